"""The cluster's certificate authority, its one-time join tokens and its revocations."""

import datetime
import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tierwise.clock import wall_s
from tierwise.domain.ids import is_name
from tierwise.errors import FailedPrecondition, InvalidArgument, Unauthenticated
from tierwise.files import write_atomically
from tierwise.wire.certificates import key_to_pem, new_key, signing_request
from tierwise.wire.identity import (
    JOIN_DNS_NAME,
    Credentials,
    Identity,
    Role,
    fingerprint,
    split_token,
)

AUTHORITY_DAYS = 3650
LEAF_DAYS = 365
TOKENS_MAX = 10_000
TOKEN_TTL_S_MAX = 30 * 86400.0
USED_KEPT_S = 7 * 86400.0  # so that a second use is told from an unknown token


class TokenRecord(msgspec.Struct):
    """What is stored of a token: never its secret."""

    token_id: str
    secret_sha256: str
    role: Role
    name: str
    expires_unix_s: float
    is_used: bool = False


class _Book(msgspec.Struct):
    """Everything of the authority that changes."""

    cluster_id: str
    tokens: dict[str, TokenRecord] = {}
    revoked: set[str] = set()


@dataclass(frozen=True, slots=True)
class _Signer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


class Authority:
    """Signs identities. All state is in one folder; every change is on disk before it counts."""

    def __init__(self, folder: Path) -> None:
        """Open the authority in `folder`, making a new one if the folder is empty.

        Raises:
            FailedPrecondition: The folder holds half an authority.
        """
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        parts = [folder / name for name in ("ca.pem", "ca-key.pem", "book.json")]
        present = [path.exists() for path in parts]
        if any(present) and not all(present):
            missing = ", ".join(p.name for p, is_there in zip(parts, present, strict=True) if not is_there)
            raise FailedPrecondition(f"{folder} lacks {missing}: restore it from a backup")
        if not any(present):
            self._create(parts)
        certificate = x509.load_pem_x509_certificate(parts[0].read_bytes())
        key = serialization.load_pem_private_key(parts[1].read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._signer = _Signer(certificate, key)
        self._book = msgspec.json.decode(parts[2].read_bytes(), type=_Book)
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

    def issue(self, identity: Identity) -> Credentials:
        """Return new credentials for `identity`, with a key made here."""
        key = new_key()
        return Credentials(
            self._signer.pem, self.sign(signing_request(key, identity.name), identity), key_to_pem(key)
        )

    def sign(self, request_pem: bytes, identity: Identity) -> bytes:
        """Return a PEM certificate for the key in a signing request; its subject is ignored.

        Raises:
            InvalidArgument: It is no valid signing request.
        """
        try:
            request = x509.load_pem_x509_csr(request_pem)
            if not request.is_signature_valid:
                raise InvalidSignature
        except (ValueError, InvalidSignature):
            raise InvalidArgument("the signing request is not valid: make a new one") from None
        public_key = request.public_key()
        if not isinstance(public_key, ec.EllipticCurvePublicKey):
            raise InvalidArgument("the signing request must hold an elliptic-curve key (P-256)")
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
        if identity.dns_name is not None:
            names.append(x509.DNSName(identity.dns_name))
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if identity.dns_name is not None:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = (
            _builder(_name(identity.name), public_key, LEAF_DAYS)
            .issuer_name(self._signer.certificate.subject)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        )
        certificate = builder.sign(self._signer.key, hashes.SHA256())
        self._book.revoked.discard(identity.uri)  # a fresh token makes a removed node welcome
        self._store()
        return certificate.public_bytes(serialization.Encoding.PEM)

    # -- tokens ---------------------------------------------------------------------------------

    def create_token(self, role: Role, name: str, ttl_s: float) -> tuple[str, TokenRecord]:
        """Return a token that works once, and its record.

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
        self._purge()
        if len(self._book.tokens) >= TOKENS_MAX:
            raise FailedPrecondition(f"there are {TOKENS_MAX} open tokens; wait until some expire")
        secret = secrets.token_urlsafe(24)
        record = TokenRecord(
            secrets.token_hex(4), _sha256(secret), role, name, wall_s() + ttl_s
        )
        self._book.tokens[record.secret_sha256] = record
        self._store()
        return f"tw1.{fingerprint(self._join.certificate)}.{secret}", record

    def tokens(self) -> list[TokenRecord]:
        """Return the records of all tokens that are remembered."""
        return list(self._book.tokens.values())

    def redeem(self, token: str, name: str) -> Identity:
        """Use up a token and return the identity that it grants.

        Raises:
            Unauthenticated: It is unknown, was used before, or has expired.
            InvalidArgument: It is for another name, or the name is none.
        """
        _, secret = split_token(token)
        record = self._book.tokens.get(_sha256(secret))
        if record is None:
            raise Unauthenticated("this join token is unknown here; create one on this cluster")
        if record.is_used:
            raise Unauthenticated("this join token was used before; each works once: create another")
        if record.expires_unix_s < wall_s():
            raise Unauthenticated("this join token has expired; create another")
        if record.name and record.name != name:
            raise InvalidArgument(f"this join token is for {record.name!r}, not for {name!r}")
        if not is_name(name):
            raise InvalidArgument(f"{name!r} is no name: use a-z, 0-9, '-', '.', '_'")
        record.is_used = True
        self._store()
        return Identity(record.role, name)

    # -- revocation -----------------------------------------------------------------------------

    def revoke(self, identity: Identity) -> None:
        """Refuse an identity until it joins again with a new token."""
        self._book.revoked.add(identity.uri)
        self._store()

    def is_revoked(self, identity: Identity) -> bool:
        """Return whether an identity is refused."""
        return identity.uri in self._book.revoked

    def revoked(self) -> list[str]:
        """Return the URIs of all refused identities."""
        return sorted(self._book.revoked)

    # -- storage --------------------------------------------------------------------------------

    def _purge(self) -> None:
        limit = wall_s() - USED_KEPT_S
        self._book.tokens = {
            key: record for key, record in self._book.tokens.items() if record.expires_unix_s > limit
        }

    def _store(self) -> None:
        write_atomically(self._folder / "book.json", msgspec.json.encode(self._book))

    def _create(self, parts: list[Path]) -> None:
        key = new_key()
        cluster_id = secrets.token_hex(6)
        subject = _name(f"tierwise cluster {cluster_id}")
        certificate = (
            _builder(subject, key.public_key(), AUTHORITY_DAYS)
            .issuer_name(subject)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        write_atomically(parts[1], key_to_pem(key))
        write_atomically(parts[2], msgspec.json.encode(_Book(cluster_id)))
        write_atomically(parts[0], certificate.public_bytes(serialization.Encoding.PEM))

    def _join_credentials(self) -> Credentials:
        """Load or make the join port's own certificate; tokens pin it."""
        folder = self._folder / "join"
        if (folder / "cert.pem").exists():
            return Credentials.load(folder)
        key = new_key()
        subject = _name(JOIN_DNS_NAME)
        certificate = (
            _builder(subject, key.public_key(), AUTHORITY_DAYS)
            .issuer_name(subject)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(JOIN_DNS_NAME)]), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        credentials = Credentials(pem, pem, key_to_pem(key))
        credentials.save(folder)
        return credentials


def _builder(
    subject: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.fromtimestamp(wall_s(), datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


