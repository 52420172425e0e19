"""kill -9 at any moment: whatever was acknowledged is there, whole."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agent.cache.journal import Opened, Put, framed, records_in
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
from tests.unit.cache_child import seed_of
from tierwise.domain.cache import Durability, ObjectKind
from tierwise.errors import NotFound, Overloaded


def kill_after(folder: Path, line_count: int) -> list[list[str]]:
    """Run the child until it has said so many lines; return them all, split."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.cache_child", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(line_count)]
    child.send_signal(signal.SIGKILL)
    lines += child.stdout.readlines()
    child.wait()
    assert child.returncode == -signal.SIGKILL
    # The last line may be cut: its object was acknowledged all the same, but is not looked for.
    words = [line.split() for line in lines if line.endswith("\n")]
    return [each for each in words if each[0] in ("opened", "put", "ended")]  # not what is logged


async def test_no_acknowledged_object_is_lost_by_kill_9(tmp_path: Path) -> None:
    said: list[list[str]] = []
    for line_count in (9, 26, 3, 41, 14):
        said += kill_after(tmp_path, line_count)
        async with running(tmp_path, is_idle=True) as store:
            for word, number, *rest in said:
                if word == "put":
                    at = update(int(number), rest[0])
                    info = store.info(at)
                    assert info is not None and info.digest == rest[1], at
                    assert info.durability >= Durability.DISK
                    assert np.array_equal(await value_of(store, at), vector(seed_of(at)))
                elif word == "ended":
                    at = aggregate(int(number))
                    assert np.array_equal(await value_of(store, at), vector(seed_of(at)))
                else:
                    assert store.manifest("default", "job", int(number)) is not None
            for number in store.rounds("default", "job"):
                found = await store.statistics("default", "job", number)
                base = vector(seed_of(aggregate(number - 1))) if number else np.zeros(P)
                sent = [vector(seed_of(update(number, c))) for c in found.clients]
                deltas = np.array(sent, np.float64).reshape(-1, P) - base
                assert np.allclose(found.gram, deltas @ deltas.T, rtol=1e-9)
            files = [p for p in (tmp_path / "cache" / "objects").rglob("*") if p.is_file()]
            kept = {info.digest for info in store.list()}
            assert {path.parent.name + path.name for path in files} == kept
            assert not any((tmp_path / "cache" / "unfinished").iterdir())
    assert len([words for words in said if words[0] == "put"]) > 40


async def test_a_restart_knows_everything_again(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await filled(store, 0, 0)
        await filled(store, 1, 3)
        await store.open_round(manifest(2, 2, base=aggregate(1), distance_max=1.0))
        await put(store, update(2, "c0"), np.full(P, np.nan, np.float32))
        await put(store, key(1, ObjectKind.METADATA, "c1"), {"accuracy": 0.5})
        store.mark_replicated(update(1, "c0"), ["fog-1"])
        await store.settled(aggregate(1), Durability.STORED)
        before = {info.key: info for info in store.list()}
        known = await store.statistics("default", "job", 1)
    async with running(tmp_path) as store:
        after = {info.key: info for info in store.list()}
        assert after.keys() == before.keys()
        for at, info in after.items():
            assert (info.digest, info.quarantined) == (before[at].digest, before[at].quarantined)
            assert info.metadata == before[at].metadata
        assert after[update(1, "c0")].node_ids == ("edge-1", "fog-1")
        again = await store.statistics("default", "job", 1)
        assert np.array_equal(again.gram, known.gram)
        assert again.columns["accuracy"][1] == 0.5
        # An open round goes on.
        base = await value_of(store, aggregate(1))
        await put(store, update(2, "c1"), base + np.float32(1e-3))
        file, info = await store.read(key(2, ObjectKind.MATRIX))
        assert info.metadata is not None and info.metadata["is_in"] == [False, True]
        assert np.allclose(np.frombuffer(file.view(), np.float32)[P:], base + 1e-3)


async def test_the_journal_is_rewritten_and_says_the_same(tmp_path: Path) -> None:
    async with running(tmp_path, is_idle=True) as store:
        for number in range(5):
            await filled(store, number, 3)
        for _ in range(400):
            store.mark_replicated(update(0, "c0"), ["fog-1"])
        await store.settled(update(0, "c0"), Durability.REPLICATED)
        path = tmp_path / "cache" / "journal"
        before = [(info.key, info.digest) for info in store.list()]
        await store._tasks.close()
        long = path.stat().st_size
        await store._journal.replace(store._index.records)
        assert path.stat().st_size < long / 2
        await filled(store, 5, 1)
    async with running(tmp_path, is_idle=True) as store:
        assert [(i.key, i.digest) for i in store.list() if i.key.round < 5] == before
        assert store.rounds("default", "job") == list(range(6))


async def test_a_torn_or_damaged_journal_costs_what_is_damaged_only(tmp_path: Path) -> None:
    async with running(tmp_path, is_idle=True) as store:
        await filled(store, 0, 4)
    path = tmp_path / "cache" / "journal"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])  # the last record is torn
    async with running(tmp_path, is_idle=True) as store:
        assert len(store.list()) == 4
        assert (path.parent / "journal.damaged").exists()
        await put(store, aggregate(0), vector(0))  # nothing follows half a frame
    async with running(tmp_path, is_idle=True) as store:
        assert len(store.list()) == 5
    records, _ = records_in(whole)
    one = framed(records[:1])
    damaged = bytearray(framed(records))
    damaged[len(one) + 12] ^= 0xFF  # in the second record, the first object
    found, end = records_in(bytes(damaged))
    assert [type(record) for record in found] == [Opened, Put, Put, Put, Put]
    assert end == len(damaged)


