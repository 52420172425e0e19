"""What is asked about a job as a whole: its objects, its statistics, and to forget it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import structlog

from agent.cache.answers import Answers
from agent.cache.holders import HolderIndex
from agent.cache.lists import merged
from agent.cache.own import OwnRounds
from agent.cache.peers import CachePeers
from agent.cache.putting import Putting
from agent.cache.reach import HOLDERS_TRIED_MAX, Reach
from agent.cache.rights import Rights
from agent.cache.store import CacheStore
from tierwise.clock import precise_s
from tierwise.domain.ids import NodeId
from tierwise.errors import InvalidArgument, NotFound, TierwiseError, Unavailable
from tierwise.v1 import cache_pb2
from tierwise.wire import checks, payload
from tierwise.wire.convert_cache import info_to_pb
from tierwise.wire.identity import Identity, Role, peer_identity

log = structlog.get_logger()


class Caller:
    """Who is at the other end, and for whom."""

    def __init__(self, context: Any, on_behalf: str = "") -> None:
        self.identity: Identity = peer_identity(context)
        self.is_node = self.identity.role is Role.NODE
        self.uri = on_behalf if self.is_node else self.identity.uri


class Overview:
    """Answers for one node, and asks the others where that is needed."""

    def __init__(
        self,
        store: CacheStore,
        own: OwnRounds,
        index: HolderIndex,
        peers: CachePeers,
        rights: Rights,
        reach: Reach,
        putting: Putting,
        node_id: NodeId,
    ) -> None:
        self._store = store
        self._own = own
        self._index = index
        self._peers = peers
        self._rights = rights
        self._reach = reach
        self._putting = putting
        self._here = node_id
        self._answers = Answers(store)

    # -- objects --------------------------------------------------------------------------------

    async def objects(
        self, request: cache_pb2.ListObjectsRequest, caller: Caller
    ) -> cache_pb2.ListObjectsResponse:
        """Return the objects that the caller may see."""
        is_owner: dict[tuple[str, str], bool] = {}
        found = []
        for info in self._store.list(request.namespace, request.job):
            job = info.key.namespace, info.key.job
            if job not in is_owner:
                is_owner[job] = self._rights.is_owner(caller.uri, *job)
            if is_owner[job]:
                found.append(info_to_pb(info))
        own = cache_pb2.ListObjectsResponse(objects=found, cache=self._reading())
        if not request.is_everywhere or caller.is_node:
            return own
        asked = cache_pb2.ListObjectsRequest(
            namespace=request.namespace, job=request.job, caller=caller.uri
        )
        others = await asyncio.gather(*(self._list_at(n, asked) for n in self._index.others()))
        return merged(own, others)

    async def _list_at(
        self, node_id: NodeId, request: cache_pb2.ListObjectsRequest
    ) -> cache_pb2.ListObjectsResponse:
        try:
            answer: cache_pb2.ListObjectsResponse = await self._peers.ask(
                node_id, "ListObjects", request
            )
        except TierwiseError as error:
            log.warning("cache.not_listed", node_id=node_id, cause=str(error))
            return cache_pb2.ListObjectsResponse()
        return answer

    def _reading(self) -> cache_pb2.CacheReading:
        reading = self._store.reading()
        return cache_pb2.CacheReading(
            memory_bytes=reading.memory_bytes,
            memory_bytes_max=reading.memory_bytes_max,
            disk_bytes=reading.disk_bytes,
            hit_count=reading.hit_count,
            miss_count=reading.miss_count,
            policies=dict(reading.policies),
            moved_bytes=self._peers.moved_bytes,
        )

    # -- statistics -----------------------------------------------------------------------------

    async def ask(
        self, request: cache_pb2.AskStatisticsRequest, caller: Caller
    ) -> cache_pb2.AskStatisticsResponse:
        """Return the answer to a question, from the node that has the statistics."""
        namespace = checks.name(request.namespace, "namespace")
        job = checks.name(request.job, "job")
        self._rights.check_owner(caller.uri, namespace, job)
        if not caller.is_node:
            holders = self._elsewhere(namespace, job, request.round)
            if holders:
                request.caller, request.is_forwarded = caller.uri, True
                return await self._ask_at(holders[:HOLDERS_TRIED_MAX], request)
        started_s = precise_s()
        arguments = _arguments(request.arguments)
        answer, number = await self._answers.of(
            namespace, job, request.round, request.question, arguments
        )
        return cache_pb2.AskStatisticsResponse(
            answer=payload.encode(answer, "the answer"),
            round=number,
            node_id=self._here,
            elapsed_s=precise_s() - started_s,
        )

    async def _ask_at(
        self, holders: Sequence[NodeId], request: cache_pb2.AskStatisticsRequest
    ) -> cache_pb2.AskStatisticsResponse:
        """Return the answer of the first holder that gives one."""
        failure: TierwiseError | None = None
        for node_id in holders:
            try:
                answer: cache_pb2.AskStatisticsResponse = await self._peers.ask(
                    node_id, "AskStatistics", request
                )
            except (NotFound, Unavailable) as error:
                failure = failure or error
                continue
            return answer
        raise failure or Unavailable("no node that holds the round answers", retry_after_s=1.0)

    def _elsewhere(self, namespace: str, job: str, number: int) -> Sequence[NodeId]:
        """Return which other nodes know the answer; none if this one does."""
        if number >= 0:
            return self._reach.elsewhere(namespace, job, number)
        elsewhere = self._index.newest(namespace, job)
        if elsewhere is None or elsewhere[:2] <= self._own.newest(namespace, job):
            return []
        return elsewhere[2]

    # -- the end --------------------------------------------------------------------------------

    async def forget(
        self, request: cache_pb2.ForgetJobRequest, caller: Caller
    ) -> cache_pb2.ForgetJobResponse:
        """Forget a job on every node that answers."""
        namespace = checks.name(request.namespace, "namespace")
        job = checks.name(request.job, "job")
        self._rights.check_owner(caller.uri, namespace, job)
        others = [] if caller.is_node else self._others(namespace, job)
        count = await self._store.forget(namespace, job, with_store=request.with_store)
        self._reach.forget(namespace, job)
        self._putting.forget(namespace, job)
        if others:
            request.caller = caller.uri
            count += sum(await asyncio.gather(*(self._forget_at(n, request) for n in others)))
        return cache_pb2.ForgetJobResponse(object_count=count)

    async def _forget_at(self, node_id: NodeId, request: cache_pb2.ForgetJobRequest) -> int:
        try:
            answer = await self._peers.ask(node_id, "ForgetJob", request)
        except TierwiseError as error:
            log.warning("cache.not_forgotten", node_id=node_id, cause=str(error))
            return 0
        return int(answer.object_count)

    def _others(self, namespace: str, job: str) -> list[NodeId]:
        """Return the nodes that hold something of a job, or may keep what calls have read."""
        holders = self._index.holders(namespace, job)
        return [*dict.fromkeys((*holders, *self._index.others()))]


def _arguments(blob: bytes) -> dict[str, Any]:
    try:
        found = payload.decode(blob) if blob else {}
    except payload.PayloadError as error:
        raise InvalidArgument(f"arguments: {error}") from None
    if not isinstance(found, dict):
        raise InvalidArgument("arguments: send a dict")
    return found
