"""A policy's life on a live cluster: published, in the shadow, a canary, on duty, taken back.

Two policies that misbehave are put into the daemons by a `sitecustomize` of this test: nothing that
can raise or sleep fits into a policy file.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import tierwise
from tierwise.cli import main
from tierwise.placement.features import BOUND, FEATURES, SCHEMA
from tierwise.placement.policies import learned
from tierwise.placement.score import DEFAULT_WEIGHTS
from tierwise.sdk.operator import Operator

ODD = """
import sys
if any(m in sys.orig_argv for m in ("agent.daemon", "scheduler.daemon")):
    import time
    from tierwise.placement.policy import register

    class Odd:
        def __init__(self, name, pause_s):
            self.policy_id, self.pause_s = f"{name}@1", pause_s
        def decide(self, view, request, rng):
            time.sleep(self.pause_s)
            raise ZeroDivisionError("an odd policy") if not self.pause_s else TimeoutError("slept")

    register("raises", lambda: Odd("raises", 0.0))
    register("sleeps", lambda: Odd("sleeps", 0.5))
"""
NODES = ("edge-1", "fog-1", "cloud-1")
app = tierwise.App("life")


@app.function(memory="64MiB", deadline="2s")
def double(x: int) -> int:
    return 2 * x


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tierwise.LocalCluster]:
    folder = tmp_path_factory.mktemp("life")
    (folder / "sitecustomize.py").write_text(ODD)
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{before}" if before else str(folder)
    try:
        with tierwise.LocalCluster(
            folder / "cluster", "1c,1f,1e", policy="ect", emulate=False
        ) as running:
            yield running
    finally:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def users(cluster: tierwise.LocalCluster) -> Iterator[list[tierwise.Client]]:
    """One client per entry node, so that several agents decide."""
    opened = [tierwise.Client(cluster.context, entry=node) for node in ("edge-1", "fog-1")]
    yield opened
    for client in opened:
        client.close()


@pytest.fixture(autouse=True)
def nothing_on_trial(ask: Operator) -> Iterator[None]:
    yield
    ask.shadow("")
    ask.canary("")
    ask.promote("ect")
    until(lambda: {h["policy_id"] for h in healths(ask)} == {"ect@1"})


def until(holds: Callable[[], Any]) -> Any:
    """Return the first true answer; the test's own timeout bounds the wait."""
    while not (found := holds()):
        time.sleep(0.05)
    return found


def healths(ask: Operator, duty: str = "active") -> list[dict[str, Any]]:
    return [h for n in ask.nodes() for h in n["policies"] if h["duty"] == duty]


def known(ask: Operator, policy_id: str) -> dict[str, Any]:
    return next(p for p in ask.policies() if p["policy_id"] == policy_id)


def drive(users: list[tierwise.Client], count: int) -> None:
    for i in range(count):
        app.use(users[i % len(users)])
        assert double.remote(i) == 2 * i


def publish(ask: Operator, name: str, *, bound: float = BOUND) -> str:
    """Publish a policy that prefers other nodes than the base score, by a random network."""
    rng = np.random.default_rng(5)
    network = learned.initial(8, rng)
    last = rng.standard_normal(8).astype(np.float32)
    card = learned.Card(
        name=name,
        version=1,
        schema=SCHEMA,
        beta=0.1,
        lam=5.0,
        score=asdict(DEFAULT_WEIGHTS),
        low=[-bound] * len(FEATURES),
        high=[bound] * len(FEATURES),
    )
    weights, about = learned.save(learned.Network(**(network.arrays() | {"w4": last})), card)
    return str(ask.publish(weights, about)["policy_id"])


def cli(cluster: tierwise.LocalCluster, *arguments: str) -> str:
    done = CliRunner().invoke(
        main.app, list(arguments), env={"TIERWISE_CONTEXT": str(cluster.context)}
    )
    assert done.exit_code == 0, done.output
    return done.output


def test_a_shadow_is_recorded_summed_explained_and_estimated(
    cluster: tierwise.LocalCluster, users: list[tierwise.Client], ask: Operator
) -> None:
    policy_id = publish(ask, "quiet")
    ask.shadow(policy_id)
    until(lambda: len(healths(ask, "shadow")) == len(NODES))
    drive(users, 60)

    def whole() -> dict[str, Any] | None:
        shadow: dict[str, Any] = known(ask, policy_id)["shadow"]
        return shadow if shadow["decision_count"] >= 60 else None

    trial = until(whole)
    assert trial["error_count"] == 0
    calls = [c["outcome"] for c in ask.calls("double", limit=60)]
    assert {c["policy_id"] for c in calls} == {"ect@1"}  # it only watched
    said = [c["shadow"] for c in calls]
    assert {s["policy_id"] for s in said} == {policy_id}
    assert all(s["node_id"] in NODES for s in said)
    assert any(not s["is_same"] for s in said)
    assert trial["mean_gain_s"] == pytest.approx(np.mean([s["gain_s"] for s in said]))
    assert trial["same_share"] == pytest.approx(np.mean([s["is_same"] for s in said]))

    assert f"shadow    {policy_id}" in cli(cluster, "explain", calls[0]["request_id"])
    assert "shadow: 60 decisions" in cli(cluster, "get", "policies")
    estimated = json.loads(cli(cluster, "policy", "estimate", policy_id, "-o", "json")
                           .partition("note:")[0])  # fmt: skip
    assert estimated["count"] == 60
    assert estimated["unsupported_share"] == pytest.approx(1.0 - trial["same_share"])


