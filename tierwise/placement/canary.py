"""Trying a policy for whole blocks of time, and comparing what came of it. Pure.

Calls of one moment share queues and warm instances, so two policies that decide call by call would
meet each other's consequences. Here all nodes use the same policy for one block, then perhaps the
other for the next: the blocks are the units that are compared (switchback design; Bojinov,
Simchi-Levi and Zhao, Management Science 69(7), 2023). The first part of a block inherits the queues
of the one before and is not counted.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from tierwise.cost.estimate import Float

SHARE_MIN, SHARE_MAX = 0.05, 0.95
BLOCK_S_MIN, BLOCK_S_MAX = 0.2, 86_400.0
WASHOUT = 0.1  # of a block
STRATUM_MAX = 20
BLOCKS_MIN = 3  # per policy, below which there is no interval
Z_95 = 1.959964


@dataclass(slots=True)
class Schedule:
    """Which blocks belong to the canary: the same on every node that knows share and seed.

    Blocks come in strata, the smallest number that the share divides well (5 for a share of 0.2).
    Each stratum gives the canary exactly its share, at positions drawn from the seed: so no load
    that repeats itself can always meet the same policy.
    """

    share: float
    block_s: float
    seed: int
    _stratum: int = field(init=False)
    _drawn: tuple[int, frozenset[int]] = field(init=False, default=(-1, frozenset()))

    def __post_init__(self) -> None:
        """Find the size of a stratum."""
        sizes = range(2, STRATUM_MAX + 1)
        self._stratum = min(
            sizes, key=lambda n: (round(abs(self.share * n - self._turns(n)), 6), n)
        )

    def block(self, elapsed_s: float) -> int:
        """Return the number of the block, from 1, at that time since the trial began."""
        return max(0, math.floor(elapsed_s / self.block_s)) + 1

    def is_settled(self, elapsed_s: float) -> bool:
        """Return whether calls that are decided now count: the block is no longer young."""
        return elapsed_s % self.block_s >= WASHOUT * self.block_s

    def is_canary(self, block: int) -> bool:
        """Return whether the canary decides in that block."""
        stratum, position = divmod(block - 1, self._stratum)
        if self._drawn[0] != stratum:
            rng = np.random.default_rng((self.seed, stratum))
            turns = rng.permutation(self._stratum)[: self._turns(self._stratum)]
            self._drawn = (stratum, frozenset(turns.tolist()))
        return position in self._drawn[1]

    def _turns(self, size: int) -> int:
        return min(size - 1, max(1, round(self.share * size)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What came of one policy: `blocks` has shape (n, 3): calls, misses, summed cost per block."""

    blocks: Float

    @property
    def calls(self) -> int:
        """Return the number of calls."""
        return int(self.blocks[:, 0].sum())

    @property
    def misses(self) -> int:
        """Return how many of them missed their deadline."""
        return int(self.blocks[:, 1].sum())

    @property
    def mean_cost_s(self) -> float:
        """Return the mean objective per call, in second-equivalents; NaN without calls."""
        return _ratio(self.blocks[:, 2], self.blocks[:, 0])[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Mean of the canary minus mean of the baseline, per call, with a 95 % interval.

    `low` and `high` are NaN if either has fewer than BLOCKS_MIN blocks with calls.
    """

    mean: float
    low: float
    high: float


def compare(canary: Arm, baseline: Arm, column: int = 2) -> Difference:
    """Compare the two by a column of their blocks: 1 misses, 2 cost.

    Each mean is a ratio of sums over blocks; its variance is that of the linearised ratio
    (Cochran, Sampling Techniques, 1977, §6.4). The interval is Welch's, with blocks as units.
    """
    (one, one_variance), (two, two_variance) = (
        _ratio(arm.blocks[:, column], arm.blocks[:, 0]) for arm in (canary, baseline)
    )
    counts = [int((arm.blocks[:, 0] > 0).sum()) for arm in (canary, baseline)]
    mean = one - two
    if min(counts) < BLOCKS_MIN:
        return Difference(mean=mean, low=math.nan, high=math.nan)
    variance = one_variance + two_variance
    if variance <= 0.0:
        return Difference(mean=mean, low=mean, high=mean)
    freedom = variance**2 / (one_variance**2 / (counts[0] - 1) + two_variance**2 / (counts[1] - 1))
    half = student_t_95(freedom) * math.sqrt(variance)
    return Difference(mean=mean, low=mean - half, high=mean + half)


def student_t_95(freedom: float) -> float:
    """Return the 97.5 % point of Student's t, from its expansion around the normal.

    Abramowitz and Stegun 26.7.5; off by less than 0.8 % from 2 degrees of freedom on.
    """
    z, v = Z_95, max(2.0, freedom)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160
    return z + g1 / v + g2 / v**2 + g3 / v**3 + g4 / v**4


def _ratio(sums: Float, counts: Float) -> tuple[float, float]:
    """Return sum ÷ count over all blocks with calls, and the variance of that."""
    keep = counts > 0
    sums, counts = sums[keep], counts[keep]
    n = len(counts)
    if n == 0:
        return math.nan, math.nan
    ratio = float(sums.sum() / counts.sum())
    if n == 1:
        return ratio, math.nan
    residuals = (sums - ratio * counts) / counts.mean()
    return ratio, float((residuals @ residuals) / (n * (n - 1)))
