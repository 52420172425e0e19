"""The real scheduler process, spoken to over mTLS by a user and by an agent of the test's own."""

import asyncio
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scheduler_builders import (
    Client,
    SchedulerProcess,
    agent_of,
    connected,
    outcome_pb,
    refused_session,
    result_pb,
    user_of,
)

from tierwise.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Overloaded,
    PermissionDenied,
    TierwiseError,
    Unauthenticated,
    Unavailable,
)
from tierwise.placement.features import FEATURES, SCHEMA
from tierwise.placement.policies import learned
from tierwise.placement.score import DEFAULT_WEIGHTS
from tierwise.v1 import (
    call_pb2,
    cluster_pb2,
    function_pb2,
    node_pb2,
    policy_pb2,
    types_pb2,
    work_pb2,
)
from tierwise.wire.errors import error_from_rpc
from tierwise.wire.identity import join

FAILED = types_pb2.OUTCOME_STATE_FAILED
REFUSED = types_pb2.OUTCOME_STATE_REFUSED


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SchedulerProcess]:
    process = SchedulerProcess(tmp_path_factory.mktemp("scheduler")).start()
    yield process
    assert process.end() == 0, process.log.read_text()


@pytest.fixture
def own_scheduler(tmp_path: Path) -> Iterator[SchedulerProcess]:
    """A process that the test may kill."""
    process = SchedulerProcess(tmp_path)
    yield process
    if process.process is not None and process.process.poll() is None:
        process.end(signal.SIGKILL)


def unique(prefix: str = "w") -> str:
    return f"{prefix}{uuid.uuid4().hex[:10]}"


class Refused:
    """`with` block that expects an RPC to fail with one of our errors."""

    def __init__(self, kind: type[TierwiseError], words: str = "") -> None:
        self.kind, self.words = kind, words

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _tb: object) -> bool:
        if isinstance(error, grpc.RpcError):
            error = error_from_rpc(error)
        assert type(error) is self.kind, repr(error)
        assert self.words in str(error)
        return True


# -- work ----------------------------------------------------------------------------------------


async def test_submitted_work_reaches_a_node_and_its_result_reaches_the_user(
    scheduler: SchedulerProcess,
) -> None:
    work_id = unique()
    async with (
        await agent_of(scheduler, unique("n")) as agent,
        user_of(scheduler, cluster_pb2.ROLE_USER) as user,
    ):
        await user.deploy()
        states: list[int] = []

        async def watch() -> None:
            request = work_pb2.WatchRequest(request_id=work_id)
            changes = user.work.Watch(request, timeout=20)
            states.extend([change.work.state async for change in changes])

        await user.submit(work_id, arguments=[b"one", b"two"])
        watching = asyncio.ensure_future(watch())
        work = await agent.dispatched()
        assert (work.request_id, work.lease) == (work_id, 1)
        assert list(work.arguments) == [b"one", b"two"]
        await agent.finish(work)
        await agent.told("work_ack", lambda ack: ack.request_id == work_id)
        done = await user.result(work_id)
        await watching
    assert done.work.state == work_pb2.WORK_STATE_SUCCEEDED
    assert [item.value for item in done.result.items] == [b"one", b"two"]
    assert done.result.log == "printed"
    assert done.result.outcome.latency.run_s == 0.25
    assert states[-1] == work_pb2.WORK_STATE_SUCCEEDED


async def test_a_second_result_changes_nothing_and_is_acknowledged_all_the_same(
    scheduler: SchedulerProcess,
) -> None:
    work_id = unique()
    async with (
        await agent_of(scheduler, unique("n")) as agent,
        connected(scheduler.main, scheduler.admin) as user,
    ):
        await user.deploy()
        await user.submit(work_id)
        work = await agent.dispatched()
        await agent.finish(work, value=b"first")
        await agent.told("work_ack", lambda ack: ack.request_id == work_id)
        await agent.finish(work, value=b"second")
        await agent.told("work_ack", lambda ack: ack.request_id == work_id)
        assert (await user.result(work_id)).result.items[0].value == b"first"


