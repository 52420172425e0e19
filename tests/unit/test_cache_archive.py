"""The object store: down, slow, or holding something else; and URLs."""

import asyncio
import socket
from pathlib import Path

import numpy as np
import pytest

from agent.cache import archive as archive_module
from agent.cache import writethrough
from agent.cache.archive import Archive
from tests.unit.cache_builders import filled, manifest, put, running, update, value_of, vector
from tierwise.domain.cache import Durability
from tierwise.errors import NotFound, Unavailable

S3 = "s3://bucket/prefix"


@pytest.fixture
def s3_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """An S3 endpoint on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }.items():
        monkeypatch.setenv(name, value)


async def test_a_store_that_is_down_costs_durability_only(
    tmp_path: Path, s3_nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writethrough, "SETTLE_S_MAX", 0.2)
    async with running(tmp_path, store=S3) as store:
        sent = await filled(store, 0, 2)
        assert all(info.durability is Durability.DISK for info in store.list())
        await store.open_round(manifest(1, 1))
        with pytest.raises(Unavailable, match="safe on this node's disk"):
            await put(store, update(1, "c0"), vector(9), durability=Durability.STORED)
        assert store.info(update(1, "c0")) is not None
        assert np.array_equal(await value_of(store, update(0, "c1")), sent["c1"])
        with pytest.raises(Unavailable):
            await store.forget("default", "job", with_store=True)
        assert not store.list()  # here it is gone


async def test_a_store_that_never_answers_is_given_up(
    tmp_path: Path, s3_nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(archive_module, "CALL_S_MAX", 0.3)
    async with silent:
        found = Archive(S3, default=tmp_path)
        with pytest.raises(Unavailable):
            await found.put("a/b", b"x")
        with pytest.raises(Unavailable):
            await found.get_small("a/b")


async def test_what_waits_goes_when_the_store_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writethrough, "WAIT_S_MIN", 0.01)
    real, failures = Archive.put, iter([Unavailable("down")] * 3)

    async def _put(self: Archive, path: str, content: bytes) -> None:
        if (error := next(failures, None)) is not None:
            raise error
        await real(self, path, content)

    monkeypatch.setattr(Archive, "put", _put)
    async with running(tmp_path) as store:
        await filled(store, 0, 3)
        for info in store.list():
            found = await store.settled(info.key, Durability.STORED)
            assert found.durability is Durability.STORED
        assert next(failures, None) is None


async def test_the_store_is_asked_for_a_folder_or_bytes(tmp_path: Path) -> None:
    found = Archive(str(tmp_path / "folder"), default=tmp_path / "other")
    await found.put("a/b/c", b"123")
    await found.put("a/b/c", b"456")
    assert await found.get_small("a/b/c") == b"456"
    assert await found.paths("a/") == ["a/b/c"]
    with pytest.raises(NotFound):
        await found.get_small("a/b/d")
    with pytest.raises(Unavailable, match="larger"):
        await found.get_small("a/b/c", 2)
    got: list[bytes] = []
    await found.get("a/b/c", 3, lambda part: got.append(bytes(part)))
    assert b"".join(got) == b"456"
    with pytest.raises(Unavailable, match="has 3 bytes"):
        await found.get("a/b/c", 4, lambda part: None)
    await found.delete(["a/b/c", "a/b/d"])
    assert await found.paths("a/") == []
    assert not (tmp_path / "other").exists()


async def test_another_life_of_a_job_does_not_keep_the_first_ones_bytes(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        for seed in (1, 2):
            await store.open_round(manifest(0, 1))
            await put(store, update(0, "c0"), vector(seed), durability=Durability.STORED)
            assert await store.forget("default", "job") == 1
    path = tmp_path / "store" / "default" / "job" / "000000" / "update" / "c0"
    assert path.read_bytes() == vector(2).tobytes()
