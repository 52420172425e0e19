"""A real scheduler process, and an agent that speaks the real Session stream but runs nothing."""

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import msgspec

from tierwise.errors import TierwiseError
from tierwise.v1 import (
    call_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    function_pb2,
    function_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    policy_pb2_grpc,
    types_pb2,
    work_pb2,
    work_pb2_grpc,
)
from tierwise.wire.channel import secure_channel
from tierwise.wire.errors import error_from_rpc
from tierwise.wire.identity import Credentials, join, scheduler_dns_name

PATIENCE_S = 20.0
T = TypeVar("T")


class SchedulerProcess:
    """`python -m scheduler.daemon` on loopback; the same state folder and ports at each start."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.state = folder / "state"
        self.config = folder / "scheduler.toml"
        values = {
            "state_dir": str(self.state),
            "listen": "127.0.0.1:0",
            "join_listen": "127.0.0.1:0",
            "heartbeat_interval_s": 0.2,
            "policy": "ect",
            **settings,
        }
        self.config.write_bytes(msgspec.toml.encode(values))
        self.log = folder / "scheduler.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.main = self.join = ""

    def start(self) -> "SchedulerProcess":
        (self.state / "address").unlink(missing_ok=True)
        command = [sys.executable, "-m", "scheduler.daemon", "--config", str(self.config)]
        if self.main:
            command += ["--listen", self.main, "--join-listen", self.join]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        ends_s = time.monotonic() + PATIENCE_S
        while not (self.state / "address").exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < ends_s, self.log.read_text()
            time.sleep(0.02)
        address = msgspec.toml.decode((self.state / "address").read_bytes())
        self.main, self.join = address["main"], address["join"]
        return self

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    @property
    def admin(self) -> Credentials:
        return Credentials.load(self.state / "admin")


class Client:
    """Every service of the main port, with one identity."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.functions = function_pb2_grpc.FunctionServiceStub(channel)
        self.work = work_pb2_grpc.WorkServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        self.policies = policy_pb2_grpc.PolicyServiceStub(channel)
        self.calls = call_pb2_grpc.CallServiceStub(channel)
        self.nodes = node_pb2_grpc.NodeServiceStub(channel)

    async def deploy(
        self, name: str = "f", code: bytes = b"code", **changes: Any
    ) -> types_pb2.FunctionSpec:
        response = await self.functions.DeployFunction(
            function_pb2.DeployFunctionRequest(spec=spec_pb(name, **changes), code=code), timeout=10
        )
        return response.spec

    async def submit(
        self, *names: str, function: str = "f", key: str = "", **fields: Any
    ) -> list[str]:
        submissions = [
            work_pb2.Submission(
                invocation=invocation(name, function, **fields), idempotency_key=key
            )
            for name in names
        ]
        response = await self.work.Submit(
            work_pb2.SubmitRequest(submissions=submissions), timeout=10
        )
        return list(response.request_ids)

    async def result(self, request_id: str, wait_s: float = 10.0) -> work_pb2.GetResultResponse:
        request = work_pb2.GetResultRequest(request_id=request_id, wait_s=wait_s)
        return await self.work.GetResult(request, timeout=wait_s + 5)

    async def state(self, request_id: str) -> int:
        return (await self.result(request_id, 0.0)).work.state

    async def token(self, role: "cluster_pb2.Role.ValueType", name: str = "") -> str:
        request = cluster_pb2.CreateTokenRequest(role=role, name=name, ttl_s=60)
        return (await self.cluster.CreateToken(request, timeout=5)).token


@asynccontextmanager
async def connected(main: str, credentials: Credentials) -> AsyncIterator[Client]:
    async with secure_channel(main, credentials, scheduler_dns_name()) as channel:
        yield Client(channel)


