"""Workloads after Azure Functions, and that they moved no other preset."""

import hashlib
import sys
from collections import Counter

import numpy as np
import pytest

from envs import azure
from envs.simulator import Simulator
from envs.world import NAMED, PRESETS, make_world
from tierwise.domain.topology import Tier
from tierwise.errors import FailedPrecondition
from tierwise.placement.policy import create

# Of nodes and arrivals, seeds 0 and 1,000,003: trained weights and published tables rest on them.
DIGESTS = {
    "small": "ef2a62871f2d6d0b",
    "campus": "edee13581cf96958",
    "factory": "51ee99d805959c0c",
    "city": "c8c668fbd0dbde97",
    "flash-crowd": "9d895c1962e3b988",
    "link-cut": "25ef4284b15b15a8",
    "heterogeneous": "14720ee79fa9367f",
}


def digest(preset: str) -> str:
    found = hashlib.sha256()
    for seed in (0, 1_000_003):
        world = make_world(preset, seed, request_count=100)
        for node in world.nodes:
            found.update(f"{node.node_id} {node.capacity.cpus:.6g} {node.speed:.6g}\n".encode())
        for a in world.trace.arrivals:
            found.update(f"{a.at_s:.6g} {a.origin} {a.function} {a.request_bytes}\n".encode())
        for behaviour in world.trace.behaviours.values():
            found.update(f"{behaviour.profile.run_s:.6g} {behaviour.spec.memory_mib}\n".encode())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("preset", DIGESTS)
def test_the_worlds_of_older_presets_have_not_moved(preset: str) -> None:
    assert digest(preset) == DIGESTS[preset]


def test_azure_comes_last_so_that_no_other_preset_moves() -> None:
    assert NAMED[-1] == "azure"
    assert PRESETS[-1] == "random"


def test_the_mean_load_is_the_one_that_was_asked_for() -> None:
    for seed in range(5):
        behaviours, times, functions = azure.draw_workload(
            np.random.default_rng(seed), 8, 500, demand_cpus=2.5
        )
        work_s = sum(behaviours[i].profile.run_s for i in functions)
        assert work_s / times[-1] == pytest.approx(2.5)
        assert len(times) == len(functions) == 500
        assert (np.diff(times) >= 0.0).all()


def test_no_function_is_more_than_about_half_of_the_calls_in_the_long_run() -> None:
    top = []
    for seed in range(20):
        _, _, functions = azure.draw_workload(np.random.default_rng(seed), 10, 2000, 1.0)
        top.append(Counter(functions.tolist()).most_common(1)[0][1] / 2000)
    assert np.mean(top) < 0.65


def test_calls_come_in_bursts_as_they_were_fitted() -> None:
    """A Poisson process has gaps with a coefficient of variation of 1; every cluster has more."""
    for cluster in azure.clusters():
        assert cluster.gap_s.std() / cluster.gap_s.mean() > 2.0
    cluster = azure.clusters()[0]
    rng = np.random.default_rng(1)
    gaps = np.diff(azure._renewal(rng, cluster.gap_s, 20_000))
    assert gaps.mean() == pytest.approx(cluster.gap_s.mean(), rel=0.1)
    assert np.median(gaps) == pytest.approx(np.median(cluster.gap_s), rel=0.1)


def test_functions_stay_within_what_every_tier_can_run() -> None:
    for seed in range(10):
        world = make_world("azure", seed, request_count=50)
        edge = min(n.capacity.memory_mib for n in world.nodes if n.tier is Tier.EDGE)
        for behaviour in world.trace.behaviours.values():
            assert 64 <= behaviour.spec.memory_mib <= edge
            assert 0.005 <= behaviour.profile.run_s <= 3.0


def test_a_seed_is_a_world_whatever_numpys_own_generator_did_before() -> None:
    azure.clusters.cache_clear()
    np.random.seed(1)
    first = make_world("azure", 3, request_count=60)
    azure.clusters.cache_clear()
    np.random.seed(2)
    assert make_world("azure", 3, request_count=60) == first
    assert make_world("azure", 4, request_count=60).trace != first.trace


def test_an_azure_world_runs_to_its_end() -> None:
    world = make_world("azure", 2, request_count=120)
    outcomes = Simulator(world, 2).run(create("ect"))
    assert len(outcomes) == 120


def test_without_orcbench_only_azure_fails_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    azure.clusters.cache_clear()
    monkeypatch.setitem(sys.modules, "orcbench.internals.run", None)
    with pytest.raises(FailedPrecondition, match=r"tierwise\[azure\]"):
        make_world("azure", 1)
    for preset in NAMED[:-1]:
        assert make_world(preset, 1, request_count=10).trace.arrivals
