"""Train the DeF-DReL-style agent: a DQN that says "fog" or "cloud" per call, in the same simulator.

    python -m training.defdrel --seed 0 --steps 60000

Writes `defdrel.npz` (NumPy weights, no pickle) and the card `defdrel.json` with command and seed.
What is kept is the checkpoint that is best on validation worlds. See
`tierwise.placement.policies.defdrel` for what is the paper's and what is ours.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback

from envs.placement import Episode
from envs.world import make_world
from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.topology import Tier
from tierwise.domain.view import ClusterView
from tierwise.placement import policies
from tierwise.placement.policies.defdrel import (
    BOUND,
    CLOUD,
    FOG,
    INPUTS,
    Float32,
    forward,
    inputs,
    order,
)
from tierwise.placement.ranking import Ranking, rank_or_place
from training.export import TOLERANCE, commit, write_pair
from training.tune import TRAINING, VALIDATION, cost_of

HIDDEN = 32
REWARD_MAX = 5.0  # of one step, so that one outlier does not drown the others
CHECKPOINTS = 8


class SideEpisode(Episode):
    """An episode that is asked only where both sides have candidates."""

    def advance_to_choice(self) -> bool:
        """Run to the next decision between fog and cloud; return False when the trace has ended."""
        while self.advance():
            assert self._ranking is not None
            tiers = {row.node.tier for row in self._ranking.estimates.candidates}
            if Tier.CLOUD in tiers and len(tiers) > 1:
                return True
            self.decide(int(self._ranking.scores.argmin()))
        return False

    def state(self) -> Float32:
        """Return the agent's inputs at the open decision."""
        assert self._question is not None
        return inputs(self._question.ask.view, self._question.ask.request)

    def take(self, side: int) -> None:
        """Place the open request on the best candidate of a side."""
        assert self._ranking is not None
        self.decide(int(order(self._ranking, side)[0]))


class SideEnv(gymnasium.Env[Float32, np.int64]):
    """Fog or cloud? Rewards are `PlacementEnv`'s: what was saved against the tuned base score."""

    def __init__(self, seed: int, preset: str, request_count: int) -> None:
        self.observation_space = spaces.Box(-BOUND, BOUND, (len(INPUTS),), np.float32)
        self.action_space = spaces.Discrete(2)
        self._next_world = TRAINING + 100_000 * seed
        self._preset = preset
        self._request_count = request_count
        self._episode: SideEpisode | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32, dict[str, Any]]:
        """Start the next training world that holds a choice."""
        super().reset(seed=seed)
        while True:
            number = self._next_world
            self._next_world += 1
            world = make_world(self._preset, number, request_count=self._request_count)
            self._episode = SideEpisode(world, number)
            if self._episode.advance_to_choice():
                return self._episode.state(), {}

    def step(self, action: np.int64) -> tuple[Float32, float, bool, bool, dict[str, Any]]:
        """Place one request and run on to the next choice."""
        assert self._episode is not None
        self._episode.take(int(action))
        goes_on = self._episode.advance_to_choice()
        reward = float(np.clip(self._episode.collect(), -REWARD_MAX, REWARD_MAX))
        state = self._episode.state() if goes_on else np.zeros(len(INPUTS), np.float32)
        return state, reward, False, not goes_on, {}


class _Candidate:
    """The agent with weights that are not in the package."""

    policy_id = PolicyId("defdrel@1")

    def __init__(self, weights: tuple[Float32, ...]) -> None:
        self._weights = weights

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        values = forward(self._weights, inputs(view, request))
        side = CLOUD if values[CLOUD] > values[FOG] else FOG
        return ranking.placed(self.policy_id, order(ranking, side))


class Checkpoints(BaseCallback):
    """Now and then judges the network on validation worlds and keeps the best."""

    def __init__(self, every: int, preset: str, request_count: int, worlds: int) -> None:
        super().__init__()
        self.best_log_cost = float("inf")
        self.best: tuple[Float32, ...] = ()
        self._every = every
        self._preset = preset
        self._request_count = request_count
        self._seeds = range(VALIDATION, VALIDATION + worlds)

    def _on_step(self) -> bool:
        if self.num_timesteps % self._every == 0:
            weights = to_arrays(self.model)
            policy = _Candidate(weights)
            found = cost_of(lambda: policy, [self._preset], self._seeds, self._request_count)
            print(f"{self.num_timesteps} steps: log cost {found:.4f} on validation worlds")
            if found < self.best_log_cost:
                self.best_log_cost, self.best = found, weights
        return True


def to_arrays(model: Any) -> tuple[Float32, ...]:
    """Return the Q-network's layers for `forward`.

    Raises:
        ValueError: NumPy and torch disagree by more than 1e-5.
    """
    network = model.q_net.q_net
    arrays: list[Float32] = []
    for layer in network:
        if isinstance(layer, torch.nn.Linear):
            arrays += [layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy().copy()]
    probe = np.random.default_rng(0).uniform(-2, 2, (64, len(INPUTS))).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(probe)).numpy()
    found = np.array([forward(tuple(arrays), x) for x in probe])
    worst = float((np.abs(found - expected) / np.maximum(1.0, np.abs(expected))).max())
    if worst > TOLERANCE:
        raise ValueError(f"NumPy and torch disagree by {worst:.2e}; the export is not used")
    return tuple(arrays)


def main() -> int:
    """Parse the command line, train, write weights and card; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.defdrel", description=__doc__)
    parser.add_argument("--preset", default="random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60_000, help="decisions to learn from")
    parser.add_argument("--requests", type=int, default=300, help="per world")
    parser.add_argument("--validation-worlds", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path(policies.__file__).parent)
    flags = parser.parse_args()
    if min(flags.requests, flags.validation_worlds) < 1 or flags.steps < CHECKPOINTS:
        parser.error(f"counts start at 1, steps at {CHECKPOINTS}")
    torch.set_num_threads(1)
    model = DQN(
        "MlpPolicy",
        SideEnv(flags.seed, flags.preset, flags.requests),
        learning_rate=lambda left: 5e-4 * left,
        buffer_size=50_000,
        learning_starts=2_000,
        batch_size=256,
        gamma=0.8,
        train_freq=8,
        gradient_steps=4,
        target_update_interval=2_000,
        exploration_fraction=0.4,
        exploration_final_eps=0.05,
        policy_kwargs={"net_arch": [HIDDEN, HIDDEN]},
        seed=flags.seed,
        device="cpu",
    )
    watch = Checkpoints(
        flags.steps // CHECKPOINTS, flags.preset, flags.requests, flags.validation_worlds
    )
    model.learn(flags.steps, callback=watch)
    arrays = {f"a{i}": array for i, array in enumerate(watch.best)}
    card = {
        "inputs": INPUTS,
        "command": f"python -m training.defdrel --preset {flags.preset} --seed {flags.seed} "
        f"--steps {flags.steps} --requests {flags.requests}",
        "seed": flags.seed,
        "commit": commit(),
        "data": f"simulated worlds of preset {flags.preset}, {flags.requests} requests each, "
        f"seeds from {TRAINING + 100_000 * flags.seed}",
        "validation_log_cost": watch.best_log_cost,
    }
    print(write_pair(flags.out, "defdrel", arrays, card))
    return 0


if __name__ == "__main__":
    sys.exit(main())