async def test_a_worker_that_dies_is_retried_then_dead_lettered_then_redriven(
    scheduler: SchedulerProcess,
) -> None:
    work_id = unique()
    async with (
        await agent_of(scheduler, unique("n")) as agent,
        connected(scheduler.main, scheduler.admin) as user,
    ):
        await user.deploy()
        await user.submit(work_id)
        for lease in (1, 2):
            work = await agent.dispatched()
            assert work.lease == lease
            assert (await user.result(work_id, 0.0)).work.attempt_count == lease
            await agent.finish(work, state=FAILED, error_code="function_died", message="signal 9")
        dead = await user.result(work_id)
        assert dead.work.state == work_pb2.WORK_STATE_DEAD
        assert dead.work.attempt_count == 2
        assert "signal 9" in dead.work.message
        await user.work.Redrive(work_pb2.RedriveRequest(request_id=work_id), timeout=5)
        work = await agent.dispatched()
        assert work.lease == 3
        assert list(work.arguments) == [work_id.encode()]
        await agent.finish(work)
        done = (await user.result(work_id)).work
        assert (done.state, done.attempt_count) == (work_pb2.WORK_STATE_SUCCEEDED, 1)
        with Refused(FailedPrecondition, "not dead-lettered"):
            await user.work.Redrive(work_pb2.RedriveRequest(request_id=work_id), timeout=5)


async def test_an_exception_of_the_function_is_its_result(scheduler: SchedulerProcess) -> None:
    work_id = unique()
    async with (
        await agent_of(scheduler, unique("n")) as agent,
        connected(scheduler.main, scheduler.admin) as user,
    ):
        await user.deploy()
        await user.submit(work_id)
        work = await agent.dispatched()
        await agent.finish(
            work, state=FAILED, error_code="function_raised", message="ValueError: no"
        )
        done = await user.result(work_id)
    assert done.work.state == work_pb2.WORK_STATE_FAILED
    assert done.result.items[0].error_code == "function_raised"


async def test_a_refusal_sends_the_work_to_the_other_node(scheduler: SchedulerProcess) -> None:
    work_id = unique()
    async with (
        await agent_of(scheduler, unique("n")) as one,
        await agent_of(scheduler, unique("n")) as two,
        connected(scheduler.main, scheduler.admin) as user,
    ):
        await user.deploy()
        await user.submit(work_id)
        first = {asyncio.ensure_future(a.dispatched()): a for a in (one, two)}
        done, waiting = await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED, timeout=10)
        [task] = done
        work = task.result()
        await first[task].finish(
            work, state=REFUSED, error_code="overloaded", reason=types_pb2.REASON_QUEUE_FULL
        )
        [other] = waiting
        again = await asyncio.wait_for(other, 10)
        assert (again.request_id, again.lease) == (work_id, 2)
        await first[other].finish(again)
        assert (await user.result(work_id)).work.state == work_pb2.WORK_STATE_SUCCEEDED


async def test_an_idempotency_key_names_one_piece_of_work(scheduler: SchedulerProcess) -> None:
    key = unique("key")
    async with connected(scheduler.main, scheduler.admin) as user:
        await user.deploy()
        [first] = await user.submit(unique(), key=key, arguments=[b"x"])
        [second] = await user.submit(unique(), key=key, arguments=[b"x"])
        assert first == second
        with Refused(AlreadyExists, key):
            await user.submit(unique(), key=key, arguments=[b"other"])
        with Refused(AlreadyExists, first):
            await user.submit(first, arguments=[b"other"])
        await user.work.Cancel(work_pb2.CancelRequest(request_id=first), timeout=5)


async def test_one_bad_submission_refuses_them_all(scheduler: SchedulerProcess) -> None:
    good, bad = unique(), unique()
    async with connected(scheduler.main, scheduler.admin) as user:
        await user.deploy()
        submissions = [
            work_pb2.Submission(
                invocation=types_pb2.Invocation(
                    request_id=name, function=function, arguments=[b"x"]
                )
            )
            for name, function in ((good, "f"), (bad, "no-such-function"))
        ]
        with Refused(NotFound, "no-such-function"):
            await user.work.Submit(work_pb2.SubmitRequest(submissions=submissions), timeout=5)
        with Refused(NotFound, good):
            await user.result(good)


async def test_waiting_work_can_be_cancelled(scheduler: SchedulerProcess) -> None:
    work_id = unique()
    async with connected(scheduler.main, scheduler.admin) as user:
        await user.deploy()
        await user.submit(work_id, node_id="nobody")
        await user.work.Cancel(work_pb2.CancelRequest(request_id=work_id), timeout=5)
        done = await user.result(work_id)
        assert done.work.state == work_pb2.WORK_STATE_CANCELLED
        assert done.result.items[0].error_code == "cancelled"
        with Refused(NotFound):
            await user.work.Cancel(work_pb2.CancelRequest(request_id="nothing"), timeout=5)


