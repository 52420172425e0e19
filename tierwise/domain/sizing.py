"""How much memory a call needs, as a function of its input's measures. Small enough for agents.

The scheduler fits a `Sizing` per function (`scheduler/advisors/memory.py`); agents evaluate it in
microseconds at the door, before placement.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

STEP_MIB = 4
FLOOR_MIB = 16  # a worker's own pages, page tables and sockets are not worth a smaller limit
RETRY_FACTOR = 2
MEMORY_MIB_MAX = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """coefficient × the product of measures, each to its power; no measure means a constant."""

    powers: tuple[tuple[str, float], ...]
    coefficient: float

    def at(self, measures: Mapping[str, float]) -> float:
        """Return the term's value; a measure that is missing counts as 0."""
        value = self.coefficient
        for name, power in self.powers:
            value *= max(0.0, measures.get(name, 0.0)) ** power
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """A sum of terms with coefficients of at least 0, so that it goes on beyond what was seen."""

    terms: tuple[Term, ...]

    def at(self, measures: Mapping[str, float]) -> float:
        """Return the sum, at most 1e12."""
        try:
            return min(1e12, math.fsum(term.at(measures) for term in self.terms))
        except OverflowError:
            return 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What is known of a function's need for memory and time.

    `margin` is the conformal factor on what is predicted: a new call of the same kind stays within
    it with the chance that was asked for. `margin_beyond` is that for inputs larger than any seen,
    found by predicting the largest known from the others; there is no guarantee behind it.
    """

    memory: Growth
    run: Growth  # seconds on a CPU of speed 1.0
    margin: float
    margin_beyond: float
    highest: Mapping[str, float]  # of the measures in use, over all samples
    sample_count: int

    def is_beyond(self, measures: Mapping[str, float]) -> bool:
        """Return whether the input is larger than any that was seen."""
        return any(measures.get(name, 0.0) > high for name, high in self.highest.items())

    def memory_mib(self, measures: Mapping[str, float]) -> int | None:
        """Return the memory to allot, or None if the input lacks a measure that is needed."""
        if any(name not in measures for name in self.highest):
            return None
        margin = self.margin_beyond if self.is_beyond(measures) else self.margin
        return in_steps(self.memory.at(measures) * margin)


def in_steps(memory_mib: float) -> int:
    """Return the smallest size on offer that holds `memory_mib`, at most MEMORY_MIB_MAX."""
    size_mib = math.ceil(min(memory_mib, MEMORY_MIB_MAX) / STEP_MIB - 1e-9) * STEP_MIB
    return max(FLOOR_MIB, size_mib)
