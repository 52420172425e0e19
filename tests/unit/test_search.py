"""The search for prices: reproducible, resumable, and it finds what is known to be better."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tierwise.errors import InvalidArgument
from tierwise.placement.policies import learned
from tierwise.placement.signals import SIGNALS
from training.search import SPREAD, Progress, Settings, search, survey
from training.seeds import judged, to_markdown

TINY = Settings(
    generations=2,
    population=4,
    worlds=2,
    request_count=40,
    seed=3,
    preset="small",
    validation_worlds=1,
    evaluation_worlds=2,
    name="tiny",
)


def test_every_signal_has_a_spread() -> None:
    assert tuple(SPREAD) == SIGNALS


def test_two_searches_from_one_seed_end_alike_and_as_a_policy(tmp_path: Path) -> None:
    policies = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        assert search(TINY, folder, Progress.fresh())
        policies.append(
            learned.load(
                (folder / "policy.npz").read_bytes(), (folder / "policy.json").read_bytes()
            )
        )
    first, second = policies
    assert first.card == second.card
    assert first.policy_id == "tiny@1"
    assert "--seed 3" in first.card.command
    assert any(price.weight for price in first.card.prices.values())
    assert first.card.evaluation["worlds"] == 2


def test_an_interrupted_search_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert search(TINY, whole, Progress.fresh())
    assert search(replace(TINY, generations=1), parts, Progress.fresh())
    assert search(TINY, parts, Progress.read(parts))
    assert (whole / "progress.json").read_bytes() == (parts / "progress.json").read_bytes()
    with pytest.raises(InvalidArgument, match=r"no progress\.json"):
        Progress.read(tmp_path)


def test_the_search_approaches_what_costs_least() -> None:
    best = np.array([2.0 * SPREAD[name] for name in SIGNALS])
    progress = Progress.fresh()
    rng = np.random.default_rng(0)
    for _ in range(25):
        tried = progress.means[-1] + progress.spread * rng.standard_normal((24, len(SIGNALS)))
        costs = (((tried - best) / best) ** 2).sum(axis=1)
        progress.follow(tried, costs + rng.normal(0.0, 0.1, len(costs)))
    assert (np.abs(progress.result - best) < np.abs(best)).all()
    assert np.abs((progress.result - best) / best).mean() < 0.5


def test_a_survey_tells_the_range_of_what_was_seen() -> None:
    low, high = survey(np.zeros(len(SIGNALS)), range(1, 3), "small", 60)
    assert (low <= high).all()
    assert high[SIGNALS.index("run")] > low[SIGNALS.index("run")] > 0.0


def test_progress_is_written_whole(tmp_path: Path) -> None:
    progress = Progress.fresh()
    progress.write(tmp_path)
    state = json.loads((tmp_path / "progress.json").read_text())
    assert len(state["means"]) == 1
    assert Progress.read(tmp_path).spread.tolist() == progress.spread.tolist()


def test_the_seed_study_judges_all_on_the_same_worlds() -> None:
    gentle, absurd = np.zeros(len(SIGNALS)), np.zeros(len(SIGNALS))
    absurd[SIGNALS.index("run")] = -30.0  # seeks the slowest nodes
    costs = judged([gentle, absurd], 3, 60, "small")
    assert costs.shape == (3, 3)
    assert (costs[1] == costs[0]).all()
    assert (costs[2] > costs[0]).all()
    text = to_markdown(np.exp(costs[1:] - costs[0]) - 1.0, TINY, 3)
    assert "| 0 | +0.0% [+0.0%, +0.0%] |" in text