async def test_a_timeout_of_durable_work_counts_from_its_submission_over_restarts(
    own_scheduler: SchedulerProcess,
) -> None:
    scheduler = own_scheduler.start()
    hurried, patient = unique(), unique()
    async with connected(scheduler.main, scheduler.admin) as user:
        await user.deploy()
        await user.submit(hurried, timeout_s=5.0, node_id="node-a")
        await user.submit(patient, node_id="node-b")
        scheduler.end(signal.SIGKILL)
    scheduler.start()
    async with (
        await agent_of(scheduler, "node-a", cpus=1.0) as agent,
        connected(scheduler.main, scheduler.admin) as user,
    ):
        work = await agent.dispatched()
        assert 0.0 < work.timeout_s < 5.0
        await agent.told("cancel", lambda cancel: cancel.request_id == hurried)
        await agent.finish(work, state=types_pb2.OUTCOME_STATE_CANCELLED, error_code="cancelled")
        done = await user.result(hurried)
        assert done.work.state == work_pb2.WORK_STATE_FAILED
        assert done.result.items[0].error_code == "deadline_exceeded"
        assert "its time was over" in done.result.items[0].message
        assert await user.state(patient) == work_pb2.WORK_STATE_QUEUED


async def test_running_work_is_cancelled_where_it_runs(scheduler: SchedulerProcess) -> None:
    work_id = unique()
    async with (
        await agent_of(scheduler, unique("n")) as agent,
        connected(scheduler.main, scheduler.admin) as user,
    ):
        await user.deploy()
        await user.submit(work_id)
        work = await agent.dispatched()
        await user.work.Cancel(work_pb2.CancelRequest(request_id=work_id), timeout=5)
        assert (await agent.told("cancel")).request_id == work_id
        await agent.finish(work, state=types_pb2.OUTCOME_STATE_CANCELLED, error_code="cancelled")
        assert (await user.result(work_id)).work.state == work_pb2.WORK_STATE_CANCELLED


async def test_work_of_a_node_that_forgot_it_runs_again_under_a_higher_lease(
    scheduler: SchedulerProcess,
) -> None:
    work_id = unique()
    async with connected(scheduler.main, scheduler.admin) as user:
        await user.deploy()
        agent = await agent_of(scheduler, unique("n"))
        async with agent:
            await user.submit(work_id, node_id=agent.name)
            assert (await agent.dispatched()).lease == 1
        await agent.connect(held=[])
        try:
            again = await agent.dispatched()
            assert (again.request_id, again.lease) == (work_id, 2)
            await agent.finish(again)
            assert (await user.result(work_id)).work.state == work_pb2.WORK_STATE_SUCCEEDED
        finally:
            await agent.disconnect()


async def test_work_survives_a_reconnect_of_the_node_that_holds_it(
    scheduler: SchedulerProcess,
) -> None:
    work_id = unique()
    async with connected(scheduler.main, scheduler.admin) as user:
        await user.deploy()
        agent = await agent_of(scheduler, unique("n"))
        async with agent:
            await user.submit(work_id, node_id=agent.name)
            work = await agent.dispatched()
        await agent.connect()
        try:
            await agent.finish(work)
            done = await user.result(work_id)
            assert done.work.state == work_pb2.WORK_STATE_SUCCEEDED
            assert done.result.outcome.lease == 1
        finally:
            await agent.disconnect()


async def test_kill_9_loses_no_accepted_work_and_doubles_none_that_runs(
    own_scheduler: SchedulerProcess,
) -> None:
    scheduler = own_scheduler.start()
    running, waiting = unique(), [unique() for _ in range(20)]
    agent = await agent_of(scheduler, "node-a", cpus=1.0)
    async with connected(scheduler.main, scheduler.admin) as user, agent:
        await user.deploy()
        await user.submit(running)
        work = await agent.dispatched()
        await user.submit(*waiting, node_id="node-b")
        scheduler.end(signal.SIGKILL)
    scheduler.start()
    async with connected(scheduler.main, scheduler.admin) as user:
        for name in waiting:
            assert await user.state(name) == work_pb2.WORK_STATE_QUEUED
        assert await user.state(running) == work_pb2.WORK_STATE_LEASED
        async with agent:  # still holds the work of before
            await agent.finish(work, value=b"kept")
            done = await user.result(running)
            assert done.work.state == work_pb2.WORK_STATE_SUCCEEDED
            assert done.result.items[0].value == b"kept"
            assert done.result.outcome.lease == 1
        other = await agent_of(scheduler, "node-b", cpus=8.0)
        async with other:
            seen = set()
            for _ in waiting:
                work = await other.dispatched()
                seen.add(work.request_id)
                await other.finish(work)
            assert seen == set(waiting)
            for name in waiting:
                assert (await user.result(name)).work.state == work_pb2.WORK_STATE_SUCCEEDED


