"""What the authority's certificates say. Without state: time and keys are arguments."""

import datetime
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tierwise.errors import InvalidArgument
from tierwise.wire.identity import JOIN_DNS_NAME, Identity

REQUEST_BYTES_MAX = 16_384
COMMON_NAME_MAX = 64  # RFC 5280, upper bound of X520CommonName
CLOCKS_DIFFER = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Signer:
    """The authority's certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def load(cls, certificate_pem: bytes, key: ec.EllipticCurvePrivateKey) -> "Signer":
        """Return the signer.

        Raises:
            ValueError: That is no certificate, or the key is of another.
        """
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        if certificate.public_key() != key.public_key():
            raise ValueError("the key is not that of the certificate")
        return cls(certificate, key)

    @property
    def pem(self) -> bytes:
        """Return the certificate, PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        identity: Identity,
        now_unix_s: float,
        days: int,
    ) -> bytes:
        """Return a PEM certificate that says that the key is `identity`'s.

        Only what serves (nodes, the scheduler) gets a DNS name and may be a server.
        """
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if identity.dns_name is not None:
            names.append(x509.DNSName(identity.dns_name))
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = (
            _builder(identity.name, public_key, now_unix_s, days)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )
        signed = builder.sign(self.key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)


def requested_key(request_pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key that a signing request proves to hold.

    Raises:
        InvalidArgument: It is no valid request, or its key is not on P-256.
    """
    try:
        if len(request_pem) > REQUEST_BYTES_MAX:
            raise ValueError
        request = x509.load_pem_x509_csr(request_pem)
        public_key = request.public_key()
        if not request.is_signature_valid:
            raise InvalidSignature
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise InvalidArgument("the signing request is not valid: make a new one") from None
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(
        public_key.curve, ec.SECP256R1
    ):
        raise InvalidArgument("the signing request must hold an elliptic-curve key on P-256")
    return public_key


def self_signed_authority(
    key: ec.EllipticCurvePrivateKey, cluster_id: str, now_unix_s: float, days: int
) -> bytes:
    """Return the PEM certificate of a new authority, which may sign leaves only."""
    name = f"tierwise cluster {cluster_id}"
    certificate = (
        _builder(name, key.public_key(), now_unix_s, days)
        .issuer_name(_name(name))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def self_signed_join(key: ec.EllipticCurvePrivateKey, now_unix_s: float, days: int) -> bytes:
    """Return the PEM certificate of the join port, which is trusted by its pin alone."""
    certificate = (
        _builder(JOIN_DNS_NAME, key.public_key(), now_unix_s, days)
        .issuer_name(_name(JOIN_DNS_NAME))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(JOIN_DNS_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _builder(
    name: str, public_key: ec.EllipticCurvePublicKey, now_unix_s: float, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.fromtimestamp(now_unix_s, datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:COMMON_NAME_MAX])])
