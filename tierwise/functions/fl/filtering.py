"""Which updates of a round look malicious: four filters, each from the Gram matrix. Pure.

No filter proves anything. The cosine filter and Krum expect most clients to be honest and alike;
FoolsGold expects the opposite, that *honest* clients differ and accomplices do not.
"""

import numpy as np

from tierwise.functions.fl.geometry import (
    Float,
    Mask,
    cosines_with_sum,
    median,
    nearest_sums,
    norms,
    robust_scores,
    similarities,
)

NORM_SCORE_MAX = 3.5
CREDIBILITY_MIN = 0.5


def adaptive_cosine(
    gram: Float, weights: Float, *, slack: float = 2.0, slack_step: float = 0.5
) -> tuple[Mask, Float]:
    """Return who stays, and each client's cosine with the aggregate of those, both shape (K,).

    Adaptive federated averaging (Muñoz-González, Co and Lupu, arXiv:1909.05125, Alg. 1), on
    deltas: s_k = cos(δ_k, Σ w_j δ_j); if mean(s) < median(s) those below median − ξ·std(s) go,
    otherwise those above median + ξ·std(s); again with ξ + Δξ among those who stay, until nobody
    goes. Two clients or fewer cannot outvote each other: all stay.
    """
    count = len(gram)
    lengths = norms(gram)
    stays = np.ones(count, dtype=np.bool_)
    while True:
        cosines = cosines_with_sum(gram, np.where(stays, weights, 0.0), lengths)
        kept = cosines[stays]
        if len(kept) <= 2:
            return stays, cosines
        mean = float(kept.mean())
        off = kept - mean
        margin = max(slack * float(np.sqrt(off @ off / len(off))), 1e-9)  # less is rounding
        middle = median(kept)
        if mean < middle:
            goes = stays & (cosines < middle - margin)
        else:
            goes = stays & (cosines > middle + margin)
        if not goes.any():
            return stays, cosines
        stays = stays & ~goes
        slack += slack_step


def krum_scores(gram: Float, faulty: int) -> Float:
    """Return Krum's scores, shape (K,): the lower, the more an update is amid the others.

    See `nearest_sums`. What the paper proves needs 2f + 2 < K: a verdict on clients keeps to it.

    Raises:
        ValueError: 2f + 2 < K does not hold.
    """
    count = len(gram)
    if faulty < 0 or 2 * faulty + 2 >= count:
        raise ValueError(
            f"Krum tells {faulty} faulty clients from others only among {2 * max(faulty, 0) + 3} "
            f"or more, and the round has {count}: ask with fewer `faulty`, or of a larger round"
        )
    return nearest_sums(gram, count - faulty - 2)


def multi_krum(gram: Float, faulty: int, keep: int) -> tuple[Mask, Float]:
    """Return the `keep` updates with the lowest scores as a mask, and all scores; shape (K,) each.

    Multi-Krum of the same paper; `keep` = 1 is Krum. Ties go to the earlier row.

    Raises:
        ValueError: Too many faulty, or `keep` not in 1 … K.
    """
    scores = krum_scores(gram, faulty)
    if not 1 <= keep <= len(gram):
        raise ValueError(f"`keep` is how many clients stay: 1 to {len(gram)}, not {keep}")
    stays = np.zeros(len(gram), dtype=np.bool_)
    stays[np.argsort(scores, kind="stable")[:keep]] = True
    return stays, scores


def foolsgold(gram: Float, *, confidence: float = 1.0) -> Float:
    """Return credibilities in [0, 1], shape (K,): 0 for those who move like accomplices.

    FoolsGold (Fung, Yoon and Beschastnikh, RAID 2020, Alg. 1): c_ij cosines, v_i = max_j c_ij;
    pardoning c_ij ← c_ij·v_i ÷ v_j where v_j > v_i; α_i = 1 − max_j c_ij, divided by the largest;
    weight κ·(ln(α ÷ (1 − α)) + 0.5), clipped to [0, 1]. `gram` is of whatever was summed: of one
    round's deltas, or of each client's deltas over rounds, as in the paper. One client is believed.
    """
    count = len(gram)
    if count == 1:
        return np.ones(1)
    cosines = similarities(gram)
    np.fill_diagonal(cosines, -np.inf)
    most = np.maximum(cosines.max(axis=1), 0.0)
    np.fill_diagonal(cosines, 0.0)
    ratio = most[:, None] / np.where(most > 0.0, most, 1.0)[None, :]
    pardoned = np.where(most[None, :] > most[:, None], cosines * ratio, cosines)
    np.fill_diagonal(pardoned, -np.inf)
    apart = np.clip(1.0 - pardoned.max(axis=1), 0.0, 1.0)
    largest = float(apart.max())
    if largest <= 1e-9:  # less is rounding
        return np.zeros(count)  # all alike: FoolsGold takes all for one attacker
    apart = np.clip(apart / largest, 1e-12, 0.99)  # 0.99: as in the authors' code, for the log
    credible: Float = confidence * (np.log(apart / (1.0 - apart)) + 0.5)
    return np.clip(credible, 0.0, 1.0)


def norm_outliers(gram: Float, score_max: float = NORM_SCORE_MAX) -> tuple[Mask, Float]:
    """Return whose delta has an ordinary length, and all robust scores; shape (K,) each.

    Attacks by model replacement must be long to outweigh the others (Sun et al., Can You Really
    Backdoor Federated Learning?, 2019, section 4); free riders are short. Scores: `robust_scores`.
    """
    scores = robust_scores(norms(gram))
    return np.abs(scores) <= score_max, scores
