"""What is known of a round without its vectors: taken once, while its updates come in.

With d_i = update_i − base, the Gram matrix G_ij = ⟨d_i, d_j⟩ holds every angle and distance between
updates: cos_ij = G_ij / √(G_ii G_jj) and ‖d_i − d_j‖² = G_ii + G_jj − 2 G_ij, and the rows of
E √Λ (G = E Λ Eᵀ) are points with exactly these distances, for k-means and its like (classical
scaling, Torgerson 1952). A question that needs no more than that never touches a vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStatistics:
    """One round as far as it has come: n updates count, of K that were announced.

    Every array is float64, read-only, and in the order of `clients` unless a line says otherwise.

    Attributes:
        clients: The n clients whose update is in and counts, in the manifest's order.
        rows: Shape (n,), int64: the row of each in the round's matrix of K rows.
        expected: The K clients of the manifest; row k of the matrix belongs to `expected[k]`.
        quarantined: Why the update of a client does not count.
        parameter_count: Length of each vector, P.
        gram: Shape (n, n): inner products of the deltas; of the vectors themselves without a base.
        norms: Shape (n,): Euclidean norms of the deltas, the root of `gram`'s diagonal.
        base_dots: Shape (n,): inner products of each delta with the base; zeros without one.
        base_norm: Euclidean norm of the base; 0 without one.
        aggregate_dots: Shape (n,): inner products of each delta with the step that the aggregate
            took last (base − base of the round before); NaN if that is not known here.
        aggregate_norm: Euclidean norm of that step; NaN if not known.
        example_counts: Shape (n,): `example_count` of the metadata, 1 where it is missing.
        columns: Every number of the clients' metadata by its key, shape (n,), NaN where missing.
        metadata: Per client, all that came with its update or was put beside it.
        round_metadata: What was put for the round as a whole.
        digests: BLAKE2b-256 of each update, hex.
        base_digest: Of the base; empty without one.
        aggregate_digest: Of what the round ended with; empty before.
        arrival_s: Shape (n,): seconds from the round's opening to each update.
    """

    namespace: str
    job: str
    round: int
    clients: tuple[str, ...]
    rows: NDArray[np.int64]
    expected: tuple[str, ...]
    parameter_count: int
    gram: NDArray[np.float64]
    norms: NDArray[np.float64]
    base_dots: NDArray[np.float64]
    base_norm: float
    aggregate_dots: NDArray[np.float64]
    aggregate_norm: float
    example_counts: NDArray[np.float64]
    arrival_s: NDArray[np.float64]
    digests: tuple[str, ...]
    quarantined: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    metadata: tuple[Mapping[str, object], ...] = ()
    round_metadata: Mapping[str, object] = field(default_factory=dict)
    base_digest: str = ""
    aggregate_digest: str = ""

    @property
    def is_complete(self) -> bool:
        """Return whether every announced update is in and counts."""
        return len(self.clients) == len(self.expected)

    @property
    def has_ended(self) -> bool:
        """Return whether the round's aggregate is in."""
        return bool(self.aggregate_digest)


BLOCK_ELEMENTS_MAX = 8192  # float64: 64 KiB per vector, of which several fit a core's cache
BLOCK_BYTES_MAX = 4 << 20
ADDED_MAX = 32  # vectors per pass

Vector = NDArray[np.float32]
Matrix64 = NDArray[np.float64]


class RunningStatistics:
    """Inner products of a round's deltas, one or several updates more at a time.

    Sums are float64 over blocks of float64. With a new delta d and an older update u,
    ⟨d, u − base⟩ = ⟨d, u⟩ − ⟨d, base⟩: older updates are read once and not centred again, at an
    error of about 1e-16 · ‖u‖ / ‖u − base‖.

    Attributes:
        gram: Shape (K, K), float64, rows of the matrix; zeros where `is_in` is not set.
        base_dots, aggregate_dots: Shape (K,), float64; see RoundStatistics.
        is_in: Shape (K,), bool: rows that have been added.
    """

    def __init__(self, row_count: int) -> None:
        self.gram: Matrix64 = np.zeros((row_count, row_count))
        self.base_dots: Matrix64 = np.zeros(row_count)
        self.aggregate_dots: Matrix64 = np.full(row_count, np.nan)
        self.is_in: NDArray[np.bool_] = np.zeros(row_count, bool)
        self.base_norm = 0.0
        self.aggregate_norm = float("nan")

    def add(
        self,
        vectors: Mapping[int, Vector],
        base: Vector | None = None,
        base_before: Vector | None = None,
    ) -> None:
        """Add the updates that are not in yet: one pass over all vectors.

        Args:
            vectors: Shape (P,) each, by row: those to add, and all that were added before.
            base: Shape (P,): what deltas are taken from.
            base_before: Shape (P,): the base of the round before, for the aggregate's last step.

        Raises:
            ValueError: A vector that was added before is missing, or lengths differ.
        """
        missing = set(np.flatnonzero(self.is_in).tolist()) - set(vectors)
        if missing:
            raise ValueError(f"rows {sorted(missing)} were added before and are missing")
        new = sorted(row for row in vectors if not self.is_in[row])
        for start in range(0, len(new), ADDED_MAX):
            self._add(vectors, new[start : start + ADDED_MAX], base, base_before)

    def _add(
        self,
        vectors: Mapping[int, Vector],
        new: list[int],
        base: Vector | None,
        base_before: Vector | None,
    ) -> None:
        old = np.flatnonzero(self.is_in).tolist()
        length = len(vectors[new[0]])
        given = [vectors[row] for row in (*new, *old)]
        given += [each for each in (base, base_before) if each is not None]
        if any(each.shape != (length,) for each in given):
            raise ValueError(f"vectors of one round must all have shape ({length},)")
        width = BLOCK_BYTES_MAX // 8 // (len(new) + len(old) + 2)
        width = max(256, min(BLOCK_ELEMENTS_MAX, width))
        deltas, others = np.empty((len(new), width)), np.empty((len(old), width))
        origin, step = np.zeros(width), np.empty(width)
        among, across = np.zeros((len(new), len(new))), np.zeros((len(new), len(old)))
        of_base, of_step = np.zeros(len(new)), np.zeros(len(new))
        base_square = step_square = 0.0
        for start in range(0, length, width):
            block = slice(start, min(start + width, length))
            here = slice(0, block.stop - start)
            if base is not None:
                origin[here] = base[block]
                base_square += float(origin[here] @ origin[here])
            for at, row in enumerate(new):
                np.subtract(vectors[row][block], origin[here], out=deltas[at, here])
            delta = deltas[:, here]
            among += delta @ delta.T
            if base is not None:
                of_base += delta @ origin[here]
                if base_before is not None:
                    np.subtract(origin[here], base_before[block], out=step[here])
                    of_step += delta @ step[here]
                    step_square += float(step[here] @ step[here])
            for at, row in enumerate(old):
                others[at, here] = vectors[row][block]
            if old:
                across += delta @ others[:, here].T
        across -= of_base[:, None]
        self.gram[np.ix_(new, new)] = among
        self.gram[np.ix_(new, old)] = across
        self.gram[np.ix_(old, new)] = across.T
        self.base_dots[new] = of_base
        if base is not None:
            self.base_norm = float(np.sqrt(base_square))
            if base_before is not None:
                self.aggregate_dots[new] = of_step
                self.aggregate_norm = float(np.sqrt(step_square))
        self.is_in[new] = True
