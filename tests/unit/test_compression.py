"""Vectors on the wire: as near as their encoding allows, and what is lost is made up for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierwise.domain.topology import Link
from tierwise.errors import InvalidArgument
from tierwise.wire import compression
from tierwise.wire.compression import AUTO, ENCODINGS, FP16, INT8, RAW, Decoder, Rates

SLOW, FAST = (Link(rtt_s=0.0, bandwidth_bytes_per_s=rate) for rate in (1e6, 1e11))


def vector(count: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=scale, size=count).astype(np.float32)


def sent(found: np.ndarray, encoding: str, *, cut: int = 100_000, **options: np.ndarray) -> bytes:
    """Encode, cut anywhere, decode."""
    relative_to = options.get("relative_to")
    body = b"".join(bytes(c) for c in compression.encoded(found, encoding, **options))
    decoder = Decoder(encoding, relative_to)
    parts = [bytes(decoder.feed(body[at : at + cut])) for at in range(0, len(body), cut)]
    return b"".join([*parts, bytes(decoder.finish())])


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 5_000) | st.sampled_from([262_144, 262_145, 300_000]),
    encoding=st.sampled_from(ENCODINGS),
    cut=st.integers(1, 4_000) | st.just(1 << 20),
    seed=st.integers(0, 9),
)
def test_a_vector_arrives_whole_however_its_bytes_are_cut(
    count: int, encoding: str, cut: int, seed: int
) -> None:
    cut = max(cut, count // 500)
    found = vector(count, seed)
    body = [bytes(chunk) for chunk in compression.encoded(found, encoding)]
    assert sum(map(len, body)) == compression.encoded_bytes(encoding, count)
    assert max(map(len, body)) <= compression.CHUNK_BYTES_MAX
    arrived = np.frombuffer(sent(found, encoding, cut=cut), np.float32)
    largest = np.abs(found).max()
    bound = {RAW: 0.0, FP16: largest * 2**-11, INT8: largest / 127 / 2 * 1.001}[encoding]
    assert np.abs(arrived - found).max() <= bound


@pytest.mark.parametrize("encoding", [FP16, INT8])
def test_the_error_is_bounded_by_the_scale_of_each_block(encoding: str) -> None:
    found = np.concatenate([vector(1024), vector(1024, scale=1e-4)])
    arrived = np.frombuffer(sent(found, encoding), np.float32)
    assert np.abs(arrived - found)[1024:].max() < 1e-5


def test_a_difference_compresses_better_than_the_whole() -> None:
    base = vector(50_000)
    found = base + vector(50_000, 1, scale=1e-3)
    whole = np.frombuffer(sent(found, INT8), np.float32)
    apart = np.frombuffer(sent(found, INT8, relative_to=base), np.float32)
    assert np.abs(apart - found).max() < np.abs(whole - found).max() / 100
    exact = np.frombuffer(sent(found, RAW, relative_to=base), np.float32)
    assert np.abs(exact - found).max() < 1e-6


@pytest.mark.parametrize("encoding", [FP16, INT8])
def test_what_is_lost_is_fed_back_and_does_not_add_up(encoding: str) -> None:
    rounds = [vector(3_000, seed, scale=1e-2) + 1e-5 for seed in range(40)]
    residual = np.zeros(3_000, np.float32)
    fed = sum(
        np.frombuffer(sent(each, encoding, residual=residual), np.float32).astype(np.float64)
        for each in rounds
    )
    plain = sum(np.frombuffer(sent(e, encoding), np.float32).astype(np.float64) for e in rounds)
    exact = sum(each.astype(np.float64) for each in rounds)
    # The sum lacks what the last round lost, and nothing else.
    assert np.abs(fed - exact + residual).max() < 1e-5
    assert np.abs(fed - exact).mean() < np.abs(plain - exact).mean() / 3


def test_what_is_no_number_arrives_as_none_and_is_not_made_up_for() -> None:
    found = vector(3_000)
    found[5], found[2_000] = np.nan, np.inf
    residual = np.zeros(3_000, np.float32)
    arrived = np.frombuffer(sent(found, INT8, residual=residual), np.float32)
    assert not np.isfinite(arrived[5]) and not np.isfinite(arrived[2_000])
    assert np.isfinite(residual).all()
    with pytest.raises(InvalidArgument, match="65504"):
        sent(np.full(10, 1e6, np.float32), FP16)


def test_damaged_bytes_are_refused() -> None:
    decoder = Decoder(FP16)
    decoder.feed(b"\0\0\0")
    with pytest.raises(InvalidArgument, match="within an element"):
        decoder.finish()
    longer = Decoder(RAW, vector(10))
    with pytest.raises(InvalidArgument, match="longer"):
        longer.feed(vector(11).tobytes())
    for wrong in ("zip", AUTO):
        with pytest.raises(InvalidArgument, match="use fp16"):
            Decoder(wrong)


def test_the_slower_the_link_the_smaller_the_encoding() -> None:
    rates = Rates({RAW: 0.0, FP16: 1e-9, INT8: 2e-9})
    assert compression.choose(10_000_000, SLOW, rates) == INT8
    assert compression.choose(10_000_000, FAST, rates) == RAW
    slow_machine = Rates({RAW: 0.0, FP16: 1e-9, INT8: 1e-3})
    assert compression.choose(10_000_000, SLOW, slow_machine) == FP16


def test_a_machine_measures_its_own_rates() -> None:
    ticks = iter(range(10_000))
    rates = compression.measured(lambda: float(next(ticks)))
    assert rates.seconds[RAW] == 0.0
    assert rates.seconds[FP16] > 0.0 and rates.seconds[INT8] > 0.0
