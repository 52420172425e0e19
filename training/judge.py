"""The last step of every training: choose the dials, judge on held-out worlds, write the policy."""

import json
import multiprocessing
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from envs.simulator import Simulator
from envs.world import make_world
from tierwise.files import write_atomically
from tierwise.placement import policies
from tierwise.placement.features import BOUND, FEATURES
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.policies.learned import Card, LearnedPolicy, Network, Price, save
from tierwise.placement.policy import Policy
from tierwise.placement.score import DEFAULT_WEIGHTS
from training.evaluate import HELD_OUT, compare
from training.export import make_card
from training.figures import mean_cost_s
from training.network import BETA
from training.tune import VALIDATION

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
TEMPERATURES = (0.0, 0.5, 1.0)
# Drawing keeps agents that share a stale view from all running to the same node, which tells with
# many nodes: the highest temperature is taken that costs no more than validation can tell apart
# (paired costs of one world scatter by a tenth, so those of 48 worlds are good to 1.5 %).
MARGIN = 0.02
PROCESSES = 2
VALIDATION_REQUESTS = 400
EVALUATION_REQUESTS = 600

Range = tuple[NDArray[np.float32], NDArray[np.float32]]
EVERYTHING: Range = (
    np.full(len(FEATURES), -BOUND, dtype=np.float32),
    np.full(len(FEATURES), BOUND, dtype=np.float32),
)
NO_PRICES: Mapping[str, Price] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a policy's card says of where it comes from, and on what it is judged."""

    name: str
    version: int
    preset: str
    seed: int
    command: str
    validation_worlds: int
    evaluation_worlds: int


def processes(count: int = PROCESSES) -> ProcessPoolExecutor:
    """Return a pool of simulating processes: spawned, for a fork copies locks of other threads."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


class Validation:
    """Judges weights on worlds that training never sees, against the base score on the same."""

    def __init__(self, preset: str, worlds: int) -> None:
        self._preset = preset
        self._seeds = range(VALIDATION, VALIDATION + worlds)
        self._pool = processes()
        self._base = self._costs_s(EarliestCompletion())

    def ratio(self, policy: Policy) -> float:
        """Return the mean over worlds of cost ÷ cost of the base score; below 1 is better."""
        return float(np.exp(np.mean(np.log(self._costs_s(policy) / self._base))))

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown()

    def _costs_s(self, policy: Policy) -> NDArray[np.float64]:
        one = partial(_cost_s, policy, self._preset)
        return np.array(list(self._pool.map(one, self._seeds, chunksize=4)))


def _cost_s(policy: Policy, preset: str, seed: int) -> float:
    world = make_world(preset, seed, request_count=VALIDATION_REQUESTS)
    return mean_cost_s(Simulator(world, seed).run(policy))


def as_policy(
    network: Network,
    trained: Range = EVERYTHING,
    *,
    prices: Mapping[str, Price] = NO_PRICES,
    lam: float = 1.0,
    temperature: float = 1.0,
) -> LearnedPolicy:
    """Return weights as the policy that agents would run; `trained` is the range of features."""
    low, high = trained
    card = Card(
        name="candidate",
        version=1,
        schema=1,
        beta=BETA,
        lam=lam,
        temperature=temperature,
        score=asdict(DEFAULT_WEIGHTS),
        low=np.where(np.isfinite(low), low, -BOUND).tolist(),
        high=np.where(np.isfinite(high), high, BOUND).tolist(),
        prices=dict(prices),
    )
    return LearnedPolicy(network, card)


def finish(
    folder: Path,
    network: Network,
    origin: Origin,
    trained: Range = EVERYTHING,
    prices: Mapping[str, Price] = NO_PRICES,
) -> None:
    """Choose λ and temperature on validation, judge on held-out worlds, write policy and card."""
    from tqdm import tqdm

    def candidate(lam: float, temperature: float) -> LearnedPolicy:
        return as_policy(network, trained, prices=prices, lam=lam, temperature=temperature)

    ratios: dict[tuple[float, float], float] = {}
    total = len(TEMPERATURES) + len(LAMBDAS) - 1 + 2 * origin.evaluation_worlds
    with (
        tqdm(total=total, unit="step", desc="judging", file=sys.stderr) as bar,
        closing(Validation(origin.preset, origin.validation_worlds)) as validation,
    ):

        def tried(lam: float, temperature: float) -> tuple[float, float]:
            if (lam, temperature) not in ratios:
                policy = candidate(lam, temperature)
                ratios[lam, temperature] = validation.ratio(policy)
                bar.update()
            return ratios[lam, temperature], lam

        lowest = min(tried(1.0, each)[0] for each in TEMPERATURES)
        temperature = max(each for each in TEMPERATURES if tried(1.0, each)[0] < lowest + MARGIN)
        lam = min(LAMBDAS, key=lambda each: tried(each, temperature))
        policy = candidate(lam, temperature)
        seeds = range(HELD_OUT, HELD_OUT + origin.evaluation_worlds)
        rows = compare(
            {"ect": EarliestCompletion(), "learned": policy},
            [origin.preset],
            seeds,
            EVALUATION_REQUESTS,
            on_progress=bar.update,
        )
    judged = next(row for row in rows if row["policy"] == "learned")
    card = make_card(
        name=origin.name,
        version=origin.version,
        beta=BETA,
        lam=lam,
        temperature=temperature,
        low=policy.card.low,
        high=policy.card.high,
        score=policy.card.score,
        prices=policy.card.prices,
        command=origin.command,
        seed=origin.seed,
        data=f"simulated worlds of preset {origin.preset}",
        evaluation={
            "what": "simulated, held-out worlds, paired with the tuned base score (ect)",
            "worlds": origin.evaluation_worlds,
            "cost_vs_ect": judged["versus_ect"],
            "cost_vs_ect_95": [judged["versus_ect_low"], judged["versus_ect_high"]],
            "missed": judged["missed"],
            "missed_ect": next(r for r in rows if r["policy"] == "ect")["missed"],
            "validation_cost_ratio_by_lambda_and_temperature": {
                f"{dials[0]:g}, {dials[1]:g}": round(ratio, 4) for dials, ratio in ratios.items()
            },
        },
    )
    weights, card_json = save(network, card)
    write_atomically(folder / "policy.npz", weights)
    write_atomically(folder / "policy.json", card_json)


def verdict(folder: Path) -> str:
    """Return in words how the policy in a run folder did on held-out worlds."""
    evaluation = json.loads((folder / "policy.json").read_text())["evaluation"]
    low, high = evaluation["cost_vs_ect_95"]
    return (
        f"cost {evaluation['cost_vs_ect']:+.1%} [{low:+.1%}, {high:+.1%}] against ect on "
        f"{evaluation['worlds']} held-out simulated worlds"
    )


def ship(folder: Path) -> None:
    """Copy the policy into the package, under the name `learned`."""
    target = Path(str(policies.__file__)).parent
    card = json.loads((folder / "policy.json").read_text()) | {"name": "learned"}
    write_atomically(target / "shipped.npz", (folder / "policy.npz").read_bytes())
    write_atomically(target / "shipped.json", json.dumps(card, indent=2).encode())


def new_folder(root: Path, name: str) -> Path:
    """Make and return the next run folder, `name_1`, `name_2` and so on, as rl-zoo does."""
    endings = [path.name.rpartition("_")[2] for path in root.glob(f"{name}_*")]
    number = 1 + max((int(ending) for ending in endings if ending.isdigit()), default=0)
    folder = root / f"{name}_{number}"
    folder.mkdir(parents=True)
    return folder
