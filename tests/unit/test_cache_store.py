"""The cache: what comes in, what is refused, what is read, what is known of it."""

import asyncio
import hashlib
import mmap
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.unit.cache_builders import (
    OWNER,
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
from tierwise.domain.cache import Durability, IncomingHead, ObjectKind
from tierwise.errors import (
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
)
from tierwise.wire import payload


async def test_a_round_comes_in_and_is_read_in_every_way(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await filled(store, 0, 0)
        sent = await filled(store, 1, 3)
        file, info = await store.read(key(1, ObjectKind.MATRIX))
        matrix = np.frombuffer(file.view(), np.float32).reshape(3, P)
        assert info.metadata is not None
        assert info.metadata["clients"] == ["c0", "c1", "c2"]
        assert info.metadata["is_in"] == [True] * 3
        assert np.array_equal(matrix, np.stack(list(sent.values())))
        for client, value in sent.items():
            file, info = await store.read(update(1, client))
            assert np.array_equal(np.frombuffer(file.view(), np.float32), value)
            assert info.digest == hashlib.blake2b(value, digest_size=32).hexdigest()
            assert np.array_equal(await value_of(store, update(1, client)), value)
        assert store.newest_aggregate("default", "job") == aggregate(1)
        assert [held.rounds for held in store.held()] == [(0, 1)]
        assert store.rounds("default", "job") == [0, 1]


async def test_a_matrix_cannot_be_written_by_who_reads_it(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await filled(store, 0, 2)
        file, _ = await store.read(key(0, ObjectKind.MATRIX))
        with pytest.raises(PermissionError):
            mmap.mmap(file.fd, file.nbytes)
        with pytest.raises(PermissionError):
            os.pwrite(file.fd, b"x", 0)


async def test_the_same_object_twice_is_one_object(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.open_round(manifest(0, 1))
        value = vector(1)
        first = await put(store, update(0, "c0"), value)
        again = await put(store, update(0, "c0"), value)
        assert (again.digest, again.key) == (first.digest, first.key)
        head = IncomingHead(key=first.key, size_bytes=first.size_bytes, digest=first.digest)
        incoming = store.receive(head, OWNER)
        assert incoming.known is not None and incoming.known.digest == first.digest
        assert (await incoming.commit()).digest == first.digest
        assert len(store.list()) == 1
        await store.open_round(manifest(0, 1))  # and so with rounds


async def test_a_name_is_final(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.open_round(manifest(0, 1))
        value = vector(1)
        await put(store, update(0, "c0"), value)
        with pytest.raises(AlreadyExists):
            await put(store, update(0, "c0"), vector(2))
        with pytest.raises(AlreadyExists):
            await put(store, update(0, "c0"), vector(2), digest="00" * 32)
        assert np.array_equal(await value_of(store, update(0, "c0")), value)
        with pytest.raises(AlreadyExists):
            await store.open_round(manifest(0, 2))


async def test_only_its_writer_puts_a_clients_update(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.open_round(manifest(0, {"a": "uri:a", "b": ""}))
        for client, writer in (("a", OWNER), ("a", "uri:b"), ("b", "uri:a")):
            with pytest.raises(PermissionDenied):
                await put(store, update(0, client), vector(1), writer=writer)
        await put(store, update(0, "a"), vector(1), writer="uri:a")
        await put(store, update(0, "b"), vector(2), writer=OWNER)
        with pytest.raises(PermissionDenied):
            await put(store, aggregate(0), vector(3), writer="uri:a")
        await put(store, key(0, ObjectKind.METADATA, "a"), {"loss": 1.0}, writer="uri:a")
        await put(store, key(0, ObjectKind.METADATA, "b"), {"loss": 2.0}, writer=OWNER)
        await put(store, aggregate(0), vector(3), writer="")  # the cluster itself
        with pytest.raises(PermissionDenied):
            await store.open_round(manifest(1, 1, owner="uri:a"))


async def test_rounds_have_an_order(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        with pytest.raises(FailedPrecondition, match="not open"):
            await put(store, update(0, "c0"), vector(1))
        await store.open_round(manifest(3, 2))
        await put(store, update(3, "c0"), vector(1))
        await put(store, aggregate(3), vector(2))
        with pytest.raises(FailedPrecondition, match="has ended"):
            await put(store, update(3, "c1"), vector(3))
        with pytest.raises(FailedPrecondition, match="out of order"):
            await store.open_round(manifest(2, 2))
        with pytest.raises(FailedPrecondition, match="base"):
            await store.open_round(manifest(5, 1, base=aggregate(4)))
        await put(store, update(3, "c0"), vector(1))  # delivered twice, late
        await put(store, key(3, ObjectKind.METADATA), {"accuracy": 0.9})  # facts come later


async def test_a_round_that_ends_meanwhile_takes_nothing_more(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.open_round(manifest(0, 1))
        value = vector(1)
        late = store.receive(IncomingHead(key=update(0, "c0"), size_bytes=value.nbytes), OWNER)
        late.write(value.tobytes())
        await put(store, aggregate(0), vector(2))
        with pytest.raises(FailedPrecondition, match="ended meanwhile"):
            await late.commit()
        assert [info.key.kind for info in store.list()] == [ObjectKind.AGGREGATE]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.full(P, np.nan, np.float32), "NaN"),
        (np.where(np.arange(P) == P - 1, np.inf, 0).astype(np.float32), "infinity"),
        (np.full(P, 1e3, np.float32), "from its base"),
        (np.full(P, 3e38, np.float32), "from its base"),  # its square is beyond float32
        (np.zeros(P - 1, np.float32), "bytes instead of"),
        (np.zeros(P + 1, np.float32), "bytes instead of"),
    ],
)
async def test_what_breaks_the_manifest_is_seen_and_never_counted(
    tmp_path: Path, value: np.ndarray, reason: str
) -> None:
    async with running(tmp_path) as store:
        await filled(store, 0, 0)
        await store.open_round(manifest(1, 2, base=aggregate(0), distance_max=100.0))
        info = await put(store, update(1, "c0"), value)
        assert reason in info.quarantined
        assert not info.is_in_memory
        good = await value_of(store, aggregate(0)) + 0.01
        await put(store, update(1, "c1"), good)
        found = await store.statistics("default", "job", 1)
        assert found.clients == ("c1",) and list(found.rows) == [1]
        assert reason in found.quarantined["c0"]
        file, whole = await store.read(key(1, ObjectKind.MATRIX))
        assert whole.metadata is not None and whole.metadata["is_in"] == [False, True]
        assert not np.frombuffer(file.view(), np.float32)[:P].any()  # no NaN for weights of 0
        with pytest.raises(NotFound, match="quarantined"):
            await store.read(update(1, "c0"))
        kept, _ = await store.view(update(1, "c0"), with_quarantined=True)
        assert bytes(kept) == value.tobytes()
        # Its client may send a sound one.
        again = await put(store, update(1, "c0"), good)
        assert not again.quarantined
        assert (await store.statistics("default", "job", 1)).clients == ("c0", "c1")
        assert [info.quarantined for info in store.list()] == [""] * 3


async def test_an_aggregate_or_metadata_that_is_none_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.open_round(manifest(0, 1))
        with pytest.raises(InvalidArgument, match="NaN"):
            await put(store, aggregate(0), np.full(P, np.nan, np.float32))
        with pytest.raises(InvalidArgument):
            await put(store, aggregate(0), np.zeros(P - 1, np.float32))
        with pytest.raises(InvalidArgument):
            await put(store, key(0, ObjectKind.METADATA), vector(1, length=16))
        with pytest.raises(InvalidArgument):
            await put(store, key(0, ObjectKind.MATRIX), vector(1))
        assert not store.list()
        await put(store, aggregate(0), vector(1))


async def test_a_transfer_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.open_round(manifest(0, 1))
        value = vector(1).tobytes()
        head = IncomingHead(key=update(0, "c0"), size_bytes=len(value))
        cut = store.receive(head, OWNER)
        cut.write(value[:-4])
        with pytest.raises(InvalidArgument, match="truncated"):
            await cut.commit()
        long = store.receive(head, OWNER)
        long.write(value)
        with pytest.raises(InvalidArgument, match="more than"):
            long.write(b"x")
        with pytest.raises(InvalidArgument, match="digest"):
            await put(store, update(0, "c0"), vector(1), digest="ab" * 32)
        left = store.receive(head, OWNER)
        left.write(value[:100])
        left.abort()
        left.abort()
        assert not store.list()
        assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name == "0"]
        file, _ = await store.read(key(0, ObjectKind.MATRIX))
        assert not np.frombuffer(file.view(), np.float32).any()
        await put(store, update(0, "c0"), vector(1))


async def test_an_object_sent_anew_ends_the_first_attempt(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.open_round(manifest(0, 1))
        value = vector(1)
        head = IncomingHead(key=update(0, "c0"), size_bytes=value.nbytes)
        first = store.receive(head, OWNER)
        first.write(np.full(P, np.nan, np.float32).tobytes()[:8000])
        second = store.receive(head, OWNER)
        with pytest.raises(Cancelled):
            first.write(b"more")
        second.write(value.tobytes())
        with pytest.raises(Cancelled):
            await first.commit()
        assert not (await second.commit()).quarantined
        assert np.array_equal(await value_of(store, update(0, "c0")), value)


@pytest.mark.parametrize(
    "bad",
    [
        manifest(0, {"../etc": ""}),
        manifest(0, {"a/b": ""}),
        manifest(0, {"": ""}),
        manifest(0, 1, job="Job!"),
        manifest(-1, 1),
        manifest(10**6, 1),
        manifest(0, 1, parameter_count=0),
        manifest(0, 1001),
        manifest(0, 1, distance_max=float("nan")),
        manifest(0, 1, base=aggregate(0)),
        manifest(1, 1, base=aggregate(0, job="other")),
        manifest(1, 1, base=update(0, "c0")),
    ],
)
async def test_a_manifest_out_of_bounds_is_refused(tmp_path: Path, bad: object) -> None:
    async with running(tmp_path, is_idle=True) as store:
        with pytest.raises(InvalidArgument):
            await store.open_round(bad)  # type: ignore[arg-type]
        assert not store.list()


async def test_what_could_never_fit_is_said_to_be_too_large(tmp_path: Path) -> None:
    async with running(tmp_path, memory_mib=1) as store:
        with pytest.raises(PayloadTooLarge, match="memory_mib"):
            await store.open_round(manifest(0, 100))
        await store.open_round(manifest(0, 10))  # and this fits


async def test_memory_is_bounded_and_what_went_is_read_from_the_disk(tmp_path: Path) -> None:
    async with running(tmp_path, memory_mib=1) as store:
        sent = {}
        for number in range(12):  # 12 × 11 × 16 KiB is twice what fits
            sent[number] = await filled(store, number, 10)
            assert store.reading().memory_bytes <= 1 << 20
        for number, updates in sent.items():
            file, _ = await store.read(key(number, ObjectKind.MATRIX))
            found = np.frombuffer(file.view(), np.float32).reshape(10, P)
            assert np.array_equal(found, np.stack(list(updates.values())))
            del file, found
            assert store.reading().memory_bytes <= 1 << 20
        assert store.reading().miss_count


async def test_memory_that_is_still_mapped_counts(tmp_path: Path) -> None:
    async with running(tmp_path, memory_mib=1, policy="lru") as store:
        await filled(store, 0, 30)
        file, _ = await store.read(key(0, ObjectKind.MATRIX))
        with pytest.raises(Overloaded, match="memory_mib"):
            await filled(store, 1, 60)
        del file
        async with asyncio.timeout(20):
            while True:  # what is being counted may not go yet
                try:
                    await store.open_round(manifest(1, 60, base=aggregate(0)))
                    break
                except Overloaded:
                    await asyncio.sleep(0.02)


async def test_a_full_disk_is_a_typed_error_and_keeps_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, disk_mib=1) as store:
        await store.open_round(manifest(0, 100))
        taken = 0
        with pytest.raises(Overloaded, match="disk_mib"):
            for index in range(100):
                await put(store, update(0, f"c{index}"), vector(index))
                taken += 1
        assert taken == 64
        assert len(store.list()) == 64
        assert store.reading().disk_bytes == 1 << 20
        assert (await store.statistics("default", "job", 0)).clients == tuple(
            f"c{index}" for index in range(64)
        )
        assert await store.forget("default", "job", with_store=True) == 64
        assert store.reading().disk_bytes == 0
        await filled(store, 0, 3)


async def test_one_namespace_cannot_take_it_all(tmp_path: Path) -> None:
    async with running(tmp_path, quota_mib=1) as store:
        await store.open_round(manifest(0, 60))
        busy = store.receive(IncomingHead(key=update(0, "c0"), size_bytes=4 * P), OWNER)
        with pytest.raises(Overloaded, match="quota_mib"):
            await store.open_round(manifest(0, 60, job="more"))
        other = replace(manifest(0, 60, job="more"), namespace="other")
        await store.open_round(other)
        busy.abort()


async def test_the_disk_keeps_only_what_no_store_elsewhere_has(tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # another disk than the test's folder
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    elsewhere = Path(tempfile.mkdtemp(dir=memory))
    try:
        async with running(
            tmp_path, disk_mib=1, memory_mib=1, store=f"file://{elsewhere}"
        ) as store:
            sent = {}
            for number in range(10):
                sent[number] = await filled(store, number, 10)
                await store.settled(aggregate(number), Durability.STORED)
                assert store.reading().disk_bytes <= 1 << 20
            files = [p for p in (tmp_path / "cache" / "objects").rglob("*") if p.is_file()]
            assert sum(path.stat().st_size for path in files) <= 1 << 20
            for number, updates in sent.items():  # the oldest come back
                for client, value in updates.items():
                    assert np.array_equal(await value_of(store, update(number, client)), value)
            assert await store.forget("default", "job", with_store=True)
            assert not [path for path in elsewhere.rglob("*") if path.is_file()]
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)


async def test_durability_rises_and_can_be_waited_for(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.open_round(manifest(0, 4))
        info = await put(store, update(0, "c0"), vector(0), durability=Durability.MEMORY)
        assert info.durability is Durability.MEMORY
        info = await put(store, update(0, "c1"), vector(1))
        assert info.durability >= Durability.DISK
        info = await put(store, update(0, "c2"), vector(2), durability=Durability.STORED)
        assert info.durability is Durability.STORED
        plain = tmp_path / "store" / "default" / "job" / "000000" / "update" / "c2"
        assert plain.read_bytes() == vector(2).tobytes()
        assert (await store.settled(update(0, "c0"), Durability.STORED)).durability is (
            Durability.STORED
        )
        await put(store, update(0, "c3"), vector(3), is_replica=True)
        store.mark_replicated(update(0, "c3"), ["fog-1"])
        found = await store.settled(update(0, "c3"), Durability.REPLICATED)
        assert found.durability is Durability.REPLICATED
        assert found.node_ids == ("edge-1", "fog-1")


async def test_replication_is_told_of_what_counts_only(tmp_path: Path) -> None:
    told = []
    async with running(tmp_path) as store:
        store.on_committed.append(lambda info, head: told.append((str(info.key), head.is_replica)))
        await store.open_round(manifest(0, 2))
        await put(store, update(0, "c0"), np.full(P, np.nan, np.float32))
        await put(store, update(0, "c1"), vector(1))
        await put(store, update(0, "c1"), vector(1))
        assert told == [("default/job/000000/update/c1", False)]


async def test_forgetting_a_job_leaves_the_others(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        sent = await filled(store, 0, 2)
        await filled(store, 0, 2, job="twin")  # the same bytes, so the same files
        assert await store.forget("default", "job") == 3
        assert await store.forget("default", "job") == 0
        assert store.rounds("default", "job") == []
        for client, value in sent.items():
            assert np.array_equal(await value_of(store, update(0, client, job="twin")), value)
        await filled(store, 0, 2)  # the name is free again


async def test_metadata_is_small_and_read_back(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.open_round(manifest(0, 1))
        at = key(0, ObjectKind.METADATA)
        await put(store, at, {"accuracy": 0.5, "classes": [1, 2]})
        file, info = await store.read(at)
        assert payload.decode(bytes(file.view())) == {"accuracy": 0.5, "classes": [1, 2]}
        assert info.is_in_memory
        with pytest.raises(InvalidArgument, match="metadata"):
            await put(store, key(0, ObjectKind.METADATA, "c0"), {"x": "y" * 300_000})
        with pytest.raises(InvalidArgument, match="metadata"):
            await put(store, update(0, "c0"), vector(1), {"x": "y" * 300_000})


async def test_many_at_a_time_end_as_one_by_one(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.open_round(manifest(0, 40))
        values = {f"c{index}": vector(index) for index in range(40)}

        async def _send(client: str) -> None:
            head = IncomingHead(key=update(0, client), size_bytes=4 * P)
            incoming = store.receive(head, OWNER)
            blob = values[client].tobytes()
            for start in range(0, len(blob), 3000):
                incoming.write(blob[start : start + 3000])
                await asyncio.sleep(0)
            await incoming.commit()

        async with asyncio.TaskGroup() as group:
            for client in values:
                group.create_task(_send(client))
        found = await store.statistics("default", "job", 0)
        exact = np.stack(list(values.values())).astype(np.float64)
        assert np.allclose(found.gram, exact @ exact.T, rtol=1e-12)


async def test_a_second_process_cannot_use_the_folder(tmp_path: Path) -> None:
    async with running(tmp_path):
        with pytest.raises(FailedPrecondition, match="another process"):
            async with running(tmp_path):
                pass


async def test_a_wrong_configuration_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="lru"):
        async with running(tmp_path, policy="clairvoyant"):
            pass
    with pytest.raises(InvalidArgument, match="memory_mib"):
        async with running(tmp_path, memory_mib=-1):
            pass
    with pytest.raises(InvalidArgument, match="store"):
        async with running(tmp_path, store="ftp://host/x"):
            pass
