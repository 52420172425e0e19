"""Training is reproducible, resumes, and exports what it trained."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tierwise.placement.policies import learned
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.policies.learned import Card, Network, Price
from training.evaluate import HELD_OUT, compare, interval, iqm
from training.export import disagreement, to_network
from training.judge import as_policy
from training.network import Residual
from training.ppo import Settings, main, train

TINY = Settings(
    steps=1024,
    seed=3,
    preset="small",
    env_count=8,
    hidden=8,
    request_count=30,
    validation_worlds=1,
    evaluation_worlds=1,
    name="tiny",
)


def test_two_short_trainings_from_one_seed_give_equal_weights(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        assert train(TINY, folder, is_resumed=False)
    first, second = (np.load(folder / "policy.npz") for folder in folders)
    assert all((first[name] == second[name]).all() for name in first.files)


def test_a_network_is_trained_on_top_of_prices_and_the_policy_has_them(tmp_path: Path) -> None:
    searched, trained = tmp_path / "searched", tmp_path / "trained"
    for folder in (searched, trained):
        folder.mkdir()
    prices = {"wait": Price(weight=0.3, low=0.0, high=9.0)}  # those of other signals are 0
    weights, card = learned.save(*_tiny_policy(prices))
    (searched / "policy.npz").write_bytes(weights)
    (searched / "policy.json").write_bytes(card)
    assert train(replace(TINY, prices=str(searched)), trained, is_resumed=False)
    policy = learned.load(
        (trained / "policy.npz").read_bytes(), (trained / "policy.json").read_bytes()
    )
    assert policy.card.prices == prices
    assert f"--prices {searched}" in policy.card.command


def _tiny_policy(prices: dict[str, Price]) -> tuple[Network, Card]:
    network = learned.initial(8, np.random.default_rng(0))
    return network, as_policy(network, prices=prices).card


def test_a_run_can_be_resumed_and_ends_as_a_loadable_policy(tmp_path: Path) -> None:
    assert train(TINY, tmp_path, is_resumed=False)
    longer = replace(TINY, steps=2048)
    assert train(longer, tmp_path, is_resumed=True)
    policy = learned.load(
        (tmp_path / "policy.npz").read_bytes(), (tmp_path / "policy.json").read_bytes()
    )
    assert policy.policy_id == "tiny@1"
    assert "--seed 3" in policy.card.command
    assert json.loads((tmp_path / "policy.json").read_text())["evaluation"]["worlds"] == 1


def test_numpy_equals_torch_and_a_fresh_network_is_the_base_score() -> None:
    torch.manual_seed(0)
    residual = Residual(16)
    fresh = to_network(residual)
    assert np.all(fresh.forward(np.ones((3, 24), dtype=np.float32)) == 0.0)
    torch.nn.init.normal_(residual.layer4.weight)
    torch.nn.init.normal_(residual.layer4.bias)
    assert disagreement(residual, to_network(residual)) <= 1e-5


def test_the_residual_does_not_depend_on_the_order_of_candidates() -> None:
    torch.manual_seed(1)
    residual = Residual(16)
    torch.nn.init.normal_(residual.layer4.weight)
    features = torch.randn(1, 16, 24)
    valid = (torch.arange(16) < 9).float()[None]
    order = torch.cat([torch.randperm(9), torch.arange(9, 16)])
    straight = residual(features, valid)[0, order]
    shuffled = residual(features[:, order], valid[:, order])[0]
    assert torch.allclose(straight[:9], shuffled[:9], atol=1e-5)


def test_what_is_not_valid_has_no_influence() -> None:
    torch.manual_seed(2)
    residual = Residual(16)
    torch.nn.init.normal_(residual.layer4.weight)
    features = torch.randn(1, 16, 24)
    valid = (torch.arange(16) < 5).float()[None]
    changed = features.clone()
    changed[:, 5:] = 7.0
    assert torch.equal(residual(features, valid)[:, :5], residual(changed, valid)[:, :5])


def test_a_policy_compared_with_itself_differs_by_nothing() -> None:
    rows = compare(
        {"ect": EarliestCompletion(), "same": EarliestCompletion()},
        ["small"],
        range(HELD_OUT, HELD_OUT + 3),
        60,
    )
    same = next(row for row in rows if row["policy"] == "same")
    assert same["versus_ect"] == same["versus_ect_low"] == same["versus_ect_high"] == 0.0


def test_the_interquartile_mean_ignores_outliers_and_lies_in_its_interval() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 1e9])
    assert iqm(values) == 4.5
    steady = np.random.default_rng(0).normal(10.0, 1.0, 200)
    low, high = interval(steady)
    assert low < iqm(steady) < high


def test_steps_are_rounded_up_to_whole_rollouts() -> None:
    assert replace(TINY, steps=1).whole_steps == 128 * 8
    assert replace(TINY, steps=1024).whole_steps == 1024
    assert replace(TINY, steps=1025).whole_steps == 2048


def test_a_resumed_run_goes_on_to_what_it_was_meant_to_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, Path, bool]] = []

    def noted(settings: Settings, folder: Path, *, is_resumed: bool) -> bool:
        seen.append((settings.steps, folder, is_resumed))
        return False

    monkeypatch.setattr("training.ppo.train", noted)
    for arguments in (["--steps", "5000", "--out", str(tmp_path)], ["--resume", ""]):
        if not arguments[-1]:
            arguments[-1] = str(seen[0][1])
        monkeypatch.setattr("sys.argv", ["train", *arguments])
        assert main() == 130
    assert seen == [(5000, seen[0][1], False), (5000, seen[0][1], True)]
    monkeypatch.setattr("sys.argv", ["train", "--resume", str(seen[0][1]), "--steps", "9000"])
    main()
    assert seen[-1][0] == 9000
