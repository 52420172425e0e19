"""The cluster's certificate authority, its one-time join tokens and its revocations."""

import hashlib
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from scheduler import certificates
from tierwise.clock import wall_s
from tierwise.domain.ids import is_name
from tierwise.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unauthenticated
from tierwise.files import write_atomically
from tierwise.wire.certificates import key_to_pem, new_key, signing_request
from tierwise.wire.identity import Credentials, Identity, Role, fingerprint, split_token

AUTHORITY_DAYS = 3650
LEAF_DAYS = 365
DAY_S = 86_400.0
TOKENS_MAX = 10_000
TOKEN_TTL_S_MAX = 30 * DAY_S
USED_KEPT_S = 7 * DAY_S  # so that a second use is told from an unknown token
CERTIFICATES_MAX = 256  # remembered of one identity; only its own scheduler renews that often
FILES = ("ca.pem", "ca-key.pem", "book.json")


class TokenRecord(msgspec.Struct):
    """What is stored of a token: never its secret."""

    token_id: str
    secret_sha256: str
    role: Role
    name: str
    expires_unix_s: float
    is_used: bool = False


class _Book(msgspec.Struct):
    """Everything of the authority that changes.

    A revoked name is in `revoked` until it joins again; its certificates of before stay in
    `revoked_certificates` until they expire. Both maps of certificates go from fingerprint to
    expiry, seconds since the epoch.
    """

    cluster_id: str
    tokens: dict[str, TokenRecord] = {}
    revoked: set[str] = set()
    issued: dict[str, dict[str, float]] = {}  # by URI
    revoked_certificates: dict[str, float] = {}


