"""Budgets of a day that are spent, and what a caller is told of them."""

from dataclasses import dataclass

from tierwise.errors import BudgetExceeded


@dataclass(frozen=True, slots=True, kw_only=True)
class SpentBudget:
    """A budget that takes no new calls until its day is over; an empty function means all."""

    namespace: str
    function: str
    usd_per_day: float
    spent_usd: float
    ends_unix_s: float  # wall time: a day is what people mean by it, in UTC

    def error(self, now_unix_s: float) -> BudgetExceeded:
        """Return what its callers are told."""
        left_s = max(1.0, self.ends_unix_s - now_unix_s)
        whose = f"{self.namespace}/{self.function}" if self.function else self.namespace
        return BudgetExceeded(
            f"{whose} has spent {self.spent_usd:.6g} $ of its {self.usd_per_day:.6g} $ for today: "
            f"raise it (`tierwise budget set {whose} --usd-per-day N`, as an admin), or wait "
            f"{left_s / 3600.0:.1f} h until the day is over in UTC",
            retry_after_s=left_s,
        )


class SpentBudgets:
    """The budgets that are spent, by whose they are; most of the time there are none."""

    def __init__(self, spent: tuple[SpentBudget, ...] = ()) -> None:
        self._by_key = {(each.namespace, each.function): each for each in spent}

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def of(self, namespace: str, function: str, now_unix_s: float) -> SpentBudget | None:
        """Return the spent budget that a call would fall under; None if there is none any more."""
        for key in ((namespace, ""), (namespace, function)):
            spent = self._by_key.get(key)
            if spent is not None and now_unix_s < spent.ends_unix_s:
                return spent
        return None
