"""The same placement episodes, stepped by several processes: Python simulates on one core each."""

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.placement import Prices
from envs.vector import PlacementVecEnv, Rewards, VectorEnv


class ShardedVecEnv(VectorEnv):
    """Splits the environments among processes; what they return is that of one `PlacementVecEnv`.

    A process that ends by itself ends the training: its next answer raises EOFError here.
    """

    def __init__(
        self,
        env_count: int,
        *,
        seed: int,
        preset: str = "random",
        request_count: int = 400,
        process_count: int = 2,
        prices: Prices | None = None,
    ) -> None:
        """Start the processes.

        Args:
            env_count: How many environments in all.
            seed: Of the worlds.
            preset: See `envs.world`.
            request_count: Requests per episode.
            process_count: At most as many as environments.
            prices: See `envs.placement.Episode`.
        """
        super().__init__(env_count)
        context = multiprocessing.get_context("spawn")  # torch may have threads here: no fork
        self._pipes: list[Connection] = []
        self._processes = []
        for index in np.array_split(np.arange(env_count), min(process_count, env_count)):
            here, there = context.Pipe()
            part = range(int(index[0]), int(index[-1]) + 1)
            process = context.Process(
                target=_serve, args=(there, env_count, seed, preset, request_count, part, prices)
            )
            process.daemon = True  # ends with this one, however that ends
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def reset(self) -> NDArray[np.float32]:
        """Start every episode anew; return observations, shape (n, 16, 30)."""
        self._observations = np.concatenate(self._ask("reset"))
        return self._observations.copy()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Send the actions, shape (n,), to the processes."""
        for pipe, part in zip(self._pipes, np.array_split(actions, len(self._pipes)), strict=True):
            pipe.send(("step", part))

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Return what `PlacementVecEnv` would."""
        observations, rewards, dones, infos = zip(*(p.recv() for p in self._pipes), strict=True)
        self._observations = np.concatenate(observations)
        return (
            self._observations.copy(),
            np.concatenate(rewards),
            np.concatenate(dones),
            [info for part in infos for info in part],
        )

    def take_rewards(self) -> Rewards:
        """Return the rewards since the last call; see `PlacementVecEnv.take_rewards`."""
        paid, earned = zip(*self._ask("take_rewards"), strict=True)
        return np.concatenate(paid, axis=1), np.concatenate(earned, axis=1)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5.0)
        self._pipes, self._processes = [], []

    def _ask(self, verb: str) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((verb, None))
        return [pipe.recv() for pipe in self._pipes]


def _serve(
    pipe: Connection,
    env_count: int,
    seed: int,
    preset: str,
    request_count: int,
    part: range,
    prices: Prices | None,
) -> None:
    """Answer until the other end closes."""
    environment = PlacementVecEnv(
        env_count, seed=seed, preset=preset, request_count=request_count, part=part, prices=prices
    )
    try:
        while True:
            verb, actions = pipe.recv()
            if verb == "step":
                environment.step_async(actions)
                pipe.send(environment.step_wait())
            else:
                pipe.send(getattr(environment, verb)())
    except (EOFError, KeyboardInterrupt):
        pass
