"""Questions about who moves like whom, and who does not. From the Gram matrix."""

import numpy as np

from tierwise.functions.fl import clustering, filtering
from tierwise.functions.fl.geometry import (
    Float,
    Index,
    Mask,
    cosines_with,
    cosines_with_sum,
    distances_squared,
    embedding,
    median,
    shares,
    similarities,
)
from tierwise.functions.fl.question import (
    Answer,
    Question,
    by_client,
    check_any,
    check_range,
    generator,
    number,
    row_of,
    selected,
)
from tierwise.functions.fl.statistics import RoundStatistics

GROUPS_TRIED_MAX = 6
FAULTY_SHARE = 0.2


def similarity(
    statistics: RoundStatistics, *, client: str = "", is_pairwise: bool = False
) -> Answer:
    """Return cosines of deltas: with the rest, with the round's mean, with the step before."""
    check_any(statistics)
    clients = statistics.clients
    cosines = similarities(statistics.gram)
    if client:
        row = row_of(statistics, client)
        return {"client": client, "cosines": by_client(clients, cosines[row])}
    count = len(clients)
    weights = shares(statistics.example_counts)
    with_mean = cosines_with_sum(statistics.gram, weights, statistics.norms)
    others = (cosines.sum(axis=1) - 1.0) / max(count - 1, 1)
    answer: Answer = {
        "with_others": by_client(clients, others if count > 1 else np.full(1, np.nan)),
        "with_mean": by_client(clients, with_mean),
        "mean": number(float(others.mean())) if count > 1 else None,
    }
    if np.isfinite(statistics.aggregate_norm):
        with_step = cosines_with(
            statistics.aggregate_dots, statistics.norms, statistics.aggregate_norm
        )
        answer["with_last_step"] = by_client(clients, with_step)
    if is_pairwise:
        answer["pairs"] = {
            name: by_client(clients, row) for name, row in zip(clients, cosines, strict=True)
        }
    return answer


def norm_outliers(
    statistics: RoundStatistics, *, score_max: float = filtering.NORM_SCORE_MAX
) -> Answer:
    """Return lengths of deltas, robust scores, and who is out of the ordinary."""
    check_any(statistics)
    check_range("score_max", score_max, 0.0, 1e6)
    is_ordinary, scores = filtering.norm_outliers(statistics.gram, score_max)
    return {
        "norms": by_client(statistics.clients, statistics.norms),
        "median": median(statistics.norms),
        **_verdict(statistics, is_ordinary, scores),
    }


def cosine_filter(
    statistics: RoundStatistics, *, slack: float = 2.0, slack_step: float = 0.5
) -> Answer:
    """Return who stays in adaptive federated averaging, and cosines with their mean."""
    check_any(statistics)
    check_range("slack", slack, 0.0, 1e6)
    check_range("slack_step", slack_step, 0.0, 1e6)
    stays, cosines = filtering.adaptive_cosine(
        statistics.gram, shares(statistics.example_counts), slack=slack, slack_step=slack_step
    )
    return _verdict(statistics, stays, cosines)


def krum(statistics: RoundStatistics, *, faulty: int = -1, keep: int = 0) -> Answer:
    """Return Krum's scores, its choice, and which updates multi-Krum keeps."""
    check_any(statistics, 3)
    count = len(statistics.clients)
    bound = _faulty(count) if faulty < 0 else faulty
    stays, scores = filtering.multi_krum(statistics.gram, bound, keep or max(count - bound, 1))
    return {
        "faulty_max": bound,
        "chosen": statistics.clients[int(scores.argmin())],
        **_verdict(statistics, stays, scores),
    }


def foolsgold(
    statistics: RoundStatistics,
    *,
    confidence: float = 1.0,
    credible_min: float = filtering.CREDIBILITY_MIN,
) -> Answer:
    """Return FoolsGold's weights of this round's deltas: accomplices move alike and get 0."""
    check_any(statistics)
    check_range("confidence", confidence, 0.0, 1e6)
    check_range("credible_min", credible_min, 0.0, 1.0)
    credible = filtering.foolsgold(statistics.gram, confidence=confidence)
    return _verdict(statistics, credible >= credible_min, credible)


