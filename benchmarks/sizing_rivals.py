"""Ways to size a function's memory, behind one interface, for `bench_memory_sizing`.

Each learns from the same profiled runs and has one knob (a safety margin, or what stands for it)
that is tuned by the same cross-validation: least billed cost among those settings that keep
out-of-memory runs at 1 %, else the one with the fewest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from scheduler.advisors.memory import Sample, fit
from tierwise.domain.sizing import FLOOR_MIB, in_steps

MARGINS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0)
TUNING_LEVELS_MIB = (16, 32, 64, 128, 256, 512, 1024, 2048)  # AWS Lambda Power Tuning: powers of 2
SHARES = (1.0, 0.5)


@dataclass(frozen=True, slots=True)
class Run:
    """One profiled run: its input's measures, its need, its time at each CPU share."""

    measures: Mapping[str, float]
    peak_mib: float
    need_mib: int
    run_s: Mapping[float, float]  # by CPU share


@dataclass(frozen=True, slots=True)
class Size:
    """What a call gets."""

    memory_mib: int
    share: float = 1.0


class Sizer(Protocol):
    """Chooses a size for each call, having seen profiled runs."""

    knobs: Sequence[float]
    knob: float
    trains_with_knob: bool  # else it may be turned after training

    def train(self, runs: Sequence[Run], seed: int) -> None:
        """Learn from profiled runs."""

    def choose(self, measures: Mapping[str, float]) -> Size:
        """Return the size for one call."""

    def learn(self, measures: Mapping[str, float], run: Run, has_run_out: bool) -> None:
        """Hear how a call went, at the size that was chosen."""


class Fixed:
    """What does not look at the input, and does not learn."""

    knobs: Sequence[float] = MARGINS
    knob = 1.0
    trains_with_knob = True

    def __init__(self) -> None:
        self.size = Size(FLOOR_MIB)

    def train(self, runs: Sequence[Run], seed: int) -> None:
        raise NotImplementedError

    def choose(self, measures: Mapping[str, float]) -> Size:
        return self.size

    def learn(self, measures: Mapping[str, float], run: Run, has_run_out: bool) -> None:
        pass


class StaticMax(Fixed):
    """The largest peak that was profiled, times a margin."""

    def train(self, runs: Sequence[Run], seed: int) -> None:
        self.size = Size(in_steps(self.knob * max(r.peak_mib for r in runs)))


class StaticP95(Fixed):
    """The 95th percentile of the peaks, times a margin."""

    def train(self, runs: Sequence[Run], seed: int) -> None:
        self.size = Size(in_steps(self.knob * float(np.quantile([r.peak_mib for r in runs], 0.95))))


class PowerTuning(Fixed):
    """AWS Lambda Power Tuning: runs one payload at every level and takes the cheapest.

    The payload is the one at a quantile (the knob) of the profiled ones.
    """

    knobs = (0.5, 0.8, 0.9, 0.95, 1.0)

    def train(self, runs: Sequence[Run], seed: int) -> None:
        ordered = sorted(runs, key=lambda r: r.need_mib)
        payload = ordered[min(len(ordered) - 1, int(self.knob * len(ordered)))]
        fitting = [m for m in TUNING_LEVELS_MIB if m >= payload.need_mib] or [TUNING_LEVELS_MIB[-1]]
        self.size = min(
            (Size(m, c) for m in fitting for c in SHARES),
            key=lambda s: s.memory_mib * payload.run_s[s.share],
        )