async def test_work_leased_before_a_kill_runs_again_if_its_node_does_not_return(
    own_scheduler: SchedulerProcess,
) -> None:
    scheduler = own_scheduler.start()
    work_id = unique()
    async with connected(scheduler.main, scheduler.admin) as user:
        await user.deploy()
        async with await agent_of(scheduler, "node-a") as gone:
            await user.submit(work_id)
            await gone.dispatched()
            scheduler.end(signal.SIGKILL)
    scheduler.start()
    async with (
        connected(scheduler.main, scheduler.admin) as user,
        await agent_of(scheduler, "node-b") as agent,
    ):
        work = await agent.dispatched()
        assert (work.request_id, work.lease) == (work_id, 2)
        await agent.finish(work)
        assert (await user.result(work_id)).work.state == work_pb2.WORK_STATE_SUCCEEDED


async def test_a_full_queue_says_overloaded_and_when_to_come_back(tmp_path: Path) -> None:
    scheduler = SchedulerProcess(tmp_path, work_queue_max=3).start()
    try:
        async with connected(scheduler.main, scheduler.admin) as user:
            await user.deploy()
            await user.submit("a", "b", "c")
            try:
                await user.submit("d")
                raise AssertionError("accepted")
            except grpc.RpcError as failure:
                error = error_from_rpc(failure)
            assert type(error) is Overloaded
            assert error.retry_after_s
            await user.submit("a")  # known work is no new work
            await user.work.Cancel(work_pb2.CancelRequest(request_id="a"), timeout=5)
            await user.result("a")
            await user.submit("d")
    finally:
        scheduler.end()


# -- catalogue, view, policy ---------------------------------------------------------------------


async def test_a_deployed_function_is_told_to_agents_and_its_code_can_be_fetched_by_nodes_only(
    scheduler: SchedulerProcess,
) -> None:
    name = unique("f")
    async with (
        await agent_of(scheduler, unique("n")) as agent,
        connected(scheduler.main, scheduler.admin) as user,
    ):
        spec = await user.deploy(name, b"one")
        assert spec.version == 1
        await agent.told("catalogue", lambda c: any(f.name == name for f in c.functions))
        again = await user.functions.DeployFunction(
            function_pb2.DeployFunctionRequest(spec=spec, code=b"one"), timeout=5
        )
        assert not again.is_new
        assert (await user.deploy(name, b"two")).version == 2
        request = function_pb2.GetCodeRequest(code_digest=spec.code_digest)
        assert (await agent.client.functions.GetCode(request, timeout=5)).code == b"one"
        with Refused(PermissionDenied, "GetCode"):
            await user.functions.GetCode(request, timeout=5)
        await user.functions.DeleteFunction(
            function_pb2.DeleteFunctionRequest(function=f"{name}@2"), timeout=5
        )
        assert (await user.deploy(name, b"three")).version == 3  # numbers are not given out twice


async def test_agents_hear_of_each_other(scheduler: SchedulerProcess) -> None:
    one_name, two_name = unique("n"), unique("n")
    async with await agent_of(scheduler, one_name) as one:
        async with await agent_of(scheduler, two_name):
            ready = types_pb2.NODE_STATE_READY
            await one.told(
                "view",
                lambda v: any(p.node.node_id == two_name and p.state == ready for p in v.peers),
            )
        gone = (types_pb2.NODE_STATE_SUSPECT, types_pb2.NODE_STATE_LOST)
        await one.told(
            "view", lambda v: any(p.node.node_id == two_name and p.state in gone for p in v.peers)
        )


