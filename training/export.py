"""From torch to the NumPy policy that agents run."""

import io
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from tierwise.files import write_atomically
from tierwise.placement.features import BOUND, FEATURES
from tierwise.placement.policies.learned import Card, Network, Price
from training.network import Residual

TOLERANCE = 1e-5


def to_network(residual: Residual) -> Network:
    """Return the same function in NumPy.

    Raises:
        ValueError: The two disagree by more than 1e-5 (relative to the larger values).
    """

    def array(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.ascontiguousarray(tensor.detach().cpu().numpy().astype(np.float32))

    network = Network(
        w1=array(residual.layer1.weight.T),
        b1=array(residual.layer1.bias),
        w2=array(residual.layer2.weight.T),
        b2=array(residual.layer2.bias),
        w3=array(residual.layer3.weight.T),
        b3=array(residual.layer3.bias),
        w4=array(residual.layer4.weight[0]),
        b4=array(residual.layer4.bias[0]).reshape(()),
    )
    worst = disagreement(residual, network)
    if worst > TOLERANCE:
        raise ValueError(f"NumPy and torch disagree by {worst:.2e}; the export is not used")
    return network


def disagreement(residual: Residual, network: Network, *, samples: int = 200) -> float:
    """Return the largest |torch − NumPy| ÷ max(1, |torch|) over random decisions."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(samples):
        k = int(rng.integers(1, 17))
        features = rng.uniform(-BOUND / 2, BOUND / 2, size=(k, len(FEATURES))).astype(np.float32)
        with torch.no_grad():
            expected = residual(torch.from_numpy(features)[None], torch.ones(1, k))[0].numpy()
        found = network.forward(features)
        relative = np.abs(found - expected) / np.maximum(1.0, np.abs(expected))
        worst = max(worst, float(relative.max()))
    return worst


def make_card(
    *,
    name: str,
    version: int,
    beta: float,
    lam: float,
    temperature: float,
    low: list[float],
    high: list[float],
    score: dict[str, float],
    prices: dict[str, Price],
    command: str,
    seed: int,
    data: str,
    evaluation: dict[str, Any],
) -> Card:
    """Return the card of a policy trained here and now."""
    return Card(
        name=name,
        version=version,
        schema=1,
        beta=beta,
        lam=lam,
        temperature=temperature,
        score=score,
        low=low,
        high=high,
        prices=prices,
        command=command,
        seed=seed,
        commit=commit(),
        data=data,
        evaluation=evaluation,
    )


def write_pair(folder: Path, name: str, arrays: Mapping[str, Any], card: Mapping[str, Any]) -> Path:
    """Write a rival's arrays as `name.npz` with `name.json` beside it; return the first."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(folder / f"{name}.npz", buffer.getvalue())
    encoded = msgspec.json.encode({"name": name, **card})
    write_atomically(folder / f"{name}.json", msgspec.json.format(encoded))
    return folder / f"{name}.npz"


def commit() -> str:
    """Return what git calls this checkout, "unknown" outside of one."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"
