"""Many placement episodes in one process, as stable-baselines3 wants them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from envs.placement import COLUMNS, VALID, Episode, Prices, new_episode
from tierwise.placement.features import BOUND, CANDIDATES_MAX, GAP_MAX

Rewards = tuple[NDArray[np.float32], NDArray[np.float32]]

PLAYS = 3  # of each world
HINDSIGHT = 4  # columns that only a critic may look at
REMEMBERED_MAX = 4096  # steps whose rewards are kept for `take_rewards`


class VectorEnv(VecEnv):
    """What the batched environments share: spaces, masks, and what the learner asks of them.

    Observations are those of `PlacementEnv` and four columns more for the critic alone, the same in
    every row: what `Episode.hindsight` returns.
    """

    def __init__(self, env_count: int) -> None:
        shape = (CANDIDATES_MAX, COLUMNS + HINDSIGHT)
        super().__init__(
            env_count,
            spaces.Box(-BOUND, GAP_MAX, shape=shape, dtype=np.float32),
            spaces.Discrete(CANDIDATES_MAX),
        )
        self._observations = np.zeros((env_count, *shape), dtype=np.float32)

    def action_masks(self) -> NDArray[np.bool_]:
        """Return valid actions of all episodes, shape (n, 16)."""
        masks: NDArray[np.bool_] = self._observations[:, :, VALID] > 0.0
        return masks

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Answer `action_masks`, the only method that the learner calls."""
        if method_name != "action_masks":
            raise AttributeError(f"placement episodes have no method {method_name!r}")
        return list(self.action_masks()[self._indices(indices)])

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return attributes of the episodes; `render_mode` is None for each."""
        if attr_name == "render_mode":
            return [None for _ in self._indices(indices)]
        if attr_name == "action_masks":  # asked for to see whether masking is supported
            return [self.action_masks for _ in self._indices(indices)]
        raise AttributeError(f"placement episodes have no attribute {attr_name!r}")

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuse: episodes are changed by actions only."""
        raise AttributeError(f"placement episodes have no attribute {attr_name!r} to set")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Return False for each: there are no wrappers inside."""
        return [False for _ in self._indices(indices)]

    def _indices(self, indices: Any) -> Sequence[int]:
        if indices is None:
            return range(self.num_envs)
        return [indices] if isinstance(indices, int) else list(indices)


class PlacementVecEnv(VectorEnv):
    """Steps all episodes one after the other into shared arrays; no process, no copy per episode.

    Episodes restart by themselves: each world is played three times, then the next of the stream
    follows, so the same seed gives the same sequence of worlds whatever the actions are.
    """

    def __init__(
        self,
        env_count: int,
        *,
        seed: int,
        preset: str = "random",
        request_count: int = 400,
        part: range | None = None,
        prices: Prices | None = None,
    ) -> None:
        """Make `env_count` episodes of a preset.

        Args:
            env_count: How many at a time.
            seed: Of the worlds.
            preset: See `envs.world`.
            request_count: Requests per episode.
            part: Which of them are made here; None is all.
            prices: See `Episode`.
        """
        part = range(env_count) if part is None else part
        children = np.random.SeedSequence(seed).spawn(env_count)[part.start : part.stop]
        env_count = len(part)
        super().__init__(env_count)
        self._preset = preset
        self._request_count = request_count
        self._prices = prices
        self._streams = [np.random.default_rng(child) for child in children]
        self._episodes: list[Episode] = []
        self._actions: NDArray[np.int64] = np.zeros(env_count, dtype=np.int64)
        self._plays_left = [0] * env_count  # of the world that an environment is in
        self._begun_at = [0] * env_count  # at which step of all its episode began
        self._step_count = 0
        self._rollout_at = 0  # the step at which `take_rewards` was last called
        self._paid: list[NDArray[np.float32]] = []  # since then, by the step that paid
        self._earned: list[NDArray[np.float32]] = []  # and by the step that decided

    def reset(self) -> NDArray[np.float32]:
        """Start every episode anew; return observations, shape (n, 16, 30)."""
        self._episodes = [self._fresh(index) for index in range(self.num_envs)]
        self._begun_at = [self._step_count] * self.num_envs
        return self._observations.copy()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Remember the actions, shape (n,)."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Take the remembered actions; ended episodes are truncated, not terminated."""
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        dones = np.zeros(self.num_envs, dtype=np.bool_)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if len(self._paid) >= REMEMBERED_MAX:
            self.take_rewards()  # this learner does not look back
        self._paid.append(rewards)
        self._earned.append(np.zeros(self.num_envs, dtype=np.float32))
        for index, episode in enumerate(self._episodes):
            episode.decide(int(self._actions[index]))
            is_over = not episode.advance()
            for settled in episode.settle():
                rewards[index] += settled.saved
                if settled.decision is not None:
                    step = self._begun_at[index] + settled.decision
                    self._earned[max(0, step - self._rollout_at)][index] -= settled.cost
            if is_over:
                dones[index] = True
                infos[index] = {
                    "terminal_observation": self._observations[index].copy(),
                    "TimeLimit.truncated": True,
                    "episode": {
                        "r": episode.gain,
                        "l": episode.ended_count,
                        "t": 0.0,
                    },
                }
                self._episodes[index] = self._fresh(index)
                self._begun_at[index] = self._step_count + 1
            else:
                self._observe(index, episode)
        self._step_count += 1
        # The learner adds to the rewards that it gets; `take_rewards` keeps what was paid.
        return self._observations.copy(), rewards.copy(), dones, infos

    def take_rewards(self) -> Rewards:
        """Return the rewards since the last call, each of shape (steps, n), and forget them.

        The first are as `step_wait` paid them, when a request ended. The second are −cost, in mean
        costs under the base score, at the step that had placed the request: a learner that looks
        back at a whole rollout need not guess which of many decisions a late reward belongs to.
        What was decided before the last call counts at the first step since.
        """
        paid, earned = np.array(self._paid), np.array(self._earned)
        self._paid, self._earned, self._rollout_at = [], [], self._step_count
        return paid, earned

    def close(self) -> None:
        """Forget the episodes."""
        self._episodes = []

    def _fresh(self, index: int) -> Episode:
        """Start the next world, or the same once more: its base score is simulated only once."""
        if self._plays_left[index] > 0:
            episode = self._episodes[index].again()
            episode.advance()
        else:
            seed = int(self._streams[index].integers(2**31))
            episode = new_episode(self._preset, seed, self._request_count, self._prices)
            self._plays_left[index] = PLAYS
        self._plays_left[index] -= 1
        self._observe(index, episode)
        return episode

    def _observe(self, index: int, episode: Episode) -> None:
        out = self._observations[index]
        episode.observe(out)
        out[:, COLUMNS:] = episode.hindsight()
