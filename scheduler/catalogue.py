"""Function versions: stored once, never changed, told to every agent. Serves FunctionService."""

# ruff: noqa: D102, N802 - gRPC methods are named and described by the protos

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy import Connection, delete, select

from scheduler.store.store import Store
from scheduler.store.tables import code, function_names, functions
from tierwise.clock import wall_s
from tierwise.domain.function import FunctionProfile, FunctionSpec
from tierwise.domain.ids import FunctionId, function_id, split_function_id
from tierwise.domain.sizing import Sizing
from tierwise.domain.topology import Node
from tierwise.errors import FailedPrecondition, InvalidArgument, NotFound, PayloadTooLarge
from tierwise.v1 import function_pb2, function_pb2_grpc, types_pb2
from tierwise.wire import convert

log = structlog.get_logger()

CODE_BYTES_MAX = 32 << 20
FUNCTIONS_MAX = 10_000  # versions; agents are told of all of them


class FunctionCatalogue(function_pb2_grpc.FunctionServiceServicer):
    """Every version in memory, code in the store."""

    def __init__(self, store: Store, profile: Callable[[FunctionId], FunctionProfile]) -> None:
        """Load what the store holds.

        Args:
            store: Where functions are kept.
            profile: What has been learnt of a function.
        """
        self._store = store
        self._profile = profile
        self._specs: dict[FunctionId, FunctionSpec] = {}
        self._created: dict[FunctionId, float] = {}
        self._deploying = asyncio.Lock()  # equal deployments at the same time are one version
        self.revision = int(wall_s() * 1000)  # higher at each start
        self.on_changed: Callable[[], None] = lambda: None
        # How a function's memory follows its input, if that is known.
        self.sizing: Callable[[FunctionId], Sizing | None] = lambda _: None
        self.nodes: Callable[[], Iterable[Node]] = tuple
        self.environments: Callable[[str], list[function_pb2.NodeEnvironment]] = lambda digest: []
        for row in store.read_now(lambda c: c.execute(select(functions)).mappings().all()):
            try:
                spec = convert.spec_from_pb(types_pb2.FunctionSpec.FromString(row["spec"]))
            except InvalidArgument as error:  # an older version has taken it
                log.error("function.not_loaded", function=row["name"], cause=str(error))
                continue
            self._specs[spec.function_id] = spec
            self._created[spec.function_id] = row["created_unix_s"]

    def find(self, function: str) -> FunctionSpec:
        """Return the version that `name`, `ns/name` or `ns/name@version` means.

        Raises:
            InvalidArgument: It is no function name.
            NotFound: There is no such function.
        """
        namespace, name, version = _split(function)
        if version is not None:
            spec = self._specs.get(function_id(namespace, name, version))
        else:
            spec = max(self._versions(namespace, name), key=lambda s: s.version, default=None)
        if spec is None:
            raise NotFound(
                f"there is no function {function!r}; `tierwise get functions` lists what there is"
            )
        return spec

    def to_pb(self) -> types_pb2.Catalogue:
        """Return the whole catalogue as agents get it."""
        return types_pb2.Catalogue(
            revision=self.revision,
            functions=[convert.spec_to_pb(spec) for spec in self._specs.values()],
            profiles={str(key): convert.profile_to_pb(self._profile(key)) for key in self._specs},
            sizings={
                str(key): convert.sizing_to_pb(sizing)
                for key in self._specs
                if (sizing := self.sizing(key)) is not None
            },
        )

    def sizings_changed(self) -> None:
        """Have agents told of what `sizing` says now."""
        self._changed()

    async def resize(
        self, spec: FunctionSpec, *, memory_mib: int, is_memory_auto: bool
    ) -> tuple[FunctionSpec, bool]:
        """Deploy the code of `spec` with other memory; return the version and whether it is new.

        Raises:
            NotFound: Its code is gone.
        """
        query = select(code.c.content).where(code.c.digest == spec.code_digest)
        content = await self._store.read(lambda c: c.scalar(query))
        if content is None:
            raise NotFound(f"the code of {spec.function_id} is gone; deploy it again")
        asked = replace(spec, memory_mib=memory_mib, is_memory_auto=is_memory_auto)
        async with self._deploying:
            newest = self.find(f"{spec.namespace}/{spec.name}")
            if replace(asked, version=newest.version) == newest:
                return newest, False
            return await self._add(asked, content), True

    # -- RPCs -----------------------------------------------------------------------------------

    async def DeployFunction(
        self, request: function_pb2.DeployFunctionRequest, context: Any
    ) -> function_pb2.DeployFunctionResponse:
        content = request.code
        if not content:
            raise InvalidArgument("code is empty")
        if len(content) > CODE_BYTES_MAX:
            raise PayloadTooLarge(
                f"the code has {len(content)} bytes, the limit is {CODE_BYTES_MAX}: keep data out "
                "of the function and pass it as an argument"
            )
        wanted = request.spec
        wanted.code_digest = await asyncio.to_thread(lambda: hashlib.sha256(content).hexdigest())
        wanted.version = 1
        asked = convert.spec_from_pb(wanted)  # checks every field
        _check_python(asked, self.nodes())
        async with self._deploying:
            for known in self._versions(asked.namespace, asked.name):
                if replace(asked, version=known.version) == known:
                    return function_pb2.DeployFunctionResponse(spec=convert.spec_to_pb(known))
            spec = await self._add(asked, content)
        return function_pb2.DeployFunctionResponse(spec=convert.spec_to_pb(spec), is_new=True)

    async def ListFunctions(
        self, request: function_pb2.ListFunctionsRequest, context: Any
    ) -> function_pb2.ListFunctionsResponse:
        newest: dict[tuple[str, str], FunctionSpec] = {}
        for spec in sorted(self._specs.values(), key=lambda s: s.version):
            if request.namespace in ("", spec.namespace):
                newest[spec.namespace, spec.name] = spec
        return function_pb2.ListFunctionsResponse(
            functions=[self._describe(newest[key]) for key in sorted(newest)]
        )

    async def GetFunction(
        self, request: function_pb2.GetFunctionRequest, context: Any
    ) -> function_pb2.GetFunctionResponse:
        return self._describe(self.find(request.function))

    async def ListFunctionVersions(
        self, request: function_pb2.ListFunctionVersionsRequest, context: Any
    ) -> function_pb2.ListFunctionVersionsResponse:
        newest = self.find(request.function)
        versions = self._versions(newest.namespace, newest.name)
        versions.sort(key=lambda spec: -spec.version)
        return function_pb2.ListFunctionVersionsResponse(
            versions=[convert.spec_to_pb(spec) for spec in versions]
        )

    async def DeleteFunction(
        self, request: function_pb2.DeleteFunctionRequest, context: Any
    ) -> function_pb2.DeleteFunctionResponse:
        namespace, name, version = _split(request.function)
        gone = [s for s in self._versions(namespace, name) if version in (None, s.version)]
        if not gone:  # idempotent: what is gone already is as it should be
            return function_pb2.DeleteFunctionResponse(deleted_count=0)
        kept = {s.code_digest for s in self._specs.values() if s not in gone}

        def remove(connection: Connection) -> None:
            for spec in gone:
                connection.execute(
                    delete(functions)
                    .where(functions.c.namespace == spec.namespace)
                    .where(functions.c.name == spec.name)
                    .where(functions.c.version == spec.version)
                )
                if spec.code_digest not in kept:
                    connection.execute(delete(code).where(code.c.digest == spec.code_digest))

        def removed(_: None) -> None:
            for spec in gone:
                self._specs.pop(spec.function_id, None)
                self._created.pop(spec.function_id, None)
            self._changed()

        async with self._deploying:
            await self._store.write(remove, on_stored=removed)
        return function_pb2.DeleteFunctionResponse(deleted_count=len(gone))

    async def GetCode(
        self, request: function_pb2.GetCodeRequest, context: Any
    ) -> function_pb2.GetCodeResponse:
        query = select(code.c.content).where(code.c.digest == request.code_digest)
        content = await self._store.read(lambda c: c.scalar(query))
        if content is None:
            raise NotFound(f"there is no code {request.code_digest[:12]}…")
        return function_pb2.GetCodeResponse(code=content)

    async def _add(self, asked: FunctionSpec, content: bytes) -> FunctionSpec:
        """Store the next version and tell of it; the caller holds `_deploying`.

        Raises:
            FailedPrecondition: There are too many.
        """
        if len(self._specs) >= FUNCTIONS_MAX:
            raise FailedPrecondition(
                f"there are {FUNCTIONS_MAX} function versions; delete some with "
                "`tierwise delete function`"
            )
        created_unix_s = wall_s()

        def added(spec: FunctionSpec) -> None:
            self._specs[spec.function_id] = spec
            self._created[spec.function_id] = created_unix_s
            self._changed()

        return await self._store.write(
            lambda c: self._insert(c, asked, content, created_unix_s), on_stored=added
        )

    def _insert(
        self, connection: Connection, asked: FunctionSpec, content: bytes, created_unix_s: float
    ) -> FunctionSpec:
        """Store code and declaration under the next version of their name."""
        names = function_names
        where = (names.c.namespace == asked.namespace) & (names.c.name == asked.name)
        version = (connection.scalar(select(names.c.last_version).where(where)) or 0) + 1
        spec = replace(asked, version=version)
        connection.execute(
            self._store.insert(names)
            .values(namespace=spec.namespace, name=spec.name, last_version=version)
            .on_conflict_do_update(
                index_elements=["namespace", "name"], set_={"last_version": version}
            )
        )
        connection.execute(
            self._store.insert(code)
            .values(digest=spec.code_digest, content=content)
            .on_conflict_do_nothing()
        )
        connection.execute(
            functions.insert().values(
                namespace=spec.namespace,
                name=spec.name,
                version=version,
                spec=convert.spec_to_pb(spec).SerializeToString(),
                created_unix_s=created_unix_s,
            )
        )
        return spec

    def _describe(self, spec: FunctionSpec) -> function_pb2.GetFunctionResponse:
        return function_pb2.GetFunctionResponse(
            spec=convert.spec_to_pb(spec),
            profile=convert.profile_to_pb(self._profile(spec.function_id)),
            created_unix_s=self._created.get(spec.function_id, 0.0),
            environments=self.environments(spec.requirements_digest) if spec.requirements else (),
        )

    def _versions(self, namespace: str, name: str) -> list[FunctionSpec]:
        return [s for s in self._specs.values() if s.namespace == namespace and s.name == name]

    def _changed(self) -> None:
        self.revision += 1
        self.on_changed()


def _check_python(spec: FunctionSpec, nodes: Iterable[Node]) -> None:
    """Refuse code that no node there is can load.

    Raises:
        FailedPrecondition: Every node of its tiers has another minor version of Python.
    """
    there = {node.python_version for node in nodes if node.tier in spec.tiers}
    may_do = {spec.python_version, ""}  # a node that does not say may have it
    if not spec.python_version or not there or there & may_do:
        return
    raise FailedPrecondition(
        f"{spec.name} was packed by Python {spec.python_version}, which only that minor version "
        f"can load; the nodes that may run it have {', '.join(sorted(there))}: deploy it with one "
        "of these"
    )


def _split(function: str) -> tuple[str, str, int | None]:
    try:
        return split_function_id(function)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
