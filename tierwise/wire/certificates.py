"""Keys and certificates, for joining and for looking at one's own."""

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tierwise.errors import Unauthenticated
from tierwise.wire.identity import Credentials, Identity, parse_identity


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the key as unencrypted PKCS#8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def signing_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Return a PEM signing request; the authority ignores its subject."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def expiry_unix_s(credentials: Credentials) -> float:
    """Return when the certificate ends, seconds since the epoch."""
    certificate = x509.load_pem_x509_certificate(credentials.certificate)
    return certificate.not_valid_after_utc.timestamp()


def own_identity(credentials: Credentials) -> Identity:
    """Return the identity in one's own certificate.

    Raises:
        Unauthenticated: There is none.
    """
    certificate = x509.load_pem_x509_certificate(credentials.certificate)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return parse_identity(names.get_values_for_type(x509.UniformResourceIdentifier)[0])
    except (x509.ExtensionNotFound, IndexError):
        raise Unauthenticated("the certificate holds no tierwise identity") from None
