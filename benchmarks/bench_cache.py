"""What does it cost to take a round into the cache, and how fast does the cache answer?

    python -m benchmarks.bench_cache [--parameters N] [--clients K] [--rounds R]

One process, no wire: chunks of 1 MiB are handed to the store as a stream would, each update until
it is on the disk. Beside each figure its ratio to a copy of the same bytes to new memory, measured
in the same run. CPU is all threads of the process. The disk is the one under --folder.
"""

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import uvloop

from agent.cache.store import CacheStore
from benchmarks.report import make_table, show, spread
from tierwise.clock import precise_s
from tierwise.config import CacheConfig
from tierwise.domain.cache import (
    IncomingHead,
    ObjectKey,
    ObjectKind,
    RoundClient,
    RoundManifest,
)

CHUNK = 1 << 20
OWNER = "benchmark"


def key(number: int, kind: ObjectKind, client: str = "") -> ObjectKey:
    return ObjectKey(namespace="default", job="bench", round=number, kind=kind, client=client)


async def put(store: CacheStore, at: ObjectKey, value: np.ndarray) -> None:
    blob = memoryview(value).cast("B")
    head = IncomingHead(key=at, size_bytes=blob.nbytes, metadata={"example_count": 32})
    incoming = store.receive(head, OWNER)
    for start in range(0, blob.nbytes, CHUNK):
        incoming.write(blob[start : start + CHUNK])
        await asyncio.sleep(0)  # as between messages
    info = await incoming.commit()
    assert not info.quarantined


@contextlib.asynccontextmanager
async def running(folder: Path, memory_mib: int) -> AsyncIterator[CacheStore]:
    store = CacheStore(folder / "cache", CacheConfig(memory_mib=memory_mib), node_id="bench")
    await store.recover()
    background = asyncio.create_task(store.run_forever())
    try:
        yield store
    finally:
        background.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await background
        await store.close()


class Figures:
    """Milliseconds by what was done."""

    def __init__(self) -> None:
        self.ms: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timed(self, name: str):  # type: ignore[no-untyped-def]
        start_s, cpu_s = precise_s(), time.process_time()
        yield
        self.ms.setdefault(name, []).append(1e3 * (precise_s() - start_s))
        self.ms.setdefault(f"{name}, CPU", []).append(1e3 * (time.process_time() - cpu_s))


async def measure(folder: Path, arguments: argparse.Namespace) -> Figures:
    figures = Figures()
    count, length = arguments.clients, arguments.parameters
    rng = np.random.default_rng(0)
    base = rng.standard_normal(length, dtype=np.float32)
    updates = [base + rng.standard_normal(length, dtype=np.float32) * 0.01 for _ in range(count)]
    memory_mib = 3 * 4 * length * (count + 2) >> 20
    async with running(folder, memory_mib) as store:
        await store.open_round(
            RoundManifest(
                namespace="default", job="bench", round=0, clients=(), parameter_count=length,
                owner=OWNER,
            )
        )  # fmt: skip
        await put(store, key(0, ObjectKind.AGGREGATE), base)
        for number in range(1, arguments.rounds + 1):
            with figures.timed("copy to new memory"):
                np.copyto(np.empty_like(base), updates[0])
            spare = np.zeros_like(base)
            with figures.timed("copy to used memory"):
                np.copyto(spare, updates[0])
            clients = tuple(RoundClient(client=f"c{index}") for index in range(count))
            await store.open_round(
                RoundManifest(
                    namespace="default", job="bench", round=number, clients=clients,
                    parameter_count=length, base=key(number - 1, ObjectKind.AGGREGATE),
                    distance_max=1e9, owner=OWNER,
                )
            )  # fmt: skip
            await asyncio.sleep(2.0)  # clients train; pages are laid out meanwhile
            for index, update in enumerate(updates):
                update[number] += np.float32(1.0)  # no two rounds hold the same bytes
                with figures.timed("take one update, to the disk"):
                    await put(store, key(number, ObjectKind.UPDATE, f"c{index}"), update)
                await asyncio.sleep(0.3)  # they do not all end together
            with figures.timed("wait for the statistics then"):
                await store.statistics("default", "bench", number)
            for _ in range(50):
                with figures.timed("statistics"):
                    await store.statistics("default", "bench", number)
                with figures.timed("matrix in memory"):
                    await store.read(key(number, ObjectKind.MATRIX))
                with figures.timed("view of an update"):
                    await store.view(key(number, ObjectKind.UPDATE, "c1"))
            with figures.timed("file of an update"):
                file, _ = await store.read(key(number, ObjectKind.UPDATE, "c1"))
            del file
            await put(store, key(number, ObjectKind.AGGREGATE), base)
            base[number] += np.float32(1.0)
    with figures.timed("start again"):
        context = running(folder, memory_mib)
        store = await context.__aenter__()
    with figures.timed("statistics after a start"):
        await store.statistics("default", "bench", arguments.rounds)
    with figures.timed("matrix from the disk"):
        await store.read(key(arguments.rounds, ObjectKind.MATRIX))
    await context.__aexit__(None, None, None)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=int, default=11_700_000)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = uvloop.run(measure(Path(folder), arguments)).ms
    size_mb = 4e-6 * arguments.parameters
    copy_ms = float(np.median(figures["copy to new memory"]))
    table = make_table(
        f"A round of {arguments.clients} × {size_mb:.1f} MB in the cache, no wire",
        ["ms", "median", "spread", "× copy"],
        "Copy: of one update's bytes.",
    )
    for name, values in figures.items():
        if name.endswith("CPU") and not name.startswith("take"):
            continue
        median = float(np.median(values))
        table.add_row(name, f"{median:.3f}", spread(values), f"{median / copy_ms:.2f}")
    show(table)


if __name__ == "__main__":
    main()