async def refused_session(
    main: str, credentials: Credentials, hello: node_pb2.SessionRequest
) -> TierwiseError:
    """Open a session that is refused; return the error, whichever call it comes from."""
    for _ in range(10):
        async with connected(main, credentials) as client:
            call = client.nodes.Session()
            try:
                await call.write(hello)
                while isinstance(await call.read(), node_pb2.SessionResponse):
                    pass
            except grpc.RpcError as failure:
                error = error_from_rpc(failure)
                # A write that meets the refusal half way hides it: grpc.aio says only this.
                if "Internal error from Core" not in str(error):
                    return error
    raise AssertionError("the session was not refused")


@asynccontextmanager
async def user_of(
    scheduler: SchedulerProcess, role: "cluster_pb2.Role.ValueType", name: str = ""
) -> AsyncIterator[Client]:
    """Join with a fresh token and connect."""
    name = name or f"u{uuid.uuid4().hex[:8]}"
    async with connected(scheduler.main, scheduler.admin) as admin:
        credentials, _, _ = await join(scheduler.join, await admin.token(role), name)
    async with connected(scheduler.main, credentials) as client:
        yield client


class FakeAgent:
    """Holds one session; remembers what it was told, does what the test says."""

    def __init__(self, name: str, credentials: Credentials, main: str, cpus: float = 2.0) -> None:
        self.name = name
        self.credentials = credentials
        self.main = main
        self.cpus = cpus
        self.sequence = int(time.time() * 1000)
        self.held: dict[str, int] = {}
        self.inbox: deque[node_pb2.SessionResponse] = deque()
        self.news = asyncio.Event()
        self.ended = asyncio.Event()
        self.end_error: BaseException | None = None
        self.writing = asyncio.Lock()

    async def __aenter__(self) -> "FakeAgent":
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.disconnect()

    async def connect(self, *, held: Sequence[tuple[str, int]] | None = None) -> None:
        """Open a session and say hello."""
        self.ended.clear()
        self.channel = secure_channel(self.main, self.credentials, scheduler_dns_name())
        self.client = Client(self.channel)
        self.call = self.client.nodes.Session()
        await self.call.write(self.hello(held))
        self._tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._beat())]
        await self.told("welcome")

    def hello(self, held: Sequence[tuple[str, int]] | None = None) -> node_pb2.SessionRequest:
        leases = list(self.held.items()) if held is None else list(held)
        return node_pb2.SessionRequest(
            hello=node_pb2.Hello(
                node=types_pb2.Node(
                    node_id=self.name,
                    tier=types_pb2.TIER_FOG,
                    capacity=types_pb2.Resources(cpus=self.cpus, memory_mib=4096),
                    speed=1.0,
                    address="127.0.0.1:1",
                ),
                version="0",
                leases=[node_pb2.Lease(request_id=key, lease=lease) for key, lease in leases],
            )
        )

    async def disconnect(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.call.cancel()
        await self.channel.close()

    async def told(
        self, kind: str, where: Callable[[Any], bool] = lambda body: True, timeout_s: float = 10.0
    ) -> Any:
        """Return the next message of a kind for which `where` holds, dropping those before."""
        async with asyncio.timeout(timeout_s):
            while True:
                while self.inbox:
                    message = self.inbox.popleft()
                    if message.WhichOneof("body") == kind and where(getattr(message, kind)):
                        return getattr(message, kind)
                self.news.clear()
                await self.news.wait()

    async def dispatched(self) -> types_pb2.Invocation:
        invocation: types_pb2.Invocation = await self.told("dispatch")
        return invocation

    async def finish(self, invocation: types_pb2.Invocation, **changes: Any) -> None:
        """Send a result; OK with the first argument as value unless `changes` say otherwise."""
        await self.send(
            node_pb2.SessionRequest(work_result=result_pb(invocation, self.name, **changes))
        )

    async def send(self, message: node_pb2.SessionRequest) -> None:
        async with self.writing:  # a stream takes one write at a time
            await self.call.write(message)

    async def report(
        self, *outcomes: types_pb2.Outcome, log: str = "", ended_ago_s: float = 0.0
    ) -> None:
        """Send a heartbeat with call reports."""
        reports = [
            node_pb2.CallReport(
                outcome=o, log=log, caller="tierwise://user/u", ended_ago_s=ended_ago_s
            )
            for o in outcomes
        ]
        await self.send(node_pb2.SessionRequest(heartbeat=self._heartbeat(reports)))

    def _heartbeat(self, calls: Sequence[node_pb2.CallReport] = ()) -> node_pb2.Heartbeat:
        self.sequence += 1
        free = types_pb2.Resources(cpus=self.cpus, memory_mib=4096)
        return node_pb2.Heartbeat(
            reading=types_pb2.NodeReading(sequence=self.sequence, free=free),
            host=types_pb2.HostReading(cpu_percent=12.5),
            calls=calls,
            policy_id="ect@1",
        )

    async def _beat(self) -> None:
        while True:
            await self.send(node_pb2.SessionRequest(heartbeat=self._heartbeat()))
            await asyncio.sleep(0.1)

    async def _read(self) -> None:
        try:
            while True:
                message = await self.call.read()
                if not isinstance(message, node_pb2.SessionResponse):
                    break
                if message.WhichOneof("body") == "dispatch":
                    self.held[message.dispatch.request_id] = message.dispatch.lease
                elif message.WhichOneof("body") == "work_ack":
                    self.held.pop(message.work_ack.request_id, None)
                self.inbox.append(message)
                self.news.set()
        except grpc.RpcError as error:
            self.end_error = error
        finally:
            self.ended.set()


async def agent_of(scheduler: SchedulerProcess, name: str, **changes: Any) -> FakeAgent:
    """Join a node; the caller connects it with `async with`."""
    async with connected(scheduler.main, scheduler.admin) as admin:
        token = await admin.token(cluster_pb2.ROLE_NODE, name)
    credentials, main, _ = await join(scheduler.join, token, name)
    return FakeAgent(name, credentials, main, **changes)


def spec_pb(name: str = "f", **changes: Any) -> types_pb2.FunctionSpec:
    spec = types_pb2.FunctionSpec(
        namespace="default",
        name=name,
        memory_mib=64,
        cpus=1.0,
        timeout_s=60.0,
        deadline_s=1.0,
        priority=types_pb2.PRIORITY_NORMAL,
        instances_max=16,
        keep_alive_s=60.0,
        retries_max=1,
    )
    spec.MergeFrom(types_pb2.FunctionSpec(**changes))
    return spec


def invocation(request_id: str, function: str = "f", **fields: Any) -> types_pb2.Invocation:
    fields.setdefault("arguments", [request_id.encode()])
    return types_pb2.Invocation(request_id=request_id, function=function, **fields)


def outcome_pb(request_id: str, node_id: str, **changes: Any) -> types_pb2.Outcome:
    fields: dict[str, Any] = {
        "request_id": request_id,
        "function_id": "default/f@1",
        "state": types_pb2.OUTCOME_STATE_OK,
        "origin": node_id,
        "node_id": node_id,
        "latency": types_pb2.LatencySplit(run_s=0.25),
        "deadline_s": 1.0,
        "priority": types_pb2.PRIORITY_NORMAL,
        "item_count": 1,
        "memory_mib": 64,
        "gb_s": 64 / 1024 * 0.25,
        "money_usd": 1e-6,
        **changes,
    }
    return types_pb2.Outcome(**fields)


def result_pb(
    invocation: types_pb2.Invocation, node_id: str, *, value: bytes = b"", **changes: Any
) -> types_pb2.InvocationResult:
    changes.setdefault("function_id", invocation.function)
    changes.setdefault("item_count", len(invocation.arguments))
    outcome = outcome_pb(invocation.request_id, node_id, lease=invocation.lease, **changes)
    items = [
        types_pb2.Item(error_code=outcome.error_code, message=outcome.message)
        if outcome.error_code
        else types_pb2.Item(value=value or argument)
        for argument in invocation.arguments
    ]
    return types_pb2.InvocationResult(
        request_id=invocation.request_id, items=items, outcome=outcome, log="printed"
    )
