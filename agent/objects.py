"""Calls that read objects of caches and put their results there: the bytes stay where they lie.

What a call reads becomes files that its worker maps: of this node's own cache as they are, of
another node's after one copy over the network. What it returns goes into a cache, here or there,
and its caller gets a receipt.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import structlog

from agent.cache.putting import Outgoing, Putting
from agent.cache.reach import Reach
from agent.runtime.instance import ItemKind, ItemResult, RunReport
from tierwise.clock import monotonic_s
from tierwise.domain.cache import ObjectInfo, ObjectKey, ObjectKind, most_bytes
from tierwise.domain.ids import NodeId
from tierwise.domain.request import Request
from tierwise.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ResultRejected,
    TierwiseError,
)
from tierwise.v1 import cache_pb2, types_pb2
from tierwise.wire import payload
from tierwise.wire.convert_cache import (
    check_objects,
    durability_from_pb,
    key_from_pb,
    metadata_to_bytes,
)
from tierwise.wire.memfd import Memfd

log = structlog.get_logger()

SINK_TIMEOUT_S = 120.0

OnDone = Callable[[RunReport], None]
Start = Callable[[Sequence[Memfd], float, OnDone], None]


@dataclass(frozen=True, slots=True)
class Cached:
    """What one call reads from caches, and where its result goes."""

    inputs: tuple[cache_pb2.ObjectRef, ...]
    output: cache_pb2.ObjectSink | None

    @classmethod
    def of(cls, invocation: types_pb2.Invocation, caller: str = "") -> "Cached | None":
        """Return what an invocation says, or None if it has nothing to do with caches.

        Args:
            invocation: As it came.
            caller: Who reads and puts, if not a node that says for whom it does.

        Raises:
            InvalidArgument: A field is wrong; the message names it.
        """
        if not check_objects(invocation, caller):
            return None
        has_output = invocation.HasField("output")
        return cls(tuple(invocation.inputs), invocation.output if has_output else None)

    def fill(self, invocation: types_pb2.Invocation) -> None:
        """Say it in an invocation that passes the call on."""
        invocation.inputs.extend(self.inputs)
        if self.output is not None:
            invocation.output.CopyFrom(self.output)


class Carried:
    """One run on its way: fetching, running, putting. It ends in exactly one report."""

    def __init__(self, on_done: OnDone, item_count: int) -> None:
        self.task: asyncio.Task[None] | None = None
        self.is_running = False
        self._on_done = on_done
        self._item_count = item_count
        self._is_over = False

    def cut(self) -> bool:
        """End it as cancelled; return False if it is with the worker, which must be killed."""
        if self.is_running or self._is_over:
            return False
        if self.task is not None:
            self.task.cancel()
        killed = ItemResult(ItemKind.CANCELLED, message="cancelled")
        self.end(_report([killed] * self._item_count))
        return True

    def end(self, report: RunReport) -> None:
        """Deliver the report, once."""
        if not self._is_over:
            self._is_over = True
            self._on_done(report)


class CallObjects:
    """Brings calls their objects, and puts away what they return."""

    def __init__(self, reach: Reach, putting: Putting, group: asyncio.TaskGroup) -> None:
        self._reach = reach
        self._putting = putting
        self._group = group

    def holders(self, cached: Cached, argument: bytes) -> tuple[tuple[NodeId, ...], int]:
        """Return the nodes that hold most of what a call reads, and how many bytes it reads."""
        sizes = payload.detached_bytes(argument)
        rows = [
            (self._reach.holders(key_from_pb(ref.key), NodeId(ref.node_id)), size_bytes)
            for ref, size_bytes in zip(cached.inputs, sizes, strict=False)
        ]
        return most_bytes(rows), sum(sizes)

    def carry(
        self,
        cached: Cached,
        arguments: Sequence[bytes],
        timeout_s: float,
        start: Start,
        on_done: OnDone,
    ) -> Carried:
        """Run a call with its objects.

        Args:
            cached: What it reads, and where its result goes.
            arguments: Its encoded argument set.
            timeout_s: How long fetching and running may take.
            start: Runs it: with these files, in this time, and who gets the report.
            on_done: Gets the report, once, never before this returns.
        """
        carried = Carried(on_done, len(arguments))
        run = self._guarded(carried, cached, arguments, timeout_s, start)
        carried.task = self._group.create_task(run)
        return carried

    async def _guarded(
        self,
        carried: Carried,
        cached: Cached,
        arguments: Sequence[bytes],
        timeout_s: float,
        start: Start,
    ) -> None:
        """Run; a bug here ends the call, not the agent."""
        try:
            await self._run(carried, cached, arguments, timeout_s, start)
        except Exception:
            log.exception("call.objects_crashed")
            error = TierwiseError("its objects could not be handled; see the agent's log")
            carried.end(_report([_failed(error)] * len(arguments)))

    async def _run(
        self,
        carried: Carried,
        cached: Cached,
        arguments: Sequence[bytes],
        timeout_s: float,
        start: Start,
    ) -> None:
        ends_s = monotonic_s() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                files = await self._fetch(cached, arguments[0])
        except TimeoutError:
            late = DeadlineExceeded(
                f"what it reads did not come within {timeout_s:.3g} s: allow a longer timeout"
            )
            carried.end(_report([_failed(late)] * len(arguments)))
            return
        except TierwiseError as error:
            carried.end(_report([_failed(error)] * len(arguments)))
            return
        done: asyncio.Future[RunReport] = asyncio.get_running_loop().create_future()
        carried.is_running = True
        start(files, max(0.001, ends_s - monotonic_s()), done.set_result)
        report = await done
        carried.is_running = False
        del files
        if cached.output is not None and report.items[0].kind is ItemKind.OK:
            report = await self._sink(cached.output, report)
        carried.end(report)

    async def _fetch(self, cached: Cached, argument: bytes) -> list[Memfd]:
        """Return the files of what a call reads.

        Raises:
            TierwiseError: One is nowhere, may not be read, or has another size than was said.
        """
        wanted = payload.detached_bytes(argument)
        if len(wanted) != len(cached.inputs):
            raise InvalidArgument(
                f"the arguments lack {len(wanted)} arrays, and inputs names {len(cached.inputs)}"
            )
        reads = [
            self._reach.read(key_from_pb(ref.key), ref.caller, near=NodeId(ref.node_id))
            for ref in cached.inputs
        ]
        found = [await reads[0]] if len(reads) == 1 else await _all(reads)
        for ref, (file, _), size_bytes in zip(cached.inputs, found, wanted, strict=True):
            if file.nbytes != size_bytes:
                raise FailedPrecondition(
                    f"{key_from_pb(ref.key)} has {file.nbytes} bytes, and the call expects "
                    f"{size_bytes}: make the reference anew"
                )
        return [file for file, _ in found]

    async def _sink(self, sink: cache_pb2.ObjectSink, report: RunReport) -> RunReport:
        """Put a result where it should go; the report has a receipt in its place."""
        try:
            async with asyncio.timeout(SINK_TIMEOUT_S):
                item = await self._put(sink, report.items[0])
        except TimeoutError:
            item = _failed(
                DeadlineExceeded(f"its result was not taken within {SINK_TIMEOUT_S:.0f} s")
            )
        except TierwiseError as error:
            item = _failed(error)
        return replace(report, items=(item,))

    async def _put(self, sink: cache_pb2.ObjectSink, item: ItemResult) -> ItemResult:
        key = key_from_pb(sink.key)
        vector, metadata = _parts(key, item)
        relative_to = key_from_pb(sink.relative_to) if sink.HasField("relative_to") else None
        outgoing = Outgoing(
            key=key,
            vector=vector,
            metadata=metadata,
            durability=durability_from_pb(sink.durability),
            writer=sink.caller,
            encoding=sink.encoding,
            relative_to=relative_to,
        )
        info = await self._putting.put(outgoing, NodeId(sink.node_id))
        return ItemResult(ItemKind.OK, payload.encode(receipt(info, metadata)))


def placed(
    request: Request, cached: Cached, argument: bytes, objects: CallObjects | None
) -> Request:
    """Return the request with where its data lies, if nobody has said so, and how much that is."""
    if objects is None or not cached.inputs or request.data_nodes:
        return request
    nodes, size_bytes = objects.holders(cached, argument)
    return replace(request, data_nodes=nodes, data_bytes=size_bytes)


def receipt(info: ObjectInfo, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what the caller of a call gets in place of its result."""
    return {
        **metadata,
        "digest": info.digest,
        "size_bytes": info.size_bytes,
        "node_id": info.node_ids[0] if info.node_ids else "",
        "durability": info.durability.name.lower(),
        "quarantined": info.quarantined,
    }


