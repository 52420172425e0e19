"""The object store behind a cache: a folder, or S3, GCS or Azure through obstore.

Objects are at `namespace/job/round/kind[/client]`, plain bytes that any tool can read. Beside them,
`namespace/job/round/index/<node>` says what they are, so that a node that lost everything, or
another one, can take a round up again.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import NotFoundError
from obstore.store import LocalStore, from_url

from tierwise.errors import InvalidArgument, NotFound, Unavailable

if TYPE_CHECKING:
    from obstore.store import ObjectStore

ATTEMPTS_MAX = 3  # per call; the caller comes again later
CALL_S_MAX = 20.0
CONNECT_S_MAX = 5.0
CHUNK_BYTES = 8 << 20
LIST_MAX = 100_000

Result = TypeVar("Result")


class Archive:
    """One object store. Every call ends within about `CALL_S_MAX` per 64 MiB."""

    def __init__(self, url: str, *, default: Path) -> None:
        """Connect to nothing yet.

        Args:
            url: s3://…, gs://…, az://…, a folder, or empty: `default`.
            default: A folder; made if it is used.

        Raises:
            InvalidArgument: The URL means nothing to us.
        """
        self.folder: Path | None = None
        if "://" not in url or url.startswith("file://"):
            self.folder = Path(url.removeprefix("file://")) if url else default
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._store: ObjectStore = LocalStore(self.folder, mkdir=True)
            return
        options: dict[str, Any] = {
            "retry_config": {
                "max_retries": ATTEMPTS_MAX - 1,
                "retry_timeout": timedelta(seconds=CALL_S_MAX),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
            "client_options": {
                "timeout": timedelta(seconds=CALL_S_MAX),
                "connect_timeout": timedelta(seconds=CONNECT_S_MAX),
                "allow_http": url.startswith("s3://"),  # a store within reach of a cable
            },
        }
        try:
            self._store = from_url(url, **options)
        except Exception as error:  # of several kinds: unknown scheme, bad host, missing region
            raise InvalidArgument(f"cache.store = {url!r}: {error}") from None

    def shares_disk(self, folder: Path) -> bool:
        """Return whether the store is a folder on the same file system."""
        return self.folder is not None and self.folder.stat().st_dev == folder.stat().st_dev

    async def put_file(self, path: str, source: Path, *, is_final: bool = True) -> None:
        """Store a file; one that will never change may get a second name instead of a copy.

        Raises:
            Unavailable: The store does not answer, or refuses; the message says what it said.
        """
        target = self.folder / path if is_final and self.folder is not None else None
        if target is not None and await asyncio.to_thread(_link, source, target):
            return
        await self._call(obstore.put_async(self._store, path, source), path, source.stat().st_size)

    async def put(self, path: str, content: bytes) -> None:
        """Store a few bytes, in place of what was there.

        Raises:
            Unavailable: As `put_file`.
        """
        await self._call(obstore.put_async(self._store, path, content), path, len(content))

    async def get(self, path: str, size_bytes: int, take: Callable[[memoryview], None]) -> None:
        """Hand an object's bytes to `take` in order, in a thread.

        Raises:
            NotFound: There is none.
            Unavailable: The store does not answer, or the object has another size.
        """
        await self._call(self._stream(path, size_bytes, take), path, size_bytes)

    async def get_small(self, path: str, size_bytes_max: int = 64 << 20) -> bytes:
        """Return an object.

        Raises:
            NotFound: There is none.
            Unavailable: The store does not answer, or the object is larger.
        """

        async def _read() -> bytes:
            found = await obstore.get_async(self._store, path)
            if found.meta["size"] > size_bytes_max:
                raise Unavailable(f"{path} in the store is larger than {size_bytes_max} bytes")
            return bytes(await found.bytes_async())

        return await self._call(_read(), path, 0)

    async def paths(self, prefix: str) -> list[str]:
        """Return the paths under a prefix, at most LIST_MAX.

        Raises:
            Unavailable: The store does not answer.
        """

        async def _all() -> list[str]:
            found: list[str] = []
            async for batch in obstore.list(self._store, prefix):
                found += [meta["path"] for meta in batch]
                if len(found) >= LIST_MAX:
                    break
            return found

        return await self._call(_all(), prefix, 0)

    async def delete(self, paths: list[str]) -> None:
        """Delete objects; those that are not there are deleted already.

        Raises:
            Unavailable: The store does not answer.
        """
        for start in range(0, len(paths), 1000):  # as many as S3 takes at once
            batch = paths[start : start + 1000]
            with contextlib.suppress(NotFound):
                await self._call(obstore.delete_async(self._store, batch), batch[0], 0)

    async def _stream(self, path: str, size_bytes: int, take: Callable[[memoryview], None]) -> None:
        found = await obstore.get_async(self._store, path)
        if found.meta["size"] != size_bytes:
            raise Unavailable(
                f"{path} in the store has {found.meta['size']} bytes, not {size_bytes}"
            )
        count = 0
        async for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
            part = memoryview(chunk)
            await asyncio.to_thread(take, part)
            count += part.nbytes
        if count != size_bytes:
            raise Unavailable(f"{path} came truncated from the store")

    async def _call(self, call: Awaitable[Result], path: str, size_bytes: int) -> Result:
        timeout_s = CALL_S_MAX * (1 + size_bytes // (64 << 20))
        try:
            async with asyncio.timeout(timeout_s):  # wait_for can swallow a cancellation
                return await call
        except (FileNotFoundError, NotFoundError):
            raise NotFound(f"the store holds no {path}") from None
        except TimeoutError:
            raise Unavailable(f"the store did not answer within {timeout_s:.0f} s") from None
        except (NotFound, Unavailable, OSError):
            raise  # an OSError is the local disk's
        except Exception as error:  # obstore has a kind per cause; all mean: not now
            text = " ".join(str(error).split())[:400]
            raise Unavailable(f"the store refuses {path}: {text}") from None


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name instead of a copy; return whether the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    name = target.with_name(f".{target.name}.new")
    try:
        name.unlink(missing_ok=True)
        os.link(source, name)
        name.replace(target)  # what another life of the job left there goes
        name.unlink(missing_ok=True)  # it stays if both are the same file already
    except OSError:
        return False
    return True
