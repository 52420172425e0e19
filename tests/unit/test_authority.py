"""The cluster's authority: tokens that work once, certificates that say who one is."""

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.authority import Authority
from tierwise.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unauthenticated
from tierwise.wire.certificates import new_key, own_identity, signing_request
from tierwise.wire.identity import Credentials, Identity, Role, fingerprint, split_token


class Clock:
    """A wall clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 1.8e9

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> Authority:
    return Authority(tmp_path / "authority", clock=clock)


def request_for(name: str) -> bytes:
    return signing_request(new_key(), name)


def token_for(authority: Authority, name: str = "", ttl_s: float = 60.0) -> str:
    return authority.create_token(Role.NODE, name, ttl_s)[0]


def shown_by(certificate: bytes) -> Identity:
    """Return who a peer with this certificate is, as a server sees it."""
    identity = own_identity(Credentials(b"", certificate, b""))
    return replace(identity, fingerprint=fingerprint(certificate))


def test_a_token_makes_the_node_it_names_and_no_other(authority: Authority) -> None:
    token = token_for(authority, "gate-3")
    with pytest.raises(InvalidArgument, match="is for 'gate-3', not for 'gate-4'"):
        authority.admit(token, "gate-4", request_for("gate-4"))
    identity, _ = authority.admit(token, "gate-3", request_for("gate-3"))
    assert identity == Identity(Role.NODE, "gate-3")


def test_a_token_used_twice_is_refused_with_the_cause(authority: Authority) -> None:
    token = token_for(authority)
    authority.admit(token, "gate-3", request_for("gate-3"))
    with pytest.raises(Unauthenticated, match="used before"):
        authority.admit(token, "gate-4", request_for("gate-4"))


def test_an_expired_token_is_refused_with_the_cause(authority: Authority, clock: Clock) -> None:
    token = token_for(authority, ttl_s=60.0)
    clock.now_s += 61.0
    with pytest.raises(Unauthenticated, match="has expired"):
        authority.admit(token, "gate-3", request_for("gate-3"))


def test_a_token_with_another_secret_is_unknown(authority: Authority) -> None:
    pin, secret = split_token(token_for(authority))
    with pytest.raises(Unauthenticated, match="unknown here"):
        authority.admit(f"tw1.{pin}.{secret[::-1]}", "gate-3", request_for("gate-3"))


@pytest.mark.parametrize("nonsense", ["", "tw1", "tw1.x", "tw2.aa.bb", "tw1..", "a.b.c.d"])
def test_what_is_no_token_is_said_to_be_none(authority: Authority, nonsense: str) -> None:
    with pytest.raises((Unauthenticated, InvalidArgument)):
        authority.admit(nonsense, "gate-3", request_for("gate-3"))


def test_a_bad_signing_request_does_not_use_up_the_token(authority: Authority) -> None:
    token = token_for(authority)
    good = request_for("gate-3")
    middle = len(good) // 2
    tampered = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for bad in (b"", b"nonsense", good[:-40], tampered):
        with pytest.raises(InvalidArgument):
            authority.admit(token, "gate-3", bad)
    authority.admit(token, "gate-3", good)


def test_a_used_token_stays_used_after_a_restart(tmp_path: Path, clock: Clock) -> None:
    first = Authority(tmp_path / "a", clock=clock)
    token = token_for(first)
    first.admit(token, "gate-3", request_for("gate-3"))
    with pytest.raises(Unauthenticated, match="used before"):
        Authority(tmp_path / "a", clock=clock).admit(token, "gate-4", request_for("gate-4"))


def test_secrets_of_tokens_are_not_written_down(tmp_path: Path, clock: Clock) -> None:
    authority = Authority(tmp_path / "a", clock=clock)
    _, secret = split_token(token_for(authority))
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes()


def test_the_identity_is_in_the_certificate_whatever_the_request_says(
    authority: Authority, tmp_path: Path
) -> None:
    token = token_for(authority, "gate-3")
    key = new_key()
    identity, pem = authority.admit(token, "gate-3", signing_request(key, "root"))
    issued = Credentials(authority.certificate, pem, b"")
    assert own_identity(issued).name == "gate-3"
    assert own_identity(issued).role is identity.role


def test_a_free_token_cannot_take_a_name_that_is_in_use(authority: Authority) -> None:
    authority.admit(token_for(authority), "gate-3", request_for("gate-3"))
    with pytest.raises(AlreadyExists, match="gate-3"):
        authority.admit(token_for(authority), "gate-3", request_for("gate-3"))


def test_a_revoked_node_is_refused_until_it_joins_again(authority: Authority) -> None:
    identity, old = authority.admit(token_for(authority), "gate-3", request_for("gate-3"))
    authority.revoke(identity)
    shown = shown_by(old)
    assert authority.is_revoked(shown)
    _, new = authority.admit(token_for(authority), "gate-3", request_for("gate-3"))
    assert authority.is_revoked(shown), "the old certificate stays refused"
    assert not authority.is_revoked(shown_by(new))


@pytest.mark.parametrize("role", [Role.SCHEDULER])
def test_a_token_cannot_make_a_scheduler(authority: Authority, role: Role) -> None:
    with pytest.raises(InvalidArgument):
        authority.create_token(role, "", 60.0)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan"), 1e9])
def test_a_token_lives_between_a_second_and_thirty_days(authority: Authority, ttl_s: float) -> None:
    with pytest.raises(InvalidArgument, match="30 days"):
        authority.create_token(Role.NODE, "", ttl_s)


def test_a_damaged_authority_says_what_to_do(tmp_path: Path, clock: Clock) -> None:
    Authority(tmp_path / "a", clock=clock)
    (tmp_path / "a" / "book.json").write_bytes(b"{")
    with pytest.raises(FailedPrecondition, match="restore it from a backup"):
        Authority(tmp_path / "a", clock=clock)


def test_keys_can_be_read_by_their_owner_only(tmp_path: Path, clock: Clock) -> None:
    Authority(tmp_path / "a", clock=clock)
    keys = list((tmp_path / "a").rglob("*key*.pem"))
    assert keys
    for path in keys:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