async def test_a_promoted_policy_is_assigned_and_rolled_back(scheduler: SchedulerProcess) -> None:
    async with (
        await agent_of(scheduler, unique("n")) as agent,
        connected(scheduler.main, scheduler.admin) as admin,
    ):
        assert (await agent.told("policy")).builtin == "ect"
        await admin.policies.PromotePolicy(
            policy_pb2.PromotePolicyRequest(policy_id="cloud-only"), timeout=5
        )
        assert (await agent.told("policy")).builtin == "cloud-only"
        await admin.policies.RollBackPolicy(policy_pb2.RollBackPolicyRequest(), timeout=5)
        assert (await agent.told("policy")).builtin == "ect"
        with Refused(FailedPrecondition):
            await admin.policies.RollBackPolicy(policy_pb2.RollBackPolicyRequest(), timeout=5)
        with Refused(NotFound, "no-such"):
            await admin.policies.PromotePolicy(
                policy_pb2.PromotePolicyRequest(policy_id="no-such"), timeout=5
            )
        with Refused(InvalidArgument):
            await admin.policies.PublishPolicy(
                policy_pb2.PublishPolicyRequest(name="x", weights=b"pickle", card=b"{}"), timeout=5
            )


# -- calls ---------------------------------------------------------------------------------------


async def test_reported_calls_are_listed_billed_and_learnt_from(
    scheduler: SchedulerProcess,
) -> None:
    name = unique("f")
    call_id = unique("call-")
    async with (
        await agent_of(scheduler, unique("n")) as agent,
        connected(scheduler.main, scheduler.admin) as user,
    ):
        await user.deploy(name)
        outcome = outcome_pb(call_id, agent.name, function_id=f"default/{name}@1", gb_s=0.015625)
        await agent.report(outcome, log="hello", ended_ago_s=1000.0)

        async def call() -> call_pb2.Call:
            request = call_pb2.GetCallRequest(request_id=call_id[:-1])  # a prefix is enough
            return (await user.calls.GetCall(request, timeout=5)).call

        async with asyncio.timeout(10):
            while True:
                try:
                    found = await call()
                    break
                except grpc.RpcError as error:
                    assert isinstance(error_from_rpc(error), NotFound)
                    await asyncio.sleep(0.05)
        assert found.log == "hello"
        assert found.ended_unix_s == pytest.approx(time.time() - 1000.0, abs=60.0)
        assert found.outcome.latency.run_s == 0.25
        listed = await user.calls.ListCalls(call_pb2.ListCallsRequest(function=name), timeout=5)
        assert [c.outcome.request_id for c in listed.calls] == [call_id]
        usage = await user.calls.GetUsage(call_pb2.GetUsageRequest(namespace="default"), timeout=5)
        [row] = [u for u in usage.usage if u.function == name]
        assert (row.call_count, row.gb_s) == (1, 64 / 1024 * 0.25)
        await agent.told("view", lambda v: v.profiles[f"default/{name}@1"].run_s == 0.25)


async def test_durable_work_is_billed_like_any_call(scheduler: SchedulerProcess) -> None:
    name, work_id = unique("f"), unique()
    async with (
        await agent_of(scheduler, unique("n")) as agent,
        connected(scheduler.main, scheduler.admin) as user,
    ):
        await user.deploy(name)
        await user.submit(work_id, function=name)
        await agent.finish(await agent.dispatched())
        await user.result(work_id)
        async with asyncio.timeout(10):
            while True:
                request = call_pb2.ListCallsRequest(function=name)
                calls = (await user.calls.ListCalls(request, timeout=5)).calls
                if calls:
                    break
                await asyncio.sleep(0.05)
    assert calls[0].outcome.request_id == work_id
    assert calls[0].caller == "tierwise://admin/admin"


async def test_what_has_succeeded_is_on_the_bill_once_whoever_is_killed(
    own_scheduler: SchedulerProcess,
) -> None:
    scheduler = own_scheduler.start()
    work_ids = [unique() for _ in range(20)]
    agent = await agent_of(scheduler, "node-a", cpus=16.0)
    async with connected(scheduler.main, scheduler.admin) as user, agent:
        await user.deploy()
        await user.submit(*work_ids)
        for _ in work_ids:
            work = await agent.dispatched()
            await agent.finish(work)
        for work_id in work_ids:
            await user.result(work_id)
        scheduler.end(signal.SIGKILL)  # at once
    scheduler.start()
    async with connected(scheduler.main, scheduler.admin) as user, agent:
        again = outcome_pb(work_ids[0], agent.name, function_id=work.function, lease=1)
        await agent.report(again)  # a node that tells of durable work is not asked
        sentinel = outcome_pb(unique("call-"), agent.name, function_id=work.function)
        await agent.report(sentinel)
        async with asyncio.timeout(10):
            while True:
                listed = await user.calls.ListCalls(call_pb2.ListCallsRequest(limit=99), timeout=5)
                ids = [call.outcome.request_id for call in listed.calls]
                if sentinel.request_id in ids:
                    break
                await asyncio.sleep(0.05)
        assert sorted(ids) == sorted([*work_ids, sentinel.request_id])
        usage = await user.calls.GetUsage(call_pb2.GetUsageRequest(), timeout=5)
        assert [row.call_count for row in usage.usage] == [len(work_ids) + 1]


