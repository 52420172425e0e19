"""Federated jobs ⇄ protobuf. What an author sends is checked here before it is a job."""

from tierwise.domain.federated import (
    ROBUST,
    STRATEGIES,
    AggregatorRecord,
    FederatedClient,
    JobProgress,
    JobSpec,
    Pace,
    RoundRecord,
    RoundState,
    Strategy,
    Topology,
    UpdateRecord,
    UpdateState,
)
from tierwise.domain.ids import FunctionId, NodeId
from tierwise.errors import InvalidArgument
from tierwise.v1 import federated_pb2
from tierwise.wire import checks, payload

CLIENTS_MAX = 10_000
ROUNDS_MAX = 100_000
PARAMETERS_MAX = 1 << 33
CONFIG_BYTES_MAX = 1 << 20
DEADLINE_S_MAX = 86_400.0
AGGREGATORS_MAX = 64
REPLICAS_MAX = 8
ENCODINGS = ("", "auto", "fp16", "int8")


def job_spec_to_pb(spec: JobSpec) -> federated_pb2.FederatedJobSpec:
    """Return the message of a job."""
    pace = spec.pace
    return federated_pb2.FederatedJobSpec(
        namespace=spec.namespace,
        job=spec.job,
        client_function=spec.client_function,
        aggregate_function=spec.aggregate_function,
        evaluate_function=spec.evaluate_function or "",
        clients=[
            federated_pb2.FederatedClient(
                client=each.client, node_id=each.node_id, data=payload.encode(each.data, "data")
            )
            for each in spec.clients
        ],
        parameter_count=spec.parameter_count,
        round_count=spec.round_count,
        strategy=federated_pb2.FederatedStrategy(
            name=spec.strategy.name, parameters=dict(spec.strategy.parameters)
        ),
        pace=federated_pb2.FederatedPace(
            clients_per_round=pace.clients_per_round,
            over_commit=pace.over_commit,
            quorum=pace.quorum,
            deadline_s=pace.deadline_s,
            failures_max=pace.failures_max,
            is_skipping=pace.is_skipping,
            seed=pace.seed,
            evaluate_every=pace.evaluate_every,
        ),
        topology=federated_pb2.FederatedTopology(
            root=spec.topology.root or "",
            is_hierarchical=spec.topology.is_hierarchical,
            aggregators_max=spec.topology.aggregators_max,
        ),
        config=payload.encode(dict(spec.config), "config"),
        initial_node=spec.initial_node or "",
        distance_max=spec.distance_max,
        encoding=spec.encoding,
        replica_nodes=spec.replica_nodes,
        run=spec.run,
        facts=payload.encode(dict(spec.facts), "facts"),
    )


