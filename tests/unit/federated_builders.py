"""A cluster in a view, a job over it, and a shell that answers what a planner asks for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from scheduler.workloads.federated import planner_of
from scheduler.workloads.federated_events import (
    Call,
    CallEnded,
    Cancel,
    Command,
    Event,
    OpenRound,
    RoundOpened,
    Save,
    Submit,
    Ticked,
)
from tierwise.domain.federated import FederatedClient, JobProgress, JobSpec, RoundRecord, Strategy
from tierwise.domain.function import FunctionProfile, FunctionSpec
from tierwise.domain.ids import FunctionId, NodeId
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Link, LinkTable, Node, NodeState, Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView

MERGE = FunctionSpec(
    namespace="default",
    name="fl-aggregate",
    version=1,
    code_digest="x",
    tiers=frozenset((Tier.FOG, Tier.CLOUD)),
)
CLOUD, FOG = NodeId("cloud-1"), NodeId("fog-1")
EDGES = tuple(NodeId(f"edge-{i}") for i in (1, 2, 3, 4))
OFFSET_S = 1000.0
Answer = Callable[[Call], CallEnded | None]


def view(**states: NodeState) -> ClusterView:
    """Return a cloud, a fog near four edges, and a slow way from both to the cloud."""
    nodes = [(CLOUD, Tier.CLOUD), (FOG, Tier.FOG), *((edge, Tier.EDGE) for edge in EDGES)]
    near = Link(rtt_s=0.004, bandwidth_bytes_per_s=1e7)
    far = Link(rtt_s=0.1, bandwidth_bytes_per_s=4e5)
    rows = []
    for name, tier in nodes:
        capacity = Resources(cpus=4, memory_mib=4096)
        node = Node(node_id=name, tier=tier, capacity=capacity, speed=1.0)
        state = states.get(name.replace("-", "_"), NodeState.READY)
        reading = NodeReading(free=capacity, warm={MERGE.function_id: 1})
        rows.append(NodeView(node=node, reading=reading, state=state))
    return ClusterView(
        now_s=0.0,
        origin=None,
        nodes=tuple(rows),
        links=LinkTable(by_pair={(edge, FOG): near for edge in EDGES}, default=far),
        profiles={MERGE.function_id: FunctionProfile(run_s=0.001)},
    )


def job(
    strategy: str = "fedavg", parameters: dict[str, float] | None = None, **changes: Any
) -> JobSpec:
    """Return a job with a client on each edge."""
    spec = JobSpec(
        namespace="default",
        job="j",
        client_function=FunctionId("default/client@1"),
        aggregate_function=MERGE.function_id,
        clients=tuple(
            FederatedClient(client=f"c{i}", node_id=edge, data=i)
            for i, edge in enumerate(EDGES, start=1)
        ),
        parameter_count=250_000,
        round_count=2,
        initial_node=CLOUD,
        strategy=Strategy(name=strategy, parameters=parameters or {}),
    )
    return replace(spec, **changes)


def receipt(call: Call, **facts: Any) -> CallEnded:
    """Return the end of a call that went well."""
    value = {"digest": f"d-{call.call_id}", "example_count": 10.0, "loss": 0.5, **facts}
    return CallEnded(call_id=call.call_id, value=value)


class Shell:
    """Does what a planner asks for, at once, and remembers it."""

    def __init__(
        self,
        spec: JobSpec,
        progress: JobProgress | None = None,
        current: RoundRecord | None = None,
        *,
        answer: Answer = receipt,
    ) -> None:
        self.planner = planner_of(
            spec,
            MERGE,
            progress or JobProgress(round_count=spec.round_count),
            uid="u",
            unix_offset_s=OFFSET_S,
            current=current,
        )
        self.answer = answer
        self.is_opening = True
        self.now_s = 0.0
        self.view = view()
        self.commands: list[Command] = []
        self.rounds: dict[int, RoundRecord] = {}

    def feed(self, event: Event) -> list[Command]:
        """Give one event; return the commands, without doing them."""
        made = self.planner.step(event, self.now_s)
        self.commands += made
        for command in made:
            if isinstance(command, Save) and command.record is not None:
                self.rounds[command.record.round] = command.record
        return made

    def tick(self, after_s: float | None = None) -> list[Command]:
        """Let time pass, until a tick is due unless told otherwise."""
        due_s = self.planner.due_s
        self.now_s = self.now_s + after_s if after_s is not None else max(self.now_s, due_s or 0.0)
        return self.feed(Ticked(view=self.view))

    def run(self, step_max: int = 1000) -> None:
        """Tick and answer until nothing is due."""
        made = self.tick()
        for _ in range(step_max):
            made = self.do(made)
            if not made:
                if self.planner.due_s is None:
                    return
                made = self.tick()
        raise AssertionError("it does not come to an end")

    def do(self, commands: list[Command]) -> list[Command]:
        """Do commands; return those that follow."""
        made: list[Command] = []
        for command in commands:
            match command:
                case OpenRound() if self.is_opening:
                    number = command.manifest.round
                    made += self.feed(RoundOpened(node_id=command.node_id, round=number))
                case Submit():
                    if (ended := self.answer(command.call)) is not None:
                        made += self.feed(ended)
                case Cancel():
                    made += self.feed(
                        CallEnded(call_id=command.call_id, error_code="cancelled", message="")
                    )
                case _:
                    pass
        return made

    def calls(self, purpose: str = "") -> list[Call]:
        """Return every call that was submitted, those of a purpose."""
        every = [c.call for c in self.commands if isinstance(c, Submit)]
        return [call for call in every if f".{purpose}" in call.call_id]
