"""Both machines under faults: whatever history, no overcommit, one result each, nothing stuck."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from agent.machine import NodeMachine
from agent.pool import InstanceState
from envs.simulator import Simulator
from envs.traces import Mix, make_trace
from envs.world import Faults, World, make_world
from tierwise.placement.policy import create

SEED_COUNT = 240
REQUEST_COUNT = 60
GROUPS = 12


def faulty_world(seed: int) -> World:
    """Draw a world, and which faults strike it."""
    rng = np.random.default_rng(seed + 77)
    world = make_world("random", seed, request_count=2)
    trace = make_trace(
        rng,
        list(world.nodes),
        Mix(
            load=float(rng.uniform(0.05, 1.2)),
            function_count=int(rng.integers(2, 8)),
            request_count=REQUEST_COUNT,
            burstiness=float(rng.choice((1.0, 3.0))),
            durable_share=float(rng.choice((0.0, 0.3, 0.7))),
        ),
    )
    behaviours = {
        key: replace(b, spec=replace(b.spec, timeout_s=8.0, instances_max=int(rng.integers(1, 5))))
        for key, b in trace.behaviours.items()
    }
    until_s = trace.arrivals[-1].at_s + 10.0
    faults = Faults(
        drop=float(rng.choice((0.0, 0.03, 0.1))),
        duplicate=float(rng.choice((0.0, 0.05, 0.2))),
        delay=float(rng.choice((0.0, 0.1))),
        crash_interval_s=float(rng.choice((0.0, 2.0, 5.0))),
        down_s=float(rng.uniform(0.2, 8.0)),
        partition_interval_s=float(rng.choice((0.0, 3.0))),
        partition_s=float(rng.uniform(0.5, 8.0)),
        until_s=until_s,
    )
    return replace(world, trace=replace(trace, behaviours=behaviours), faults=faults)


def check_resources(machine: NodeMachine) -> None:
    """Assert that what instances hold is what the pool counts, and fits into the node."""
    capacity = machine.node.capacity
    cpus = memory_mib = gpu_slots = 0.0
    per_function: Counter[str] = Counter()
    for instance in machine.pool.instances():
        spec = instance.spec
        memory_mib += spec.memory_mib
        per_function[spec.function_id] += 1
        assert per_function[spec.function_id] <= spec.instances_max
        if instance.state is not InstanceState.IDLE:
            cpus += spec.cpus
            gpu_slots += spec.gpu_slots
    free = machine.pool.free
    assert cpus <= capacity.cpus + 1e-6
    assert memory_mib <= capacity.memory_mib
    assert gpu_slots <= capacity.gpu_slots
    assert abs(free.cpus - (capacity.cpus - cpus)) < 1e-6
    assert free.memory_mib == capacity.memory_mib - memory_mib


def check_run(seed: int) -> Simulator:
    """Run one faulty world to its end and assert every invariant."""
    world = faulty_world(seed)
    simulator = Simulator(world, seed)
    simulator.on_step = check_resources
    simulator.run(create("ect" if seed % 2 else "least-loaded"))
    durable = {f"r{index + 1:06}" for index, a in enumerate(world.trace.arrivals) if a.is_durable}
    every = {f"r{index + 1:06}" for index in range(len(world.trace.arrivals))}
    answered = Counter(outcome.request_id for outcome in simulator.outcomes)
    recorded = Counter(outcome.request_id for outcome, _ in simulator.recorded)
    assert simulator.unfinished_count == 0, f"{simulator.unfinished_count} requests are stuck"
    assert set(answered) == every - durable
    assert set(recorded) == durable
    assert max(answered.values(), default=1) == 1
    assert max(recorded.values(), default=1) == 1
    for outcome in (*simulator.outcomes, *(outcome for outcome, _ in simulator.recorded)):
        assert min(vars_of(outcome.latency)) >= -1e-6
    return simulator


def vars_of(latency: object) -> list[float]:
    return [getattr(latency, name) for name in type(latency).__dataclass_fields__]  # type: ignore[attr-defined]


@pytest.mark.parametrize("group", range(GROUPS))
def test_invariants_hold_over_many_seeds(group: int) -> None:
    for seed in range(group, SEED_COUNT, GROUPS):
        try:
            check_run(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_the_faults_really_strike() -> None:
    """Guards the test above: crashes, refusals, retries and dead letters must occur in it."""
    kinds: Counter[str] = Counter()
    for seed in range(40):
        simulator = check_run(seed)
        for outcome in simulator.outcomes:
            kinds[outcome.error_code] += 1
            kinds["tried"] += len(outcome.tried)
        for outcome, is_dead in simulator.recorded:
            kinds["leases"] += outcome.lease > 1
            kinds["dead"] += is_dead
    assert kinds["unavailable"] > 0
    assert kinds["tried"] > 0
    assert kinds["leases"] > 0
    assert kinds["deadline_exceeded"] > 0
