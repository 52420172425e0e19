"""Whose model behaves unlike the others', without any test data. Pure."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tierwise.functions.fl.geometry import Float, Mask, robust_scores
from tierwise.functions.fl.networks import Array, Network, Part

ACTIVE_MIN = 0.003


def random_inputs(count: int, width: int, rng: np.random.Generator) -> Array:
    """Return uniform inputs within ±√(6 ÷ width), shape (count, width), float32.

    Kaiming's uniform bounds (He et al., ICCV 2015), from which FedDebug draws its inputs.
    """
    bound = float(np.sqrt(6.0 / width))
    return rng.uniform(-bound, bound, (count, width)).astype(np.float32)


def activations(network: Network, rows: Sequence[Array], inputs: Array, active_min: float) -> Mask:
    """Return which neurons fire, shape (K, inputs, neurons): hidden ones, then outputs.

    Args:
        network: What the rows are the parameters of.
        rows: Models, K of shape (P,).
        inputs: Shape (inputs, width).
        active_min: What a neuron must exceed.
    """
    fired = []
    for row in rows:
        logits, hidden = network.run(row, inputs)
        fired.append(np.concatenate([*hidden, logits], axis=1) > active_min)
    return np.stack(fired)


def odd_ones(fired: Mask, faulty: int) -> NDArray[np.int64]:
    """Return on how many inputs each client is one of the `faulty` odd ones, shape (K,).

    FedDebug's differential testing of activations (Gill, Anwar and Gulzar, ICSE 2023): of all
    groups of K − 1 clients, the one with the most neurons that fire in all of its members is taken
    for sound, and who is outside for faulty; then again among the rest, `faulty` times. Ties go to
    nobody if all are tied, else to the first.

    A neuron that fires in all but one member tells against that one; so counts per client are
    enough, no group need be formed.

    Args:
        fired: Shape (K, inputs, neurons).
        faulty: In 1 … K − 2.
    """
    count, input_count, _ = fired.shape
    found = np.zeros(count, dtype=np.int64)
    for place in range(input_count):
        rest = np.arange(count)
        for _ in range(faulty):
            some = fired[rest, place]
            sums = some.sum(axis=0)
            # Common to all others of the group, by whom is left out.
            common = ((sums - some) == len(rest) - 1).sum(axis=1)
            if common.max() == common.min():
                break
            out = int(common.argmax())
            found[rest[out]] += 1
            rest = np.delete(rest, out)
    return found


def layer_norms(rows: Sequence[Array], base: Array | None, layers: list[Part]) -> Float:
    """Return ‖δ_i‖ of each layer, shape (K, layers), float64; of the vectors without a base."""
    found = np.empty((len(rows), len(layers)))
    for place, layer in enumerate(layers):
        before = 0.0 if base is None else base[layer.start : layer.stop].astype(np.float64)
        for row, vector in enumerate(rows):
            delta = vector[layer.start : layer.stop].astype(np.float64) - before
            found[row, place] = np.sqrt(delta @ delta)
    return found


def layer_scores(norms: Float) -> Float:
    """Return `robust_scores` within each layer, shape (K, layers)."""
    return np.stack([robust_scores(column) for column in norms.T], axis=1)
