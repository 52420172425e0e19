"""Who is who: identities, credentials, and the client side of joining.

What needs the cryptography package is in `certificates`, so that an agent loads it to join only.
"""

import asyncio
import hashlib
import ssl
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import grpc
from tierwise.domain.ids import is_name
from tierwise.errors import InvalidArgument, Unauthenticated, Unavailable
from tierwise.files import write_atomically
from tierwise.v1 import join_pb2, join_pb2_grpc
from tierwise.wire.errors import error_from_rpc

SCHEME = "tierwise://"
JOIN_DNS_NAME = "join.tierwise"
JOIN_TIMEOUT_S = 15.0


class Role(StrEnum):
    """What an identity may be."""

    NODE = "node"
    USER = "user"
    ADMIN = "admin"
    SCHEDULER = "scheduler"


@dataclass(frozen=True, slots=True)
class Identity:
    """A role and a name, written `tierwise://role/name` in the certificate's URI SAN."""

    role: Role
    name: str

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


def parse_identity(uri: str) -> Identity:
    """Return the identity of a URI.

    Raises:
        Unauthenticated: It is none.
    """
    role, _, name = uri.removeprefix(SCHEME).partition("/")
    if not uri.startswith(SCHEME) or role not in list(Role) or not is_name(name):
        raise Unauthenticated(f"{uri!r} is no tierwise identity")
    return Identity(Role(role), name)


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
            Unauthenticated: One of them is missing.
        """
        try:
            return cls(*((folder / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")))
        except OSError as error:
            raise Unauthenticated(
                f"no credentials in {folder}: {error.strerror}; "
                "get some with `tierwise login` or `tierwise up`"
            ) from None

    def save(self, folder: Path) -> None:
        """Write the three files, the key first and readable by the owner only."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        contents = {"key.pem": self.key, "ca.pem": self.authority, "cert.pem": self.certificate}
        for name, content in contents.items():
            write_atomically(folder / name, content)





def fingerprint(certificate_pem: bytes) -> str:
    """Return the SHA-256 of a certificate's DER form, hex."""
    der = ssl.PEM_cert_to_DER_cert(certificate_pem.decode())
    return hashlib.sha256(der).hexdigest()


def peer_identity(context: Any) -> Identity:
    """Return who is calling, from the verified client certificate.

    Raises:
        Unauthenticated: There is no certificate, or no identity in it.
    """
    names = context.auth_context().get("x509_subject_alternative_name") or ()
    for name in names:
        text = name.decode(errors="replace")
        if text.startswith(SCHEME):
            return parse_identity(text)
    raise Unauthenticated(
        "no client certificate with a tierwise identity: join the cluster first "
        "(`tierwise login` for people, a token for agents)"
    )


def split_token(token: str) -> tuple[str, str]:
    """Return (pin, secret) of a join token.

    Raises:
        InvalidArgument: It is not of the form tw1.<pin>.<secret>.
    """
    version, _, rest = token.strip().partition(".")
    pin, _, secret = rest.partition(".")
    if version != "tw1" or len(pin) != 64 or not secret:
        raise InvalidArgument("this is no join token: `tierwise token create` prints tw1.<pin>.<secret>")
    return pin, secret


async def join(address: str, token: str, name: str) -> tuple[Credentials, str, Identity]:
    """Trade a one-time token for credentials.

    Args:
        address: host:port of the scheduler's join port.
        token: From `tierwise token create`.
        name: The node's or user's name.

    Returns:
        The credentials, the scheduler's main address and the identity that was granted.

    Raises:
        InvalidArgument: The token or name is malformed.
        Unauthenticated: The port's certificate is not the pinned one; or the token is unknown,
            used or expired.
        Unavailable: Nobody answers at `address`.
    """
    pin, _ = split_token(token)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidArgument(f"join address {address!r}: write host:port")
    try:
        certificate = (
            await asyncio.to_thread(
                ssl.get_server_certificate, (host, int(port)), timeout=JOIN_TIMEOUT_S
            )
        ).encode()
    except OSError as error:
        raise Unavailable(f"nobody answers at the join port {address}: {error}") from None
    if fingerprint(certificate) != pin:
        raise Unauthenticated(
            f"the certificate at {address} is not the one in the token: the token is of another "
            "cluster, or somebody is in between"
        )
    from tierwise.wire.certificates import key_to_pem, new_key, signing_request

    key = new_key()
    options = [("grpc.ssl_target_name_override", JOIN_DNS_NAME)]
    async with grpc.aio.secure_channel(
        address, grpc.ssl_channel_credentials(certificate), options
    ) as channel:
        request = join_pb2.JoinRequest(
            token=token.strip(), signing_request=signing_request(key, name), name=name
        )
        try:
            response = await join_pb2_grpc.JoinServiceStub(channel).Join(
                request, timeout=JOIN_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
    credentials = Credentials(response.authority, response.certificate, key_to_pem(key))
    return credentials, response.scheduler_address, parse_identity(response.identity)

