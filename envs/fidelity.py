"""How well do predicted figures hold against measured ones: errors, and whether ranks agree. Pure.

Ranks are compared by pairs (Kendall, "A New Measure of Rank Correlation", Biometrika 1938). A pair
counts as *resolved* only if the measured difference is larger than its own noise, by paired blocks
of time: what reality does not tell apart, a simulator need not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

RESOLVED_ERRORS = 2.0  # standard errors of the mean difference that tell a pair apart, about 95 %


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAgreement:
    """Do two rankings of the same things agree?

    Attributes:
        kendall: Of all pairs, −1 to 1.
        spearman: Correlation of ranks, −1 to 1.
        pair_count: All pairs.
        resolved_count: Pairs that the measurement tells apart.
        agreed_count: Resolved pairs that are predicted in the measured order.
        disagreements: Resolved pairs that are not, better first as measured.
    """

    kendall: float
    spearman: float
    pair_count: int
    resolved_count: int
    agreed_count: int
    disagreements: tuple[tuple[str, str], ...]

    @property
    def is_same(self) -> bool:
        """Return whether every resolved pair is predicted in the measured order."""
        return self.agreed_count == self.resolved_count


def relative_error(predicted: float, measured: float) -> float:
    """Return by what share the prediction is too high (+) or too low (−)."""
    return predicted / measured - 1.0


def rank_agreement(measured: Mapping[str, Float], predicted: Mapping[str, float]) -> RankAgreement:
    """Compare two rankings by cost.

    Args:
        measured: Per name the costs in blocks of time, shape (blocks,), NaN where a block is empty.
            The same block of all names saw the same arrivals: differences are paired.
        predicted: Per name the predicted cost.
    """
    names = sorted(measured)
    means = {name: float(np.nanmean(measured[name])) for name in names}
    concordant = discordant = resolved = agreed = 0
    wrong: list[tuple[str, str]] = []
    for one, other in combinations(names, 2):
        better, worse = (one, other) if means[one] < means[other] else (other, one)
        is_right = predicted[better] < predicted[worse]
        concordant += is_right
        discordant += not is_right
        if is_resolved(measured[worse] - measured[better]):
            resolved += 1
            agreed += is_right
            if not is_right:
                wrong.append((better, worse))
    pairs = concordant + discordant
    return RankAgreement(
        kendall=(concordant - discordant) / max(1, pairs),
        spearman=spearman([means[name] for name in names], [predicted[name] for name in names]),
        pair_count=pairs,
        resolved_count=resolved,
        agreed_count=agreed,
        disagreements=tuple(wrong),
    )


def is_resolved(differences: Float) -> bool:
    """Return whether the mean of paired differences is clearly not zero."""
    known = differences[~np.isnan(differences)]
    if len(known) < 2:
        return False
    error = float(known.std(ddof=1)) / np.sqrt(len(known))
    return bool(abs(known.mean()) > RESOLVED_ERRORS * error)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of ranks; figures that are equal are ranked as they come."""
    if len(one) < 2:
        return 1.0
    ranks = [np.argsort(np.argsort(np.asarray(each), kind="stable")) for each in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
