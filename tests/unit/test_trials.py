"""Trials at the scheduler: what is summed, what is compared, and what outlives a restart."""

import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from scheduler.store.store import Store
from scheduler.trials import CANARY, SHADOW, Trial, Trials
from tests.unit.scheduler_builders import SchedulerProcess, agent_of, connected, outcome_pb
from tests.unit.test_scheduler_daemon import Refused, policy_file
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.decision import ShadowDecision
from tierwise.domain.ids import FunctionId, NodeId, PolicyId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from tierwise.v1 import cluster_pb2, policy_pb2, types_pb2

OUTCOME = Outcome(
    request_id=RequestId("r"),
    function_id=FunctionId("default/f@1"),
    state=OutcomeState.OK,
    origin=NodeId("n"),
    node_id=NodeId("n"),
    latency=LatencySplit(run_s=0.5),
    deadline_s=1.0,
)
HEAD = {"is_builtin": False, "baseline_id": "ect", "share": 0.5, "block_s": 10.0, "seed": 3}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = Store(f"sqlite:///{tmp_path / 'scheduler.db'}")
    yield opened
    await opened.close()


async def start(store: Store, trials: Trials, kind: str, policy_id: str = "new@1") -> Trial:
    head = {**HEAD, "kind": kind, "policy_id": policy_id}
    await store.write(lambda c: trials.start(c, head), on_stored=trials.took)
    trial = trials.running(kind)
    assert trial is not None
    return trial


async def keep(store: Store, trials: Trials, *outcomes: Outcome) -> None:
    await store.write(lambda c: trials.keep(c, outcomes))


async def test_what_a_shadow_said_is_summed(store: Store) -> None:
    trials = Trials(store)
    await start(store, trials, SHADOW)
    said = ShadowDecision(policy_id=PolicyId("new@1"), node_id=NodeId("a"))
    shadows = (
        replace(said, gain_s=0.3),
        replace(said, is_same=True),
        replace(said, error="it raised", gain_s=99.0),
        replace(said, policy_id=PolicyId("old@1"), gain_s=99.0),
    )
    await keep(store, trials, *(replace(OUTCOME, shadow=shadow) for shadow in shadows))
    await keep(store, trials, replace(OUTCOME, shadow=replace(said, gain_s=-0.6)))
    found = await trials.shadow("new@1")
    assert found is not None
    assert (found.decision_count, found.error_count) == (4, 1)
    assert found.same_share == pytest.approx(1 / 3)
    assert found.mean_gain_s == pytest.approx(-0.1)
    assert await trials.shadow("old@1") is None


async def test_calls_are_compared_by_the_policy_whose_block_it_was(store: Store) -> None:
    trials = Trials(store)
    trial = await start(store, trials, CANARY)
    schedule = trial.schedule
    outcomes = []
    for block in range(1, 21):
        run_s = 0.25 if schedule.is_canary(block) else 0.5
        one = replace(OUTCOME, trial_id=trial.trial_id, block=block)
        outcomes += [replace(one, latency=LatencySplit(run_s=run_s))] * block
    late = replace(OUTCOME, latency=LatencySplit(run_s=5.0))
    outcomes += [
        replace(late, trial_id=trial.trial_id, block=0),  # decided when a block was young
        replace(late, trial_id=trial.trial_id, block=1, state=OutcomeState.CANCELLED),
        replace(late, trial_id=trial.trial_id + 1, block=1),
        late,
    ]
    await keep(store, trials, *outcomes)
    found = await trials.canary("new@1")
    assert found is not None
    assert (found.canary.block_count, found.baseline.block_count) == (10, 10)
    assert found.canary.call_count + found.baseline.call_count == sum(range(1, 21))
    assert found.canary.mean_cost_s == pytest.approx(0.25)
    assert found.baseline.mean_cost_s == pytest.approx(0.5)
    assert found.cost_s.mean == pytest.approx(-0.25)
    assert found.cost_s.low <= -0.25 <= found.cost_s.high < 0.0
    assert found.missed_share.mean == 0.0


