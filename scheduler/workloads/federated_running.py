"""The round under way, and what becomes of an update."""

from dataclasses import dataclass, field, replace

from scheduler.workloads.federated_calls import Stage, counted_of, mean_metrics, metrics_of
from scheduler.workloads.federated_events import CallEnded
from tierwise.domain.federated import RoundRecord, RoundState, UpdateRecord, UpdateState
from tierwise.domain.ids import NodeId, RequestId


@dataclass(slots=True)
class Running:
    """The round under way."""

    record: RoundRecord
    updates: dict[str, UpdateRecord]
    ends_at_s: float
    opened_at_s: float
    unopened: set[NodeId]
    sites: dict[str, NodeId]  # where each client's update goes
    told_at_s: float | None = None
    stages: list[Stage] = field(default_factory=list)
    pending: set[RequestId] = field(default_factory=set)
    closed_at_s: float = 0.0
    evaluation: RequestId | None = None

    @property
    def is_collecting(self) -> bool:
        """Return whether updates are waited for."""
        return self.record.state is RoundState.COLLECTING

    def count(self, state: UpdateState) -> int:
        """Return how many updates are in a state; asked after every answer."""
        return [each.state for each in self.updates.values()].count(state)

    def counted(self) -> list[UpdateRecord]:
        """Return the updates that count so far."""
        return counted_of(self.updates.values())

    def unanswered(self) -> list[UpdateRecord]:
        """Return the updates that are waited for."""
        return [each for each in self.updates.values() if each.state is UpdateState.ASKED]

    def judge(self, event: CallEnded) -> None:
        """Take what the evaluation says; if it failed, the aggregate is none the worse."""
        record = self.record
        if event.error_code:
            self.record = replace(record, message=f"the evaluation failed: {event.message}")
        else:
            found = {**record.metrics, **metrics_of(event.value)}
            self.record = replace(record, metrics=found)

    def take_receipt(self, event: CallEnded) -> None:
        """Take what an aggregator says of its result, and of the updates that it left out."""
        record = self.record
        self.record = replace(record, digest=str(event.value.get("digest", "")))
        kept = event.value.get("kept_rows")
        for row, client in enumerate(record.aggregators[-1].clients):
            update = self.updates.get(client)
            is_counted = update is not None and update.state is UpdateState.COUNTED
            if isinstance(kept, list) and is_counted and row not in kept:
                assert update is not None
                words = "left out: too far from the others"
                self.updates[client] = replace(update, message=words)

    def snapshot(self) -> RoundRecord:
        """Return the round as it stands."""
        metrics = {**mean_metrics(self.counted()), **self.record.metrics}
        return replace(self.record, updates=tuple(self.updates.values()), metrics=metrics)


def on_way(record: RoundRecord) -> list[NodeId]:
    """Return the aggregators that merge parts; they get a model when the next round opens there."""
    return [each.node_id for each in record.aggregators if each.node_id != record.root]


def answered(update: UpdateRecord, event: CallEnded, elapsed_s: float) -> UpdateRecord:
    """Return what became of an update: it counts only if a cache took it and found no fault."""
    update = replace(update, elapsed_s=elapsed_s)
    facts = event.value
    if event.error_code:
        message = f"{event.error_code}: {event.message}"
        return replace(update, state=UpdateState.FAILED, message=message)
    if facts.get("quarantined"):
        message = str(facts["quarantined"])
        return replace(update, state=UpdateState.QUARANTINED, message=message)
    count = facts.get("example_count", 0.0)
    if not isinstance(count, int | float) or not 0.0 <= count < 1e15:
        message = f"its example_count is {count!r}"
        return replace(update, state=UpdateState.FAILED, message=message)
    if not facts.get("digest"):
        return replace(update, state=UpdateState.FAILED, message="there is no receipt for it")
    return replace(
        update,
        state=UpdateState.COUNTED,
        example_count=float(count),
        metrics=metrics_of(facts),
    )