# -- nodes and rights ----------------------------------------------------------------------------


async def test_a_token_works_once(scheduler: SchedulerProcess) -> None:
    async with connected(scheduler.main, scheduler.admin) as admin:
        token = await admin.token(cluster_pb2.ROLE_NODE)
    await join(scheduler.join, token, unique("n"))
    with Refused(Unauthenticated, "used before"):
        await join(scheduler.join, token, unique("n"))


async def test_the_name_of_a_connected_node_cannot_be_taken(scheduler: SchedulerProcess) -> None:
    async with (
        await agent_of(scheduler, unique("n")) as agent,
        connected(scheduler.main, scheduler.admin) as admin,
    ):
        token = await admin.token(cluster_pb2.ROLE_NODE)
        with Refused(AlreadyExists, agent.name):
            await join(scheduler.join, token, agent.name)
        await join(scheduler.join, token, unique("n"))  # the refusal did not use up the token


async def test_rights_follow_the_role_and_no_certificate_means_no_entry(
    scheduler: SchedulerProcess,
) -> None:
    async with (
        user_of(scheduler, cluster_pb2.ROLE_USER) as user,
        user_of(scheduler, cluster_pb2.ROLE_NODE) as node,
    ):
        with Refused(PermissionDenied, "CreateToken needs admin"):
            await user.token(cluster_pb2.ROLE_ADMIN)
        with Refused(PermissionDenied):
            await user.cluster.DrainNode(cluster_pb2.DrainNodeRequest(node_id="x"), timeout=5)
        with Refused(PermissionDenied):
            await node.submit("w")
    hello = node_pb2.SessionRequest(hello=node_pb2.Hello())
    error = await refused_session(scheduler.main, scheduler.admin, hello)
    assert isinstance(error, PermissionDenied)
    assert "Session needs node" in str(error)
    options = [("grpc.ssl_target_name_override", "scheduler.tierwise")]
    anonymous = grpc.ssl_channel_credentials(scheduler.admin.authority)
    async with grpc.aio.secure_channel(scheduler.main, anonymous, options) as channel:
        with Refused(Unavailable):
            await Client(channel).deploy()


async def test_a_node_cannot_open_the_session_of_another(scheduler: SchedulerProcess) -> None:
    agent = await agent_of(scheduler, unique("n"))
    agent.name = "somebody-else"
    error = await refused_session(scheduler.main, agent.credentials, agent.hello())
    assert isinstance(error, PermissionDenied)
    assert "somebody-else" in str(error)


async def test_a_removed_node_loses_its_session_and_may_not_return(
    scheduler: SchedulerProcess,
) -> None:
    async with connected(scheduler.main, scheduler.admin) as admin:
        agent = await agent_of(scheduler, unique("n"))
        async with agent:
            await admin.cluster.RemoveNode(
                cluster_pb2.RemoveNodeRequest(node_id=agent.name), timeout=5
            )
            await asyncio.wait_for(agent.ended.wait(), 10)
        nodes = (await admin.cluster.ListNodes(cluster_pb2.ListNodesRequest(), timeout=5)).nodes
        assert agent.name not in {n.node.node_id for n in nodes}
        error = await refused_session(scheduler.main, agent.credentials, agent.hello())
        assert isinstance(error, Unauthenticated)
        assert "revoked" in str(error)


async def test_a_drained_node_is_told_so_again_after_both_restart(
    own_scheduler: SchedulerProcess,
) -> None:
    scheduler = own_scheduler.start()
    agent = await agent_of(scheduler, "node-a")
    async with connected(scheduler.main, scheduler.admin) as admin, agent:
        await admin.cluster.DrainNode(
            cluster_pb2.DrainNodeRequest(node_id="node-a", is_on=True), timeout=5
        )
        await agent.told("drain", lambda drain: drain.is_on)
    assert scheduler.end() == 0
    scheduler.start()
    async with connected(scheduler.main, scheduler.admin) as admin, agent:
        await agent.told("drain", lambda drain: drain.is_on)
        nodes = (await admin.cluster.ListNodes(cluster_pb2.ListNodesRequest(), timeout=5)).nodes
        assert [n.state for n in nodes] == [types_pb2.NODE_STATE_DRAINING]


