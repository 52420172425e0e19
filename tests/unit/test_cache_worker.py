"""A worker computes on a round where it lies: in the cache's own memory."""

import asyncio
import hashlib
from pathlib import Path

import cloudpickle
import numpy as np

from agent.runtime.environments import HOST
from agent.runtime.runtime import ItemKind, RunReport, Runtime
from tests.unit.cache_builders import P, filled, key, running
from tierwise.domain.cache import ObjectKind
from tierwise.wire import payload

CLIENTS = 80  # 1.25 MiB: what is smaller travels inside the message


async def test_a_worker_gets_a_matrix_uncopied_and_cannot_write_it(tmp_path: Path) -> None:
    def mean_of(matrix, rows):  # type: ignore[no-untyped-def]
        try:
            import mmap

            mmap.mmap(3, matrix.nbytes)
            can_write = True
        except (OSError, ValueError):
            can_write = matrix.flags.writeable
        return can_write, matrix[rows].mean(axis=0)

    code = cloudpickle.dumps(mean_of)
    path = tmp_path / hashlib.sha256(code).hexdigest()
    path.write_bytes(code)
    runtime = Runtime(state_dir=tmp_path / "runtime", isolation="standard")
    await runtime.open()
    try:
        await runtime.start(
            "a", code_digest=path.name, code_path=path, environment=HOST, memory_mib=256
        )
        async with running(tmp_path) as store:
            sent = await filled(store, 0, CLIENTS, ends=False)
            file, _ = await store.read(key(0, ObjectKind.MATRIX))
            stands_for = np.zeros((CLIENTS, P), np.float32)
            blob = payload.encode(((stands_for, [0, 7]), {}), detached=[])
            done: asyncio.Future[RunReport] = asyncio.get_running_loop().create_future()
            runtime.run("a", [blob], timeout_s=20.0, on_done=done.set_result, attachments=[file])
            (item,) = (await done).items
            assert item.kind is ItemKind.OK, item
            can_write, mean = payload.decode(item.value)
            assert not can_write
            assert np.allclose(mean, (sent["c0"] + sent["c7"]) / 2)
    finally:
        await runtime.close()