def _parts(key: ObjectKey, item: ItemResult) -> tuple[Any, dict[str, Any]]:
    """Return the bytes of a result, uncopied, and its metadata.

    Raises:
        ResultRejected: It is not (vector, dict), or for metadata not a dict.
    """
    try:
        value = payload.decode(item.value, [file.view() for file in item.attachments])
    except ValueError as error:  # only a worker that was tampered with says such things
        raise ResultRejected(f"the result is none: {error}") from None
    if key.kind is ObjectKind.METADATA:
        if not isinstance(value, dict):
            raise ResultRejected("the result goes into the cache as metadata: return a dict")
        return metadata_to_bytes(value), {}
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    vector, metadata = value if is_pair else (value, {})
    is_vector = isinstance(vector, np.ndarray) and vector.dtype == np.float32 and vector.ndim == 1
    if not is_vector or not isinstance(metadata, dict):
        raise ResultRejected(
            f"the result goes into the cache as {key}: return (vector, dict), a one-dimensional "
            "float32 array and small facts such as example_count"
        )
    return vector, metadata


async def _all(reads: list[Any]) -> list[Any]:
    """Await several reads side by side; the first error ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read) for read in reads]
    except* TierwiseError as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _failed(error: TierwiseError) -> ItemResult:
    return ItemResult(ItemKind.NO_OBJECT, message=error.message, error_code=error.code)


def _report(items: Sequence[ItemResult]) -> RunReport:
    return RunReport(
        items=tuple(items), run_s=0, peak_memory_mib=0, cpu_s=0, log="", instance_alive=True
    )
