"""Learns how a function's memory and time follow its input. Pure.

A forest alone cannot say anything of inputs beyond those it has seen, and a formula alone misses
what is particular to a region. So the peak is a *growth*, a sparse sum of power products with
coefficients ≥ 0 (as Ernest, NSDI 2016, does for run time), chosen by how well it predicts samples
that were held out, the largest among them; times, where there is data enough, a regional
*correction* from a quantile forest; times a split-conformal *margin* (Lei et al., JASA 2018, with
cross-fitting), that bounds the chance of running out of memory.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierwise.domain.sizing import FLOOR_MIB, RETRY_FACTOR, Growth, Sizing, Term, in_steps

SAMPLES_MIN = 8  # below, nothing is said
SAMPLES_MAX = 500  # the newest are kept
OOM_CHANCE = 0.01
FOLDS = 5
TAIL_SHARE = 0.3  # largest samples, predicted from the others
MEASURES_MAX = 6  # that may enter a growth
TERMS_MAX = 4  # with the constant
SPREAD_MIN = 1.5  # largest ÷ smallest value of a measure, below which it tells nothing
GAIN_MIN = 0.03  # by which a further term must lower the error
RUN_FLOOR_S = 1e-4  # shorter runs are all the same
AUTO_GAIN = 0.9  # of a fixed size's GB-seconds, above which sizing each call is not worth it
DRIFT_SLACK = 0.05  # of log(peak ÷ prediction) per call
DRIFT_LIMIT = 2.0
POWERS = (0.5, 1.0, 1.5, 2.0, 3.0)
PAIRS = ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0))
RIDGE = 1e-10  # of normal equations whose columns are scaled to 1
Array = NDArray[np.float64]
Shape = tuple[tuple[int, float], ...]  # (column, power) of each factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One call that has ended.

    `peak_mib` is what it used at most. Of one that ran out of memory nobody knows that: twice what
    it was allowed stands for it, and its time says nothing.
    """

    measures: Mapping[str, float]
    peak_mib: float
    run_s: float = 0.0  # on a CPU of speed 1.0
    is_out_of_memory: bool = False


def fit(samples: Sequence[Sample], *, oom_chance: float = OOM_CHANCE) -> Sizing | None:
    """Return what the samples teach, or None if they are too few.

    Args:
        samples: Oldest first; of more than SAMPLES_MAX the newest count.
        oom_chance: What the margin allows, for inputs like those seen.
    """
    samples = samples[-SAMPLES_MAX:]
    if len(samples) < SAMPLES_MIN:
        return None
    names = _telling(samples)
    table = _table(samples, names)
    peaks = np.array([s.peak_mib for s in samples])
    ended = np.array([not s.is_out_of_memory for s in samples])
    runs = np.array([s.run_s for s in samples])
    memory = _grow(table, peaks, FLOOR_MIB / 2)
    run = _Grown(((),), np.zeros(1))
    if ended.sum() >= SAMPLES_MIN:
        runs = runs[ended]
        run = _grow(table[ended], runs, max(RUN_FLOOR_S, float(np.median(runs)) / 4))
    used = sorted({column for column, _ in memory.used})
    scores = _scores(table, peaks, memory.shapes, _folds(table))
    tail = _scores(table, peaks, memory.shapes, [_tail(peaks)])
    margin = conformal(scores, oom_chance)
    return Sizing(
        memory=_named(memory, names),
        run=_named(run, names),
        margin=margin,
        margin_beyond=max(margin, conformal(tail, oom_chance)),
        highest={names[c]: float(table[:, c].max()) for c in used},
        sample_count=len(samples),
    )