async def test_costs_are_those_of_the_objective_and_misses_are_counted(store: Store) -> None:
    trials = Trials(store)
    trial = await start(store, trials, CANARY)
    late = replace(OUTCOME, latency=LatencySplit(run_s=3.0), trial_id=trial.trial_id, block=1)
    await keep(store, trials, late)
    found = await trials.canary("new@1")
    assert found is not None
    arm = found.canary if trial.schedule.is_canary(1) else found.baseline
    assert (arm.call_count, arm.missed_count) == (1, 1)
    assert arm.mean_cost_s == pytest.approx(DEFAULT_OBJECTIVE.cost_s(late))
    assert not found.cost_s.HasField("low")


async def test_a_new_trial_ends_that_of_its_kind_and_all_are_known_after_a_restart(
    store: Store,
) -> None:
    trials = Trials(store)
    first = await start(store, trials, SHADOW, "one@1")
    second = await start(store, trials, SHADOW, "two@1")
    third = await start(store, trials, CANARY, "one@1")
    again = Trials(store)
    assert again.running(SHADOW) == second
    assert again.running(CANARY) == third
    found = await again.shadow("one@1")
    assert found is not None
    assert (found.trial_id, found.ended_unix_s > 0) == (first.trial_id, True)


async def test_a_write_that_is_repeated_after_a_rollback_counts_once(store: Store) -> None:
    trials = Trials(store)
    await start(store, trials, SHADOW)
    said = ShadowDecision(policy_id=PolicyId("new@1"), node_id=NodeId("a"))
    tries = []

    def fail_once(connection: Connection) -> None:
        trials.keep(connection, [replace(OUTCOME, shadow=said)])
        tries.append(1)
        if len(tries) == 1:
            raise NotFound("once")

    for _ in range(2):
        try:
            await store.write(fail_once)
        except NotFound:
            continue
    found = await trials.shadow("new@1")
    assert found is not None and found.decision_count == 1


# -- the process ---------------------------------------------------------------------------------


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[SchedulerProcess]:
    process = SchedulerProcess(tmp_path).start()
    yield process
    if process.process is not None and process.process.poll() is None:
        process.end(signal.SIGKILL)


class Policies:
    """The orders of an operator, short to write."""

    def __init__(self, client: Any) -> None:
        self._stub = client.policies

    async def shadow(self, policy_id: str) -> Any:
        request = policy_pb2.ShadowPolicyRequest(policy_id=policy_id)
        return (await self._stub.ShadowPolicy(request, timeout=5)).policy

    async def canary(self, policy_id: str, share: float = 0.5, block_s: float = 1.0) -> Any:
        request = policy_pb2.CanaryPolicyRequest(policy_id=policy_id, share=share, block_s=block_s)
        return (await self._stub.CanaryPolicy(request, timeout=5)).policy

    async def promote(self, policy_id: str) -> Any:
        request = policy_pb2.PromotePolicyRequest(policy_id=policy_id)
        return (await self._stub.PromotePolicy(request, timeout=5)).policy

    async def roll_back(self) -> Any:
        return await self._stub.RollBackPolicy(policy_pb2.RollBackPolicyRequest(), timeout=5)

    async def get(self, policy_id: str) -> Any:
        listed = await self._stub.ListPolicies(policy_pb2.ListPoliciesRequest(), timeout=5)
        return next(p for p in listed.policies if p.policy_id == policy_id)


