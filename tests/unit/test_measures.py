"""Measures of a payload: what they say, and that nothing sent can make them expensive."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierwise.wire import payload
from tierwise.wire.measures import HEAD_BYTES_MAX, MEASURES_MAX, largest, measures


def of(*args: Any, **kwargs: Any) -> dict[str, float]:
    return measures(payload.encode((args, kwargs)))


def test_numbers_stand_for_themselves_and_the_rest_for_its_size() -> None:
    found = of(3, "text", -0.5, True, None, data=b"12345", rows=[1, 2, 3], where={"n": 7})
    assert found["0"] == 3.0
    assert found["1.length"] == 4.0
    assert found["2"] == -0.5
    assert found["3"] == 1.0
    assert "4" not in found
    assert found["data.length"] == 5.0
    assert found["rows.length"] == 3.0
    assert found["rows.1"] == 2.0
    assert found["where.n"] == 7.0


def test_an_array_tells_its_bytes_and_shape_but_is_not_read() -> None:
    found = of(np.zeros((640, 480, 3), dtype=np.uint8), x=np.ones(5, dtype=np.float32))
    assert found["0.bytes"] == 640 * 480 * 3
    assert [found[f"0.{axis}"] for axis in range(3)] == [640, 480, 3]
    assert found["x.bytes"] == 20.0
    assert found["arrays"] == 2.0


def test_an_array_that_travels_beside_the_payload_counts_as_if_it_were_inside() -> None:
    values = (([np.ones((1024, 512))],), {"n": 2})
    beside: list[Any] = []
    blob = payload.encode(values, detached=beside)
    assert beside
    inside, found = measures(payload.encode(values)), measures(blob)
    assert found.keys() == inside.keys()
    assert {k: v for k, v in found.items() if k != "bytes"}.items() <= inside.items()
    assert abs(found["bytes"] - inside["bytes"]) <= 64  # padding


def test_long_containers_and_texts_count_by_their_length() -> None:
    found = of(list(range(10_000)), {str(i): i for i in range(50)}, "x" * 70_000, b"y" * 300)
    assert found["0.length"] == 10_000.0
    assert found["1.length"] == 50.0
    assert found["2.length"] == 70_000.0
    assert found["3.length"] == 300.0


def test_of_a_head_beyond_all_bounds_only_the_length_is_taken() -> None:
    found = of(list(range(200_000)), n=5)
    assert found["head"] > HEAD_BYTES_MAX
    assert "n" not in found


def test_tuples_and_nested_members_are_followed_a_little_way() -> None:
    found = of((1, (2, (3, (4,)))), deep={"a": {"b": {"c": 5}}})
    assert found["0.0"] == 1.0
    assert found["0.1.0"] == 2.0
    assert not any(name.count(".") > 3 for name in found)


def test_what_is_no_payload_has_its_length_alone() -> None:
    assert measures(b"") == {"bytes": 0.0}
    assert measures(b"nonsense") == {"bytes": 8.0}
    whole = payload.encode(((1, 2), {"n": 3}))
    for end in range(len(whole)):
        assert measures(whole[:end])["bytes"] == end


def nested(depth: int) -> bytes:
    body = b"\x91" * depth + b"\x01"  # a list in a list in a list …
    head = b"\x92" + body + b"\x80"
    return payload._HEADER.pack(payload.MAGIC, 0, len(head)) + head


@pytest.mark.parametrize(
    "make",
    [
        lambda: nested(100_000),
        lambda: payload.encode(((list(range(1_000_000)),), {})),
        lambda: payload.encode(([[i] * 10 for i in range(20_000)], {})),
        lambda: payload.encode(((), {f"k{i}": i for i in range(20_000)})),
        lambda: payload.encode((("x" * (30 << 20),), {})),
        lambda: payload.encode(((np.zeros(30 << 20, dtype=np.uint8),), {})),
        lambda: payload.encode(([{f"a{j}": [j] * 16 for j in range(16)} for _ in range(16)], {})),
    ],
    ids=["deep", "long list", "many lists", "many keywords", "text", "array", "bushy"],
)
def test_hostile_and_huge_inputs_cost_less_than_their_decoding(make: Callable[[], bytes]) -> None:
    blob = make()

    def cost_s(read: Callable[[bytes], object]) -> float:
        def once() -> float:
            started_s = time.perf_counter()
            with suppress(payload.PayloadError):
                read(blob)
            return time.perf_counter() - started_s

        return min(once() for _ in range(3))

    found = measures(blob)
    assert len(found) <= MEASURES_MAX
    assert all(len(name) <= 60 for name in found)
    # A text or array costs nothing to decode; the floor is what any payload may cost.
    usual = payload.encode((list(range(HEAD_BYTES_MAX // 4)), {}))
    floor_s = cost_s(lambda _: payload.decode(usual))
    assert cost_s(measures) <= max(2.0 * cost_s(payload.decode), floor_s)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 3))
def test_no_bytes_make_it_raise(junk: bytes, array_count: int) -> None:
    blob = payload._HEADER.pack(payload.MAGIC, array_count, len(junk)) + junk
    assert len(measures(blob)) <= MEASURES_MAX


def test_damaged_payloads_are_measured_as_far_as_they_go() -> None:
    rng = random.Random(7)
    whole = payload.encode(((3, "abc", [1, 2, 3], np.ones((2, 2))), {"x": {"a": 1}}))
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        assert len(whole) <= measures(bytes(damaged))["bytes"] <= 1e15


def test_the_hungriest_item_of_a_batch_decides() -> None:
    blobs = [payload.encode(((n,), {})) for n in (3, 900, 20)]
    assert largest(blobs)["0"] == 900.0
    assert largest([]) == {}


def test_a_batch_of_many_items_is_sampled_but_its_largest_is_in() -> None:
    blobs = [payload.encode((("x" * (n % 7),), {})) for n in range(4000)]
    blobs[1234] = payload.encode((("x" * 5000,), {}))
    assert largest(blobs)["0.length"] == 5000.0


def test_nothing_in_a_payload_is_built_or_run() -> None:
    class Loud(msgspec.Struct):
        pass

    head = msgspec.msgpack.encode([[msgspec.msgpack.Ext(77, b"boom")], {}])
    blob = payload._HEADER.pack(payload.MAGIC, 0, len(head)) + head
    assert set(measures(blob)) <= {"bytes", "arrays"}


def test_lengths_that_lie_stay_within_what_a_record_may_hold() -> None:
    blob = payload._HEADER.pack(payload.MAGIC, 1, 0) + (2**64 - 1).to_bytes(8, "little")
    assert measures(blob)["bytes"] <= 1e15
