"""What a round's updates become: server optimisers, buffers, and the function that nodes run.

`fold` is the platform function: it runs one step in a worker beside the cache that holds a round's
matrix (see `blocks`), of which it gets views. A strategy is a chain of steps; the scheduler's
`workloads/federated_calls.py` lays them out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tierwise.functions.fl.blocks import Matrix, Vector, blocks, mean, runs, shares
from tierwise.functions.fl.robust import median, multi_krum, trimmed_mean


def adam_first(base: Vector, target: Vector, before: Vector | None, beta: float = 0.9) -> Vector:
    """Return FedAdam's first moment: β₁ m + (1 − β₁) Δ, where Δ = target − base.

    Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2, lines 8 and 9.

    Args:
        base: The model that the round began with.
        target: The mean of its updates.
        before: The moment of the round before; None: zeros.
        beta: β₁.
    """
    moment = target - base
    moment *= np.float32(1.0 - beta)
    if before is not None:
        moment += np.float32(beta) * before
    return moment


def adam_second(base: Vector, target: Vector, before: Vector | None, beta: float = 0.99) -> Vector:
    """Return FedAdam's second moment: β₂ v + (1 − β₂) Δ² (see `adam_first`; line 12)."""
    moment = target - base
    moment *= moment
    moment *= np.float32(1.0 - beta)
    if before is not None:
        moment += np.float32(beta) * before
    return moment


def adam_step(
    base: Vector, first: Vector, second: Vector, rate: float = 0.01, floor: float = 1e-3
) -> Vector:
    """Return the model after FedAdam's step: base + η m ÷ (√v + τ) (see `adam_first`; line 13).

    Args:
        base: The model that the round began with.
        first: m.
        second: v.
        rate: η, the server's learning rate.
        floor: τ, the degree of adaptivity.
    """
    step = np.sqrt(second)
    step += np.float32(floor)
    np.divide(first, step, out=step)
    step *= np.float32(rate)
    step += base
    return step


def staleness_weight(staleness: int, exponent: float = 0.5) -> float:
    """Return what a stale update counts: (1 + τ)^−exponent, τ = versions since it began.

    Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022,
    section 5, take the exponent ½; the form is Xie et al.'s ("Asynchronous Federated
    Optimization", 2019, polynomial staleness).
    """
    return float((1.0 + staleness) ** -exponent)


def buffered(
    base: Vector,
    groups: Sequence[tuple[Vector, Matrix, Sequence[int], Sequence[float]]],
    count: int,
    rate: float = 1.0,
) -> Vector:
    """Return the model after one buffer of asynchronous updates: FedBuff.

    base + η Σ a_i (w_i − w_origin(i)) ÷ n (Nguyen et al. 2022, algorithm 1): each update's
    difference from the version that its client began with, weighed by its staleness.

    Args:
        base: The newest model, shape (parameters,).
        groups: Of the updates that began with one version: that version, a matrix, the rows of it
            that count, and a_i of each (see `staleness_weight`).
        count: n, updates in the whole buffer.
        rate: η, the server's learning rate.

    Raises:
        ValueError: The buffer is empty, or there is not one weight per row.
    """
    if count < 1 or any(len(rows) != len(weights) for _, _, rows, weights in groups):
        raise ValueError("a buffer has at least one update, and one weight for each")
    out = base.copy()
    for origin, matrix, rows, weights in groups:
        factors = (rate / count * np.asarray(weights, dtype=np.float64)).astype(np.float32)
        total = np.float32(factors.sum())
        neighbours = list(runs(rows))
        for start, end in blocks(len(out), len(rows)):
            part = out[start:end]
            for first, last, at in neighbours:
                part += factors[at : at + last - first] @ matrix[first:last, start:end]
            part -= total * origin[start:end]
    return out