async def test_a_policy_goes_from_shadow_to_canary_to_duty_and_back(
    scheduler: SchedulerProcess,
) -> None:
    weights, card = policy_file("mine", 1)
    agent = await agent_of(scheduler, "node-a")
    async with connected(scheduler.main, scheduler.admin) as admin, agent:
        policies = Policies(admin)
        publish = policy_pb2.PublishPolicyRequest(weights=weights, card=card)
        await admin.policies.PublishPolicy(publish, timeout=5)

        await policies.shadow("mine@1")
        told = await agent.told("policy", lambda p: p.HasField("shadow"))
        assert (told.builtin, told.shadow.policy_id, told.shadow.builtin) == ("ect", "mine@1", "")
        said = types_pb2.ShadowDecision(policy_id="mine@1", node_id="node-a", gain_s=0.25)
        await agent.report(outcome_pb("call-1", "node-a", shadow=said))
        while not (await policies.get("mine@1")).shadow.decision_count:
            pass
        assert (await policies.get("mine@1")).shadow.mean_gain_s == 0.25

        await policies.canary("mine@1", 0.2, 30.0)
        told = await agent.told("policy", lambda p: p.HasField("canary"))
        assert told.HasField("shadow")
        trial = told.canary
        assert (trial.policy.policy_id, trial.share, trial.block_s) == ("mine@1", 0.2, 30.0)

        scheduler.end(signal.SIGKILL)
    scheduler.start()
    async with connected(scheduler.main, scheduler.admin) as admin, agent:
        policies = Policies(admin)
        told = await agent.told("policy", lambda p: p.HasField("canary"))
        assert (told.canary.trial_id, told.canary.seed) == (trial.trial_id, trial.seed)
        assert told.canary.elapsed_s > trial.elapsed_s

        done = await policies.roll_back()
        assert (done.ended_canary, done.policy.policy_id) == ("mine@1", "ect")
        told = await agent.told("policy")
        assert not told.HasField("canary") and not told.HasField("shadow")

        await policies.canary("mine@1")
        await policies.promote("mine@1")
        told = await agent.told("policy", lambda p: p.policy_id == "mine@1")
        assert not told.HasField("canary")
        info = await policies.get("mine@1")
        assert info.is_active and info.canary.ended_unix_s > 0

        await policies.shadow("ect")
        assert (await policies.roll_back()).policy.policy_id == "ect"  # a shadow does not stop it
        told = await agent.told("policy", lambda p: p.builtin == "ect")
        assert not told.HasField("shadow")


async def test_a_trial_that_makes_no_sense_is_refused(scheduler: SchedulerProcess) -> None:
    agent = await agent_of(scheduler, "node-a")
    async with connected(scheduler.main, scheduler.admin) as admin, agent:
        policies = Policies(admin)
        with Refused(NotFound, "no-such"):
            await policies.shadow("no-such")
        with Refused(FailedPrecondition, "decides already"):
            await policies.canary("ect")
        for share, block_s in ((0.0, 1.0), (1.5, 1.0), (float("nan"), 1.0), (0.5, 0.0)):
            with Refused(InvalidArgument, "use"):
                await policies.canary("edge-first", share, block_s)
        with Refused(PermissionDenied):
            await Policies(agent.client).shadow("edge-first")
        await policies.shadow("")  # ending what is not there is no error
        await policies.canary("")
        first = await policies.canary("edge-first")
        again = await policies.canary("edge-first")
        assert first.canary.trial_id == again.canary.trial_id


async def test_fallbacks_on_the_nodes_are_shown_with_their_policy(
    scheduler: SchedulerProcess,
) -> None:
    agent = await agent_of(scheduler, "node-a")
    async with connected(scheduler.main, scheduler.admin) as admin, agent:
        health = types_pb2.PolicyHealth(
            policy_id="edge-first@1", duty="active", breaker="open", fallbacks={"error": 7}
        )
        plain = agent._heartbeat
        agent._heartbeat = lambda *a: _with(plain(*a), health)  # type: ignore[method-assign]
        policies = Policies(admin)
        while not (info := await policies.get("edge-first")).open_nodes:
            pass
        assert (list(info.open_nodes), dict(info.fallbacks)) == (["node-a"], {"error": 7})
        listed = await admin.cluster.ListNodes(cluster_pb2.ListNodesRequest(), timeout=5)
        assert listed.nodes[0].policies[0].breaker == "open"


def _with(beat: Any, health: types_pb2.PolicyHealth) -> Any:
    beat.policies.append(health)
    return beat
