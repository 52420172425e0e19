"""Ask the future: label simulated decisions with what each candidate would have led to.

    python -m training.teacher --seed 0 --minutes 10 --out runs/labels

At some decisions of a simulated trace, the simulation is forked once per candidate and run on for
HORIZON arrivals under the tuned base score, future and noise being the same in all copies. The
differences between the copies are labels with little variance. Each label knows the future, but a
network that sees only the features of the decision learns their mean: what a policy without
foresight can gain by one step of policy improvement (rollout: Tesauro and Galperin, 1996).
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from envs.simulator import Simulator
from envs.world import make_world
from tierwise.clock import monotonic_s
from tierwise.domain.decision import NotPlaced
from tierwise.placement.features import CANDIDATES_MAX, FEATURES, encode, gaps
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.policy import Policy
from tierwise.placement.ranking import rank
from training.bounds import cost_in_a_copy
from training.evaluate import load_policies
from training.figures import mean_cost_s

TRAINING = 2_000_000  # seeds of worlds to learn from start here
SHARE = 0.3  # of the decisions are labelled
HORIZON = 30
WIDTH = 5
GAP_TRIED = 4.0  # a candidate that is worse than the best by more deadlines is not tried
SHARD = 2_000  # labels per file


@dataclass(slots=True)
class Labels:
    """Labelled decisions, n of them.

    Attributes:
        features: Each (16, 24), zero-padded.
        gaps: Each (16,), of the base scores in deadlines.
        valid: Each (16,), 1 for a candidate.
        costs: Each (16,): cost of what follows minus that of the base score's choice, ÷ the mean
            cost of a request in that world under the base score; NaN where nothing was tried.
    """

    features: list[NDArray[np.float32]] = field(default_factory=list)
    gaps: list[NDArray[np.float32]] = field(default_factory=list)
    valid: list[NDArray[np.float32]] = field(default_factory=list)
    costs: list[NDArray[np.float32]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.costs)

    def write(self, path: Path) -> None:
        """Write all as one `.npz`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                features=np.array(self.features),
                gaps=np.array(self.gaps),
                valid=np.array(self.valid),
                costs=np.array(self.costs),
            )


def label(
    preset: str,
    seed: int,
    request_count: int,
    behaviour: Policy,
    rng: np.random.Generator,
    labels: Labels,
) -> None:
    """Run one world with `behaviour` and add labels for a share of its decisions."""
    world = make_world(preset, seed, request_count=request_count)
    scale_s = mean_cost_s(Simulator(world, seed).run(EarliestCompletion()))
    simulator = Simulator(world, seed)
    while (question := simulator.next_question()) is not None:
        view, request = question.ask.view, question.ask.request
        if rng.random() < SHARE:
            found = rank(view, request, candidates_max=CANDIDATES_MAX)
            if not isinstance(found, NotPlaced) and len(found.scores) > 1:
                gap = gaps(found.scores, request.deadline_s)
                order = found.by_score().tolist()
                tried = [row for row in order[:WIDTH] if gap[row] <= GAP_TRIED]
                if len(tried) > 1:
                    k = len(gap)
                    costs_s = [cost_in_a_copy(simulator, found, row, HORIZON) for row in tried]
                    padded = np.zeros((4, CANDIDATES_MAX), dtype=np.float32)
                    padded[0, :k], padded[1, :k], padded[2] = gap, 1.0, np.nan
                    padded[2, tried] = (np.array(costs_s) - costs_s[0]) / scale_s
                    features = np.zeros((CANDIDATES_MAX, len(FEATURES)), dtype=np.float32)
                    features[:k] = encode(view, request, found.estimates, found.scores)
                    labels.features.append(features)
                    labels.gaps.append(padded[0])
                    labels.valid.append(padded[1])
                    labels.costs.append(padded[2])
        simulator.answer(behaviour.decide(view, request, rng), behaviour.policy_id)


def main() -> int:
    """Parse the command line and label until the time is over; return the exit code."""
    parser = argparse.ArgumentParser(prog="tierwise policy label", description=__doc__)
    parser.add_argument("--preset", default="random")
    parser.add_argument("--seed", type=int, default=0, help="of the worlds and the draws")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--requests", type=int, default=300, help="per world")
    parser.add_argument("--behaviour", default="ect", help="whose decisions are followed")
    parser.add_argument("--out", type=Path, default=Path("runs/labels"))
    flags = parser.parse_args()
    from tqdm import tqdm

    rng = np.random.default_rng(flags.seed)
    (learner,) = load_policies([flags.behaviour]).values()
    # Also states that the learner itself would not get into: some worlds go by a softened rule.
    behaviours = [learner, EarliestCompletion(temperature=0.15)]
    labels, written = Labels(), 0
    ends_s = monotonic_s() + 60.0 * flags.minutes
    world = TRAINING + 100_000 * flags.seed
    with tqdm(unit="label", file=sys.stderr) as bar:
        while monotonic_s() < ends_s:
            before = len(labels)
            behaviour = behaviours[int(rng.random() < 0.3)]
            label(flags.preset, world, flags.requests, behaviour, rng, labels)
            world += 1
            bar.update(len(labels) - before)
            if len(labels) >= SHARD or monotonic_s() >= ends_s:
                labels.write(flags.out / f"{flags.seed:03}-{written:03}.npz")
                written += 1
                labels = Labels()
    print(flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
