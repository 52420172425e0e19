"""Whom to ask in the next round. Pure: chance comes from a generator."""

import math
from collections.abc import Sequence

import numpy as np

from tierwise.functions.fl.geometry import Float, Index

OORT_ALPHA = 2.0
OORT_CLIP = 0.95  # quantile beyond which utilities do not count


def oort_utilities(losses: Float, counts: Float) -> Float:
    """Return Oort's statistical utilities |B_i|·√(1÷|B_i| · Σ loss²), shape (K,).

    Lai, Zhu, Madhyastha and Chowdhury, OSDI 2021, section 4.

    Args:
        losses: Root of the mean squared loss over each client's samples, ≥ 0. The mean loss is a
            lower bound of it (Jensen's inequality), and equal if the samples' losses are.
        counts: Samples |B_i|.
    """
    return counts * losses


def oort_scores(
    utilities: Float,
    durations_s: Float,
    last_rounds: Float,
    *,
    preferred_s: float,
    round_number: int,
    alpha: float = OORT_ALPHA,
) -> Float:
    """Return what Oort ranks clients by, shape (K,): gain, doubt, less for those who are slow.

    (u + √(0.1·ln R ÷ L_i)) × (T÷t_i)^α if T < t_i: same paper, Alg. 1. Utilities are capped at
    their 95 % quantile (section 4, outliers) and scaled to [0, 1] as in the authors' code, so that
    doubt weighs; α = 2 is their choice.

    Args:
        utilities: Shape (K,).
        durations_s: What a round takes each client, t_i.
        last_rounds: L_i ≥ 1, the round in which each client was seen last, counted from 1.
        preferred_s: Wanted duration T of a round, > 0.
        round_number: R ≥ 1.
        alpha: Exponent of the penalty.
    """
    capped = np.minimum(utilities, np.quantile(utilities, OORT_CLIP))
    low, high = float(capped.min()), float(capped.max())
    scaled = (capped - low) / (high - low) if high > low else np.ones_like(capped)
    doubt = np.sqrt(0.1 * math.log(round_number) / last_rounds)
    penalty = (preferred_s / np.maximum(durations_s, preferred_s)) ** alpha
    found: Float = (scaled + doubt) * penalty
    return found


def tiers(durations_s: Float, count: int) -> Index:
    """Return TiFL's tiers, 0 the fastest, shape (K,): groups of equal size by duration.

    Chai et al., HPDC 2020, section 4: clients in tiers by measured latency, so that those of a
    round do not wait for each other. Equal durations share a tier.
    """
    order = np.argsort(durations_s, kind="stable")
    found = np.empty(len(order), dtype=np.intp)
    found[order] = np.arange(len(order)) * count // len(order)
    for place in range(1, len(order)):
        if durations_s[order[place]] == durations_s[order[place - 1]]:
            found[order[place]] = found[order[place - 1]]
    return np.unique(found, return_inverse=True)[1].astype(np.intp)


def tier_chances(accuracies: Sequence[float | None]) -> Float:
    """Return the chance of each tier to give the next round: the worse it serves, the higher.

    TiFL's ChangeProbs (same paper, Alg. 2): n tiers sorted by accuracy, ascending, get (n − i) ÷ D
    with i = 1 … n and D = n(n − 1)÷2. Tiers without an accuracy count as the worst. One tier has
    the chance 1.
    """
    n = len(accuracies)
    if n == 1:
        return np.ones(1)
    known = np.array([-math.inf if each is None else each for each in accuracies])
    chances = np.empty(n)
    chances[np.argsort(known, kind="stable")] = (n - np.arange(1, n + 1)) / (n * (n - 1) / 2)
    return chances


def diverse(distances: Float, count: int) -> list[int]:
    """Return `count` clients that stand for all, best first.

    DivFL (Balakrishnan et al., ICLR 2022, section 3): Σ_k min_{i∈S} ‖δ_k − δ_i‖ made small by
    greedy choice, which is within 1 − 1÷e of the best (Nemhauser, Wolsey and Fisher, 1978). Ties go
    to the earlier row.

    Args:
        distances: Euclidean, shape (K, K).
        count: In 1 … K.
    """
    chosen: list[int] = []
    nearest = np.full(len(distances), np.inf)
    is_free = np.ones(len(distances), dtype=np.bool_)
    for _ in range(count):
        left = np.minimum(distances, nearest[None, :]).sum(axis=1)
        best = int(np.where(is_free, left, np.inf).argmin())
        chosen.append(best)
        is_free[best] = False
        nearest = np.minimum(nearest, distances[best])
    return chosen


def power_of_choice(
    losses: Float, weights: Float, count: int, candidates: int, rng: np.random.Generator
) -> list[int]:
    """Return the `count` clients with the highest loss among `candidates` drawn by weight.

    Power-of-choice (Cho, Wang and Joshi, AISTATS 2022, section 4): candidates are drawn without
    replacement ∝ their share of the data; all clients as candidates is ranking by loss.
    """
    if candidates < len(losses):
        is_drawable = weights > 0.0
        some = min(candidates, int(is_drawable.sum()))
        drawn = rng.choice(len(losses), size=some, replace=False, p=weights / weights.sum())
        drawn.sort()
    else:
        drawn = np.arange(len(losses))
    order = drawn[np.argsort(-losses[drawn], kind="stable")]
    return [int(row) for row in order[:count]]
