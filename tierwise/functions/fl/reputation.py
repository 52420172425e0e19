"""How far clients can be trusted, from what they did over rounds. Pure."""

import math
from collections.abc import Sequence

import numpy as np

from tierwise.functions.fl.geometry import Float


def beta_reputations(
    verdicts: Sequence[Float], *, forgetting: float = 1.0, prior: float = 3.0
) -> Float:
    """Return chances of good behaviour in (0, 1), shape (K,).

    (prior + r) ÷ (2·prior + r + s), with r and s the good and bad rounds so far, those of k rounds
    ago weighted by λ^k: the mean of a Beta posterior. Jøsang and Ismail, The Beta Reputation System
    (Bled 2002), section 3, with their prior 1; 3 is that of Muñoz-González, Co and Lupu
    (arXiv:1909.05125, section 3).

    Args:
        verdicts: Oldest round first, each of shape (K,): 1 good, 0 bad, NaN not there; between is
            a partial verdict.
        forgetting: λ in (0, 1]; 1 forgets nothing.
        prior: Of both parameters, > 0.
    """
    if not verdicts:
        return np.zeros(0)
    good, bad = np.zeros(len(verdicts[0])), np.zeros(len(verdicts[0]))
    for verdict in verdicts:
        is_there = ~np.isnan(verdict)
        value = np.where(is_there, verdict, 0.0)
        good = forgetting * good + value
        bad = forgetting * bad + np.where(is_there, 1.0 - value, 0.0)
    found: Float = (prior + good) / (2.0 * prior + good + bad)
    return found


def smoothed(qualities: Sequence[Float], *, keep: float = 0.8, start: float = math.nan) -> Float:
    """Return R ← ρ·R + (1 − ρ)·q over rounds, shape (K,).

    Exponential smoothing (Brown, 1959) as reputations of clients use it (Xu and Lyu, A Reputation
    Mechanism Is All You Need, 2020). Rounds in which a client was not there (NaN) leave it as it
    is.

    Args:
        qualities: Oldest round first, each of shape (K,).
        keep: ρ in [0, 1).
        start: Before the first round; NaN: the first quality there is.
    """
    if not qualities:
        return np.zeros(0)
    found = np.full(len(qualities[0]), start)
    for quality in qualities:
        stepped = np.where(np.isnan(found), quality, keep * found + (1.0 - keep) * quality)
        found = np.where(np.isnan(quality), found, stepped)
    return found