async def test_a_lost_or_damaged_file_comes_back_from_the_store(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        sent = await filled(store, 0, 3)
        infos = {c: await store.settled(update(0, c), Durability.STORED) for c in sent}
    objects, archive = tmp_path / "cache" / "objects", tmp_path / "store"
    for client in ("c0", "c1"):  # files here and there are one; make them two
        path = archive / "default" / "job" / "000000" / "update" / client
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    digests = [infos[client].digest for client in ("c0", "c1")]
    first, second = (objects / digest[:2] / digest[2:] for digest in digests)
    first.unlink()
    second.write_bytes(b"\0" * second.stat().st_size)
    async with running(tmp_path, is_idle=True) as store:
        file, _ = await store.read(key(0, ObjectKind.MATRIX))
        found = np.frombuffer(file.view(), np.float32).reshape(3, P)
        assert np.array_equal(found, np.stack(list(sent.values())))
        for client, value in sent.items():
            assert np.array_equal(await value_of(store, update(0, client)), value)


async def test_a_damaged_file_that_nobody_else_has_is_quarantined(tmp_path: Path) -> None:
    async with running(tmp_path, is_idle=True) as store:  # nothing is stored while it is idle
        await filled(store, 0, 2)
        digest = (store.info(update(0, "c0")) or pytest.fail()).digest
    path = tmp_path / "cache" / "objects" / digest[:2] / digest[2:]
    path.write_bytes(b"\0" * path.stat().st_size)
    for file in (tmp_path / "cache" / "statistics").iterdir():
        file.unlink()
    async with running(tmp_path, is_idle=True) as store:
        with pytest.raises(NotFound):
            await store.view(update(0, "c0"))
        assert "damaged" in (store.info(update(0, "c0")) or pytest.fail()).quarantined
        assert (await store.statistics("default", "job", 0)).clients == ("c1",)
    async with running(tmp_path, is_idle=True) as store:
        assert "damaged" in (store.info(update(0, "c0")) or pytest.fail()).quarantined


async def test_a_node_that_lost_its_disk_takes_rounds_up_from_the_store(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    async with running(tmp_path / "a", node_id="a", store=str(archive)) as store:
        await filled(store, 0, 0)
        sent = await filled(store, 1, 3)
        await put(store, key(1, ObjectKind.METADATA), {"accuracy": 0.5})
        known = await store.statistics("default", "job", 1)
        for info in store.list():
            await store.settled(info.key, Durability.STORED)
        while not list(archive.rglob("statistics/a")):
            await store.settled(aggregate(1), Durability.STORED)
            await asyncio.sleep(0.01)
    async with running(tmp_path / "b", node_id="b", store=str(archive)) as store:
        found = await store.statistics("default", "job")
        assert found.round == 1
        # The rows may have come in other groups: their sums differ in the last bits.
        assert np.allclose(found.gram, known.gram, rtol=1e-12, atol=1e-12)
        assert found.round_metadata["accuracy"] == 0.5
        for client, value in sent.items():
            assert np.array_equal(await value_of(store, update(1, client)), value)
        file, _ = await store.read(key(1, ObjectKind.MATRIX))
        assert np.array_equal(np.frombuffer(file.view(), np.float32), np.ravel(list(sent.values())))
        with pytest.raises(NotFound):
            await store.read(aggregate(9))
        with pytest.raises(NotFound):
            await store.statistics("default", "nothing")


async def test_a_disk_that_fails_refuses_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, is_idle=True) as store:
        await store.open_round(manifest(0, 2))
        path = tmp_path / "cache" / "journal"
        size = path.stat().st_size
        real = os.fdatasync

        def _full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fdatasync", _full)
        with pytest.raises(Overloaded, match="No space left"):
            await put(store, update(0, "c0"), vector(1))
        with pytest.raises(Overloaded):
            await put(store, key(0, ObjectKind.METADATA), {"x": 1})
        with pytest.raises(Overloaded):
            await store.open_round(manifest(1, 2))
        assert not store.list() and store.rounds("default", "job") == [0]
        assert path.stat().st_size == size
        monkeypatch.setattr(os, "fdatasync", real)
        await put(store, update(0, "c0"), vector(1))
        await store.open_round(manifest(1, 2))
        _, info = await store.read(key(0, ObjectKind.MATRIX))
        assert info.metadata is not None and info.metadata["is_in"] == [True, False]
