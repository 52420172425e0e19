"""Small caches for tests: vectors of 16 KiB, and what one does with them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.cache.store import CacheStore
from tierwise.config import CacheConfig
from tierwise.domain.cache import (
    Durability,
    IncomingHead,
    ObjectInfo,
    ObjectKey,
    ObjectKind,
    RoundClient,
    RoundManifest,
)
from tierwise.wire import payload

P = 4096
OWNER = "spiffe://tierwise/user/ada"
Vector = NDArray[np.float32]


@contextlib.asynccontextmanager
async def running(
    folder: Path, *, node_id: str = "edge-1", is_idle: bool = False, **config: object
) -> AsyncIterator[CacheStore]:
    """Run a cache in `folder/cache`; `is_idle` leaves out what runs in the background."""
    values = {"memory_mib": 64, "disk_mib": 256, **config}
    store = CacheStore(folder / "cache", CacheConfig(**values), node_id=node_id)  # type: ignore[arg-type]
    await store.recover()
    background = None if is_idle else asyncio.create_task(store.run_forever())
    try:
        yield store
    finally:
        if background is not None:
            background.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await background
        await store.close()


def key(number: int, kind: ObjectKind, client: str = "", *, job: str = "job") -> ObjectKey:
    return ObjectKey(namespace="default", job=job, round=number, kind=kind, client=client)


def update(number: int, client: str, *, job: str = "job") -> ObjectKey:
    return key(number, ObjectKind.UPDATE, client, job=job)


def aggregate(number: int, *, job: str = "job") -> ObjectKey:
    return key(number, ObjectKind.AGGREGATE, job=job)


def manifest(
    number: int,
    clients: Mapping[str, str] | int = 0,
    *,
    job: str = "job",
    base: ObjectKey | None = None,
    distance_max: float = 0.0,
    parameter_count: int = P,
    owner: str = OWNER,
) -> RoundManifest:
    if isinstance(clients, int):
        clients = {f"c{index}": "" for index in range(clients)}
    return RoundManifest(
        namespace="default",
        job=job,
        round=number,
        clients=tuple(RoundClient(client=c, writer=w) for c, w in clients.items()),
        parameter_count=parameter_count,
        distance_max=distance_max,
        base=base,
        owner=owner,
    )


def vector(seed: int, *, length: int = P) -> Vector:
    return np.random.default_rng(seed).standard_normal(length, dtype=np.float32)


async def put(
    store: CacheStore,
    at: ObjectKey,
    value: Vector | Mapping[str, object],
    metadata: Mapping[str, object] | None = None,
    *,
    writer: str = OWNER,
    digest: str = "",
    durability: Durability = Durability.DISK,
    is_replica: bool = False,
    chunk_bytes: int = 5000,
) -> ObjectInfo:
    """Send one object, in chunks that fit nothing."""
    blob = payload.encode(dict(value)) if isinstance(value, Mapping) else value.tobytes()
    head = IncomingHead(
        key=at,
        size_bytes=len(blob),
        digest=digest,
        metadata=metadata,
        durability=durability,
        is_replica=is_replica,
    )
    incoming = store.receive(head, writer)
    for start in range(0, len(blob), chunk_bytes):
        incoming.write(blob[start : start + chunk_bytes])
    return await incoming.commit()


async def filled(
    store: CacheStore, number: int, client_count: int, *, job: str = "job", ends: bool = True
) -> dict[str, Vector]:
    """Open a round, send updates near its base and end it; return the updates."""
    base = aggregate(number - 1, job=job) if number else None
    await store.open_round(manifest(number, client_count, job=job, base=base))
    origin = await value_of(store, base) if base else np.zeros(P, np.float32)
    sent = {}
    for index in range(client_count):
        client = f"c{index}"
        sent[client] = origin + 0.01 * vector(1000 * number + index)
        facts = {"example_count": 10 + index, "loss": 1.0 / (1 + number)}
        await put(store, update(number, client, job=job), sent[client], facts)
    if ends:
        end = np.mean(list(sent.values()), axis=0) if sent else vector(number)
        await put(store, aggregate(number, job=job), end.astype(np.float32))
    return sent


async def value_of(store: CacheStore, at: ObjectKey) -> Vector:
    view, _ = await store.view(at)
    return np.frombuffer(view, np.float32)
