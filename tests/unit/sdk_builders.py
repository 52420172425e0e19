"""A small cluster for the SDK's tests: real gRPC and real mTLS, but answers made to measure."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from scheduler.authority import Authority
from tierwise.config import ClientConfig, dump
from tierwise.errors import NotFound, TierwiseError
from tierwise.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    function_pb2,
    function_pb2_grpc,
    invocation_pb2,
    invocation_pb2_grpc,
    types_pb2,
    work_pb2,
    work_pb2_grpc,
)
from tierwise.wire import payload
from tierwise.wire.channel import new_server, server_credentials
from tierwise.wire.errors import ErrorInterceptor, item_from_error
from tierwise.wire.identity import Identity, Role

Answer = Callable[[types_pb2.Invocation], types_pb2.InvocationResult | None]


def echo(invocation: types_pb2.Invocation) -> types_pb2.InvocationResult:
    """Answer each item with its first argument, in 1 ms of run time for all."""
    items = [
        types_pb2.Item(value=payload.encode(payload.decode(blob)[0][0]))
        for blob in invocation.arguments
    ]
    return answer(invocation, items, run_s=0.001)


def answer(
    invocation: types_pb2.Invocation, items: list[types_pb2.Item], *, run_s: float = 0.0
) -> types_pb2.InvocationResult:
    outcome = types_pb2.Outcome(
        request_id=invocation.request_id,
        state=types_pb2.OUTCOME_STATE_OK,
        latency=types_pb2.LatencySplit(run_s=run_s),
    )
    return types_pb2.InvocationResult(
        request_id=invocation.request_id, items=items, outcome=outcome
    )


def failure(invocation: types_pb2.Invocation, error: TierwiseError) -> types_pb2.InvocationResult:
    return answer(invocation, [item_from_error(error)] * len(invocation.arguments))


@dataclass
class FakeAgent(invocation_pb2_grpc.InvocationServiceServicer):
    """Answers invocations with `reply`; None as an answer means silence."""

    name: str
    reply: Answer = echo
    is_breaking: bool = False  # end every stream at its first message
    refusal: grpc.StatusCode | None = None  # end every stream at once with this
    seen: list[types_pb2.Invocation] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    message_sizes: list[int] = field(default_factory=list)
    stream_count: int = 0
    server: grpc.aio.Server | None = None
    port: int = 0
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    async def InvokeStream(
        self,
        request_iterator: AsyncIterator[invocation_pb2.InvokeStreamRequest],
        context: Any,
    ) -> None:
        self.stream_count += 1
        if self.refusal is not None:
            await context.abort(self.refusal, "you may not")
        async for message in request_iterator:
            self.message_sizes.append(len(message.invocations))
            self.seen.extend(message.invocations)
            self.cancels.extend(message.cancels)
            self.heard.set()
            if self.is_breaking:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
            answers = [self.reply(invocation) for invocation in message.invocations]
            results = [result for result in answers if result is not None]
            if results:
                await context.write(invocation_pb2.InvokeStreamResponse(results=results))

    async def start(self, authority: Authority) -> None:
        own = server_credentials(authority.issue(Identity(Role.NODE, self.name)))
        self.server = new_server([ErrorInterceptor()])
        invocation_pb2_grpc.add_InvocationServiceServicer_to_server(self, self.server)
        self.port = self.server.add_secure_port(f"127.0.0.1:{self.port}", own)
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(grace=None)
            self.server = None


@dataclass
class FakeScheduler(
    cluster_pb2_grpc.ClusterServiceServicer,
    function_pb2_grpc.FunctionServiceServicer,
    work_pb2_grpc.WorkServiceServicer,
):
    """Lists agents, takes functions and work; remembers what it was asked."""

    agents: list[FakeAgent]
    deployed: dict[bytes, types_pb2.FunctionSpec] = field(default_factory=dict)
    deploy_count: int = 0
    submissions: list[work_pb2.Submission] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    fail_submits: int = 0  # this many answers are UNAVAILABLE although the work was taken
    work_states: list[Any] = field(default_factory=list)

    async def ListNodes(self, request: Any, context: Any) -> cluster_pb2.ListNodesResponse:
        return cluster_pb2.ListNodesResponse(
            nodes=[
                cluster_pb2.NodeInfo(
                    node=types_pb2.Node(
                        node_id=agent.name,
                        tier=types_pb2.Tier.Value(f"TIER_{agent.name.split('-')[0].upper()}"),
                        address=f"127.0.0.1:{agent.port}",
                        capacity=types_pb2.Resources(cpus=1, memory_mib=256),
                    ),
                    state=types_pb2.NODE_STATE_READY,
                )
                for agent in self.agents
            ]
        )

    async def DeployFunction(
        self, request: Any, context: Any
    ) -> function_pb2.DeployFunctionResponse:
        self.deploy_count += 1
        key = request.spec.SerializeToString(deterministic=True) + request.code
        known = self.deployed.get(key)
        if known is None:
            known = request.spec
            known.version = len(self.deployed) + 1
            known.code_digest = "d" * 64
            self.deployed[key] = known
        return function_pb2.DeployFunctionResponse(spec=known)

    async def Submit(self, request: Any, context: Any) -> work_pb2.SubmitResponse:
        self.submissions.extend(request.submissions)
        self.batch_sizes.append(len(request.submissions))
        if self.fail_submits:
            self.fail_submits -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        ids = [submission.invocation.request_id for submission in request.submissions]
        return work_pb2.SubmitResponse(request_ids=ids)

    async def GetResult(self, request: Any, context: Any) -> work_pb2.GetResultResponse:
        known = {s.invocation.request_id: s.invocation for s in self.submissions}
        if request.request_id not in known:
            raise NotFound(f"there is no work {request.request_id!r}")
        work = work_pb2.Work(request_id=request.request_id, state=work_pb2.WORK_STATE_SUCCEEDED)
        return work_pb2.GetResultResponse(work=work, result=echo(known[request.request_id]))

    async def Watch(self, request: Any, context: Any) -> None:
        for state in self.work_states:
            work = work_pb2.Work(request_id=request.request_id, state=state, attempt_count=1)
            await context.write(work_pb2.WatchResponse(work=work))


class FakeCluster:
    """A scheduler and agents on this loop, and a context folder for clients."""

    def __init__(self, folder: Path, *agents: FakeAgent) -> None:
        self.authority = Authority(folder / "authority")
        self.agents = list(agents)
        self.scheduler = FakeScheduler(self.agents)
        self.context = folder / "client"
        self._server: grpc.aio.Server | None = None
        self._port = 0

    async def __aenter__(self) -> "FakeCluster":
        for agent in self.agents:
            await agent.start(self.authority)
        await self.start_scheduler()
        self.authority.issue(Identity(Role.USER, "ada")).save(self.context)
        config = ClientConfig(scheduler=f"127.0.0.1:{self._port}")
        (self.context / "client.toml").write_bytes(dump(config))
        return self

    async def __aexit__(self, *_: object) -> None:
        for agent in self.agents:
            await agent.stop()
        await self.stop_scheduler()

    async def start_scheduler(self) -> None:
        own = server_credentials(self.authority.issue(Identity(Role.SCHEDULER, "scheduler")))
        self._server = new_server([ErrorInterceptor()])
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(self.scheduler, self._server)
        function_pb2_grpc.add_FunctionServiceServicer_to_server(self.scheduler, self._server)
        work_pb2_grpc.add_WorkServiceServicer_to_server(self.scheduler, self._server)
        self._port = self._server.add_secure_port(f"127.0.0.1:{self._port}", own)
        await self._server.start()

    async def stop_scheduler(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None
