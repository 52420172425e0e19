"""A full disk: typed errors, nothing acknowledged that is not there, and recovery."""

import asyncio
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from agent.catalogue import CodeFolder, FunctionIndex
from tests.unit.scheduler_builders import SchedulerProcess, connected
from tests.unit.test_node_machine import spec
from tierwise.domain.function import Catalogue
from tierwise.errors import StartFailed, Unavailable
from tierwise.v1 import cluster_pb2, work_pb2
from tierwise.wire.errors import error_from_rpc


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a small file system, or skip the test where this process may not."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tierwise-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for chunk in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * chunk)
            except OSError:
                pass
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "12m") as folder:
        yield folder


async def test_a_scheduler_on_a_full_disk_says_so_and_loses_nothing_it_has_accepted(
    disk: Path,
) -> None:
    scheduler = SchedulerProcess(disk)
    try:
        scheduler.start()
        async with connected(scheduler.main, scheduler.admin) as user:
            await user.deploy()
            accepted = await user.submit("before")
            filler = fill(disk)
            refusals = []
            for number in range(20):
                try:
                    accepted += await user.submit(f"full{number}", arguments=[b"z" * 50_000])
                except grpc.RpcError as failure:
                    refusals.append(error_from_rpc(failure))
            assert refusals and all(isinstance(error, Unavailable) for error in refusals)
            assert all("full" in str(error) or "space" in str(error) for error in refusals)
            assert all(error.retry_after_s for error in refusals)
            with pytest.raises(grpc.RpcError) as failed:
                for _ in range(200):  # tokens are kept in a file of their own
                    await user.token(cluster_pb2.ROLE_USER, uuid.uuid4().hex)
            error = error_from_rpc(failed.value)
            assert isinstance(error, Unavailable) and "space" in str(error)
            filler.unlink()
            async with asyncio.timeout(20):
                while True:
                    try:
                        accepted += await user.submit("after")
                        break
                    except grpc.RpcError:
                        await asyncio.sleep(0.2)
        scheduler.end()
        scheduler.start()
        async with connected(scheduler.main, scheduler.admin) as user:
            request = work_pb2.ListWorkRequest(limit=100)
            listed = (await user.work.ListWork(request, timeout=10)).work
            assert {work.request_id for work in listed} == set(accepted)
            assert {"before", "after"} <= set(accepted)
    finally:
        if scheduler.process is not None and scheduler.process.poll() is None:
            scheduler.end()


async def test_code_that_does_not_fit_fails_its_start_with_a_message_and_fits_later(
    disk: Path,
) -> None:
    import hashlib

    code = b"c" * 500_000
    digest = hashlib.sha256(code).hexdigest()

    async def fetch(_: str) -> bytes:
        return code

    folder = CodeFolder(disk / "code", fetch)
    filler = fill(disk)
    with pytest.raises(StartFailed, match=r"500000 bytes.*No space left.*code"):
        await folder.path(digest)
    assert list((disk / "code").iterdir()) == []  # no half of it keeps the disk full
    filler.unlink()
    assert (await folder.path(digest)).read_bytes() == code


def test_a_catalogue_that_cannot_be_stored_is_in_use_all_the_same(disk: Path) -> None:
    index = FunctionIndex(disk / "catalogue.pb")
    filler = fill(disk)
    one, other = (spec(name, code_digest="ab" * 32) for name in "fg")
    functions = {each.function_id: each for each in (one, other)}
    index.replace(Catalogue(revision=1, functions=functions))
    assert index.find("g") == other
    filler.unlink()
    index.replace(Catalogue(revision=2, functions=functions))
    assert FunctionIndex(disk / "catalogue.pb").find("f") is not None
