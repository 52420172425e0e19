"""Who is paid what for a round. Pure."""

import numpy as np

from tierwise.functions.fl.geometry import Float, Index

CENTS_MAX = 10**15


def split(budget: int, merits: Float, *, equal_share: float = 0.0, power: float = 1.0) -> Index:
    """Return payments in whole units that sum to `budget` exactly, shape (K,).

    pay_i = B·(e÷K + (1 − e)·max(m_i, 0)^p ÷ Σ max(m, 0)^p): proportional profit sharing by merit
    (Yu et al., A Fairness-aware Incentive Scheme for Federated Learning, AIES 2020, section 2),
    with a share e that all get alike. Who does harm gets no more than that. If nobody has merit,
    all get the same. Units that are left by rounding down go to the largest remainders, the earlier
    row first.

    Args:
        budget: In the smallest unit that is paid (cents, µUSD), 0 … 1e15.
        merits: Contributions or qualities, shape (K,), K ≥ 1.
        equal_share: e in [0, 1].
        power: p > 0; above 1 favours the best.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 0 <= budget <= CENTS_MAX:
        raise ValueError(f"`budget` is in the smallest unit paid, 0 to {CENTS_MAX}, not {budget}")
    if not 0.0 <= equal_share <= 1.0:
        raise ValueError(f"`equal_share` is a share from 0 to 1, not {equal_share}")
    if not 0.0 < power <= 100.0:
        raise ValueError(f"`power` is above 0, to 100, not {power}")
    count = len(merits)
    good = np.maximum(merits, 0.0)
    largest = float(good.max())
    raised = (good / largest) ** power if largest > 0.0 else np.ones(count)
    wanted = budget * (equal_share / count + (1.0 - equal_share) * raised / float(raised.sum()))
    paid = np.floor(wanted).astype(np.intp)
    left = budget - int(paid.sum())
    if left >= 0:
        to_all, rest = divmod(left, count)
        paid += to_all
        paid[np.argsort(-(wanted - paid), kind="stable")[:rest]] += 1
    else:  # rounding of large budgets
        paid[int(paid.argmax())] += left
    return paid
