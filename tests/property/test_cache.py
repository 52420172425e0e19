"""Invariants of the cache, over any history: bounds hold, nothing acknowledged is lost."""

import asyncio
import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.cache.rivals import NAMES
from agent.cache.store import CacheStore
from tests.unit.cache_builders import aggregate, key, manifest, put, running, update, vector
from tierwise.domain.cache import Durability, IncomingHead, ObjectKey, ObjectKind
from tierwise.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    TierwiseError,
)

ROUNDS, CLIENTS = 4, 7
LENGTH = 16_384  # 64 KiB: 16 vectors fit 1 MiB of memory, 32 the disk


@dataclass
class Model:
    """What the cache has promised."""

    held: dict[ObjectKey, np.ndarray] = field(default_factory=dict)
    quarantined: set[ObjectKey] = field(default_factory=set)


rounds = st.integers(0, ROUNDS - 1)
durabilities = st.sampled_from(Durability)
clients = st.integers(0, CLIENTS - 1).map(lambda index: f"c{index}")
ROUND_ONLY = ("open", "end", "matrix", "ask")
KINDS = ("put",) * 14 + (*ROUND_ONLY, "nan", "read", "cut", "restart")


@st.composite
def steps(draw: st.DrawFn) -> tuple:  # type: ignore[type-arg]
    kind = draw(st.sampled_from(KINDS))
    if kind == "restart":
        return (draw(st.sampled_from(["restart", "restart", "restart", "forget"])),)
    if kind in ROUND_ONLY:
        return kind, draw(rounds)
    if kind == "put":
        return kind, draw(rounds), draw(clients), draw(st.integers(0, 1)), draw(durabilities)
    return kind, draw(rounds), draw(clients)


opening = st.just([("open", number) for number in range(ROUNDS)])
histories = st.builds(
    lambda first, rest: first + rest, opening, st.lists(steps(), min_size=20, max_size=60)
)


def value_of(at: ObjectKey, version: int = 0) -> np.ndarray:
    number = int(at.client[1:]) if at.client else 99
    return vector(at.round * 1000 + number * 10 + version, length=LENGTH)


async def put_some(
    store: CacheStore, model: Model, at: ObjectKey, version: int, to: Durability
) -> None:
    value = value_of(at, version)
    try:
        info = await put(store, at, value, durability=to, chunk_bytes=40_000)
    except AlreadyExists:
        assert at in model.held and not np.array_equal(model.held[at], value)
        return
    except (FailedPrecondition, Overloaded):
        assert at not in model.held or not np.array_equal(model.held[at], value)
        return
    assert not info.quarantined
    assert at not in model.held or np.array_equal(model.held[at], value)
    model.held[at] = value
    model.quarantined.discard(at)


async def take(store: CacheStore, model: Model, step: tuple) -> None:  # type: ignore[type-arg]
    match step:
        case ("open", number):
            with contextlib.suppress(Overloaded, FailedPrecondition, PayloadTooLarge):
                await store.open_round(manifest(number, CLIENTS, parameter_count=LENGTH))
        case ("put", number, client, version, to):
            await put_some(store, model, update(number, client), version, to)
        case ("nan", number, client):
            at, bad = update(number, client), np.full(LENGTH, np.nan, np.float32)
            with contextlib.suppress(AlreadyExists, FailedPrecondition, Overloaded):
                assert (await put(store, at, bad)).quarantined
                assert at not in model.held
                model.quarantined.add(at)
        case ("end", number):
            await put_some(store, model, aggregate(number), 0, Durability.DISK)
        case ("read", number, client):
            at = update(number, client)
            try:
                file, _ = await store.read(at)
            except NotFound:
                assert at not in model.held
            except Overloaded:
                pass  # what came to memory only is being written, and cannot go yet
            else:
                assert np.array_equal(np.frombuffer(file.view(), np.float32), model.held[at])
        case ("matrix", number):
            with contextlib.suppress(NotFound, Overloaded):
                file, info = await store.read(key(number, ObjectKind.MATRIX))
                matrix = np.frombuffer(file.view(), np.float32).reshape(CLIENTS, LENGTH)
                assert info.metadata is not None
                for row, is_in in enumerate(info.metadata["is_in"]):  # type: ignore[arg-type]
                    at = update(number, f"c{row}")
                    assert is_in == (at in model.held)
                    assert np.array_equal(matrix[row], model.held.get(at, np.zeros(LENGTH)))
        case ("ask", number):
            with contextlib.suppress(NotFound):
                found = await store.statistics("default", "job", number)
                sent = [model.held[update(number, c)] for c in found.clients]
                exact = np.array(sent, np.float64).reshape(-1, LENGTH)
                assert np.allclose(found.gram, exact @ exact.T)
                assert len(sent) == sum(
                    at.round == number and at.kind is ObjectKind.UPDATE for at in model.held
                )
        case ("cut", number, client):
            at = update(number, client)
            with contextlib.suppress(TierwiseError):
                head = IncomingHead(key=at, size_bytes=4 * LENGTH)
                incoming = store.receive(head, "")
                incoming.write(b"\xff" * 100_000 if number % 2 else b"\xff" * 50_000)
                await incoming.commit()
        case ("forget",):
            await store.forget("default", "job", with_store=True)
            model.held.clear()
            model.quarantined.clear()


def check(store: CacheStore, model: Model) -> None:
    reading = store.reading()
    assert reading.memory_bytes <= 1 << 20
    assert reading.disk_bytes <= 2 << 20
    listed = {info.key: info for info in store.list()}
    assert {at for at, info in listed.items() if not info.quarantined} == set(model.held)
    assert {at for at, info in listed.items() if info.quarantined} == model.quarantined


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), histories)
def test_bounds_hold_and_nothing_acknowledged_is_lost(name: str, history: list[tuple]) -> None:  # type: ignore[type-arg]
    async def _live(folder: Path) -> None:
        model = Model()
        lives: list[list[tuple]] = [[]]  # type: ignore[type-arg]
        for step in history:
            if step[0] == "restart":
                lives.append([])
            else:
                lives[-1].append(step)
        for life in lives:
            async with running(folder, memory_mib=1, disk_mib=2, policy=name) as store:
                check(store, model)
                for step in life:
                    await take(store, model, step)
                    check(store, model)
                for at, value in model.held.items():
                    view, _ = await store.view(at)
                    assert np.array_equal(np.frombuffer(view, np.float32), value)
                    del view
                files = [p for p in (folder / "cache" / "objects").rglob("*") if p.is_file()]
                assert sum(path.stat().st_size for path in files) <= 2 << 20

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_live(Path(folder)))
