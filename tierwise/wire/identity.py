"""Who is who: identities, credentials, and the client side of joining.

What needs the cryptography package is in `certificates`, so that an agent loads it to join only.
"""

import asyncio
import hashlib
import re
import ssl
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc

from tierwise.domain.ids import is_name
from tierwise.errors import DeadlineExceeded, InvalidArgument, Unauthenticated, Unavailable
from tierwise.files import write_atomically
from tierwise.v1 import join_pb2, join_pb2_grpc
from tierwise.wire import checks
from tierwise.wire.errors import error_from_rpc

SCHEME = "tierwise://"
JOIN_DNS_NAME = "join.tierwise"
JOIN_TIMEOUT_S = 15.0
FILES = ("ca.pem", "cert.pem", "key.pem")
_TOKEN = re.compile(r"tw1\.([0-9a-f]{64})\.([A-Za-z0-9_-]{16,128})")


class Role(StrEnum):
    """What an identity may be."""

    NODE = "node"
    USER = "user"
    ADMIN = "admin"
    SCHEDULER = "scheduler"


@dataclass(frozen=True, slots=True)
class Identity:
    """A role and a name, written `tierwise://role/name` in the certificate's URI SAN.

    Of a caller, `fingerprint` says which certificate it showed: SHA-256, hex. Two identities are
    equal whatever their certificates.
    """

    role: Role
    name: str
    fingerprint: str = field(default="", compare=False)

    @property
    def uri(self) -> str:
        """Return the URI form."""
        return f"{SCHEME}{self.role}/{self.name}"

    @property
    def dns_name(self) -> str | None:
        """Return the name that servers of this identity answer to; users serve nothing."""
        if self.role is Role.NODE:
            return node_dns_name(self.name)
        return scheduler_dns_name() if self.role is Role.SCHEDULER else None

    def is_among(self, revoked: Collection[str]) -> bool:
        """Return whether a list of revoked URIs and fingerprints holds this identity.

        A name that has joined again is not in the list any more; its older certificates are.
        """
        return self.uri in revoked or self.fingerprint in revoked


def parse_identity(uri: str, fingerprint: str = "") -> Identity:
    """Return the identity of a URI.

    Raises:
        Unauthenticated: It is none.
    """
    role, _, name = uri.removeprefix(SCHEME).partition("/")
    if not uri.startswith(SCHEME) or role not in list(Role) or not is_name(name):
        raise Unauthenticated(f"{checks.shown(uri)} is no tierwise identity")
    return Identity(Role(role), name, fingerprint)


def scheduler_dns_name() -> str:
    """Return the name that a dialler expects in the scheduler's certificate."""
    return "scheduler.tierwise"


def node_dns_name(name: str) -> str:
    """Return the name that a dialler expects in a node's certificate."""
    return f"{name}.node.tierwise"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A certificate, its key and the authority that signed it; all PEM."""

    authority: bytes
    certificate: bytes
    key: bytes

    @classmethod
    def load(cls, folder: Path) -> "Credentials":
        """Read `ca.pem`, `cert.pem` and `key.pem`.

        Raises:
            Unauthenticated: One of them is missing or damaged, or the key is of another
                certificate.
        """
        try:
            credentials = cls(*((folder / name).read_bytes() for name in FILES))
            # The files, not the bytes: `ssl` takes no key from memory.
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            tls.load_verify_locations(folder / FILES[0])
            tls.load_cert_chain(folder / FILES[1], folder / FILES[2], password=lambda: b"")
        except ssl.SSLError as error:
            raise Unauthenticated(
                f"the credentials in {folder} cannot be used ({error.reason or 'not PEM'}): remove "
                "the folder and join again with a new token"
            ) from None
        except OSError as error:
            raise Unauthenticated(
                f"no credentials in {folder}: {error.strerror}; "
                "get some with `tierwise login` or `tierwise up`"
            ) from None
        return credentials

    def save(self, folder: Path) -> None:
        """Write the three files, readable by the owner only; the certificate last, as a mark."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        contents = {"key.pem": self.key, "ca.pem": self.authority, "cert.pem": self.certificate}
        for name, content in contents.items():
            write_atomically(folder / name, content)


def fingerprint(certificate_pem: bytes) -> str:
    """Return the SHA-256 of a certificate's DER form, hex."""
    der = ssl.PEM_cert_to_DER_cert(certificate_pem.decode())
    return hashlib.sha256(der).hexdigest()


# The same callers come again and again.
_fingerprint = lru_cache(maxsize=1_024)(fingerprint)