def proximal(weights: Vector, base: Vector, mu: float) -> Vector:
    """Return what a FedProx client adds to its gradient: μ (w − w_base).

    The gradient of μ/2 |w − w_base|² (Li et al. 2020, see `mean`; equation 2).
    """
    return np.float32(mu) * (weights - base)


def fold(arrays: Sequence[Any], arguments: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
    """Run one step of an aggregation; the function that nodes run.

    Args:
        arrays: What the step reads, see `STEPS`.
        arguments: `step`, its parameters, and under `metadata` what is passed on with the result.

    Returns:
        The vector, float32, and its metadata: that of `arguments`, and the step's own.

    Raises:
        ValueError: There is no such step, or it refuses its input; or the result is not finite.
    """
    given = dict(arguments)
    step, passed_on = given.pop("step"), dict(given.pop("metadata", {}))
    if step not in STEPS:
        raise ValueError(f"step {step!r}: one of {', '.join(STEPS)}")
    vector, said = STEPS[step](arrays, given)
    vector = np.ascontiguousarray(vector, dtype=np.float32)
    total = float(np.dot(vector, vector))
    if not np.isfinite(total) and not np.isfinite(vector).all():
        raise ValueError(f"step {step!r} gave a vector that is not finite")
    return vector, {**passed_on, **said}


def _mean_step(arrays: Sequence[Any], given: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
    return mean(arrays[0], given["rows"], given["weights"]), {}


def _median_step(arrays: Sequence[Any], given: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
    return median(arrays[0], given["rows"]), {}


def _trimmed_step(arrays: Sequence[Any], given: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
    return trimmed_mean(arrays[0], given["rows"], given["share"]), {}


def _krum_step(arrays: Sequence[Any], given: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
    matrix, base = arrays
    vector, kept = multi_krum(
        matrix, given["rows"], given["weights"], base, given["byzantine_count"], given["kept_count"]
    )
    return vector, {"kept_rows": kept}


def _combine_step(arrays: Sequence[Any], given: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
    """Merge what aggregators have merged; each part counts what its clients do."""
    share = shares(range(len(arrays)), given["weights"])
    out = np.zeros(len(arrays[0]), dtype=np.float32)
    for start, end in blocks(len(out), 2):
        for part, weight in zip(arrays, share, strict=True):
            out[start:end] += weight * part[start:end]
    return out, {}


def _first_step(arrays: Sequence[Any], given: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
    return adam_first(arrays[0], arrays[1], _third(arrays), given["beta"]), {}


def _second_step(arrays: Sequence[Any], given: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
    return adam_second(arrays[0], arrays[1], _third(arrays), given["beta"]), {}


def _adam_step(arrays: Sequence[Any], given: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
    base, first, second = arrays
    return adam_step(base, first, second, given["rate"], given["floor"]), {}


def _buffer_step(arrays: Sequence[Any], given: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
    """Read the newest model, then of each group the model that it began with, and its matrix."""
    groups = [
        (origin, matrix, group["rows"], group["weights"])
        for origin, matrix, group in zip(arrays[1::2], arrays[2::2], given["groups"], strict=True)
    ]
    return buffered(arrays[0], groups, given["count"], given["rate"]), {}


def _copy_step(arrays: Sequence[Any], given: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
    return arrays[0], {}


STEPS = {
    "mean": _mean_step,  # matrix
    "median": _median_step,  # matrix
    "trimmed-mean": _trimmed_step,  # matrix
    "multi-krum": _krum_step,  # matrix, base
    "combine": _combine_step,  # the parts
    "adam-first": _first_step,  # base, mean[, the moment before]
    "adam-second": _second_step,  # base, mean[, the moment before]
    "adam-step": _adam_step,  # base, first moment, second moment
    "buffer": _buffer_step,  # newest, (origin, matrix)…
    "copy": _copy_step,  # one vector
}


def _third(arrays: Sequence[Any]) -> Vector | None:
    return arrays[2] if len(arrays) > 2 else None
