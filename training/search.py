"""Learn what a placement should pay for: prices of signals, by the cross-entropy method.

A generation draws policies around the best so far, plays all of them in the same new worlds, and
moves towards those that did best (noisy cross-entropy method: Szita and Lőrincz, 2006). The cost of
whole worlds is what counts, so what a decision does to later requests is in it, and one number per
world has far less noise than one per decision.

    python -m training.search --seed 7

A run folder holds args.json, command.txt, progress.json (to resume from), and at the end policy.npz
with its card policy.json.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from envs.simulator import Simulator
from envs.world import PRESETS, make_world
from tierwise.cost.estimate import estimate
from tierwise.domain.decision import Decision
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.errors import InvalidArgument, TierwiseError
from tierwise.files import write_atomically
from tierwise.placement.feasibility import feasible
from tierwise.placement.policies.learned import LearnedPolicy, Price, initial
from tierwise.placement.signals import BOUND, SIGNALS, encode
from training.figures import mean_cost_s
from training.judge import Origin, as_policy, finish, new_folder, processes, ship, verdict

Array = NDArray[np.float64]

# How far the first generation strays from the base score, per signal: about half of what the base
# score charges for it, or what seems much for one that it does not charge for.
SPREAD = {
    "path": 0.15,
    "wait": 0.2,
    "cold_start": 0.2,
    "run": 0.2,
    "displaced": 2.0,
    "usd": 0.3,
    "late": 0.3,
    "miss": 0.1,
    "busy_run": 0.3,
    "busy_start": 0.3,
    "queued_run": 0.15,
    "queued_start": 0.15,
    "pending": 0.3,
    "old_wait": 0.2,
    "overtaken_run": 0.2,
}
SPREAD_MIN = 0.15  # of the first spread: the search never stops trying
ELITE = 0.25  # share of a generation that the next one follows
STEP = 0.5  # of the way to the elite's mean
SPREAD_STEP = 0.3
AVERAGED = 5  # last generations whose means are averaged in the end
WORLDS_FROM = 20_000_000  # seeds; validation and held-out worlds lie far below
SEED_STRIDE = 1_000_000
HIDDEN = 8  # of the network that the policy has besides, which is zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that a run depends on, besides the code."""

    generations: int = 12
    population: int = 20
    worlds: int = 40
    request_count: int = 300
    seed: int = 7
    preset: str = "random"
    validation_worlds: int = 48
    evaluation_worlds: int = 100
    name: str = "placement"
    version: int = 1


@dataclass(slots=True)
class Progress:
    """Where the search stands."""

    means: list[Array]  # of each generation so far, the start first
    spread: Array

    @classmethod
    def fresh(cls) -> "Progress":
        """Return the start: the base score, and SPREAD around it."""
        return cls([np.zeros(len(SIGNALS))], np.array([SPREAD[name] for name in SIGNALS]))

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """Return what an interrupted run has left.

        Raises:
            InvalidArgument: There is nothing to resume.
        """
        path = folder / "progress.json"
        if not path.exists():
            raise InvalidArgument(f"{folder} holds no progress.json to resume from")
        state = json.loads(path.read_text())
        return cls([np.array(mean) for mean in state["means"]], np.array(state["spread"]))

    def write(self, folder: Path) -> None:
        """Write what a resumed run needs."""
        state = {"means": [m.tolist() for m in self.means], "spread": self.spread.tolist()}
        write_atomically(folder / "progress.json", json.dumps(state).encode())

    def follow(self, tried: Array, costs: Array) -> None:
        """Move towards the best of a generation.

        Args:
            tried: Prices, shape (population, 15).
            costs: What each has cost, shape (population,).
        """
        count = max(2, int(len(tried) * ELITE))
        elite = tried[np.argsort(costs, kind="stable")[:count]]
        self.means.append(self.means[-1] + STEP * (elite.mean(axis=0) - self.means[-1]))
        spread = self.spread + SPREAD_STEP * (elite.std(axis=0) - self.spread)
        self.spread = np.maximum(spread, SPREAD_MIN * Progress.fresh().spread)

    @property
    def result(self) -> Array:
        """Return the prices that the search has come to: the mean of its last means."""
        averaged: Array = np.mean(self.means[1:][-AVERAGED:] or self.means, axis=0)
        return averaged


def priced(weights: Array, low: Array | None = None, high: Array | None = None) -> LearnedPolicy:
    """Return the policy with these prices, shape (15,); without ranges it trusts itself always."""
    low = np.zeros(len(SIGNALS)) if low is None else low
    high = np.full(len(SIGNALS), BOUND) if high is None else high
    prices = {
        name: Price(weight=float(weight), low=float(least), high=float(most))
        for name, weight, least, most in zip(SIGNALS, weights, low, high, strict=True)
    }
    network = initial(HIDDEN, np.random.default_rng(0))
    return as_policy(network, prices=prices, temperature=0.0)


def log_costs(
    candidates: Sequence[Array], seeds: range, preset: str, request_count: int
) -> list[list[float]]:
    """Return the log cost of each candidate in each world, candidates in rows."""
    return [
        [_log_cost(weights, preset, request_count, seed) for seed in seeds]
        for weights in candidates
    ]


def _log_cost(weights: Array, preset: str, request_count: int, seed: int) -> float:
    world = make_world(preset, seed, request_count=request_count)
    return float(np.log(mean_cost_s(Simulator(world, seed).run(priced(weights)))))


