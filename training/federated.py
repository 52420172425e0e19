"""How far federated placement is from the best there is, and from simple rules. Simulated.

    python -m training.federated --seeds 40
    python -m training.federated --seeds 20 --clients 8 --candidates 3

Clusters are drawn as for every evaluation; a round of five clients is placed on their fog and cloud
nodes by the cost model of `placement.federated_round`, which is also what the regrets are measured
in: this judges the search, not the model. Regret is cost ÷ the cost of the best plan of all − 1.
With `--candidates`, a cluster keeps the root and so many of the other fog and cloud nodes, drawn.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from envs.world import PRESETS, make_world
from tierwise.clock import precise_s
from tierwise.domain.decision import NotPlaced
from tierwise.domain.function import FunctionProfile, FunctionSpec
from tierwise.domain.topology import Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView
from tierwise.placement.federated import optimum, place
from tierwise.placement.federated_round import Client, Plan, Problem, Round
from training.evaluate import HELD_OUT, interval, iqm

CLIENTS = 5
NEAR = 0.05  # of the best there is
MERGE_S_PER_BYTE = 2.5e-10  # of an update: NumPy averages ten of 46.8 MB in 40 to 128 ms
AGGREGATE = FunctionSpec(
    namespace="federated",
    name="average",
    version=1,
    code_digest="simulated",
    memory_mib=256,
    tiers=frozenset((Tier.FOG, Tier.CLOUD)),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One round on one cluster."""

    view: ClusterView
    wanted: Round


def draw(preset: str, seed: int, client_count: int = CLIENTS) -> Case | None:
    """Draw a round on the cluster of a preset; None if it has too few edges or no fog.

    Updates have 0.2 to 50 MB, alike for all clients, who are ready within some seconds. Nodes may
    be busy, and warm or not.
    """
    world = make_world(preset, seed, request_count=1)
    rng = np.random.default_rng(seed)
    edges = [node for node in world.nodes if node.tier is Tier.EDGE]
    fogs = [node for node in world.nodes if node.tier is Tier.FOG]
    clouds = [node for node in world.nodes if node.tier is Tier.CLOUD]
    if len(edges) < client_count or not fogs:
        return None
    size = int(np.exp(rng.uniform(np.log(2e5), np.log(5e7))))
    picks = rng.permutation(len(edges))[:client_count]
    function = AGGREGATE.function_id
    rows = [
        NodeView(
            node=node,
            reading=NodeReading(
                free=node.capacity,
                backlog_s=float(rng.exponential(0.5)) if rng.random() < 0.5 else 0.0,
                warm={function: 1} if rng.random() < 0.5 else {},
            ),
        )
        for node in world.nodes
    ]
    profile = FunctionProfile(run_s=size * MERGE_S_PER_BYTE, cold_start_s=0.3)
    root = clouds[0] if rng.random() < 0.5 else fogs[int(rng.integers(len(fogs)))]
    return Case(
        ClusterView(
            now_s=0.0,
            origin=None,
            nodes=tuple(rows),
            links=world.links,
            profiles={function: profile},
        ),
        Round(
            clients=tuple(
                Client(
                    node_id=edges[int(i)].node_id,
                    update_bytes=size,
                    ready_s=float(rng.lognormal(0.0, 0.7)),
                )
                for i in picks
            ),
            aggregate=AGGREGATE,
            root=root.node_id,
            aggregate_bytes=size,
        ),
    )


def limited(case: Case, candidate_count: int, seed: int) -> Case:
    """Return a case with at most so many nodes that may aggregate, the root among them."""
    names = [
        row.node.node_id
        for row in case.view.nodes
        if row.node.tier in AGGREGATE.tiers and row.node.node_id != case.wanted.root
    ]
    order = np.random.default_rng(seed).permutation(len(names))[candidate_count - 1 :]
    dropped = {names[int(i)] for i in order}
    rows = tuple(row for row in case.view.nodes if row.node.node_id not in dropped)
    return Case(replace(case.view, nodes=rows), case.wanted)


def rivals(case: Case) -> dict[str, float]:
    """Return the cost of simple rules, second-equivalents."""
    problem = Problem.of(case.view, case.wanted)
    assert isinstance(problem, Problem)
    clouds, fogs = problem.rows_of(Tier.CLOUD), problem.rows_of(Tier.FOG)
    return {
        "cloud only": problem.cost_s(problem.all_to((clouds or [problem.root])[0])),
        "nearest fog": problem.cost_s(problem.nearest(fogs or [problem.root])),
        "root only": problem.cost_s(problem.all_to(problem.root)),
    }


def _planned(found: Plan | NotPlaced) -> Plan:
    assert isinstance(found, Plan), "fog and cloud nodes of drawn clusters may always aggregate"
    return found


def measure(cases: Sequence[Case]) -> tuple[dict[str, list[float]], list[float]]:
    """Return the regret of each way on each case, and the seconds that the search took."""
    regrets: dict[str, list[float]] = {}
    took_s = []
    for case in cases:
        started_s = precise_s()
        ours = _planned(place(case.view, case.wanted)).cost_s
        took_s.append(precise_s() - started_s)
        best = _planned(optimum(case.view, case.wanted)).cost_s
        for name, cost_s in {"search": ours, **rivals(case)}.items():
            regrets.setdefault(name, []).append(cost_s / best - 1.0)
    return regrets, took_s


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.federated", description=__doc__)
    parser.add_argument("--seeds", type=int, default=40, help="rounds per preset")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--candidates", type=int, default=0, help="default: all that there are")
    parser.add_argument("--presets", default="city,random", help=", ".join(PRESETS))
    flags = parser.parse_args()
    presets = flags.presets.split(",")
    if set(presets) - set(PRESETS) or min(flags.seeds, flags.clients) < 1 or flags.candidates < 0:
        parser.error(f"presets are {', '.join(PRESETS)}; seeds and clients start at 1")
    print("simulated clusters, modelled rounds; regret to the best plan of all (IQM, 95 % CI)")
    print(f"{'preset':14}{'way':14}{'regret':>9}{'from':>9}{'to':>9}{'worst':>9}{'optimal':>9}")
    for preset in presets:
        cases = []
        for seed in range(HELD_OUT, HELD_OUT + flags.seeds):
            case = draw(preset, seed, flags.clients)
            if case is not None:
                count = flags.candidates
                cases.append(limited(case, count, seed) if count else case)
        if not cases:
            print(f"{preset:14}has too few edges, or no fog")
            continue
        regrets, took_s = measure(cases)
        for name, values in regrets.items():
            array = np.array(values)
            low, high = interval(array)
            print(
                f"{preset:14}{name:14}{iqm(array):9.2%}{low:9.2%}{high:9.2%}{array.max():9.1%}"
                f"{np.mean(array < 1e-6):9.0%}"
            )
        within = np.mean(np.array(regrets["search"]) <= NEAR)
        print(f"{preset:14}search within {NEAR:.0%} of the best in {within:.0%} of the rounds")
        print(f"{preset:14}{len(cases)} rounds; search {np.median(took_s) * 1e3:.1f} ms (median)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
