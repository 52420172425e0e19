"""Calls of a live cluster become a scenario, with the times at which they came."""

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import tierwise
from envs import scenario
from envs.simulator import Simulator
from tierwise.placement.policy import create
from tierwise.sdk.operator import Operator

app = tierwise.App("record")


@app.function(memory="96MiB", deadline="2s")
def pause(seconds: float) -> float:
    import time

    time.sleep(seconds)
    return seconds


def test_what_a_live_cluster_was_asked_can_be_simulated(
    cluster: tierwise.LocalCluster, client: tierwise.Client, ask: Operator, tmp_path: Path
) -> None:
    app.use(client)
    for _ in range(6):
        pause.remote(0.05)
        time.sleep(0.15)
    until_s = time.monotonic() + 20
    while len(ask.calls("default/pause")) < 6:
        assert time.monotonic() < until_s, "agents report calls with their heartbeats"
        time.sleep(0.1)
    done = subprocess.run(
        [sys.executable, "-m", "tierwise.cli", "policy", "record", "--out", str(tmp_path)],
        env={**os.environ, "TIERWISE_CONTEXT": str(cluster.context)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "6 calls of 1 functions" in done.stderr
    world = scenario.read(tmp_path)
    came_s = [arrival.at_s for arrival in world.trace.arrivals]
    gaps = [after - before for before, after in pairwise(came_s)]
    assert min(gaps) > 0.1  # 0.2 s lay between them; one heartbeat brought them at one instant
    (behaviour,) = world.trace.behaviours.values()
    assert behaviour.spec.memory_mib == 96
    assert 0.05 <= behaviour.profile.run_s <= 0.5  # all nodes are declared no faster than 1.0
    assert len(world.nodes) == 3 and world.links.by_tier
    outcomes = Simulator(world, 1).run(create("ect"))
    assert len(outcomes) == 6
