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