def test_a_canary_decides_in_its_blocks_on_all_nodes_at_once_until_it_is_promoted(
    cluster: tierwise.LocalCluster, users: list[tierwise.Client], ask: Operator
) -> None:
    policy_id = publish(ask, "brave")
    cli(cluster, "policy", "canary", policy_id, "--share", "0.5", "--block", "500ms")
    until(lambda: len(healths(ask, "canary")) == len(NODES))

    def both() -> dict[str, Any] | None:
        drive(users, 20)
        trial: dict[str, Any] = known(ask, policy_id)["canary"]
        arms = trial["canary"], trial["baseline"]
        return trial if min(int(arm["block_count"]) for arm in arms) >= 3 else None

    trial = until(both)
    assert trial["baseline_id"] == "ect"
    assert trial["cost_s"]["low"] <= trial["cost_s"]["mean"] <= trial["cost_s"]["high"]
    deciders: dict[int, set[str]] = {}
    origins = set()
    for call in ask.calls("double", limit=10_000):
        outcome = call["outcome"]
        if outcome["trial_id"] == trial["trial_id"] and outcome["block"]:
            deciders.setdefault(outcome["block"], set()).add(outcome["policy_id"])
            origins.add(outcome["origin"])
    assert origins == {"edge-1", "fog-1"}
    assert all(len(who) == 1 for who in deciders.values())
    assert set.union(*deciders.values()) == {"ect@1", policy_id}

    cli(cluster, "policy", "promote", policy_id)
    until(lambda: {h["policy_id"] for h in healths(ask)} == {policy_id})
    assert healths(ask, "canary") == []
    assert known(ask, policy_id)["canary"]["ended_unix_s"] > 0
    assert "decides again" in cli(cluster, "policy", "rollback")
    until(lambda: {h["policy_id"] for h in healths(ask)} == {"ect@1"})


def test_rolling_back_a_canary_ends_it_first(cluster: tierwise.LocalCluster, ask: Operator) -> None:
    ask.promote("soft-ect")
    ask.canary("edge-first", 0.5, 1.0)
    assert "the canary of edge-first has ended: soft-ect decides" in cli(
        cluster, "policy", "rollback"
    )
    assert "ect decides again" in cli(cluster, "policy", "rollback")


def test_a_policy_that_raises_is_taken_off_duty_and_everybody_can_see_it(
    cluster: tierwise.LocalCluster, users: list[tierwise.Client], ask: Operator
) -> None:
    ask.promote("raises")
    until(lambda: {h["policy_id"] for h in healths(ask)} == {"raises@1"})
    drive(users, 20)

    def opened() -> list[dict[str, Any]]:
        found = [h for h in healths(ask) if h["breaker"] == "open"]
        return found if sum(int(h["fallbacks"].get("error", 0)) for h in found) >= 20 else []

    for health in until(opened):
        assert health["error"] == "ZeroDivisionError: an odd policy"

    def fell_back() -> list[dict[str, Any]]:
        calls = [c["outcome"] for c in ask.calls("double", limit=20)]
        return [c for c in calls if "raises@1" in c["explanation"]["fallback"]]

    (call, *_) = until(fell_back)
    assert call["policy_id"] == "ect@1"
    assert "fallback: instead of raises@1: it raised" in cli(cluster, "explain", call["request_id"])
    assert "raises@1 open" in cli(cluster, "get", "nodes")
    assert set(known(ask, "raises")["open_nodes"]) == {"edge-1", "fog-1"}


def test_a_policy_whose_inputs_are_out_of_range_is_taken_off_duty(
    users: list[tierwise.Client], ask: Operator
) -> None:
    policy_id = publish(ask, "narrow", bound=0.0)
    ask.promote(policy_id)
    until(lambda: {h["policy_id"] for h in healths(ask)} == {policy_id})

    def opened() -> bool:
        drive(users[:1], 30)
        return "its inputs were out of the trained range" in {h["cause"] for h in healths(ask)}

    until(opened)

    def reasons() -> str:
        return " ".join(
            c["outcome"].get("explanation", {}).get("fallback", "")  # a refused call has none
            for c in ask.calls("double", limit=1000)
        )

    until(lambda: "is outside the trained range" in reasons())
    assert known(ask, policy_id)["fallbacks"]["range"] >= 30


@pytest.mark.parametrize("name", ["sleeps", "raises"])
def test_a_shadow_that_misbehaves_is_dropped_and_harms_no_call(
    users: list[tierwise.Client], ask: Operator, name: str
) -> None:
    ask.shadow(name)
    until(lambda: len(healths(ask, "shadow")) == len(NODES))
    drive(users, 20)
    until(lambda: known(ask, name)["shadow"]["error_count"] >= 20)
    health = until(lambda: [h for h in healths(ask, "shadow") if h["breaker"] == "open"])
    assert sum(int(h["fallbacks"]["dropped"]) for h in health) == 20 - len(health)
    assert {h["breaker"] for h in healths(ask)} == {"closed"}
