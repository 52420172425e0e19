"""Questions about what clients contributed, and what they are paid for it. From the Gram matrix."""

import numpy as np

from tierwise.functions.fl import contribution, incentives
from tierwise.functions.fl.geometry import Float, shares
from tierwise.functions.fl.question import (
    Answer,
    Question,
    by_client,
    check_any,
    check_choice,
    check_range,
    column,
    generator,
    known_rows,
)
from tierwise.functions.fl.statistics import RoundStatistics

PAIRS_MAX = 20_000_000  # of clients, over all permutations
PERMUTATIONS_MIN = 20
BASES = ("linear", "leave-one-out", "shapley", "examples")


def leave_one_out(statistics: RoundStatistics) -> Answer:
    """Return what the round would lose without each client, and how far it would move."""
    check_any(statistics)
    weights = shares(statistics.example_counts)
    clients = statistics.clients
    return {
        "alignment": by_client(clients, contribution.leave_one_out(statistics.gram, weights)),
        "linear": by_client(clients, contribution.linear_values(statistics.gram, weights)),
        "influence": by_client(clients, contribution.influences(statistics.gram, weights)),
    }


def shapley(
    statistics: RoundStatistics, *, within: float = 0.001, permutations_max: int = 0, seed: int = 0
) -> Answer:
    """Return each client's Shapley value of the round's direction: exact up to ten clients."""
    check_any(statistics)
    check_range("within", within, 0.0, 1.0)
    check_range("permutations_max", permutations_max, 0, contribution.PERMUTATIONS_MAX)
    weights = shares(statistics.example_counts)
    values, permutations = _shapley(statistics, weights, within, permutations_max, seed)
    return {
        "values": by_client(statistics.clients, values),
        "sum": float(values.sum()),
        "is_exact": permutations == 0,
        "permutations": permutations,
    }


def payments(
    statistics: RoundStatistics,
    *,
    budget: int,
    basis: str = "linear",
    quality: str = "",
    equal_share: float = 0.0,
    power: float = 1.0,
) -> Answer:
    """Return a budget split by contribution, by examples, or by any column of the metadata."""
    check_any(statistics)
    check_choice("basis", basis, BASES)
    weights = shares(statistics.example_counts)
    if quality:
        merits = column(statistics, quality)
        known_rows(merits, quality, statistics)
        merits = np.nan_to_num(merits, nan=0.0)
        basis = quality
    elif basis == "linear":
        merits = contribution.linear_values(statistics.gram, weights)
    elif basis == "leave-one-out":
        merits = contribution.leave_one_out(statistics.gram, weights)
    elif basis == "shapley":
        merits, _ = _shapley(statistics, weights, 0.001, 0, 0)
    else:
        merits = statistics.example_counts
    paid = incentives.split(budget, merits, equal_share=equal_share, power=power)
    return {
        "payments": by_client(statistics.clients, paid),
        "merits": by_client(statistics.clients, merits),
        "basis": basis,
    }


def _shapley(
    statistics: RoundStatistics, weights: Float, within: float, permutations_max: int, seed: int
) -> tuple[Float, int]:
    gram, count = statistics.gram, len(statistics.clients)
    if count <= contribution.EXACT_MAX:
        coalitions = contribution.all_coalitions(count)
        values = contribution.alignments(gram, weights, coalitions)
        return contribution.shapley_coefficients(coalitions) @ values, 0
    affordable = max(min(contribution.PERMUTATIONS_MAX, PAIRS_MAX // count**2), PERMUTATIONS_MIN)
    return contribution.gtg_shapley(
        contribution.alignment_prefixes(gram, weights),
        count,
        float(contribution.alignments(gram, weights, np.ones((1, count), dtype=np.bool_))[0]),
        generator(seed),
        within=within,
        permutations_max=min(permutations_max or affordable, affordable),
    )


QUESTIONS = (
    Question(
        name="leave-one-out",
        summary="What the round would lose without each client, and how far it would move",
        needs="statistics",
        function=leave_one_out,
        arguments={},
        source="alignment: Xu et al., NeurIPS 2021; influence: Xue et al., AAAI 2021",
    ),
    Question(
        name="shapley",
        summary="Each client's fair share in the round's direction",
        needs="statistics",
        function=shapley,
        arguments={
            "within": "a permutation ends when its utility is so near that of all",
            "permutations_max": "bound; 2,000, fewer of many clients, if not given",
            "seed": "of the permutations",
        },
        source="Shapley 1953; CGSV, Xu et al., NeurIPS 2021; beyond 10 clients GTG-Shapley, "
        "Liu et al., ACM TIST 2022, Alg. 1",
    ),
    Question(
        name="payments",
        summary="A budget split by contribution, to the last unit",
        needs="statistics",
        function=payments,
        arguments={
            "budget": "in the smallest unit that is paid",
            "basis": f"{', '.join(BASES)}",
            "quality": "instead: a column of the metadata",
            "equal_share": "share of the budget that all get alike",
            "power": "above 1 favours the best",
        },
        source="Yu et al., AIES 2020, section 2",
    ),
)
