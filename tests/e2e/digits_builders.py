"""Digits on the nodes of a cluster, and what clients do with them. It runs in workers."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HELD = 360
Arrays = list[NDArray[Any]]


def write_shares(folder: Path, count: int, alpha: float = 1.0, seed: int = 0) -> list[str]:
    """Write one file of digits per client, labels drawn from a Dirichlet distribution.

    Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification" (2019): the smaller alpha, the fewer kinds of digits each client has. The file
    held.npz has the pictures that no client has.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.data))
    held, rest = order[:HELD], order[HELD:]
    owner = np.empty(len(rest), dtype=np.int64)
    for label in range(10):
        rows = np.flatnonzero(digits.target[rest] == label)
        shares = rng.dirichlet([alpha] * count)
        owner[rows] = rng.choice(count, size=len(rows), p=shares)
    owner[rng.permutation(len(rest))[:count]] = np.arange(count)  # nobody has nothing
    files = []
    for name, rows in [("held", held), *((f"c{i}", rest[owner == i]) for i in range(count))]:
        path = (folder / f"{name}.npz").resolve()
        np.savez(
            path,
            pictures=(digits.data[rows] / 16.0).astype(np.float32),
            labels=digits.target[rows],
        )
        files.append(str(path))
    return files[1:]


def initial() -> Arrays:
    return [np.zeros((64, 10)), np.zeros(10)]


def client(arrays: Arrays, config: dict[str, Any]) -> tuple[Arrays, int, dict[str, Any]]:
    """Train softmax regression on one file; `config["bad"]` names clients that flip signs."""
    import time

    import numpy as np

    time.sleep(config.get("pause_s", 0.0))
    with np.load(config["data"]) as stored:
        pictures, labels = stored["pictures"], stored["labels"]
    before = [array.copy() for array in arrays]
    weights, bias = arrays
    wanted = np.eye(10, dtype=np.float32)[labels]
    for _ in range(config["steps"]):
        powers = np.exp(pictures @ weights + bias)
        found = powers / powers.sum(axis=1, keepdims=True)
        slope = (found - wanted) / len(labels)
        weights -= config["rate"] * pictures.T @ slope
        bias -= config["rate"] * slope.sum(axis=0)
    if config["client"] in config.get("bad", ()):
        weights, bias = (b - 5.0 * (a - b) for a, b in zip((weights, bias), before, strict=True))
    if config["client"] in config.get("broken", ()):
        weights[0, 0] = np.nan
    loss = -np.log(np.maximum((found * wanted).sum(axis=1), 1e-9)).mean()
    return [weights, bias], len(labels), {"loss": loss}


def evaluate(arrays: Arrays, config: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    with np.load(config["held"]) as stored:
        pictures, labels = stored["pictures"], stored["labels"]
    found = (pictures @ arrays[0] + arrays[1]).argmax(axis=1)
    return {"accuracy": (found == labels).mean()}


def averaged(files: list[str], config: dict[str, Any], rounds: int) -> Arrays:
    """Return what plain FedAvg in this process comes to."""
    model = [array.astype(np.float32) for array in initial()]
    for _ in range(rounds):
        updates = []
        for index, path in enumerate(files):
            own = [array.copy() for array in model]
            updates.append(client(own, {**config, "data": path, "client": f"c{index}"}))
        total = sum(count for _, count, _ in updates)
        model = [
            np.sum(
                [count * arrays[i].astype(np.float64) for arrays, count, _ in updates], axis=0
            ).astype(np.float32)
            / np.float32(total)
            for i in range(len(model))
        ]
    return model