async def test_nodes_are_listed_over_a_restart_until_they_are_removed(
    own_scheduler: SchedulerProcess,
) -> None:
    scheduler = own_scheduler.start()

    async def states(admin: Client) -> dict[str, int]:
        response = await admin.cluster.ListNodes(cluster_pb2.ListNodesRequest(), timeout=5)
        return {info.node.node_id: info.state for info in response.nodes}

    async def become(wanted: dict[str, int]) -> None:
        async with asyncio.timeout(20), connected(scheduler.main, scheduler.admin) as admin:
            while await states(admin) != wanted:
                await asyncio.sleep(0.05)

    ready, lost = types_pb2.NODE_STATE_READY, types_pb2.NODE_STATE_LOST
    gone, back = await agent_of(scheduler, "gone"), await agent_of(scheduler, "back")
    async with gone, back:
        await become({"gone": ready, "back": ready})
        await gone.send(node_pb2.SessionRequest(goodbye=node_pb2.Goodbye()))
        await asyncio.wait_for(gone.ended.wait(), 10)
        assert gone.end_error is None
        await become({"gone": lost, "back": ready})
        scheduler.end(signal.SIGKILL)
    scheduler.start()
    async with back:
        await become({"gone": lost, "back": ready})
        async with connected(scheduler.main, scheduler.admin) as admin:
            with Refused(NotFound, "nobody"):
                remove = cluster_pb2.RemoveNodeRequest(node_id="nobody")
                await admin.cluster.RemoveNode(remove, timeout=5)
            for _ in range(2):
                remove = cluster_pb2.RemoveNodeRequest(node_id="gone")
                await admin.cluster.RemoveNode(remove, timeout=5)
    scheduler.end()
    scheduler.start()
    await become({"back": lost})


async def test_a_newer_session_of_a_node_ends_the_older(scheduler: SchedulerProcess) -> None:
    work_id = unique()
    first = await agent_of(scheduler, unique("n"))
    async with first, connected(scheduler.main, scheduler.admin) as user:
        second = type(first)(first.name, first.credentials, first.main)
        async with second:
            await asyncio.wait_for(first.ended.wait(), 10)
            await user.deploy()
            await user.submit(work_id, node_id=first.name)
            await second.finish(await second.dispatched())
            assert (await user.result(work_id)).work.state == work_pb2.WORK_STATE_SUCCEEDED


async def test_nonsense_on_a_session_does_not_harm_the_others(scheduler: SchedulerProcess) -> None:
    work_id = unique()
    async with (
        await agent_of(scheduler, unique("n")) as bad,
        await agent_of(scheduler, unique("n")) as good,
        connected(scheduler.main, scheduler.admin) as user,
    ):
        await user.deploy()
        await user.submit(work_id, node_id=good.name)
        work = await good.dispatched()
        forged = result_pb(work, bad.name, value=b"forged")  # it never held that lease
        await bad.send(node_pb2.SessionRequest(work_result=forged))
        await bad.send(node_pb2.SessionRequest(work_result=types_pb2.InvocationResult()))
        await bad.send(node_pb2.SessionRequest(hello=node_pb2.Hello()))
        await bad.report(types_pb2.Outcome(request_id="x", function_id="///", state=99))
        await asyncio.sleep(0.3)
        await good.finish(work)
        assert (await user.result(work_id)).result.items[0].value == work_id.encode()


# -- the process ---------------------------------------------------------------------------------


def policy_file(name: str, seed: int) -> tuple[bytes, bytes]:
    count = len(FEATURES)
    card = learned.Card(
        name=name,
        version=1,
        schema=SCHEMA,
        beta=1.0,
        lam=0.5,
        score=asdict(DEFAULT_WEIGHTS),
        low=[0.0] * count,
        high=[1.0] * count,
        seed=seed,
    )
    return learned.save(learned.initial(8, np.random.default_rng(seed)), card)


