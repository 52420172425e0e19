"""How much better could any policy be? Two yardsticks that see the future, as no policy can.

    python -m training.bounds --presets small,campus --seeds 4

`relaxed` is a lower bound: every request runs alone, warm, on its best node. `clairvoyant` is a
policy: at each decision it tries the candidates in copies of the simulation, future arrivals and
noise included, lets the tuned base score decide what follows, and takes the best. It is not the
optimum, but what a perfect forecast and much time would give. Simulated, like everything here.
"""

import argparse
import itertools
import json
import math
import os
import struct
import sys
from collections.abc import Callable

import numpy as np

from envs.simulator import Simulator
from envs.world import PRESETS, World, make_world
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.decision import NotPlaced, Placed
from tierwise.domain.ids import PolicyId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.prices import DEFAULT_PRICES, PriceTable
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.ranking import Ranking, rank
from training.evaluate import HELD_OUT
from training.figures import mean_cost_s

HORIZON = 40  # arrivals after the decision that the copies live through
WIDTH = 6  # candidates that are tried, best base scores first
CLAIRVOYANT = PolicyId("clairvoyant@1")


def relaxed_cost_s(world: World, seed: int, prices: PriceTable = DEFAULT_PRICES) -> float:
    """Return a lower bound of the mean cost per request, in second-equivalents.

    No queue, no cold start, no jitter, no fault; each request on the node where it costs least,
    with the noise that it has in the simulation of `seed`.
    """
    simulator = Simulator(world, seed)
    by_id = {node.node_id: node for node in world.nodes}
    costs = []
    for request_id, arrival, sigma_draw in simulator.schedule.planned():
        behaviour = world.trace.behaviours[arrival.function]
        origin = by_id[arrival.origin]
        profile = behaviour.profile
        response_bytes = profile.response_bytes * arrival.item_count
        best = math.inf
        for node in world.nodes:
            if arrival.is_pinned and node.node_id != arrival.data_node:
                continue
            run_s = profile.run_s * arrival.item_count / node.speed
            run_s *= math.exp(behaviour.run_sigma * sigma_draw)
            if arrival.data_node is not None and node.node_id != arrival.data_node:
                run_s += world.links.default.transfer_s(arrival.data_bytes)
            there_s = world.links.between(origin, node).transfer_s(arrival.request_bytes)
            back_s = world.links.between(node, origin).transfer_s(response_bytes)
            moved_usd = 0.0
            if node is not origin:
                moved_usd = prices.round_trip_usd(
                    origin.tier, node.tier, arrival.request_bytes, response_bytes
                )
            outcome = Outcome(
                request_id=request_id,
                function_id=arrival.function,
                state=OutcomeState.OK,
                origin=arrival.origin,
                node_id=node.node_id,
                latency=LatencySplit(transfer_s=there_s, run_s=run_s, return_s=back_s),
                deadline_s=behaviour.spec.deadline_s * arrival.item_count,
                priority=arrival.priority,
                money_usd=prices.call_usd(
                    node.tier,
                    memory_mib=behaviour.spec.memory_mib,
                    billed_s=run_s,
                    moved_usd=moved_usd,
                    item_count=arrival.item_count,
                ),
            )
            best = min(best, DEFAULT_OBJECTIVE.cost_s(outcome))
        costs.append(best)
    return float(np.mean(costs))


def clairvoyant(
    world: World, seed: int, on_decision: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Run a world with a rollout of every candidate at every decision; return the outcomes."""
    simulator = Simulator(world, seed)
    while (question := simulator.next_question()) is not None:
        on_decision()
        found = rank(question.ask.view, question.ask.request)
        if isinstance(found, NotPlaced):
            simulator.answer(found, CLAIRVOYANT)
            continue
        order = found.by_score().tolist()
        tried = order[:WIDTH]
        first = tried[0]
        if len(tried) > 1:
            costs = [cost_in_a_copy(simulator, found, row, HORIZON) for row in tried]
            first = tried[int(np.argmin(costs))]
        simulator.answer(_placed(found, order, first), CLAIRVOYANT)
    return simulator.outcomes


def _placed(found: Ranking, order: list[int], first: int) -> Placed:
    rows = found.estimates.candidates
    rest = [row for row in order if row != first]
    return Placed(node_ids=tuple(rows[row].node.node_id for row in (first, *rest)))


def cost_in_a_copy(simulator: Simulator, found: Ranking, row: int, horizon: int) -> float:
    """Return the cost of what follows if the open question is answered with candidate `row`.

    A fork is the copy: it has the same future, and its end leaves no trace here. Of the trace
    `horizon` more requests arrive; what is counted is every request that ends from now on.
    """
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        cost_s = math.inf
        try:
            ended = len(simulator.outcomes)
            simulator.stop_arrivals_after(horizon)
            simulator.answer(_placed(found, found.by_score().tolist(), row), CLAIRVOYANT)
            outcomes = simulator.run(EarliestCompletion())[ended:]
            cost_s = sum(DEFAULT_OBJECTIVE.cost_s(outcome) for outcome in outcomes)
        finally:
            os.write(write_fd, struct.pack("d", cost_s))
            os._exit(0)
    os.close(write_fd)
    blob = os.read(read_fd, 8)
    os.close(read_fd)
    os.waitpid(pid, 0)
    return float(struct.unpack("d", blob)[0])


def main() -> int:
    """Parse the command line, simulate, print; return the exit code."""
    parser = argparse.ArgumentParser(prog="tierwise policy bounds", description=__doc__)
    parser.add_argument("--presets", default="small,campus,factory")
    parser.add_argument("--seeds", type=int, default=4, help="held-out worlds per preset")
    parser.add_argument("--requests", type=int, default=300, help="per world")
    flags = parser.parse_args()
    presets = flags.presets.split(",")
    if set(presets) - set(PRESETS) or min(flags.seeds, flags.requests) < 1:
        parser.error(f"presets are {', '.join(PRESETS)}; counts start at 1")
    from tqdm import tqdm

    worlds = list(itertools.product(presets, range(HELD_OUT, HELD_OUT + flags.seeds)))
    for preset, seed in tqdm(worlds, unit="world", file=sys.stderr):
        world = make_world(preset, seed, request_count=flags.requests)
        ect_s = mean_cost_s(Simulator(world, seed).run(EarliestCompletion()))
        row = {
            "preset": preset,
            "seed": seed,
            "requests": flags.requests,
            "ect_s": round(ect_s, 4),
            "clairvoyant_s": round(mean_cost_s(clairvoyant(world, seed)), 4),
            "relaxed_s": round(relaxed_cost_s(world, seed), 4),
        }
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
