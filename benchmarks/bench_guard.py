"""What do the circuit breaker, a canary and the record of a shadow add to one decision?

    python -m benchmarks.bench_guard

One thread. The policy answers at once with a prepared decision, so that what is measured is the
guard alone: asking, judging the time taken, and learning from how the call ended. Rows are measured
interleaved, round by round; the bare policy's own time is taken off, paired by round.
"""

import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts its threads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from agent.decider import Canary, Decider, Duties
from benchmarks.bench_decision import REQUEST, SEED, make_learned, make_view
from benchmarks.report import at_most, interleaved, make_table, show, spread
from tierwise.domain.decision import Decision, Placed
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.placement.breaker import CircuitBreaker
from tierwise.placement.canary import Schedule
from tierwise.placement.policies.learned import LearnedPolicy
from tierwise.placement.policy import create

ROUNDS = 200
CALLS = 200  # per round and row
NODE_COUNT = 16
TARGET_US = 2.0


class Prepared(LearnedPolicy):
    """A learned policy in name, which answers what it answered before."""

    def prepare(self, decision: Decision) -> None:
        """Set the answer."""
        self._answer = decision

    def decide(self, *_: object) -> Decision:
        """Return the answer."""
        return self._answer


def main() -> None:
    rng = np.random.default_rng(SEED)
    view = make_view(NODE_COUNT, rng)
    learned = make_learned(rng)
    decision = learned.decide(view, REQUEST, rng)
    assert isinstance(decision, Placed) and decision.explanation is not None
    policy = Prepared(learned.network, learned.card)
    policy.prepare(decision)
    outcome = Outcome(
        request_id=REQUEST.request_id,
        function_id=REQUEST.spec.function_id,
        state=OutcomeState.OK,
        origin=REQUEST.origin,
        node_id=decision.node_ids[0],
        latency=LatencySplit(run_s=0.01),
        deadline_s=1.0,
        policy_id=policy.policy_id,
        explanation=decision.explanation,
    )

    guard = CircuitBreaker()

    def breaker() -> None:
        guard.allows(10.0)
        guard.decided(1e-4, 10.0)
        guard.ended(10.0, is_missed=False, was_predicted=False, by_base=False)

    base = create("ect")
    canary = Canary(policy=policy, trial_id=1, schedule=Schedule(0.2, 30.0, SEED), started_at_s=0.0)
    plain = Decider(Duties(active=policy), fallback=base)
    trying = Decider(Duties(active=policy, canary=canary), fallback=base)

    def whole_with_a_canary() -> None:
        trying.decide(view, REQUEST)
        trying.reported(outcome, view.now_s)

    calls: dict[str, Callable[[], object]] = {
        "bare": lambda: policy.decide(view, REQUEST, rng),
        "breaker alone": breaker,
        "decider: the decision": lambda: plain.decide(view, REQUEST),
        "decider: after the call": lambda: plain.reported(outcome, view.now_s),
        "decider: both, with a canary": whole_with_a_canary,
    }
    figures = interleaved(calls, rounds=ROUNDS, count=CALLS, warm_up=5)
    bare = figures.pop("bare")
    caption = (
        f"{ROUNDS} rounds of {CALLS} calls, {NODE_COUNT} candidates. The decider's rows include "
        "the two readings of the clock, and finding the chosen candidate when the call has ended."
    )
    title = "Added to one decision: µs, median [10 % … 90 %] over rounds"
    table = make_table(title, ("what", "µs", "target"), caption)
    for name, values in figures.items():
        asks = name in ("decider: the decision", "decider: both, with a canary")
        added = values - (bare if asks else 0.0)
        is_bound = "canary" not in name
        target = at_most(float(np.median(added)), TARGET_US) if is_bound else ""
        table.add_row(name, spread(added), target)
    show(table)


if __name__ == "__main__":
    main()