async def test_a_published_policy_is_used_fetched_and_still_in_use_after_a_restart(
    own_scheduler: SchedulerProcess,
) -> None:
    scheduler = own_scheduler.start()
    weights, card = policy_file("mine", 1)
    publish = policy_pb2.PublishPolicyRequest(weights=weights, card=card)
    agent = await agent_of(scheduler, "node-a")
    async with connected(scheduler.main, scheduler.admin) as admin, agent:
        first = (await admin.policies.PublishPolicy(publish, timeout=5)).policy
        again = (await admin.policies.PublishPolicy(publish, timeout=5)).policy
        assert first.policy_id == again.policy_id == "mine@1"
        weights, card = policy_file("mine", 2)
        publish = policy_pb2.PublishPolicyRequest(weights=weights, card=card)
        second = (await admin.policies.PublishPolicy(publish, timeout=5)).policy
        assert second.policy_id == "mine@2"
        await admin.policies.PromotePolicy(
            policy_pb2.PromotePolicyRequest(policy_id="mine@2"), timeout=5
        )
        await agent.told("policy", lambda p: p.policy_id == "mine@2" and not p.builtin)
        request = policy_pb2.FetchPolicyRequest(policy_id="mine@2")
        fetched = await agent.client.policies.FetchPolicy(request, timeout=5)
        assert learned.load(fetched.weights, fetched.card).policy_id == "mine@2"
    scheduler.end(signal.SIGKILL)
    scheduler.start()
    async with connected(scheduler.main, scheduler.admin) as admin, agent:
        await agent.told("policy", lambda p: p.policy_id == "mine@2")
        listed = await admin.policies.ListPolicies(policy_pb2.ListPoliciesRequest(), timeout=5)
        assert [p.policy_id for p in listed.policies if p.is_active] == ["mine@2"]
        await admin.policies.RollBackPolicy(policy_pb2.RollBackPolicyRequest(), timeout=5)
        await agent.told("policy", lambda p: p.builtin == "ect")


async def test_functions_tokens_and_usage_survive_a_kill(own_scheduler: SchedulerProcess) -> None:
    scheduler = own_scheduler.start()
    async with connected(scheduler.main, scheduler.admin) as admin:
        spec = await admin.deploy("kept", b"code")
        token = await admin.token(cluster_pb2.ROLE_NODE)
    scheduler.end(signal.SIGKILL)
    scheduler.start()
    await join(scheduler.join, token, "node-a")
    async with connected(scheduler.main, scheduler.admin) as admin:
        request = function_pb2.GetFunctionRequest(function="kept@1")
        found = await admin.functions.GetFunction(request, timeout=5)
        assert found.spec == spec


async def test_the_processes_keep_their_ports_over_a_restart(
    own_scheduler: SchedulerProcess,
) -> None:
    scheduler = own_scheduler.start()
    before = scheduler.main, scheduler.join
    scheduler.end(signal.SIGKILL)
    scheduler.main = ""  # it is not told
    scheduler.start()
    assert (scheduler.main, scheduler.join) == before


async def test_health_and_reflection_answer_on_the_main_port(scheduler: SchedulerProcess) -> None:
    async with connected(scheduler.main, scheduler.admin) as client:
        stub = health_pb2_grpc.HealthStub(client.channel)
        request = health_pb2.HealthCheckRequest(service="tierwise.v1.WorkService")
        answer = await stub.Check(request, timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_second_scheduler_on_the_same_folder_is_refused(own_scheduler: SchedulerProcess) -> None:
    own_scheduler.start()
    second = failed_start(own_scheduler.config)
    assert second.returncode == 1
    assert "another scheduler is running" in second.stderr


@pytest.mark.parametrize(
    ("line", "words", "code"),
    [
        ('listen = "nonsense"', "write host:port", 2),
        ('policy = "no-such"', "no-such", 1),
        ("log_level = 'loud'", "log_level", 2),
        ("unknown_key = 1", "unknown_key", 2),
        ('database = "sqlite:////no/such/folder/x.db"', "cannot be opened", 1),
        ('links = {"edge-moon" = {rtt_ms = 1, bandwidth_mbit_per_s = 1}}', "edge-moon", 2),
    ],
)
def test_a_wrong_configuration_ends_the_process_with_the_reason(
    tmp_path: Path, line: str, words: str, code: int
) -> None:
    config = tmp_path / "scheduler.toml"
    ports = 'listen = "127.0.0.1:0"\njoin_listen = "127.0.0.1:0"\n'
    ports = "" if line.startswith("listen") else ports
    config.write_text(f'state_dir = "{tmp_path / "state"}"\n{ports}{line}\n')
    failed = failed_start(config)
    assert failed.returncode == code, failed.stderr
    assert words in failed.stderr
    assert "Traceback" not in failed.stderr


def failed_start(config: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "scheduler.daemon", "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