class Authority:
    """Signs identities. All state is in one folder; every change is on disk before it counts.

    Safe to use from several threads. One process at a time may hold the folder.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = wall_s) -> None:
        """Open the authority in `folder`, making a new one if the folder is empty.

        Args:
            folder: Holds the key, the certificate and the book; only the owner may look into it.
            clock: Gives seconds since the epoch.

        Raises:
            FailedPrecondition: The folder holds half an authority, or a damaged one.
        """
        self._folder = folder
        self._clock = clock
        self._lock = threading.RLock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        missing = [name for name in FILES if not (folder / name).exists()]
        if len(missing) == len(FILES):
            self._create()
        elif missing:
            raise FailedPrecondition(
                f"{folder} lacks {', '.join(missing)}: restore it from a backup, or remove the "
                "folder to begin a new cluster"
            )
        self._load()
        self._join = self._join_credentials()

    @property
    def cluster_id(self) -> str:
        """Return the random name of this cluster."""
        return self._book.cluster_id

    @property
    def certificate(self) -> bytes:
        """Return the authority's certificate, PEM."""
        return self._signer.pem

    @property
    def join_credentials(self) -> Credentials:
        """Return the self-signed certificate of the join port."""
        return self._join

    # -- certificates ---------------------------------------------------------------------------

    def issue(self, identity: Identity) -> Credentials:
        """Return new credentials for `identity`, with a key made here."""
        key = new_key()
        request = signing_request(key, identity.name)
        return Credentials(self._signer.pem, self.sign(request, identity), key_to_pem(key))

    def sign(self, request_pem: bytes, identity: Identity) -> bytes:
        """Return a PEM certificate for the key in a signing request; its subject is ignored.

        A name that was revoked is welcome again; the certificates it had before are not.

        Raises:
            InvalidArgument: It is no valid signing request.
        """
        public_key = certificates.requested_key(request_pem)
        now_s = self._clock()
        pem = self._signer.sign(public_key, identity, now_s, LEAF_DAYS)
        with self._lock:
            held = self._book.issued.setdefault(identity.uri, {})
            held[fingerprint(pem)] = now_s + LEAF_DAYS * DAY_S
            while len(held) > CERTIFICATES_MAX:
                del held[next(iter(held))]  # the oldest
            self._book.revoked.discard(identity.uri)
            self._store()
        return pem

    def admit(self, token: str, name: str, request_pem: bytes) -> tuple[Identity, bytes]:
        """Redeem a token and sign at once: of two simultaneous uses, one is refused.

        A bad signing request does not use up the token.

        Returns:
            The identity that was granted, and its PEM certificate.

        Raises:
            Unauthenticated: The token is unknown, was used before, or has expired.
            InvalidArgument: It is for another name, or name or signing request are none.
            AlreadyExists: The token names nobody and the name is in use.
        """
        certificates.requested_key(request_pem)
        with self._lock:
            identity = self.redeem(token, name)
            return identity, self.sign(request_pem, identity)

    # -- tokens ---------------------------------------------------------------------------------

    def create_token(self, role: Role, name: str, ttl_s: float) -> tuple[str, TokenRecord]:
        """Return a token that works once, and its record.

        Args:
            role: What it makes of the one who redeems it.
            name: Who that must be; empty for anybody whose name is free.
            ttl_s: How long it may be redeemed.

        Raises:
            InvalidArgument: The role may not join, the name is none, or the time is out of bounds.
            FailedPrecondition: There are too many open tokens.
        """
        if role is Role.SCHEDULER:
            raise InvalidArgument("a token can make a node, a user or an admin")
        if name and not is_name(name):
            raise InvalidArgument(f"{name!r} is no name: use a-z, 0-9, '-', '.', '_'")
        if not 1.0 <= ttl_s <= TOKEN_TTL_S_MAX:
            raise InvalidArgument("a token lives between 1 second and 30 days")
        secret = secrets.token_urlsafe(24)
        with self._lock:
            self._purge()
            if len(self._book.tokens) >= TOKENS_MAX:
                raise FailedPrecondition(f"there are {TOKENS_MAX} tokens; wait until some expire")
            record = TokenRecord(
                secrets.token_hex(4), _sha256(secret), role, name, self._clock() + ttl_s
            )
            self._book.tokens[record.secret_sha256] = record
            self._store()
        return f"tw1.{fingerprint(self._join.certificate)}.{secret}", record

    def tokens(self) -> list[TokenRecord]:
        """Return the records of all tokens that are remembered."""
        with self._lock:
            return list(self._book.tokens.values())

    def redeem(self, token: str, name: str) -> Identity:
        """Use up a token and return the identity that it grants.

        Raises:
            Unauthenticated: It is unknown, was used before, or has expired.
            InvalidArgument: It is for another name, or the name is none.
            AlreadyExists: It names nobody and the name is in use.
        """
        _, secret = split_token(token)
        if not is_name(name):
            raise InvalidArgument(f"{name[:80]!r} is no name: use a-z, 0-9, '-', '.', '_'")
        with self._lock:
            record = self._book.tokens.get(_sha256(secret))
            if record is None:
                raise Unauthenticated(
                    "this join token is unknown here: it is of another cluster, was withdrawn or "
                    "expired long ago; create another"
                )
            if record.is_used:
                raise Unauthenticated(
                    "this join token was used before; each works once: create another"
                )
            if record.expires_unix_s < self._clock():
                raise Unauthenticated("this join token has expired; create another")
            if record.name and record.name != name:
                raise InvalidArgument(f"this join token is for {record.name!r}, not for {name!r}")
            identity = Identity(record.role, name)
            if not record.name and self._is_taken(identity):
                raise AlreadyExists(
                    f"the {record.role} name {name!r} is taken: choose another, or create a token "
                    "for just this name to replace its owner"
                )
            record.is_used = True
            self._store()
        return identity

    def _is_taken(self, identity: Identity) -> bool:
        """Return whether somebody holds a valid certificate of this name."""
        now_s = self._clock()
        held = self._book.issued.get(identity.uri, {})
        return identity.uri not in self._book.revoked and any(end > now_s for end in held.values())

    # -- revocation -----------------------------------------------------------------------------

    def revoke(self, identity: Identity) -> None:
        """Refuse a name until it joins again with a new token, and its certificates for ever.

        Open tokens for just this name are withdrawn.
        """
        with self._lock:
            book = self._book
            book.revoked.add(identity.uri)
            book.revoked_certificates.update(book.issued.pop(identity.uri, {}))
            for key, record in list(book.tokens.items()):
                if not record.is_used and Identity(record.role, record.name) == identity:
                    del book.tokens[key]
            self._purge()
            self._store()

    def is_known(self, identity: Identity) -> bool:
        """Return whether it has, or had, a certificate."""
        return identity.uri in self._book.issued or identity.uri in self._book.revoked

    def is_revoked(self, identity: Identity) -> bool:
        """Return whether a name, or the certificate that it showed, is refused."""
        book = self._book
        return identity.uri in book.revoked or identity.fingerprint in book.revoked_certificates

    def revoked(self) -> list[str]:
        """Return the URIs and certificate fingerprints that are refused; see Identity.is_among."""
        with self._lock:
            return [*sorted(self._book.revoked), *sorted(self._book.revoked_certificates)]

    # -- storage --------------------------------------------------------------------------------

    def _purge(self) -> None:
        """Forget tokens and certificates that have expired."""
        book, now_s = self._book, self._clock()
        book.tokens = {
            key: record
            for key, record in book.tokens.items()
            if record.expires_unix_s > now_s - USED_KEPT_S
        }
        book.revoked_certificates = _unexpired(book.revoked_certificates, now_s)
        held = {uri: _unexpired(ends, now_s) for uri, ends in book.issued.items()}
        book.issued = {uri: ends for uri, ends in held.items() if ends}

    def _store(self) -> None:
        """Write the book so that a power cut does not make a used token new again."""
        write_atomically(self._folder / "book.json", msgspec.json.encode(self._book))
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _create(self) -> None:
        key = new_key()
        cluster_id = secrets.token_hex(6)
        pem = certificates.self_signed_authority(key, cluster_id, self._clock(), AUTHORITY_DAYS)
        contents = (pem, key_to_pem(key), msgspec.json.encode(_Book(cluster_id)))
        for name, content in zip(FILES, contents, strict=True):
            write_atomically(self._folder / name, content)

    def _load(self) -> None:
        certificate, key_pem, book = ((self._folder / name).read_bytes() for name in FILES)
        try:
            key = serialization.load_pem_private_key(key_pem, password=None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise ValueError("ca-key.pem holds no elliptic-curve key")
            self._signer = certificates.Signer.load(certificate, key)
            self._book = msgspec.json.decode(book, type=_Book)
        except (ValueError, TypeError, msgspec.DecodeError) as error:
            raise FailedPrecondition(
                f"the authority in {self._folder} is damaged: {error}; restore it from a backup, "
                "or remove the folder to begin a new cluster"
            ) from None

    def _join_credentials(self) -> Credentials:
        """Load or make the join port's own certificate; tokens pin it."""
        folder = self._folder / "join"
        if (folder / "cert.pem").exists():
            return Credentials.load(folder)
        key = new_key()
        pem = certificates.self_signed_join(key, self._clock(), AUTHORITY_DAYS)
        credentials = Credentials(pem, pem, key_to_pem(key))
        credentials.save(folder)
        return credentials


def _unexpired(ends: dict[str, float], now_s: float) -> dict[str, float]:
    return {key: end for key, end in ends.items() if end > now_s}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