class Surveyor:
    """Lets a policy decide and notes the range of the signals that it sees."""

    def __init__(self, policy: LearnedPolicy) -> None:
        self._policy = policy
        self.policy_id = policy.policy_id
        self.low = np.full(len(SIGNALS), np.inf)
        self.high = np.full(len(SIGNALS), -np.inf)

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return what the policy decides."""
        candidates, _ = feasible(view, request)
        if len(candidates) > 1:
            seen = encode(view, request, estimate(view, request, candidates))
            self.low = np.minimum(self.low, seen.min(axis=0))
            self.high = np.maximum(self.high, seen.max(axis=0))
        return self._policy.decide(view, request, rng)


def survey(weights: Array, seeds: range, preset: str, request_count: int) -> tuple[Array, Array]:
    """Return the lowest and highest value of each signal in some worlds, shape (15,) each."""
    surveyor = Surveyor(priced(weights))
    for seed in seeds:
        Simulator(make_world(preset, seed, request_count=request_count), seed).run(surveyor)
    is_seen = surveyor.low <= surveyor.high
    return np.where(is_seen, surveyor.low, 0.0), np.where(is_seen, surveyor.high, 0.0)


def find_prices(settings: Settings, folder: Path, progress: Progress) -> Array | None:
    """Return the prices that were found, shape (15,), or None after an interruption.

    Progress is left in `folder`.
    """
    from tqdm import tqdm

    first = WORLDS_FROM + SEED_STRIDE * settings.seed
    with (
        processes() as pool,
        tqdm(
            total=settings.generations * settings.worlds,
            initial=(len(progress.means) - 1) * settings.worlds,
            unit="world",
            file=sys.stderr,
        ) as bar,
    ):
        try:
            for generation in range(len(progress.means) - 1, settings.generations):
                rng = np.random.default_rng([settings.seed, generation])
                noise = rng.standard_normal((settings.population, len(SIGNALS)))
                tried = progress.means[-1] + progress.spread * noise
                candidates = [np.zeros(len(SIGNALS)), progress.means[-1], *tried]
                start = first + generation * settings.worlds
                seeds = [range(seed, seed + 1) for seed in range(start, start + settings.worlds)]
                one = partial(
                    log_costs,
                    candidates,
                    preset=settings.preset,
                    request_count=settings.request_count,
                )
                columns = []
                for column in pool.map(one, seeds):
                    columns.append(np.array(column)[:, 0])
                    bar.update()
                costs = np.stack(columns, axis=1)  # candidates × worlds
                gain = float(np.expm1((costs[1] - costs[0]).mean()))
                bar.set_postfix_str(f"cost {gain:+.1%} vs ect in the worlds of this generation")
                progress.follow(tried, costs[2:].mean(axis=1))
                progress.write(folder)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            return None
    return progress.result


def search(settings: Settings, folder: Path, progress: Progress) -> bool:
    """Search in `folder` and judge the policy; return False if it was interrupted."""
    weights = find_prices(settings, folder, progress)
    if weights is None:
        return False
    first = WORLDS_FROM + SEED_STRIDE * settings.seed
    low, high = survey(
        weights, range(first, first + settings.worlds), settings.preset, settings.request_count
    )
    policy = priced(weights, low, high)
    origin = Origin(
        name=settings.name,
        version=settings.version,
        preset=settings.preset,
        seed=settings.seed,
        command=_command(settings),
        validation_worlds=settings.validation_worlds,
        evaluation_worlds=settings.evaluation_worlds,
    )
    finish(folder, policy.network, origin, prices=policy.card.prices)
    return True


def _command(settings: Settings) -> str:
    default = asdict(Settings())
    changed = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in asdict(settings).items()
        if name == "seed" or (value != default[name] and name not in ("name", "version"))
    ]
    return "tierwise policy search " + " ".join(changed)


def main() -> int:
    """Parse the command line and search; return the exit code."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="tierwise policy search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--generations", type=int, default=default.generations)
    parser.add_argument(
        "--population", type=int, default=default.population, help="policies per generation"
    )
    parser.add_argument("--worlds", type=int, default=default.worlds, help="that each is played in")
    parser.add_argument("--request-count", type=int, default=default.request_count)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--preset", choices=PRESETS, default=default.preset)
    parser.add_argument("--validation-worlds", type=int, default=default.validation_worlds)
    parser.add_argument("--evaluation-worlds", type=int, default=default.evaluation_worlds)
    parser.add_argument("--name", default=default.name, help="of the policy")
    parser.add_argument("--version", type=int, default=default.version, help="of the policy")
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="folder of runs")
    parser.add_argument("--resume", type=Path, help="run folder to go on with")
    parser.add_argument(
        "--ship", action="store_true", help="also replace the policy inside the package"
    )
    flags = vars(parser.parse_args())
    root, resume, is_shipped = flags.pop("out"), flags.pop("resume"), flags.pop("ship")
    counts = ("generations", "population", "worlds", "request_count")
    if min(flags[name] for name in counts) < 1 or flags["population"] < 2:
        parser.error("counts start at 1, a population at 2")
    try:
        if resume is not None:
            settings = Settings(**json.loads((resume / "args.json").read_text()))
            folder, progress = resume, Progress.read(resume)
        else:
            settings = Settings(**flags)
            folder, progress = new_folder(root, settings.name), Progress.fresh()
            write_atomically(folder / "args.json", json.dumps(asdict(settings), indent=2).encode())
            write_atomically(folder / "command.txt", shlex.join(sys.argv).encode())
        print(f"searching in {folder}", file=sys.stderr)
        if not search(settings, folder, progress):
            print(f"interrupted; go on with --resume {folder}", file=sys.stderr)
            return 130
    except (TierwiseError, OSError, TypeError) as error:
        print(f"tierwise policy search: {error}", file=sys.stderr)
        return 1
    print(verdict(folder), file=sys.stderr)
    if is_shipped:
        ship(folder)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
