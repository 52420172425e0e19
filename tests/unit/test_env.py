"""`tierwise/Placement-v0` keeps gymnasium's and stable-baselines3's contracts."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from envs.placement import COLUMNS, GAP, VALID, PlacementEnv
from envs.sharded import ShardedVecEnv
from envs.vector import HINDSIGHT, PlacementVecEnv, VectorEnv
from tierwise.placement.features import CANDIDATES_MAX


def base_scores_choice(observation: np.ndarray) -> int:  # type: ignore[type-arg]
    return int(np.argmin(observation[:, GAP] + 1e3 * (1.0 - observation[:, VALID])))


def test_it_is_registered_and_passes_both_checkers() -> None:
    environment = gymnasium.make("envs:tierwise/Placement-v0", preset="small", request_count=40)
    check_env(environment.unwrapped, skip_render_check=True)
    sb3_check_env(environment.unwrapped)


def play(choose: Callable[[np.ndarray], int]) -> tuple[float, dict[str, Any]]:  # type: ignore[type-arg]
    """Return the sum of rewards of an episode, and its last info."""
    environment = PlacementEnv("small", 80)
    observation, _ = environment.reset(seed=4)
    rewards = 0.0
    is_over = False
    while not is_over:
        action = np.int64(choose(observation))
        observation, reward, _, is_over, info = environment.step(action)
        rewards += reward
    return rewards, info


def test_who_decides_like_the_base_score_earns_nothing() -> None:
    rewards, info = play(base_scores_choice)
    assert info["ended_count"] == 80
    assert rewards == pytest.approx(0.0, abs=1e-9)
    assert info["gain"] == pytest.approx(0.0, abs=1e-9)


def test_an_episode_pays_for_every_request_exactly_once() -> None:
    rewards, info = play(lambda observation: 0)
    assert info["ended_count"] == 80
    assert rewards != 0.0
    assert rewards == pytest.approx(80 * info["gain"])


def test_the_same_seed_and_actions_give_the_same_episode() -> None:
    def rewards() -> list[float]:
        environment = PlacementEnv("random", 60)
        observation, _ = environment.reset(seed=11)
        found = []
        for _ in range(30):
            action = np.int64(base_scores_choice(observation))
            observation, reward, _, is_over, _ = environment.step(action)
            found.append(reward)
            if is_over:
                break
        return found

    assert rewards() == rewards()


def test_an_invalid_action_becomes_the_base_scores_choice_and_is_counted() -> None:
    environment = PlacementEnv("small", 60)
    environment.reset(seed=1)
    assert not environment.action_masks()[CANDIDATES_MAX - 1]
    *_, info = environment.step(np.int64(CANDIDATES_MAX - 1))
    assert info["invalid_count"] == 1


def test_the_batched_environment_is_many_single_ones() -> None:
    batch = PlacementVecEnv(3, seed=5, preset="small", request_count=40)
    observations = batch.reset()
    assert observations.shape == (3, CANDIDATES_MAX, COLUMNS + HINDSIGHT)
    ends = 0
    for _ in range(60):
        actions = np.array([base_scores_choice(o) for o in observations])
        assert batch.action_masks()[np.arange(3), actions].all()
        observations, _, dones, infos = batch.step(actions)
        for is_over, info in zip(dones, infos, strict=True):
            assert ("terminal_observation" in info) == bool(is_over)
            assert info.get("TimeLimit.truncated", False) == bool(is_over)
            ends += int(is_over)
    assert ends >= 3


def steps(environment: VectorEnv, count: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    found = [environment.reset()]
    for _ in range(count):
        best = np.argmin(found[-1][:, :, GAP] + 1e3 * (1.0 - found[-1][:, :, VALID]), axis=1)
        environment.step_async((best + np.arange(len(best))) % 2)
        found.append(environment.step_wait()[0])
    environment.close()
    return found


def test_processes_change_nothing() -> None:
    one = PlacementVecEnv(5, seed=3, preset="small", request_count=30)
    two = ShardedVecEnv(5, seed=3, preset="small", request_count=30, process_count=2)
    for here, there in zip(steps(one, 40), steps(two, 40), strict=True):
        np.testing.assert_array_equal(here, there)


def test_a_decision_earns_the_cost_of_its_own_request() -> None:
    environment = PlacementVecEnv(2, seed=5, preset="small", request_count=60)
    seen = [environment.reset()]
    for _ in range(50):
        base = [base_scores_choice(one) for one in seen[-1]]
        environment.step_async(np.array(base))
        seen.append(environment.step_wait()[0])
    paid, earned = environment.take_rewards()
    assert paid.shape == earned.shape == (50, 2)
    assert np.abs(paid).max() < 1e-6  # like the base score, request by request
    under_base = np.array(seen[:-1])[:, :, 0, COLUMNS]
    has_ended = earned < 0.0  # the others still run, or were asked about again
    assert has_ended.mean() > 0.7
    np.testing.assert_allclose(earned[has_ended], -under_base[has_ended], rtol=1e-5)


def test_rewards_are_taken_once() -> None:
    environment = PlacementVecEnv(2, seed=5, preset="small", request_count=60)
    environment.reset()
    for _ in range(3):
        for _ in range(10):
            environment.step_async(environment.action_masks().argmax(axis=1))
            rewards = environment.step_wait()[1]
            rewards += 1e6  # what a learner adds to them is its own business
        paid, earned = environment.take_rewards()
        assert paid.shape == earned.shape == (10, 2)
        assert np.abs(paid).max() < 1e6
    assert environment.take_rewards()[0].shape[0] == 0
