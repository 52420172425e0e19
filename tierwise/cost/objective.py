"""The one number that placement minimises. The environment's reward is its negative."""

from dataclasses import dataclass

from tierwise.domain.decision import CandidateScore
from tierwise.domain.function import Priority
from tierwise.domain.outcome import Outcome, OutcomeState


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Weights that turn an outcome into second-equivalents.

    Attributes:
        per_latency_s: Cost of one second of latency.
        per_miss_s: Cost of a missed deadline at priority NORMAL; scales with priority ÷ NORMAL.
        per_failure_s: Further cost if there was no result at all.
        per_usd_s: Seconds that one US dollar is worth.
        per_joule_s: Seconds that one joule is worth.
    """

    per_latency_s: float = 1.0
    per_miss_s: float = 1.0
    per_failure_s: float = 2.0
    per_usd_s: float = 20_000.0
    per_joule_s: float = 0.0

    def cost_s(self, outcome: Outcome) -> float:
        """Return the cost of one finished request, in second-equivalents, ≥ 0."""
        weight = int(outcome.priority) / 2.0
        cost = (
            self.per_latency_s * outcome.latency.total_s
            + self.per_usd_s * outcome.money_usd
            + self.per_joule_s * outcome.energy_j
        )
        if outcome.is_missed:
            cost += self.per_miss_s * weight
        if outcome.state is not OutcomeState.OK:
            cost += self.per_failure_s * weight
        return cost

    def predicted_s(self, row: CandidateScore, deadline_s: float, priority: Priority) -> float:
        """Return what a call should cost on a candidate: `cost_s` of its predicted terms."""
        latency_s = row.transfer_s + row.wait_s + row.cold_start_s + row.run_s + row.return_s
        cost = self.per_latency_s * latency_s + self.per_usd_s * row.money_usd
        if latency_s > deadline_s:
            cost += self.per_miss_s * int(priority) / 2.0
        return cost


DEFAULT_OBJECTIVE = Objective()
