"""Federated clients on scikit-learn's digits: a small network, shares drawn, attackers named.

What a client does follows from its arguments alone, so a job on a cluster and a loop in one process
come to the same model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HELD = 360  # pictures that no client has
HIDDEN = 32
Arrays = list[NDArray[Any]]


def write_shares(folder: Path, count: int, alpha: float, seed: int) -> tuple[list[str], str]:
    """Write a file of pictures per client, and one of those for judging; return their paths.

    Labels are shared out by a Dirichlet distribution (Hsu et al., "Measuring the Effects of
    Non-Identical Data Distribution for Federated Visual Classification", 2019): the smaller alpha,
    the fewer kinds of digits each client has.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.data))
    held, rest = order[:HELD], order[HELD:]
    owner = np.empty(len(rest), dtype=np.int64)
    for label in range(10):
        rows = np.flatnonzero(digits.target[rest] == label)
        owner[rows] = rng.choice(count, size=len(rows), p=rng.dirichlet([alpha] * count))
    owner[rng.permutation(len(rest))[:count]] = np.arange(count)  # nobody has nothing
    paths = []
    for name, rows in [("held", held), *((f"c{i}", rest[owner == i]) for i in range(count))]:
        path = (folder / f"a{alpha:g}-s{seed}-{name}.npz").resolve()
        pictures = (digits.data[rows] / 16.0).astype(np.float32)
        np.savez(path, pictures=pictures, labels=digits.target[rows])
        paths.append(str(path))
    return paths[1:], paths[0]


def initial(seed: int) -> Arrays:
    """Return a network 64–32–10, He initialised."""
    rng = np.random.default_rng(seed)
    return [
        rng.normal(0.0, (2.0 / 64) ** 0.5, (64, HIDDEN)).astype(np.float32),
        np.zeros(HIDDEN, dtype=np.float32),
        rng.normal(0.0, (2.0 / HIDDEN) ** 0.5, (HIDDEN, 10)).astype(np.float32),
        np.zeros(10, dtype=np.float32),
    ]


def client(arrays: Arrays, config: dict[str, Any]) -> tuple[Arrays, int, dict[str, Any]]:
    """Train on one file; a client among `bad` sends its step with the sign flipped, enlarged."""
    import numpy as np

    with np.load(config["data"]["path"]) as stored:
        pictures, labels = stored["pictures"], stored["labels"]
    before = [array.copy() for array in arrays]
    first, offset, second, bias = (np.asarray(a, dtype=np.float32) for a in arrays)
    wanted = np.eye(10, dtype=np.float32)[labels]
    rng = np.random.default_rng((config["seed"], config["round"], config["data"]["index"]))
    rate = np.float32(config["rate"])
    loss = 0.0
    for _ in range(config["epochs"]):
        for rows in np.array_split(rng.permutation(len(labels)), max(1, len(labels) // 32)):
            hidden = np.maximum(pictures[rows] @ first + offset, 0.0)
            logits = hidden @ second + bias
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            found = powers / powers.sum(axis=1, keepdims=True)
            loss = -float(np.log(np.maximum((found * wanted[rows]).sum(axis=1), 1e-9)).mean())
            slope = (found - wanted[rows]) / np.float32(len(rows))
            back = (slope @ second.T) * (hidden > 0.0)
            second -= rate * hidden.T @ slope
            bias -= rate * slope.sum(axis=0)
            first -= rate * pictures[rows].T @ back
            offset -= rate * back.sum(axis=0)
    trained = [first, offset, second, bias]
    if config["client"] in config["bad"]:
        scale = config["scale"]
        trained = [b - scale * (a - b) for a, b in zip(trained, before, strict=True)]
    return trained, len(labels), {"loss": loss}


def idle(arrays: Arrays, config: dict[str, Any]) -> tuple[Arrays, int, dict[str, Any]]:
    """Return the model as it came: what a round costs without any training."""
    return arrays, 1, {}


def evaluate(arrays: Arrays, config: dict[str, Any]) -> dict[str, Any]:
    """Judge a model on the pictures that no client has."""
    import numpy as np

    with np.load(config["held"]) as stored:
        pictures, labels = stored["pictures"], stored["labels"]
    hidden = np.maximum(pictures @ arrays[0] + arrays[1], 0.0)
    found = (hidden @ arrays[2] + arrays[3]).argmax(axis=1)
    return {"accuracy": float((found == labels).mean())}


def average_here(
    paths: Sequence[str],
    seed: int,
    config: dict[str, Any],
    rounds: int,
    without: Sequence[int] = (),
) -> Arrays:
    """Return what plain FedAvg in this process comes to: the reference.

    McMahan et al. 2017, algorithm 1: the mean of the clients' models by their examples, in float64.
    """
    model = initial(seed)
    for number in range(1, rounds + 1):
        updates = []
        for index, path in enumerate(paths):
            if index in without:
                continue
            data = {"path": path, "index": index}
            own = {**config, "data": data, "client": f"c{index}", "round": number}
            updates.append(client([array.copy() for array in model], own))
        total = sum(count for _, count, _ in updates)
        model = [
            sum((count / total) * arrays[i].astype(np.float64) for arrays, count, _ in updates)
            for i in range(len(model))
        ]
        model = [array.astype(np.float32) for array in model]
    return model
