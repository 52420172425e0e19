"""Federated jobs over a real scheduler process: kept over kill -9, told to who watches, guarded."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.scheduler_builders import (
    Client,
    FakeAgent,
    SchedulerProcess,
    agent_of,
    connected,
    spec_pb,
    user_of,
)
from tierwise.domain.federated import FederatedClient, JobSpec, Pace, Strategy, Topology
from tierwise.domain.ids import FunctionId, NodeId
from tierwise.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from tierwise.v1 import (
    cluster_pb2,
    federated_pb2,
    federated_pb2_grpc,
    function_pb2,
    node_pb2,
    types_pb2,
)
from tierwise.wire import payload
from tierwise.wire.convert_federated import job_spec_to_pb
from tierwise.wire.errors import error_from_rpc

DONE = federated_pb2.FEDERATED_ROUND_STATE_DONE
SUCCEEDED = federated_pb2.FEDERATED_JOB_STATE_SUCCEEDED
STOPPED = federated_pb2.FEDERATED_JOB_STATE_STOPPED
ROUNDS = 3


class FakeNode(FakeAgent):
    """Opens what rounds it is told, and answers calls as a cache would, once it `may_answer`."""

    def begin(self) -> None:
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.seen: list[types_pb2.Invocation] = []
        self.manifests: list[Any] = []
        self._answers: set[asyncio.Future[None]] = set()
        self._serving = asyncio.ensure_future(self._serve())

    async def _serve(self) -> None:
        while True:
            while self.inbox:
                message = self.inbox.popleft()
                match message.WhichOneof("body"):
                    case "open_round":
                        await self._open(message.open_round)
                    case "dispatch":
                        self.seen.append(message.dispatch)
                        self._answers.add(asyncio.ensure_future(self._answer(message.dispatch)))
            self.news.clear()
            await self.news.wait()

    async def _open(self, manifest: Any) -> None:
        self.manifests.append(manifest)
        opened = node_pb2.RoundOpened(
            namespace=manifest.namespace, job=manifest.job, round=manifest.round
        )
        await self.send(node_pb2.SessionRequest(round_opened=opened))

    async def _answer(self, invocation: types_pb2.Invocation) -> None:
        await self.may_answer.wait()
        value = payload.encode({"digest": "d", "example_count": 5, "loss": 0.25})
        await self.finish(invocation, value=value)

    async def disconnect(self) -> None:
        self._serving.cancel()
        await super().disconnect()


@pytest.fixture
def scheduler(tmp_path: Path) -> Any:
    process = SchedulerProcess(tmp_path).start()
    yield process
    if process.process is not None and process.process.poll() is None:
        process.end()


async def node_of(scheduler: SchedulerProcess, name: str) -> FakeNode:
    agent = await agent_of(scheduler, name)
    return FakeNode(agent.name, agent.credentials, agent.main)


def job(**changes: Any) -> federated_pb2.FederatedJobSpec:
    fields: dict[str, Any] = {
        "namespace": "default",
        "job": "digits",
        "client_function": FunctionId("default/client@1"),
        "aggregate_function": FunctionId("default/fold@1"),
        "clients": (
            FederatedClient(client="c1", node_id=NodeId("n1"), data={"path": "/a"}),
            FederatedClient(client="c2", node_id=NodeId("n1"), data=None),
        ),
        "parameter_count": 100,
        "round_count": ROUNDS,
        "initial_node": NodeId("n1"),
        **changes,
    }
    return job_spec_to_pb(JobSpec(**fields))


async def deploy(client: Client) -> None:
    for name in ("client", "fold"):
        spec = spec_pb(name)
        request = function_pb2.DeployFunctionRequest(spec=spec, code=name.encode())
        await client.functions.DeployFunction(request, timeout=10)


class Jobs:
    """The service as a caller has it, errors typed."""

    def __init__(self, client: Client) -> None:
        self.stub = federated_pb2_grpc.FederatedServiceStub(client.channel)

    async def call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self.stub, method)(request, timeout=15)
        except Exception as error:
            raise error_from_rpc(error) from None  # type: ignore[arg-type]

    async def create(self, spec: federated_pb2.FederatedJobSpec) -> Any:
        return await self.call("CreateJob", federated_pb2.CreateJobRequest(spec=spec))

    async def get(self, job: str = "digits") -> federated_pb2.GetJobResponse:
        request = federated_pb2.GetJobRequest(namespace="default", job=job)
        found: federated_pb2.GetJobResponse = await self.call("GetJob", request)
        return found

    async def until(
        self, holds: Callable[[federated_pb2.GetJobResponse], bool], job: str = "digits"
    ) -> federated_pb2.GetJobResponse:
        async with asyncio.timeout(30):
            while not holds(found := await self.get(job)):
                await asyncio.sleep(0.05)
        return found


async def test_a_job_runs_and_tells_of_every_round(scheduler: SchedulerProcess) -> None:
    node = await node_of(scheduler, "n1")
    async with connected(scheduler.main, scheduler.admin) as admin, node:
        node.begin()
        await deploy(admin)
        jobs = Jobs(admin)
        made = await jobs.create(job())
        assert made.is_new and made.job.owner == "tierwise://admin/admin"
        again = await jobs.create(job())
        assert not again.is_new, "the same content is the same job"
        request = federated_pb2.WatchJobRequest(namespace="default", job="digits")
        seen = [each async for each in jobs.stub.WatchJob(request, timeout=30)]
        assert seen[-1].job.state == SUCCEEDED and seen[-1].job.done_count == ROUNDS
        found = await jobs.get()
        assert [r.state for r in found.rounds] == [DONE] * ROUNDS
        assert found.rounds[0].metrics["loss"] == 0.25
        assert {u.client for u in found.rounds[0].updates} == {"c1", "c2"}
        listed = await jobs.call("ListJobs", federated_pb2.ListJobsRequest())
        assert [each.spec.job for each in listed.jobs] == ["digits"]
        # What a node is asked: in whose name, what it reads, where its result goes.
        manifest = node.manifests[0]
        assert manifest.owner == "tierwise://admin/admin" and manifest.base_node == "n1"
        asked = next(each for each in node.seen if ".client.c1" in each.request_id)
        assert asked.node_id == "n1" and asked.inputs[0].caller == "tierwise://admin/admin"
        assert asked.output.key.client == "c1" and asked.output.node_id == "n1"
        assert payload.detached_bytes(asked.arguments[0]) == [400]
        filled = [memoryview(bytes(400))]
        (arrays, arguments), _ = payload.decode(asked.arguments[0], filled)
        assert arrays[0].shape == (100,)
        assert arguments == {"client": "c1", "round": 1, "config": {}, "data": {"path": "/a"}}


async def test_after_kill_9_a_job_goes_on_and_asks_nobody_twice(
    scheduler: SchedulerProcess,
) -> None:
    node = await node_of(scheduler, "n1")
    async with connected(scheduler.main, scheduler.admin) as admin, node:
        node.begin()
        await deploy(admin)
        node.may_answer.clear()
        await Jobs(admin).create(job())
        async with asyncio.timeout(20):
            while len(node.seen) < 2:
                await asyncio.sleep(0.02)
    before = {each.request_id for each in node.seen}
    scheduler.end(signal.SIGKILL)
    scheduler.start()
    async with connected(scheduler.main, scheduler.admin) as admin:
        held = {each.request_id: each.lease for each in node.seen}
        node.held = dict(held)
        await node.connect()
        node.begin()
        jobs = Jobs(admin)
        for request_id, lease in held.items():  # they had gone on meanwhile
            value = payload.encode({"digest": "d", "example_count": 5, "loss": 0.25})
            await node.finish(
                types_pb2.Invocation(
                    request_id=request_id,
                    lease=lease,
                    function="default/client@1",
                    arguments=[b"x"],
                ),
                value=value,
            )
        found = await jobs.until(lambda f: f.job.state == SUCCEEDED)
        assert [r.state for r in found.rounds] == [DONE] * ROUNDS
        again = [each.request_id for each in node.seen if each.request_id in before]
        assert not again, "a client's work is not run twice"
        await node.disconnect()


async def test_a_job_is_stopped_and_resumed(scheduler: SchedulerProcess) -> None:
    node = await node_of(scheduler, "n1")
    async with connected(scheduler.main, scheduler.admin) as admin, node:
        node.begin()
        await deploy(admin)
        node.may_answer.clear()
        jobs = Jobs(admin)
        await jobs.create(job(pace=Pace(deadline_s=60.0)))
        await jobs.until(lambda f: bool(f.rounds))
        request = federated_pb2.StopJobRequest(namespace="default", job="digits")
        stopped = await jobs.call("StopJob", request)
        assert stopped.job.state == STOPPED
        assert (await jobs.call("StopJob", request)).job.state == STOPPED
        node.may_answer.set()
        wanted = federated_pb2.ResumeJobRequest(namespace="default", job="digits", round_count=2)
        await jobs.call("ResumeJob", wanted)
        found = await jobs.until(lambda f: f.job.state == SUCCEEDED)
        assert found.job.done_count == 2
        with pytest.raises(FailedPrecondition, match="all 2 rounds of default/digits are done"):
            await jobs.call("ResumeJob", wanted)
        wanted.round_count = 3
        await jobs.call("ResumeJob", wanted)
        found = await jobs.until(lambda f: f.job.state == SUCCEEDED)
        assert found.job.done_count == 3


async def test_a_job_is_its_owners_and_its_name_is_taken_while_it_runs(
    scheduler: SchedulerProcess,
) -> None:
    async with (
        connected(scheduler.main, scheduler.admin) as admin,
        user_of(scheduler, cluster_pb2.ROLE_USER) as ann,
        user_of(scheduler, cluster_pb2.ROLE_USER) as bob,
    ):
        await deploy(admin)
        await Jobs(ann).create(job())  # no node: it waits
        found = await Jobs(bob).until(lambda f: bool(f.job.message))
        assert "waiting for clients: 0 of 2" in found.job.message
        stop = federated_pb2.StopJobRequest(namespace="default", job="digits")
        with pytest.raises(PermissionDenied, match="the federated job default/digits is of"):
            await Jobs(bob).call("StopJob", stop)
        with pytest.raises(PermissionDenied):
            await Jobs(bob).create(job(round_count=9))
        with pytest.raises(AlreadyExists, match="another federated job default/digits is running"):
            await Jobs(ann).create(job(round_count=9))
        await Jobs(admin).call("StopJob", stop)
        assert (await Jobs(ann).create(job(round_count=9))).is_new, "its name is free again"
        with pytest.raises(NotFound, match="no federated job default/other"):
            await Jobs(ann).get("other")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"clients": ()}, "at least one"),
    ({"parameter_count": 0}, "parameter_count"),
    ({"round_count": 0}, "round_count"),
    ({"job": "No Name"}, "job"),
    ({"encoding": "zip"}, "encoding"),
    ({"pace": Pace(clients_per_round=3)}, "clients_per_round"),
    ({"pace": Pace(quorum=3)}, "quorum"),
    ({"client_function": "client"}, "client_function"),
    ({"strategy": Strategy(name="best")}, "use one of fedavg"),
    ({"strategy": Strategy(name="median", parameters={"mu": 1.0})}, "has no parameters"),
    ({"strategy": Strategy(name="trimmed-mean", parameters={"share": 0.5})}, "below 0.5"),
    (
        {
            "strategy": Strategy(name="multi-krum"),
            "topology": Topology(is_hierarchical=True),
        },
        "needs every update in one place",
    ),
]


async def test_a_wrong_job_is_refused_in_words(scheduler: SchedulerProcess) -> None:
    async with connected(scheduler.main, scheduler.admin) as admin:
        for changes, words in WRONG:
            with pytest.raises(InvalidArgument, match=words):
                await Jobs(admin).create(job(**changes))


async def test_a_job_of_functions_that_nobody_deployed_is_refused(
    scheduler: SchedulerProcess,
) -> None:
    async with connected(scheduler.main, scheduler.admin) as admin:
        with pytest.raises(NotFound, match="default/client@1"):
            await Jobs(admin).create(job())
