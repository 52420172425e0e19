"""Federated jobs: what their authors ask for, how far they are, and what became of each round."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from tierwise.domain.ids import FunctionId, NodeId

# Strategies, with the parameters that each knows and what they are by default.
STRATEGIES: Mapping[str, Mapping[str, float]] = {
    "fedavg": {},
    # μ of the term that clients add; see `aggregate.proximal`.
    "fedprox": {"mu": 0.1},
    # Reddi et al. 2021: η, β₁, β₂ and τ of the server.
    "fedadam": {"rate": 0.01, "beta_1": 0.9, "beta_2": 0.99, "floor": 1e-3},
    # Nguyen et al. 2022: updates per buffer, clients at work at a time (0: all), the server's
    # rate, how staleness weighs, and what is too stale to count.
    "fedbuff": {
        "buffer": 10.0,
        "concurrency": 0.0,
        "rate": 1.0,
        "exponent": 0.5,
        "staleness_max": 20.0,
    },
    "median": {},
    # Share of the lowest and of the highest values that is left out.
    "trimmed-mean": {"share": 0.2},
    # Share of clients that may be bad, and how many of the others are averaged (0: all).
    "multi-krum": {"bad_share": 0.2, "kept": 0.0},
}
ROBUST = frozenset(("median", "trimmed-mean", "multi-krum"))  # they must see all updates at once


class JobState(IntEnum):
    """Where a federated job stands."""

    RUNNING = 1
    STOPPED = 2
    SUCCEEDED = 3
    FAILED = 4


class RoundState(IntEnum):
    """Where a round stands."""

    COLLECTING = 1
    AGGREGATING = 2
    DONE = 3
    FAILED = 4
    STOPPED = 5


class UpdateState(IntEnum):
    """What became of one client in one round."""

    ASKED = 1
    COUNTED = 2
    QUARANTINED = 3
    FAILED = 4
    LATE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class FederatedClient:
    """One client: a name, the node that holds its data, and what its function is told of that."""

    client: str
    node_id: NodeId
    data: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How updates become a model: a name of `STRATEGIES` and its parameters."""

    name: str = "fedavg"
    parameters: Mapping[str, float] = field(default_factory=dict)

    def parameter(self, name: str) -> float:
        """Return a parameter, its default if it is not set."""
        return self.parameters.get(name, STRATEGIES[self.name][name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How rounds are run.

    Attributes:
        clients_per_round: Updates that a round wants; 0: one of every client.
        over_commit: So many more are asked, as a share; the slowest are left behind (Bonawitz et
            al., "Towards Federated Learning at Scale: System Design", MLSys 2019, take 0.3).
        quorum: Updates without which a round fails; 0: as many as it wants.
        deadline_s: A round waits no longer for updates.
        failures_max: Rounds that may fail in a row.
        is_skipping: A failed round counts as one, instead of being replaced.
        seed: Of the sampling.
        evaluate_every: Every how many rounds the aggregate is judged.
    """

    clients_per_round: int = 0
    over_commit: float = 0.0
    quorum: int = 0
    deadline_s: float = 600.0
    failures_max: int = 3
    is_skipping: bool = False
    seed: int = 0
    evaluate_every: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Where rounds are aggregated.

    Attributes:
        root: Has the result of every round; None: chosen when the job starts.
        is_hierarchical: Updates are merged on their way, at nodes that the placement chooses.
        aggregators_max: At most so many of those.
    """

    root: NodeId | None = None
    is_hierarchical: bool = False
    aggregators_max: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A federated job as its author asks for it.

    Attributes:
        client_function: Takes ([model], arguments), returns (update, facts of it).
        aggregate_function: `tierwise.functions.fl.aggregate.fold`, deployed.
        evaluate_function: Takes ([model], arguments), returns metrics; None: nobody judges.
        parameter_count: Elements of the model, float32.
        config: What every client is told.
        initial_node: Where the aggregate of round 0 is.
        distance_max: An update further than this from the model is quarantined; 0: no bound.
        encoding: How updates travel: empty, fp16, int8 or auto.
        replica_nodes: Nodes that get a copy of what the root takes.
        run: Tells it from a job of equal content that ran before.
        facts: What goes with every aggregate, for those who ask about rounds: `layout`, settings.
    """

    namespace: str
    job: str
    client_function: FunctionId
    aggregate_function: FunctionId
    clients: tuple[FederatedClient, ...]
    parameter_count: int
    round_count: int
    evaluate_function: FunctionId | None = None
    strategy: Strategy = field(default_factory=Strategy)
    pace: Pace = field(default_factory=Pace)
    topology: Topology = field(default_factory=Topology)
    config: Mapping[str, object] = field(default_factory=dict)
    initial_node: NodeId | None = None
    distance_max: float = 0.0
    encoding: str = ""
    replica_nodes: tuple[NodeId, ...] = ()
    run: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def wanted_count(self) -> int:
        """Return how many updates a round wants."""
        return self.pace.clients_per_round or len(self.clients)

    @property
    def quorum(self) -> int:
        """Return without how many updates a round fails."""
        return self.pace.quorum or self.wanted_count


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """How far a job is: all that must outlive the scheduler, besides the round under way.

    Attributes:
        round_count: Rounds that are wanted in all.
        round: The newest number that was given to a round.
        base_round: Whose aggregate is the newest model; `base_node` has it.
        failure_count: Rounds that have failed since the last that did not.
        root: Where results are; None until the first round.
        association: The aggregator of each node that has clients, while it is hierarchical.
        moment_round: The newest round that left FedAdam's moments; 0: none.
    """

    state: JobState = JobState.RUNNING
    message: str = ""
    round_count: int
    done_count: int = 0
    round: int = 0
    base_round: int = 0
    base_node: NodeId | None = None
    failure_count: int = 0
    root: NodeId | None = None
    association: Mapping[NodeId, NodeId] = field(default_factory=dict)
    moment_round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRecord:
    """What became of one client in one round.

    Attributes:
        elapsed_s: From the question to the answer.
        staleness: Aggregates that were made between its beginning and its end.
        asked_round: The round in which it began; asynchronous jobs count it in a later one.
        base_round: Whose aggregate it began with.
    """

    client: str
    node_id: NodeId
    state: UpdateState = UpdateState.ASKED
    message: str = ""
    example_count: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0
    staleness: int = 0
    asked_round: int = 0
    base_round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorRecord:
    """A node that merges, and the clients whose updates it gets."""

    node_id: NodeId
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """One round: who was asked, what came, what was made of it.

    Attributes:
        aggregators: The root is the last of them, with the clients that send to it, if any.
        metrics: Means over the updates that count, by examples; and the evaluation's.
        planned_cost_s: What the placement expects it to cost, second-equivalents.
        is_moved: Aggregators were moved for it.
    """

    round: int
    state: RoundState = RoundState.COLLECTING
    message: str = ""
    started_unix_s: float = 0.0
    ended_unix_s: float = 0.0
    base_round: int = 0
    base_node: NodeId | None = None
    root: NodeId | None = None
    updates: tuple[UpdateRecord, ...] = ()
    aggregators: tuple[AggregatorRecord, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    wanted_count: int = 0
    quorum: int = 0
    planned_cost_s: float = 0.0
    is_moved: bool = False
    digest: str = ""
    collect_s: float = 0.0
    aggregate_s: float = 0.0
