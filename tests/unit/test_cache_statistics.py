"""Statistics taken at ingest, against a direct computation."""

from pathlib import Path

import numpy as np
import pytest

from tests.unit.cache_builders import (
    P,
    aggregate,
    filled,
    key,
    manifest,
    put,
    running,
    update,
    value_of,
    vector,
)
from tierwise.domain.cache import ObjectKind
from tierwise.errors import NotFound
from tierwise.functions.fl.statistics import RunningStatistics


@pytest.mark.parametrize(
    "batches", [[[0, 1, 2, 3, 4]], [[4], [0], [2, 1], [3]], [[0, 4], [1, 2, 3]]]
)
@pytest.mark.parametrize("length", [1, 7, 8192, 20_001])
def test_updates_one_by_one_or_together_give_the_same(
    batches: list[list[int]], length: int
) -> None:
    base, before = vector(100, length=length), vector(101, length=length)
    sent = [base + np.float32(1e-3) * vector(index, length=length) for index in range(5)]
    running_ = RunningStatistics(5)
    known: dict[int, np.ndarray] = {}
    for batch in batches:
        known |= {row: sent[row] for row in batch}
        running_.add(known, base, before)
    deltas = np.array(sent, np.float64) - base.astype(np.float64)
    step = base.astype(np.float64) - before
    scale = np.linalg.norm(deltas, axis=1)
    assert np.all(np.abs(running_.gram - deltas @ deltas.T) <= 1e-12 * np.outer(scale, scale))
    assert np.allclose(running_.base_dots, deltas @ base.astype(np.float64), rtol=1e-9, atol=1e-9)
    assert np.allclose(running_.aggregate_dots, deltas @ step, rtol=1e-9, atol=1e-9)
    assert running_.base_norm == pytest.approx(float(np.linalg.norm(base.astype(np.float64))))
    assert running_.aggregate_norm == pytest.approx(float(np.linalg.norm(step)))


def test_small_deltas_of_large_vectors_keep_their_angles() -> None:
    """⟨d, u⟩ − ⟨d, base⟩ loses ‖u‖/‖d‖ of precision: 10⁴ of 10¹⁶."""
    base = np.float32(100.0) + vector(0, length=50_000)
    sent = {row: base + np.float32(1e-2) * vector(row + 1, length=50_000) for row in range(4)}
    one_by_one, together = RunningStatistics(4), RunningStatistics(4)
    together.add(sent, base)
    for row in range(4):
        one_by_one.add({each: sent[each] for each in range(row + 1)}, base)
    scale = np.sqrt(np.outer(np.diag(together.gram), np.diag(together.gram)))
    assert np.all(np.abs(one_by_one.gram - together.gram) < 1e-10 * scale)


def test_vectors_that_do_not_belong_together_are_refused() -> None:
    found = RunningStatistics(3)
    found.add({0: vector(0)})
    with pytest.raises(ValueError, match="missing"):
        found.add({1: vector(1)})
    with pytest.raises(ValueError, match="shape"):
        found.add({0: vector(0), 1: vector(1, length=P - 1)})
    assert list(found.is_in) == [True, False, False]


async def test_a_round_is_known_without_its_vectors(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await filled(store, 0, 0)
        await filled(store, 1, 2)
        base, before = await value_of(store, aggregate(1)), await value_of(store, aggregate(0))
        sent = await filled(store, 2, 4, ends=False)
        await put(
            store, key(2, ObjectKind.METADATA, "c1"), {"loss": 9.0, "tags": ["x"], "ok": True}
        )
        found = await store.statistics("default", "job", 2)
        deltas = np.array(list(sent.values()), np.float64) - base.astype(np.float64)
        assert np.allclose(found.gram, deltas @ deltas.T, rtol=1e-11)
        assert np.allclose(found.norms, np.linalg.norm(deltas, axis=1))
        assert np.allclose(found.base_dots, deltas @ base.astype(np.float64))
        step = base.astype(np.float64) - before
        assert np.allclose(found.aggregate_dots, deltas @ step)
        assert found.aggregate_norm == pytest.approx(float(np.linalg.norm(step)))
        assert found.clients == found.expected == ("c0", "c1", "c2", "c3")
        assert list(found.example_counts) == [10, 11, 12, 13]
        assert found.columns["loss"][1] == 9.0 and found.columns["loss"][0] == pytest.approx(1 / 3)
        assert found.columns["ok"][1] == 1.0 and np.isnan(found.columns["ok"][0])
        assert "tags" not in found.columns and found.metadata[1]["tags"] == ["x"]
        assert found.is_complete and not found.has_ended
        assert np.all(found.arrival_s >= 0)
        assert found.base_digest == (store.info(aggregate(1)) or pytest.fail()).digest
        with pytest.raises(ValueError, match="read-only"):
            found.gram[0, 0] = 0.0


async def test_a_second_answer_is_the_first_one_until_something_changes(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.open_round(manifest(0, 3))
        await put(store, update(0, "c2"), vector(2))
        first = await store.statistics("default", "job", 0)
        assert await store.statistics("default", "job", 0) is first
        assert first.clients == ("c2",) and not first.is_complete
        await put(store, update(0, "c0"), vector(0))
        second = await store.statistics("default", "job", 0)
        assert second.clients == ("c0", "c2") and list(second.rows) == [0, 2]
        assert first.gram[0, 0] == second.gram[1, 1]
        await put(store, key(0, ObjectKind.METADATA), {"note": "late"})
        assert (await store.statistics("default", "job", 0)).round_metadata == {"note": "late"}
        await put(store, aggregate(0), vector(9), {"accuracy": 0.1})
        last = await store.statistics("default", "job", 0)
        assert last.has_ended and last.round_metadata == {"note": "late", "accuracy": 0.1}


async def test_the_newest_round_is_the_newest_that_is_done(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        with pytest.raises(NotFound):
            await store.statistics("default", "job")
        await store.open_round(manifest(0))
        await put(store, aggregate(0), vector(0))
        await filled(store, 1, 2, ends=False)
        assert (await store.statistics("default", "job")).round == 1  # complete
        await store.open_round(manifest(2, 2, base=aggregate(0)))
        await put(store, update(2, "c0"), vector(3))
        assert (await store.statistics("default", "job")).round == 1
        await put(store, aggregate(2), vector(4))
        assert (await store.statistics("default", "job")).round == 2  # ended by its quorum
        assert [each.round for each in await store.history("default", "job")] == [1, 2]
        assert [each.round for each in await store.history("default", "job", count=1)] == [2]
        assert not await store.history("default", "job", count=0)


async def test_a_round_whose_vectors_are_gone_from_memory_still_answers(tmp_path: Path) -> None:
    async with running(tmp_path, memory_mib=1) as store:
        for number in range(10):
            await filled(store, number, 10)
        reads = store.reading()
        for number in range(10):
            found = await store.statistics("default", "job", number)
            assert len(found.clients) == 10
        after = store.reading()
        assert (after.hit_count, after.miss_count) == (reads.hit_count, reads.miss_count)
