"""What may be called here: the last catalogue, kept on disk, and the code behind it."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import structlog

from tierwise.domain.function import Catalogue, FunctionSpec
from tierwise.domain.ids import function_id, split_function_id
from tierwise.errors import InvalidArgument, StartFailed
from tierwise.files import write_atomically
from tierwise.v1 import types_pb2
from tierwise.wire import convert

LOOKUPS_MAX = 4096
log = structlog.get_logger()


class FunctionIndex:
    """Finds functions by the names that callers use, also after a restart without scheduler."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lookups: dict[str, FunctionSpec] = {}
        self.catalogue = Catalogue()
        if path.exists():
            stored = types_pb2.Catalogue.FromString(path.read_bytes())
            self.catalogue = convert.catalogue_from_pb(stored)

    def find(self, function: str) -> FunctionSpec | None:
        """Return the version that `name`, `ns/name` or `ns/name@version` means, or None.

        Raises:
            InvalidArgument: It is no function name.
        """
        spec = self._lookups.get(function)
        if spec is None:
            try:
                namespace, name, version = split_function_id(function)
            except ValueError as error:
                raise InvalidArgument(str(error)) from None
            if version is None:
                spec = self.catalogue.latest(namespace, name)
            else:
                spec = self.catalogue.functions.get(function_id(namespace, name, version))
            if spec is not None and len(self._lookups) < LOOKUPS_MAX:
                self._lookups[function] = spec
        return spec

    def replace(self, catalogue: Catalogue) -> None:
        """Take over a new catalogue and store it, if there is room; without, it is in use only."""
        self.catalogue = catalogue
        self._lookups.clear()
        try:
            write_atomically(self._path, convert.catalogue_to_pb(catalogue).SerializeToString())
        except OSError as error:
            log.error("catalogue.not_stored", cause=str(error))

    def add(self, spec: FunctionSpec) -> None:
        """Add one function that was pulled before its catalogue came."""
        functions = {**self.catalogue.functions, spec.function_id: spec}
        self.replace(replace(self.catalogue, functions=functions))


class CodeFolder:
    """Code blobs in a folder, named by their SHA-256."""

    def __init__(self, folder: Path, fetch: Callable[[str], Awaitable[bytes]]) -> None:
        self._folder = folder
        self._fetch = fetch
        self._locks: dict[str, asyncio.Lock] = {}
        folder.mkdir(parents=True, exist_ok=True)

    async def path(self, code_digest: str) -> Path:
        """Return the file with this content, fetching it from the scheduler once.

        Raises:
            StartFailed: What came does not have the digest, or there is no room for it here.
            TierwiseError: It could not be fetched.
        """
        path = self._folder / code_digest
        if path.exists():
            return path
        lock = self._locks.setdefault(code_digest, asyncio.Lock())
        async with lock:
            if not path.exists():
                code = await self._fetch(code_digest)
                if hashlib.sha256(code).hexdigest() != code_digest:
                    raise StartFailed(f"code {code_digest[:12]} arrived damaged; deploy it again")
                try:
                    await asyncio.to_thread(write_atomically, path, code)
                except OSError as error:
                    raise StartFailed(
                        f"its code ({len(code)} bytes) could not be stored on this node: "
                        f"{error.strerror}; free space in {self._folder}"
                    ) from None
        self._locks.pop(code_digest, None)
        return path
