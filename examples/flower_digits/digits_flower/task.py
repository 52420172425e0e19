"""The learning task: data, model and local training, in NumPy.

1,797 pictures of 8 × 8; a fifth is held back for judging. The rest is dealt to clients by a
Dirichlet distribution over the labels (Hsu, Qi and Brown 2019, "Measuring the effects of
non-identical data distribution"): alpha 100 is nearly even, 0.1 leaves most clients a few digits.
The model is one hidden layer of 32.
"""

import functools
import itertools

import numpy as np
from sklearn.datasets import load_digits

SIZES = (64, 32, 10)
NAMES = ("w1", "b1", "w2", "b2")
CLIENT_ROWS_MIN = 2


@functools.lru_cache(maxsize=64)
def partitions(client_count, alpha, seed):
    """Return the row numbers of each client."""
    labels = split()[1]
    rng = np.random.default_rng(seed)
    while True:  # as usual: dealt again until nobody has next to nothing
        shares = [[] for _ in range(client_count)]
        for label in range(SIZES[-1]):
            rows = rng.permutation(np.flatnonzero(labels == label))
            weights = rng.dirichlet(np.full(client_count, alpha))
            cuts = (np.cumsum(weights)[:-1] * len(rows)).astype(int)
            for share, part in zip(shares, np.split(rows, cuts), strict=True):
                share.append(part)
        found = [np.sort(np.concatenate(share)) for share in shares]
        if min(map(len, found)) >= CLIENT_ROWS_MIN:
            return found


@functools.lru_cache(maxsize=1)
def split():
    """Return training pictures and labels, then those held back for judging."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    pictures = (digits.data / 16.0).astype(np.float32)[order]
    labels = digits.target[order]
    held = len(order) // 5
    return pictures[held:], labels[held:], pictures[:held], labels[:held]


def initial(seed):
    """Return the arrays of a fresh model (He et al. 2015)."""
    rng = np.random.default_rng(seed)
    arrays = []
    for inputs, outputs in itertools.pairwise(SIZES):
        arrays.append(rng.normal(0, np.sqrt(2 / inputs), (inputs, outputs)).astype(np.float32))
        arrays.append(np.zeros(outputs, np.float32))
    return arrays


def train(arrays, pictures, labels, epochs, batch_size, rate, seed):
    """Return the model after some epochs of SGD, and the mean loss of the last."""
    w1, b1, w2, b2 = (array.copy() for array in arrays)
    rng = np.random.default_rng(seed)
    wanted = np.eye(SIZES[-1], dtype=np.float32)[labels]
    losses = []
    for _ in range(epochs):
        losses = []
        order = rng.permutation(len(pictures))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            hidden = np.maximum(pictures[rows] @ w1 + b1, 0)
            found = softmax(hidden @ w2 + b2)
            losses.append(float(-np.log(found[np.arange(len(rows)), labels[rows]] + 1e-9).mean()))
            error = (found - wanted[rows]) / len(rows)
            back = (error @ w2.T) * (hidden > 0)
            w2 -= rate * hidden.T @ error
            b2 -= rate * error.sum(axis=0)
            w1 -= rate * pictures[rows].T @ back
            b1 -= rate * back.sum(axis=0)
    return [w1, b1, w2, b2], float(np.mean(losses))


def judge(arrays, pictures, labels):
    """Return accuracy and mean loss."""
    w1, b1, w2, b2 = arrays
    found = softmax(np.maximum(pictures @ w1 + b1, 0) @ w2 + b2)
    loss = float(-np.log(found[np.arange(len(labels)), labels] + 1e-9).mean())
    return float((found.argmax(axis=1) == labels).mean()), loss


def softmax(logits):
    """Return probabilities per row."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
