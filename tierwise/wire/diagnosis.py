"""Why a connection fails, in words: gRPC only says that the socket was closed."""

import asyncio
import socket
import ssl
import tempfile
from pathlib import Path

from tierwise.errors import TierwiseError
from tierwise.wire.identity import Credentials, split_address

CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 2.0

# What every HTTP/2 client says first: the preface, and an empty SETTINGS frame.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))

# OpenSSL's verdicts on the other side's certificate (x509_vfy.h).
_NOT_YET_VALID, _EXPIRED, _HOSTNAME_MISMATCH = 9, 10, 62
_UNKNOWN_ISSUER = (2, 18, 19, 20, 21)

_REMEDY = "join again with a new token (`tierwise login` for people)"


async def diagnose(address: str, credentials: Credentials, expected_dns_name: str) -> str:
    """Return in words what happens when one connects to `address`; takes a few seconds at most."""
    return await asyncio.to_thread(_diagnose, address, credentials, expected_dns_name)


def _diagnose(address: str, credentials: Credentials, expected_dns_name: str) -> str:
    try:
        own_fault = _own_fault(credentials)
        host_port = split_address(address)
        plain = socket.create_connection(host_port, timeout=CONNECT_TIMEOUT_S)
    except TierwiseError as error:
        return error.message
    except ssl.SSLError as error:
        return f"this side's credentials cannot be used ({error.reason or 'not PEM'}): {_REMEDY}"
    except TimeoutError:
        return f"{address} does not answer: the machine is down, or a firewall is in between"
    except socket.gaierror as error:
        return f"the host of {address} is not known: {error.strerror}"
    except OSError as error:
        return f"nobody listens at {address}: {error.strerror or error}"
    with plain:
        return _handshake(plain, credentials, address, expected_dns_name, own_fault)


def _handshake(
    plain: socket.socket,
    credentials: Credentials,
    address: str,
    expected_dns_name: str,
    own_fault: str,
) -> str:
    closed = f"{address} closed the connection: " + (
        f"it does not accept this side's certificate, which {own_fault}; {_REMEDY}"
        if own_fault
        else "it does not accept this side's certificate (revoked, or of another cluster), or it "
        "has just ended"
    )
    try:
        context = ssl.create_default_context(cadata=credentials.authority.decode())
        context.set_alpn_protocols(["h2"])
        _show(context, credentials)
        with context.wrap_socket(plain, server_hostname=expected_dns_name) as tls:
            # With TLS 1.3 the other side judges our certificate after the handshake.
            tls.settimeout(ANSWER_TIMEOUT_S)
            tls.sendall(_HELLO)
            if not tls.recv(1):
                return closed
            return (
                f"{address} answers as {expected_dns_name} and accepts this side's certificate: "
                "the connection is in order now"
            )
    except ssl.SSLCertVerificationError as error:
        return _verdict(error, address, expected_dns_name)
    except ssl.SSLEOFError:
        return closed
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or "") and "CERT" in (error.reason or ""):
            return closed
        return f"{address} does not speak TLS as a tierwise port does ({error.reason or error})"
    except TimeoutError:
        return f"something listens at {address} but does not answer in time: it may be overloaded"
    except ValueError as error:  # a name that cannot be asked for
        return f"{expected_dns_name!r} cannot be asked for: {error}"
    except OSError:
        return closed


def _show(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Let a context show our certificate; `ssl` takes no key from memory."""
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = Path(folder, "cert.pem"), Path(folder, "key.pem")
        certificate.write_bytes(credentials.certificate)
        key.touch(mode=0o600)
        key.write_bytes(credentials.key)
        context.load_cert_chain(certificate, key, password=lambda: b"")


def _own_fault(credentials: Credentials) -> str:
    """Return what is wrong with our own certificate, "" if nothing is.

    gRPC servers do not say why they refuse one, so a server in memory that trusts the same
    authority judges it here.

    Raises:
        ssl.SSLError: The credentials are damaged.
    """
    judge = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    judge.verify_mode = ssl.CERT_REQUIRED
    judge.load_verify_locations(cadata=credentials.authority.decode())
    applicant = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    applicant.check_hostname = False
    applicant.verify_mode = ssl.CERT_NONE
    for context in (judge, applicant):
        _show(context, credentials)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (applicant.wrap_bio(back, there), judge.wrap_bio(there, back, server_side=True))
    for _ in range(3):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                if error.verify_code == _EXPIRED:
                    return "has expired"
                if error.verify_code in _UNKNOWN_ISSUER:
                    return "is not of this cluster's authority"
                return f"is not valid ({error.verify_message})"
    return ""


def _verdict(error: ssl.SSLCertVerificationError, address: str, expected_dns_name: str) -> str:
    """Say why we do not accept the other side's certificate."""
    code = error.verify_code
    if code == _EXPIRED:
        return f"the certificate of {address} has expired: it must join again with a new token"
    if code == _NOT_YET_VALID:
        return f"the certificate of {address} is not valid yet: the clocks of the two sides differ"
    if code == _HOSTNAME_MISMATCH:
        return f"{address} is not {expected_dns_name}: another node answers there"
    if code in _UNKNOWN_ISSUER:
        return (
            f"the certificate of {address} is of an unknown authority: it belongs to another "
            "cluster than this side's credentials"
        )
    return f"the certificate of {address} is not accepted: {error.verify_message}"