def job_spec_from_pb(pb: federated_pb2.FederatedJobSpec) -> JobSpec:
    """Return the job of a message.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    checks.at_most(pb.clients, "clients", CLIENTS_MAX)
    if not pb.clients:
        raise InvalidArgument("clients: a federated job needs at least one")
    checks.at_most(pb.replica_nodes, "replica_nodes", REPLICAS_MAX)
    clients = tuple(_client_from_pb(each) for each in pb.clients)
    names = [each.client for each in clients]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidArgument(f"clients: there are two of the name {checks.shown(twice)}")
    strategy = _strategy_from_pb(pb.strategy)
    topology = Topology(
        root=NodeId(checks.name(pb.topology.root, "root")) if pb.topology.root else None,
        is_hierarchical=pb.topology.is_hierarchical,
        aggregators_max=checks.integer(
            pb.topology.aggregators_max or 3, "aggregators_max", 1, AGGREGATORS_MAX
        ),
    )
    if topology.is_hierarchical and strategy.name in ROBUST | {"fedbuff"}:
        raise InvalidArgument(
            f"strategy {strategy.name} needs every update in one place: use it without a hierarchy"
        )
    if pb.encoding not in ENCODINGS:
        raise InvalidArgument(
            f"encoding {checks.shown(pb.encoding)}: leave it empty, or use auto, fp16 or int8"
        )
    return JobSpec(
        namespace=checks.name(pb.namespace, "namespace"),
        job=checks.name(pb.job, "job"),
        client_function=_function(pb.client_function, "client_function"),
        aggregate_function=_function(pb.aggregate_function, "aggregate_function"),
        evaluate_function=(
            _function(pb.evaluate_function, "evaluate_function") if pb.evaluate_function else None
        ),
        clients=clients,
        parameter_count=checks.integer(pb.parameter_count, "parameter_count", 1, PARAMETERS_MAX),
        round_count=checks.integer(pb.round_count, "round_count", 1, ROUNDS_MAX),
        strategy=strategy,
        pace=_pace_from_pb(pb.pace, len(clients)),
        topology=topology,
        config=_dict_from_pb(pb.config, "config"),
        initial_node=(
            NodeId(checks.name(pb.initial_node, "initial_node")) if pb.initial_node else None
        ),
        distance_max=checks.number(pb.distance_max, "distance_max", 0.0, 1e30),
        encoding=pb.encoding,
        replica_nodes=tuple(NodeId(checks.name(n, "replica_nodes")) for n in pb.replica_nodes),
        run=checks.text(pb.run, "run", 64),
        facts=_dict_from_pb(pb.facts, "facts"),
    )


def round_to_pb(record: RoundRecord) -> federated_pb2.FederatedRound:
    """Return the message of a round."""
    return federated_pb2.FederatedRound(
        round=record.round,
        state=federated_pb2.FederatedRoundState.ValueType(record.state),
        message=record.message,
        started_unix_s=record.started_unix_s,
        ended_unix_s=record.ended_unix_s,
        base_round=record.base_round,
        base_node=record.base_node or "",
        root=record.root or "",
        updates=[
            federated_pb2.FederatedUpdate(
                client=each.client,
                node_id=each.node_id,
                state=federated_pb2.FederatedUpdateState.ValueType(each.state),
                message=checks.clean(each.message, checks.TEXT_LENGTH_MAX),
                example_count=each.example_count,
                metrics=dict(each.metrics),
                elapsed_s=each.elapsed_s,
                staleness=each.staleness,
                asked_round=each.asked_round,
                base_round=each.base_round,
            )
            for each in record.updates
        ],
        aggregators=[
            federated_pb2.FederatedAggregator(node_id=each.node_id, clients=each.clients)
            for each in record.aggregators
        ],
        metrics=dict(record.metrics),
        wanted_count=record.wanted_count,
        quorum=record.quorum,
        planned_cost_s=record.planned_cost_s,
        is_moved=record.is_moved,
        digest=record.digest,
        collect_s=record.collect_s,
        aggregate_s=record.aggregate_s,
    )


def round_from_pb(pb: federated_pb2.FederatedRound) -> RoundRecord:
    """Return the round of a message that this process has written before."""
    return RoundRecord(
        round=pb.round,
        state=RoundState(pb.state),
        message=pb.message,
        started_unix_s=pb.started_unix_s,
        ended_unix_s=pb.ended_unix_s,
        base_round=pb.base_round,
        base_node=NodeId(pb.base_node) if pb.base_node else None,
        root=NodeId(pb.root) if pb.root else None,
        updates=tuple(
            UpdateRecord(
                client=each.client,
                node_id=NodeId(each.node_id),
                state=UpdateState(each.state),
                message=each.message,
                example_count=each.example_count,
                metrics=dict(each.metrics),
                elapsed_s=each.elapsed_s,
                staleness=each.staleness,
                asked_round=each.asked_round,
                base_round=each.base_round,
            )
            for each in pb.updates
        ),
        aggregators=tuple(
            AggregatorRecord(node_id=NodeId(each.node_id), clients=tuple(each.clients))
            for each in pb.aggregators
        ),
        metrics=dict(pb.metrics),
        wanted_count=pb.wanted_count,
        quorum=pb.quorum,
        planned_cost_s=pb.planned_cost_s,
        is_moved=pb.is_moved,
        digest=pb.digest,
        collect_s=pb.collect_s,
        aggregate_s=pb.aggregate_s,
    )


def job_to_pb(
    spec: federated_pb2.FederatedJobSpec,
    progress: JobProgress,
    *,
    owner: str,
    created_unix_s: float,
    ended_unix_s: float,
) -> federated_pb2.FederatedJob:
    """Return the message of a job as it stands."""
    return federated_pb2.FederatedJob(
        spec=spec,
        state=federated_pb2.FederatedJobState.ValueType(progress.state),
        message=progress.message,
        owner=owner,
        created_unix_s=created_unix_s,
        ended_unix_s=ended_unix_s,
        done_count=progress.done_count,
        round=progress.round,
        root=progress.root or "",
        base_round=progress.base_round,
        failure_count=progress.failure_count,
    )


def _client_from_pb(pb: federated_pb2.FederatedClient) -> FederatedClient:
    return FederatedClient(
        client=checks.name(pb.client, "clients.client"),
        node_id=NodeId(checks.name(pb.node_id, "clients.node_id")),
        data=_value(pb.data, "clients.data"),
    )


def _strategy_from_pb(pb: federated_pb2.FederatedStrategy) -> Strategy:
    known = STRATEGIES.get(pb.name)
    if known is None:
        raise InvalidArgument(
            f"strategy {checks.shown(pb.name)}: use one of {', '.join(STRATEGIES)}"
        )
    for name, value in pb.parameters.items():
        if name not in known:
            has = f"has {', '.join(known)}" if known else "has no parameters"
            raise InvalidArgument(f"strategy {pb.name} {has}, but not {checks.shown(name)}")
        checks.number(value, f"strategy.{name}", 0.0, 1e9)
    found = Strategy(name=pb.name, parameters=dict(pb.parameters))
    for name, below in (("share", 0.5), ("bad_share", 0.5), ("beta_1", 1.0), ("beta_2", 1.0)):
        if name in known and not found.parameter(name) < below:
            raise InvalidArgument(f"strategy.{name}: use a number below {below:g}")
    return found


def _pace_from_pb(pb: federated_pb2.FederatedPace, client_count: int) -> Pace:
    wanted = checks.integer(pb.clients_per_round, "clients_per_round", 0, client_count)
    return Pace(
        clients_per_round=wanted,
        over_commit=checks.number(pb.over_commit, "over_commit", 0.0, 10.0),
        quorum=checks.integer(pb.quorum, "quorum", 0, wanted or client_count),
        deadline_s=checks.number(pb.deadline_s or 600.0, "deadline_s", 0.1, DEADLINE_S_MAX),
        failures_max=checks.integer(pb.failures_max, "failures_max", 0, 1000),
        is_skipping=pb.is_skipping,
        seed=checks.integer(pb.seed, "seed", 0, (1 << 63) - 1),
        evaluate_every=checks.integer(pb.evaluate_every or 1, "evaluate_every", 1, ROUNDS_MAX),
    )


def _dict_from_pb(blob: bytes, field: str) -> dict[str, object]:
    value = _value(blob, field) if blob else {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InvalidArgument(f"{field}: use a dict with text as keys")
    return value


def _value(blob: bytes, field: str) -> object:
    if len(blob) > CONFIG_BYTES_MAX:
        raise InvalidArgument(
            f"{field} has {len(blob)} bytes, the limit is {CONFIG_BYTES_MAX}: name what is large"
        )
    if not blob:
        return None
    try:
        found: object = payload.decode(blob)
    except payload.PayloadError as error:
        raise InvalidArgument(f"{field}: {error}") from None
    return found


def _function(value: str, field: str) -> FunctionId:
    return FunctionId(checks.function_id(value, field))