def malicious(statistics: RoundStatistics, *, votes_min: int = 2, faulty: int = -1) -> Answer:
    """Return who is suspected by how many of the four filters."""
    check_any(statistics, 3)
    check_range("votes_min", votes_min, 1, 4)
    count = len(statistics.clients)
    bound = _faulty(count) if faulty < 0 else faulty
    gram, weights = statistics.gram, shares(statistics.example_counts)
    # Multi-Krum always sends `faulty` home: it only counts where they are also far off.
    kept, scores = filtering.multi_krum(gram, bound, max(count - bound, 1))
    far = ~kept & (scores > 2.0 * median(scores))
    suspects = {
        "cosine-filter": ~filtering.adaptive_cosine(gram, weights)[0],
        "krum": far,
        "foolsgold": filtering.foolsgold(gram) < filtering.CREDIBILITY_MIN,
        "norm-outliers": ~filtering.norm_outliers(gram)[0],
    }
    votes = np.sum(list(suspects.values()), axis=0)
    return {
        "suspects": selected(statistics.clients, votes >= votes_min),
        "votes": by_client(statistics.clients, votes),
        "by_filter": {name: selected(statistics.clients, mask) for name, mask in suspects.items()},
    }


def clusters(
    statistics: RoundStatistics, *, k: int = 0, is_by_direction: bool = False, seed: int = 0
) -> Answer:
    """Return groups of clients by k-means on the deltas, or on their directions."""
    check_any(statistics)
    count = len(statistics.clients)
    check_range("k", k, 0, count)
    gram = similarities(statistics.gram) if is_by_direction else statistics.gram
    points = embedding(gram)
    apart = np.sqrt(distances_squared(gram))
    tried = [k] if k else list(range(2, min(GROUPS_TRIED_MAX, count - 1) + 1)) or [1]
    first = clustering.seeds(points, tried[-1], generator(seed))
    best: tuple[float, Index, float] | None = None
    for size in tried:
        labels, inertia = clustering.kmeans(points, first[:, :size])
        fit = clustering.silhouette(apart, labels)
        if best is None or fit > best[0]:
            best = (fit, labels, inertia)
    assert best is not None
    fit, labels, inertia = best
    return {
        "groups": [
            selected(statistics.clients, labels == label) for label in range(int(labels.max()) + 1)
        ],
        "labels": by_client(statistics.clients, labels),
        "silhouette": fit,
        "inertia": inertia,
    }


def cfl_split(
    statistics: RoundStatistics,
    *,
    mean_norm_max: float = 0.4,
    norm_min: float = 1.6,
    gap_min: float = 0.0,
) -> Answer:
    """Return the two sides that are least alike, and whether clustered FL would part them."""
    check_any(statistics, 2)
    for name, value in (("mean_norm_max", mean_norm_max), ("norm_min", norm_min)):
        check_range(name, value, 0.0, 1e30)
    check_range("gap_min", gap_min, 0.0, 1.0)
    sides, across = clustering.bipartition(similarities(statistics.gram))
    weights = shares(statistics.example_counts)
    mean_norm = float(np.sqrt(max(float(weights @ statistics.gram @ weights), 0.0)))
    norm_max = float(statistics.norms.max())
    gap = float(np.sqrt((1.0 - across) / 2.0))
    return {
        "sides": [selected(statistics.clients, ~sides), selected(statistics.clients, sides)],
        "cosine_across_max": across,
        "gap": gap,
        "mean_norm": mean_norm,
        "norm_max": norm_max,
        "is_split": mean_norm < mean_norm_max and norm_max > norm_min and gap >= gap_min,
    }


def chart(statistics: RoundStatistics, *, axes: int = 2, is_by_direction: bool = False) -> Answer:
    """Return clients as points whose distances are those of the deltas, as far as axes go."""
    check_any(statistics)
    check_range("axes", axes, 1, 16)
    gram = similarities(statistics.gram) if is_by_direction else statistics.gram
    points = embedding(gram)
    total = float((points**2).sum())
    shown = np.zeros((len(points), axes))
    shown[:, : points.shape[1]] = points[:, :axes]
    share = float((shown**2).sum()) / total if total > 0.0 else 1.0
    return {"points": by_client(statistics.clients, shown), "explained_share": share}


