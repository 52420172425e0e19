"""Federated averaging on scikit-learn's digits: the pictures stay on the edges, weights travel."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tierwise

app = tierwise.App("digits")
Weights = NDArray[np.float32]


@app.function(memory="128MiB", deadline="2s", tier="edge", keep_alive="10s")
def train_client(path: str, weights: Weights, epochs: int, rate: float) -> tuple[Weights, int]:
    """Train softmax regression on the pictures in a local file; return weights and their count."""
    import numpy as np

    with np.load(path) as stored:
        pictures, labels = stored["pictures"], stored["labels"]
    inputs = np.hstack([pictures / 16.0, np.ones((len(pictures), 1))]).astype(np.float32)
    wanted = np.eye(10, dtype=np.float32)[labels]
    rng = np.random.default_rng(0)
    weights = weights.copy()
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(inputs)), max(1, len(inputs) // 32)):
            logits = inputs[rows] @ weights
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            found = powers / powers.sum(axis=1, keepdims=True)
            weights -= rate * inputs[rows].T @ (found - wanted[rows]) / len(rows)
    return weights, len(inputs)


@app.function(memory="96MiB", deadline="500ms", keep_alive="10s")
def average(updates: list[Any]) -> Weights:
    """Return the mean of client weights, each by its number of pictures (FedAvg, McMahan 2017)."""
    import numpy as np

    counts = np.array([count for _, count in updates], dtype=np.float64)
    stacked = np.stack([weights for weights, _ in updates])
    mean: Weights = np.tensordot(counts / counts.sum(), stacked, axes=1).astype(np.float32)
    return mean


def split(folder: Path, nodes: Sequence[str]) -> tuple[list[str], Weights, NDArray[np.int64]]:
    """Write one uneven share of the pictures per node; keep a fifth for judging.

    Returns:
        The files, and the pictures (n, 64) and labels (n,) that no client sees.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    # Uneven: each client has mostly its own digits, as in life.
    rest = rest[np.argsort(digits.target[rest] + np.random.default_rng(1).uniform(0, 4, len(rest)))]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for node, rows in zip(nodes, np.array_split(rest, len(nodes)), strict=True):
        path = folder / f"{node}.npz"
        np.savez(path, pictures=digits.data[rows].astype(np.float32), labels=digits.target[rows])
        files.append(str(path.resolve()))
    return files, digits.data[held].astype(np.float32), digits.target[held]


async def rounds(
    files: Sequence[str],
    nodes: Sequence[str],
    pictures: Weights,
    labels: NDArray[np.int64],
    round_count: int,
) -> AsyncIterator[float]:
    """Run federated averaging; yield the accuracy on the held pictures after each round."""
    weights = np.zeros((65, 10), dtype=np.float32)
    inputs = np.hstack([pictures / 16.0, np.ones((len(pictures), 1))]).astype(np.float32)
    for _ in range(round_count):
        calls = (
            train_client.options(node=node).remote.aio(path, weights, 8, 0.5)
            for node, path in zip(nodes, files, strict=True)
        )
        updates = await asyncio.gather(*calls)
        weights = await average.remote.aio(list(updates))
        yield float(((inputs @ weights).argmax(axis=1) == labels).mean())