class Cose(Fixed):
    """COSE (INFOCOM 2020): Bayesian optimisation of one configuration per function.

    The knob is how many times its cost a run that is out of memory counts.
    """

    knobs = (3.0, 30.0)
    trials = 25

    def train(self, runs: Sequence[Run], seed: int) -> None:
        rng = np.random.default_rng(seed)
        top = 1.5 * max(r.need_mib for r in runs)
        sizes = sorted({in_steps(m) for m in np.geomspace(FLOOR_MIB, max(top, 32), 24)})
        space = [Size(m, c) for m in sizes for c in SHARES]
        grid = np.array([[math.log2(s.memory_mib), 2.0 * s.share] for s in space])
        picked = [int(i) for i in rng.choice(len(space), min(4, len(space)), replace=False)]
        # The same runs at every size: what differs is then the size.
        payloads = sorted(runs, key=lambda r: r.need_mib)[:: max(1, len(runs) // 8)]
        payloads = [*payloads, max(runs, key=lambda r: r.need_mib)]
        costs: list[float] = []
        failing: set[int] = set()

        def tried(index: int) -> float:
            size = space[index]
            total = 0.0
            for run in payloads:
                cost = size.memory_mib * run.run_s[size.share]
                is_short = size.memory_mib < run.need_mib
                total += cost * (1.0 + 2.0 * self.knob if is_short else 1.0)
                failing.update([index] if is_short else [])
            return math.log(total)

        costs = [tried(i) for i in picked]
        for _ in range(self.trials - len(picked)):
            mean, deviation = _gaussian_process(grid, picked, np.array(costs))
            z = (min(costs) - mean) / deviation
            gain = (min(costs) - mean) * _normal(z) + deviation * _density(z)
            picked.append(int(np.argmax(gain)))
            costs.append(tried(picked[-1]))
        mean, _ = _gaussian_process(grid, picked, np.array(costs))
        sound = [i for i in picked if i not in failing] or list(range(len(space)))
        self.size = space[min(sound, key=lambda i: mean[i])]


def _gaussian_process(
    grid: np.ndarray, picked: Sequence[int], costs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation over the grid: Matérn 5/2 over octaves of memory, noise 0.1."""
    far = math.sqrt(5.0) * np.linalg.norm(grid[:, None] - grid[None], axis=2)
    kernel = (1.0 + far + far**2 / 3.0) * np.exp(-far)
    centre, scale = costs.mean(), costs.std() + 1e-9
    known = kernel[np.ix_(picked, picked)] + 0.1 * np.eye(len(picked))
    weights = np.linalg.solve(known, kernel[picked])
    variance = 1.0 - np.einsum("ij,ij->j", weights, kernel[picked])
    mean = centre + scale * (weights.T @ ((costs - centre) / scale))
    return mean, scale * np.sqrt(np.maximum(variance, 1e-9))


def _density(z: np.ndarray) -> np.ndarray:
    return np.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi)


def _normal(z: np.ndarray) -> np.ndarray:
    return np.array([0.5 * (1.0 + math.erf(each / math.sqrt(2.0))) for each in z])


class Parrotfish(Fixed):
    """Parrotfish (SoCC 2023): a parametric curve of cost over memory, fitted to a few samples.

    It explores sizes for representative inputs, fits a·exp(−m/b) + c to the run time over memory,
    and takes the cheapest size at which none of them fails. The knob is a margin on that.
    """

    def train(self, runs: Sequence[Run], seed: int) -> None:
        from scipy.optimize import curve_fit

        ordered = sorted(runs, key=lambda r: r.need_mib)
        chosen = [ordered[int(q * (len(ordered) - 1))] for q in (0.1, 0.5, 0.9, 1.0)]
        least = max(r.need_mib for r in chosen)
        sizes = np.array([in_steps(least * f) for f in (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)])
        costs = np.zeros(len(sizes))
        for run in chosen:
            times = np.full(len(sizes), run.run_s[1.0])
            try:
                (a, b, c), _ = curve_fit(
                    lambda m, a, b, c: a * np.exp(-m / b) + c,
                    sizes,
                    times,
                    p0=(0.0, float(least), float(times[-1])),
                    maxfev=2000,
                )
                costs += sizes * (a * np.exp(-sizes / b) + c)
            except RuntimeError:
                costs += sizes * times
        self.size = Size(in_steps(self.knob * float(sizes[int(np.argmin(costs))])))


class _PerInput:
    """What looks at the input, by the measures that all profiled runs have."""

    knobs: Sequence[float] = MARGINS
    knob = 1.0
    trains_with_knob = True

    def __init__(self) -> None:
        self._names: list[str] = []

    def _table(self, runs: Sequence[Run]) -> np.ndarray:
        self._names = sorted(set.intersection(*(set(r.measures) for r in runs)))
        return np.array([[r.measures[n] for n in self._names] for r in runs])

    def _row(self, measures: Mapping[str, float]) -> np.ndarray:
        return np.array([[measures.get(n, 0.0) for n in self._names]])

    def learn(self, measures: Mapping[str, float], run: Run, has_run_out: bool) -> None:
        pass


class MemFigLess(_PerInput):
    """MemFigLess (2024): a multi-output random forest from input to memory and time."""

    trains_with_knob = False

    def train(self, runs: Sequence[Run], seed: int) -> None:
        from sklearn.ensemble import RandomForestRegressor

        targets = [[r.peak_mib, r.run_s[1.0], r.run_s[0.5]] for r in runs]
        self._forest = RandomForestRegressor(60, random_state=seed, n_jobs=1)
        self._forest.fit(self._table(runs), targets)
        self._known: dict[tuple[float, ...], np.ndarray] = {}

    def choose(self, measures: Mapping[str, float]) -> Size:
        row = self._row(measures)
        key = tuple(row[0])
        if key not in self._known:
            self._known[key] = self._forest.predict(row)[0]
        peak_mib, full_s, half_s = self._known[key]
        return Size(in_steps(self.knob * peak_mib), 1.0 if full_s <= half_s else 0.5)


class Shabari(_PerInput):
    """Shabari-like (2024): online cost-sensitive classes of memory, one linear model per class.

    A class's cost is the waste of a size that suffices and, for one that does not, the knob times
    how far it falls short. It starts at the largest size and trusts its models after some calls.
    """

    knobs = (2.0, 5.0, 10.0, 30.0)
    trusted_after = 10
    rate = 0.3

    def train(self, runs: Sequence[Run], seed: int) -> None:
        table = np.log1p(np.maximum(0.0, self._table(runs)))
        self._mean, self._scale = table.mean(axis=0), table.std(axis=0) + 1e-9
        top = in_steps(2.0 * max(r.peak_mib for r in runs))
        self._sizes = sorted({in_steps(m) for m in np.geomspace(FLOOR_MIB, max(top, 32), 16)})
        self._weights = np.zeros((len(self._sizes), 2 * len(self._names) + 1))
        self._seen = 0
        order = np.random.default_rng(seed)
        for _ in range(5):  # its models would see many more calls than were profiled
            for index in order.permutation(len(runs)):
                self.learn(runs[index].measures, runs[index], has_run_out=False)

    def _features(self, measures: Mapping[str, float]) -> np.ndarray:
        row = (np.log1p(np.maximum(0.0, self._row(measures)[0])) - self._mean) / self._scale
        return np.concatenate([[1.0], row, row**2])

    def choose(self, measures: Mapping[str, float]) -> Size:
        if self._seen < self.trusted_after:
            return Size(self._sizes[-1])
        return Size(self._sizes[int(np.argmin(self._weights @ self._features(measures)))])

    def learn(self, measures: Mapping[str, float], run: Run, has_run_out: bool) -> None:
        self._seen += 1
        x = self._features(measures)
        levels = np.log2(np.array(self._sizes))
        need = math.log2(in_steps(run.peak_mib))
        costs = np.where(levels >= need, levels - need, self.knob * (need - levels + 0.5))
        step = self.rate / (1.0 + float(x @ x))
        self._weights += step * np.outer(costs - self._weights @ x, x)


class QuantileForest(_PerInput):
    """A quantile forest alone, its 0.9-quantile with a cross-fitted conformal margin."""

    knobs = (0.9,)
    knob = 0.9

    def train(self, runs: Sequence[Run], seed: int) -> None:
        from quantile_forest import RandomForestQuantileRegressor

        from scheduler.advisors.memory import conformal

        table = self._table(runs)
        peaks = np.maximum(FLOOR_MIB / 2, [r.peak_mib for r in runs])
        scores = []
        for fold in range(5):
            out = np.arange(len(runs)) % 5 == fold
            forest = RandomForestQuantileRegressor(30, random_state=seed, min_samples_leaf=2)
            forest.fit(table[~out], peaks[~out])
            scores.append(peaks[out] / forest.predict(table[out], quantiles=[self.knob]).ravel())
        self._margin = conformal(np.concatenate(scores), 0.01)
        self._forest = RandomForestQuantileRegressor(30, random_state=seed, min_samples_leaf=2)
        self._forest.fit(table, peaks)
        self._known: dict[tuple[float, ...], float] = {}

    def choose(self, measures: Mapping[str, float]) -> Size:
        row = self._row(measures)
        key = tuple(row[0])
        if key not in self._known:
            found = self._forest.predict(row, quantiles=[self.knob])
            self._known[key] = float(np.ravel(found)[0])
        return Size(in_steps(self._margin * self._known[key]))


class Tierwise(_PerInput):
    """tierwise: growth × conformal margin, as agents evaluate it. It has no knob."""

    knobs = (0.01,)
    knob = 0.01
    is_online = False
    refit_every = 8

    def train(self, runs: Sequence[Run], seed: int) -> None:
        self._samples = [_sample(run) for run in runs]
        self._default = in_steps(max(r.peak_mib for r in runs))
        self._new = 0
        self.sizing = fit(self._samples, oom_chance=self.knob)

    def choose(self, measures: Mapping[str, float]) -> Size:
        found = self.sizing.memory_mib(measures) if self.sizing is not None else None
        return Size(found or self._default)

    def learn(self, measures: Mapping[str, float], run: Run, has_run_out: bool) -> None:
        if not self.is_online:
            return
        self._samples.append(_sample(run))
        self._new += 1
        if has_run_out or self._new >= self.refit_every:
            self._new = 0
            self.sizing = fit(self._samples, oom_chance=self.knob)


class TierwiseOnline(Tierwise):
    """The same, fitted anew as calls end."""

    is_online = True


def _sample(run: Run) -> Sample:
    return Sample(measures=run.measures, peak_mib=run.peak_mib, run_s=run.run_s[1.0])


RIVALS: dict[str, type] = {
    "static max": StaticMax,
    "static p95": StaticP95,
    "Power Tuning": PowerTuning,
    "COSE": Cose,
    "Parrotfish": Parrotfish,
    "MemFigLess-RF": MemFigLess,
    "Shabari-like": Shabari,
    "quantile forest": QuantileForest,
    "tierwise": Tierwise,
    "tierwise online": TierwiseOnline,
}