def _verdict(statistics: RoundStatistics, stays: Mask, scores: Float) -> Answer:
    return {
        "kept": selected(statistics.clients, stays),
        "rejected": selected(statistics.clients, ~stays),
        "scores": by_client(statistics.clients, scores),
    }


def _faulty(count: int) -> int:
    """Return a fifth of the clients, as far as Krum can bear."""
    return max(min(int(FAULTY_SHARE * count), (count - 3) // 2), 0)


_BY_DIRECTION = "of directions instead of deltas, so that lengths do not count"
_FAULTY = "how many clients may be faulty; a fifth of them if it is not given"

QUESTIONS = (
    Question(
        name="similarity",
        summary="Cosine of each delta with the others, the round's mean and the last step",
        needs="statistics",
        function=similarity,
        arguments={
            "client": "only this client's cosine with each other",
            "is_pairwise": "also of every pair",
        },
        source="G_ij ÷ √(G_ii·G_jj)",
    ),
    Question(
        name="norm-outliers",
        summary="Length of each delta, and whose is out of the ordinary",
        needs="statistics",
        function=norm_outliers,
        arguments={"score_max": "robust standard deviations that are still ordinary"},
        source="Iglewicz and Hoaglin 1993; norms as a defence: Sun et al. 2019",
    ),
    Question(
        name="cosine-filter",
        summary="Who points away from the rest: adaptive federated averaging",
        needs="statistics",
        function=cosine_filter,
        arguments={
            "slack": "ξ: standard deviations from the median that are borne",
            "slack_step": "Δξ: more of them in each pass",
        },
        source="Muñoz-González, Co and Lupu 2019, Alg. 1",
    ),
    Question(
        name="krum",
        summary="Krum's scores and choice, and whom multi-Krum keeps",
        needs="statistics",
        function=krum,
        arguments={"faulty": _FAULTY, "keep": "how many stay; all but `faulty` if not given"},
        source="Blanchard et al., NeurIPS 2017, section 4",
    ),
    Question(
        name="foolsgold",
        summary="Who moves like an accomplice, by this round alone",
        needs="statistics",
        function=foolsgold,
        arguments={
            "confidence": "κ of the weights",
            "credible_min": "weight from which a client is kept",
        },
        source="Fung, Yoon and Beschastnikh, RAID 2020, Alg. 1",
    ),
    Question(
        name="malicious",
        summary="Who is suspected by cosine-filter, Krum, FoolsGold and norms together",
        needs="statistics",
        function=malicious,
        arguments={"votes_min": "filters that make a suspect, 1 to 4", "faulty": _FAULTY},
        source="the four filters above",
    ),
    Question(
        name="clusters",
        summary="Groups of clients that move alike (k-means)",
        needs="statistics",
        function=clusters,
        arguments={
            "k": "how many groups; of 2 to 6 those with the best silhouette if not given",
            "is_by_direction": _BY_DIRECTION,
            "seed": "of the first centres",
        },
        source="Lloyd 1982; Arthur and Vassilvitskii, SODA 2007; Rousseeuw 1987",
    ),
    Question(
        name="cfl-split",
        summary="The two sides that are least alike, and whether to train them apart",
        needs="statistics",
        function=cfl_split,
        arguments={
            "mean_norm_max": "ε₁: the round's mean must be shorter, for training has settled",
            "norm_min": "ε₂: some delta must be longer, for clients disagree",
            "gap_min": "√((1 − cosine across) ÷ 2) must be so large",
        },
        source="Sattler, Müller and Samek, IEEE TNNLS 2021, section III",
    ),
    Question(
        name="map",
        summary="Clients as points, as far from each other as their deltas",
        needs="statistics",
        function=chart,
        arguments={"axes": "coordinates of each, 1 to 16", "is_by_direction": _BY_DIRECTION},
        source="Torgerson 1952",
    ),
)