def guess(samples: Sequence[Sample]) -> Sizing | None:
    """Return a size for all inputs while samples are too few for more: twice the largest peak."""
    if not samples:
        return None
    largest = Term(powers=(), coefficient=max(s.peak_mib for s in samples))
    run = Term(powers=(), coefficient=max(s.run_s for s in samples))
    return Sizing(
        memory=Growth(terms=(largest,)),
        run=Growth(terms=(run,)),
        margin=float(RETRY_FACTOR),
        margin_beyond=float(RETRY_FACTOR),
        highest={},
        sample_count=len(samples),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """How to declare a function's memory, and what its samples say for that.

    Figures in GB-seconds are sums over the samples, on a CPU of speed 1.0, retries included; those
    of "auto" come from a cross-validation.
    """

    is_auto: bool
    memory_mib: int  # fixed size that is recommended, or for inputs that nothing is known of
    sample_count: int
    out_of_memory_count: int
    peaks_mib: tuple[float, float, float, float]  # quantiles 0.5, 0.95, 0.99 and 1
    gb_s_declared: float
    gb_s_fixed: float
    gb_s_auto: float
    out_of_memory_share: float  # with what is recommended
    sizing: Sizing | None


def recommend(samples: Sequence[Sample], declared_mib: int) -> Recommendation | None:
    """Return what to declare, or None if samples are too few.

    Args:
        samples: Oldest first.
        declared_mib: What each call gets now.
    """
    samples = samples[-SAMPLES_MAX:]
    sizing = fit(samples)
    if sizing is None:
        return None
    peaks = np.array([s.peak_mib for s in samples])
    fixed_mib = in_steps(conformal(peaks, OOM_CHANCE))
    fixed = [fixed_mib] * len(samples)
    auto = [fixed_mib] * len(samples)
    for held_out in _folds(_table(samples, _telling(samples))):
        other = fit([s for s, is_out in zip(samples, held_out, strict=True) if not is_out])
        if other is not None:
            for index in map(int, np.flatnonzero(held_out)):
                auto[index] = other.memory_mib(samples[index].measures) or fixed_mib
    gb_s_auto, auto_share = _replayed(samples, auto)
    gb_s_fixed, fixed_share = _replayed(samples, fixed)
    is_auto = gb_s_auto < AUTO_GAIN * gb_s_fixed
    p50, p95, p99 = (float(q) for q in np.quantile(peaks, (0.5, 0.95, 0.99)))
    return Recommendation(
        is_auto=is_auto,
        memory_mib=fixed_mib,
        sample_count=len(samples),
        out_of_memory_count=sum(s.is_out_of_memory for s in samples),
        peaks_mib=(p50, p95, p99, float(peaks.max())),
        gb_s_declared=_replayed(samples, [declared_mib] * len(samples))[0],
        gb_s_fixed=gb_s_fixed,
        gb_s_auto=gb_s_auto,
        out_of_memory_share=auto_share if is_auto else fixed_share,
        sizing=sizing,
    )


def _replayed(samples: Sequence[Sample], sizes_mib: Sequence[int]) -> tuple[float, float]:
    """Return GB-seconds and the share out of memory, had the samples had these sizes."""
    gb_s, out_count = 0.0, 0
    for sample, size_mib in zip(samples, sizes_mib, strict=True):
        is_out = size_mib < sample.peak_mib
        out_count += is_out
        gb_s += size_mib / 1024.0 * sample.run_s * (1 + RETRY_FACTOR if is_out else 1)
    return gb_s, out_count / len(samples)


class Drift:
    """Notices that peaks have moved away from what is predicted (Page–Hinkley, both ways)."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._count = 0
        self._mean = 0.0
        self._up = self._down = 0.0

    def saw(self, peak_mib: float, predicted_mib: float) -> bool:
        """Take in one call; return whether this is drift, and begin anew if so."""
        error = math.log(max(peak_mib, FLOOR_MIB / 2) / max(predicted_mib, FLOOR_MIB / 2))
        self._count += 1
        self._mean += (error - self._mean) / self._count
        self._up = max(0.0, self._up + error - self._mean - DRIFT_SLACK)
        self._down = max(0.0, self._down + self._mean - error - DRIFT_SLACK)
        if max(self._up, self._down) <= DRIFT_LIMIT:
            return False
        self._begin()
        return True


def conformal(scores: Array, chance: float) -> float:
    """Return the factor that a new score exceeds with at most `chance`, if scores are exchangeable.

    With n scores that is the ⌈(n + 1)(1 − chance)⌉-th smallest. If n is too small for that, the
    largest is stretched by how far the scores spread; the chance is then not guaranteed.
    """
    ordered = np.sort(scores)
    rank = math.ceil((len(ordered) + 1) * (1.0 - chance))
    if rank <= len(ordered):
        return float(ordered[rank - 1])
    spread = float(ordered[-1] - np.median(ordered))
    return float(ordered[-1]) + spread * (rank - len(ordered)) / len(ordered)


@dataclass(frozen=True, slots=True)
class _Grown:
    """Terms by column of the table; `shapes[i]` has weight `weights[i]`."""

    shapes: tuple[Shape, ...]
    weights: Array

    @property
    def used(self) -> set[tuple[int, float]]:
        return {factor for shape in self.shapes for factor in shape}


def _telling(samples: Sequence[Sample]) -> list[str]:
    """Return the measures that every sample has and that tell something, at most MEASURES_MAX.

    Of two that rise and fall together the first counts; the most correlated with the peak lead.
    """
    common = set(samples[0].measures).intersection(*(s.measures for s in samples))
    peaks = _ranks(np.array([s.peak_mib for s in samples]))
    found: list[tuple[float, str, Array]] = []
    for name in sorted(common):
        values = np.array([s.measures[name] for s in samples])
        if values.min() < 0.0 or values.max() < SPREAD_MIN * max(values.min(), 1e-9):
            continue
        found.append((abs(_correlation(_ranks(values), peaks)), name, values))
    found.sort(key=lambda each: (-round(each[0], 3), each[1] == "bytes", each[1]))
    kept: list[tuple[str, Array]] = []
    for _, name, values in found:
        if all(abs(_correlation(values, other)) < 0.99999 for _, other in kept):
            kept.append((name, values))
    return [name for name, _ in kept[:MEASURES_MAX]]


def _table(samples: Sequence[Sample], names: Sequence[str]) -> Array:
    """Return the measures, a row per sample; without names its rows are empty."""
    rows = [[sample.measures.get(name, 0.0) for name in names] for sample in samples]
    return np.array(rows, dtype=np.float64).reshape(len(samples), len(names))


def _ranks(values: Array) -> Array:
    return np.argsort(np.argsort(values)).astype(np.float64)


def _correlation(a: Array, b: Array) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0.0 else 0.0


def _grow(table: Array, values: Array, floor: float) -> _Grown:
    """Choose terms one by one: each must lower the error on held-out samples, and not be negative.

    The first is the constant. Where it would be negative beside another it is zero: values a little
    below a line through zero grow by that line, not by a steeper power that leaves the constant be.

    Errors are relative to the value, or to `floor` if that is larger: what is below it matters not.
    """
    weights = 1.0 / np.maximum(values, floor)
    columns = range(table.shape[1])
    candidates: list[Shape] = [()]
    candidates += [((c, p),) for c in columns for p in POWERS]
    candidates += [((a, p), (b, q)) for a in columns for b in columns if a < b for p, q in PAIRS]
    splits = np.array([*_folds(table), _tail(values)])
    trials = _Trials(_design(table, candidates), values, weights, splits)
    chosen = [0]
    error = float(trials.errors(np.array([chosen]))[0])
    while len(chosen) < min(TERMS_MAX, len(candidates)):
        rest = [c for c in range(len(candidates)) if c not in chosen]
        bases = _with_and_without_constant(chosen)
        tried = [np.array([[*base, c] for c in rest]) for base in bases]
        errors = [trials.errors(sets) for sets in tried]
        best = min(range(len(tried)), key=lambda i: float(errors[i].min()))
        row = int(np.argmin(errors[best]))
        if not errors[best][row] < error * (1.0 - GAIN_MIN):
            break
        error = float(errors[best][row])
        chosen = tried[best][row].tolist()
    for columns_used in filter(None, _with_and_without_constant(chosen)):
        shapes = tuple(candidates[c] for c in columns_used)
        solved = _solve(_design(table, shapes), values, weights)
        if solved is not None:
            return _Grown(shapes, solved)
    # All samples together want a negative weight: the constant does it.
    return _Grown(((),), np.array([float(np.average(values, weights=weights))]))


def _with_and_without_constant(chosen: list[int]) -> list[list[int]]:
    return [chosen, chosen[1:]] if chosen[0] == 0 else [chosen]


class _Trials:
    """Errors of many sets of terms at once, from the normal equations of each split."""

    def __init__(
        self, design: Array, values: Array, weights: Array, splits: NDArray[np.bool_]
    ) -> None:
        rows = design / np.maximum(np.abs(design).max(axis=0), 1e-300) * weights[:, None]
        aims = values * weights
        self._count = splits.sum(axis=1)
        held = [(rows[out], aims[out]) for out in splits]
        known = [(rows[~out], aims[~out]) for out in splits]
        self._gram = np.array([r.T @ r for r, _ in known])
        self._aim = np.array([r.T @ y for r, y in known])
        self._held_gram = np.array([r.T @ r for r, _ in held])
        self._held_aim = np.array([r.T @ y for r, y in held])
        self._held_square = np.array([y @ y for _, y in held])

    def errors(self, trials: NDArray[np.int_]) -> Array:
        """Return, for each row of column numbers, the mean error over the splits.

        It is the root mean square of what the held-out samples miss; infinite if any split wants a
        negative weight.
        """
        pairs = (slice(None), trials[:, :, None], trials[:, None, :])
        gram = self._gram[pairs] + RIDGE * np.eye(trials.shape[1])
        solved = np.linalg.solve(gram, self._aim[:, trials][..., None])[..., 0]
        square = (
            np.einsum("sti,stij,stj->st", solved, self._held_gram[pairs], solved)
            - 2.0 * np.einsum("sti,sti->st", solved, self._held_aim[:, trials])
            + self._held_square[:, None]
        )
        errors = np.sqrt(np.maximum(square, 0.0) / self._count[:, None]).mean(axis=0)
        largest = np.abs(solved).max(axis=2, keepdims=True)
        is_negative = (solved < -1e-9 * np.maximum(largest, 1e-300)).any(axis=(0, 2))
        mean: Array = np.where(is_negative, np.inf, errors)
        return mean


def _design(table: Array, shapes: Sequence[Shape]) -> Array:
    columns = [
        np.prod([table[:, c] ** p for c, p in shape], axis=0) if shape else np.ones(len(table))
        for shape in shapes
    ]
    return np.stack(columns, axis=1)


def _solve(design: Array, values: Array, weights: Array) -> Array | None:
    """Return the weighted least-squares solution, or None if a coefficient is negative."""
    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)
    solved, *_ = np.linalg.lstsq(design / scale * weights[:, None], values * weights, rcond=1e-10)
    if solved.min() < -1e-9 * max(1.0, float(np.abs(solved).max())):
        return None
    weighed: Array = np.maximum(solved, 0.0) / scale
    return weighed


def _scores(
    table: Array,
    peaks: Array,
    shapes: Sequence[Shape],
    splits: Sequence[NDArray[np.bool_]],
) -> Array:
    """Return peak ÷ prediction of samples that the prediction did not see; small ones count less.

    Both are raised to half the floor: an error below what is allotted anyway is none.
    """
    weights = 1.0 / np.maximum(peaks, FLOOR_MIB / 2)
    design = _design(table, shapes)
    scores = []
    for held_out in splits:
        known = design[~held_out], peaks[~held_out]
        solved = _solve(*known, weights[~held_out])
        if solved is None:
            solved = np.linalg.lstsq(*known, rcond=1e-10)[0].astype(np.float64)
        predicted = np.maximum(design[held_out] @ solved, FLOOR_MIB / 2)
        scores.append(np.maximum(peaks[held_out], FLOOR_MIB / 2) / predicted)
    return np.concatenate(scores)


def _folds(table: Array) -> list[NDArray[np.bool_]]:
    """Return FOLDS masks of held-out samples; equal inputs are held out together.

    Otherwise a sample would be predicted from its own repetitions.
    """
    seen: dict[tuple[float, ...], int] = {}
    groups = np.array([seen.setdefault(tuple(row), len(seen)) for row in table.tolist()])
    if len(seen) < FOLDS:
        groups = np.arange(len(table))
    return [groups % FOLDS == fold for fold in range(FOLDS)]


def _tail(values: Array) -> NDArray[np.bool_]:
    """Return a mask of the largest samples; of equal ones, of the newest."""
    mask = np.zeros(len(values), dtype=np.bool_)
    mask[np.argsort(values, kind="stable")[-math.ceil(TAIL_SHARE * len(values)) :]] = True
    return mask


def _named(grown: _Grown, names: Sequence[str]) -> Growth:
    return Growth(
        terms=tuple(
            Term(powers=tuple((names[c], p) for c, p in shape), coefficient=float(weight))
            for shape, weight in zip(grown.shapes, grown.weights, strict=True)
            if weight > 0.0
        )
    )