def peer_identity(context: Any) -> Identity:
    """Return who is calling, from the verified client certificate.

    Raises:
        Unauthenticated: There is no certificate, or no identity in it.
    """
    shown = context.auth_context()
    for name in shown.get("x509_subject_alternative_name") or ():
        text = name.decode(errors="replace")
        if text.startswith(SCHEME):
            pem = shown.get("x509_pem_cert") or ()
            return parse_identity(text, _fingerprint(bytes(pem[0])) if pem else "")
    raise Unauthenticated(
        "no client certificate with a tierwise identity: join the cluster first "
        "(`tierwise login` for people, a token for agents)"
    )


def split_token(token: str) -> tuple[str, str]:
    """Return (pin, secret) of a join token; the pin is the SHA-256 of the port's certificate.

    Raises:
        InvalidArgument: It is not of the form tw1.<pin>.<secret>.
    """
    match = _TOKEN.fullmatch(token.strip())
    if match is None:
        raise InvalidArgument(
            "this is no join token: `tierwise token create` prints tw1.<pin>.<secret>; "
            "copy all of it"
        )
    return match[1], match[2]


def split_address(address: str) -> tuple[str, int]:
    """Return (host, port) of `host:port` or `[v6 address]:port`.

    Raises:
        InvalidArgument: It is no such address.
    """
    if not address:
        raise InvalidArgument("the address is empty: write host:port")
    checks.address(address, "address")
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def fetch_pinned_certificate(address: str, pin: str, timeout_s: float = JOIN_TIMEOUT_S) -> bytes:
    """Return the PEM certificate that a port shows, if it is the pinned one. Blocks.

    Raises:
        InvalidArgument: `address` is not host:port.
        Unauthenticated: It is another certificate.
        Unavailable: Nobody answers there, or not in TLS.
    """
    try:
        certificate = ssl.get_server_certificate(split_address(address), timeout=timeout_s)
    except ssl.SSLError as error:
        raise Unavailable(
            f"{address} does not answer in TLS ({error.reason or error}): is it the join port?"
        ) from None
    except OSError as error:
        raise Unavailable(
            f"nobody answers at the join port {address}: {error.strerror or error}"
        ) from None
    if fingerprint(certificate.encode()) != pin:
        raise Unauthenticated(
            f"the certificate at {address} is not the one that the token names: the token is of "
            "another cluster, this is not its join port, or somebody is in between"
        )
    return certificate.encode()


async def join(address: str, token: str, name: str) -> tuple[Credentials, str, Identity]:
    """Trade a one-time token for credentials.

    Args:
        address: host:port of the scheduler's join port.
        token: From `tierwise token create`.
        name: The node's or user's name.

    Returns:
        The credentials, the scheduler's main address and the identity that was granted.

    Raises:
        InvalidArgument: The address, token or name is malformed, or the token is for another name.
        AlreadyExists: The name is in use.
        Unauthenticated: The port's certificate is not the pinned one; or the token is unknown,
            used or expired.
        Unavailable: Nobody answers at `address`.
        DeadlineExceeded: The scheduler did not answer in time; the token may be used up.
    """
    from tierwise.wire.certificates import key_to_pem, new_key, own_identity, signing_request

    token = token.strip()
    pin, _ = split_token(token)
    checks.name(name, "name")
    certificate = await asyncio.to_thread(fetch_pinned_certificate, address, pin)
    key = new_key()
    request = join_pb2.JoinRequest(
        token=token, signing_request=signing_request(key, name), name=name
    )
    options = [("grpc.ssl_target_name_override", JOIN_DNS_NAME)]
    async with grpc.aio.secure_channel(
        address, grpc.ssl_channel_credentials(certificate), options
    ) as channel:
        try:
            response = await join_pb2_grpc.JoinServiceStub(channel).Join(
                request, timeout=JOIN_TIMEOUT_S
            )
        except grpc.RpcError as failure:
            error = error_from_rpc(failure)
            if isinstance(error, DeadlineExceeded):
                raise DeadlineExceeded(
                    f"{address} did not answer within {JOIN_TIMEOUT_S:.0f} s: try again, with a "
                    "new token if this one is said to be used"
                ) from None
            raise error from None
    credentials = Credentials(response.authority, response.certificate, key_to_pem(key))
    identity = own_identity(credentials)
    if identity.name != name:
        raise Unauthenticated(f"{address} granted {identity.uri}, but {name!r} was asked for")
    return credentials, response.scheduler_address, identity
