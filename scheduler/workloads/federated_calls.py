"""The calls of one federated round: its clients, the steps of its aggregation, its judge.

    one aggregator        matrix ─ mean | median | … ─► aggregate
    a hierarchy           each matrix ─ mean ─► part      parts ─ combine ─► aggregate
    fedadam after either  mean ─► first moment, second moment ─► aggregate
    fedbuff               newest, origins, updates ─ buffer ─► aggregate

Steps are those of tierwise/functions/fl/aggregate.py. Ids follow from job, round and purpose alone,
so that a scheduler that was started again finds the calls that it had made.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from scheduler.workloads.federated_events import Call, Input, Output
from tierwise.domain.cache import ObjectKey, ObjectKind, RoundClient, RoundManifest
from tierwise.domain.federated import (
    ROBUST,
    AggregatorRecord,
    JobProgress,
    JobSpec,
    RoundRecord,
    RoundState,
    UpdateRecord,
    UpdateState,
)
from tierwise.domain.ids import NodeId, RequestId

METRICS_MAX = 256  # names per update
GROUPS_MAX = 7  # rounds whose updates one call reads: a model and a matrix of each, of 16 in all
Stage = list[Call]  # all of them must succeed before the next stage
Weights = list[float]


class Calls:
    """Makes the calls of one job."""

    def __init__(self, spec: JobSpec, uid: str) -> None:
        self._spec = spec
        self._uid = uid

    def key(self, round_number: int, kind: ObjectKind, client: str = "") -> ObjectKey:
        """Return the name of one object of the job."""
        spec = self._spec
        return ObjectKey(
            namespace=spec.namespace, job=spec.job, round=round_number, kind=kind, client=client
        )

    def model(self, round_number: int) -> ObjectKey:
        """Return the name of the model that a round has ended with.

        What asynchronous clients send goes to the round in which they began, so that one must not
        have ended while they are at work: its model is a part until then, see `close`.
        """
        is_part = self._spec.strategy.name == "fedbuff" and round_number > 0
        return self.key(round_number, ObjectKind.AGGREGATE, "model" if is_part else "")

    def call_id(self, round_number: int, *purpose: str) -> RequestId:
        """Return the id of a call."""
        return RequestId(".".join(("fl", self._uid, str(round_number), *purpose)))

    def manifest(self, record: RoundRecord, site: AggregatorRecord) -> RoundManifest:
        """Return what the cache of one aggregator will get in a round."""
        spec = self._spec
        return RoundManifest(
            namespace=spec.namespace,
            job=spec.job,
            round=record.round,
            clients=tuple(RoundClient(client=client) for client in site.clients),
            parameter_count=spec.parameter_count,
            distance_max=spec.distance_max,
            base=self.model(record.base_round),
            replica_nodes=tuple(
                node for node in spec.replica_nodes if node != site.node_id == record.root
            ),
        )

    def client(self, record: RoundRecord, update: UpdateRecord) -> Call:
        """Return the call of one client: the model in, its update to its aggregator."""
        spec = self._spec
        asked = next(each for each in spec.clients if each.client == update.client)
        site = next(s.node_id for s in record.aggregators if update.client in s.clients)
        base = self.model(update.base_round)  # its aggregator has it, to take differences from
        config = dict(spec.config)
        if spec.strategy.name == "fedprox":
            config["proximal_mu"] = spec.strategy.parameter("mu")
        return Call(
            call_id=self.call_id(update.asked_round, "client", update.client),
            function=spec.client_function,
            node_id=update.node_id,
            inputs=(self._vector(base, site),),
            arguments={
                "client": update.client,
                "round": update.asked_round,
                "config": config,
                "data": asked.data,
            },
            output=Output(
                key=self.key(update.asked_round, ObjectKind.UPDATE, update.client),
                node_id=site,
                encoding=spec.encoding,
                relative_to=base if spec.encoding else None,
            ),
            timeout_s=spec.pace.deadline_s,
        )

    def aggregation(self, record: RoundRecord, progress: JobProgress) -> list[Stage]:
        """Return the stages that make the aggregate of a round of what has come."""
        spec, root = self._spec, record.root
        assert root is not None
        is_adam = spec.strategy.name == "fedadam"
        mean_key = self.key(record.round, ObjectKind.AGGREGATE, "mean" if is_adam else "")
        sites = [site for site in record.aggregators if any(_weights(record, site)[1])]
        stages: list[Stage]
        if [site.node_id for site in sites] == [root]:
            stages = [[self._merge(record, sites[0], mean_key, "merge")]]
        else:
            parts = [
                self._merge(
                    record,
                    site,
                    self.key(record.round, ObjectKind.AGGREGATE, f"part.{number}"),
                    f"part.{number}",
                )
                for number, site in enumerate(sites)
            ]
            combine = self._fold(
                self.call_id(record.round, "combine"),
                root,
                [self._vector(_output(part).key, root) for part in parts],
                {"step": "combine", "weights": [sum(_weights(record, s)[1]) for s in sites]},
                Output(key=mean_key, node_id=root),
                record,
            )
            stages = [parts, [combine]]
        return stages + (self._adam(record, progress) if is_adam else [])

    def buffer(self, record: RoundRecord, weights: Weights) -> list[Stage]:
        """Return the stages of an asynchronous aggregate: the newest model, and what is added.

        One call reads so many rounds' updates at most, so there may be several, one on the other.

        Args:
            record: Its updates that count say in which round each began, and with which model.
            weights: One per update that counts, in order.
        """
        root = record.root
        assert root is not None
        (site,) = record.aggregators
        counted = counted_of(record.updates)
        row_of = {client: row for row, client in enumerate(site.clients)}
        groups: dict[tuple[int, int], tuple[list[int], Weights]] = {}
        for each, weight in zip(counted, weights, strict=True):
            rows, shares = groups.setdefault((each.asked_round, each.base_round), ([], []))
            rows.append(row_of[each.client])
            shares.append(weight)
        shape = (len(site.clients), self._spec.parameter_count)
        newest = self.model(record.base_round)
        stages: list[Stage] = []
        ordered = sorted(groups.items())
        for start in range(0, len(ordered), GROUPS_MAX):
            some = ordered[start : start + GROUPS_MAX]
            inputs = [self._vector(newest, root)]
            for (asked_round, base_round), _ in some:
                matrix = self.key(asked_round, ObjectKind.MATRIX)
                inputs.append(self._vector(self.model(base_round), root))
                inputs.append(Input(key=matrix, node_id=root, shape=shape))
            arguments = {
                "step": "buffer",
                "groups": [{"rows": rows, "weights": shares} for _, (rows, shares) in some],
                "count": len(counted),
                "rate": self._spec.strategy.parameter("rate"),
            }
            is_last = start + GROUPS_MAX >= len(ordered)
            part = f"buffer.{start // GROUPS_MAX}"
            newest = self.model(record.round)
            if not is_last:
                newest = self.key(record.round, ObjectKind.AGGREGATE, part)
            output = Output(key=newest, node_id=root)
            call_id = self.call_id(record.round, part)
            stages.append([self._fold(call_id, root, inputs, arguments, output, record)])
        return stages

    def close(self, round_number: int, node_id: NodeId, model_of: int, source: NodeId) -> Call:
        """Return the call that ends a round in a cache, with a model: its memory may go then.

        Args:
            round_number: A round that failed, that no asynchronous client works for any more, or
                that a node on the way has merged a part of.
            node_id: Where that is.
            model_of: The round whose model is put there.
            source: Who has it.
        """
        return Call(
            call_id=self.call_id(round_number, "close", node_id),
            function=self._spec.aggregate_function,
            node_id=node_id,
            inputs=(self._vector(self.model(model_of), source),),
            arguments={"step": "copy"},
            output=Output(key=self.key(round_number, ObjectKind.AGGREGATE), node_id=node_id),
        )

    def endings(self, record: RoundRecord, nodes: Iterable[NodeId]) -> list[Call]:
        """Return the calls that end a round in caches: with its model, or that of before."""
        is_done = record.state is RoundState.DONE
        model_of = record.round if is_done else record.base_round
        source = record.root if is_done else record.base_node
        if source is None:
            return []
        return [self.close(record.round, node_id, model_of, source) for node_id in nodes]

    def evaluation(self, record: RoundRecord) -> Call | None:
        """Return the call that judges the aggregate of a round, if it is this round's turn."""
        spec = self._spec
        if spec.evaluate_function is None or record.round % spec.pace.evaluate_every:
            return None
        assert record.root is not None
        return Call(
            call_id=self.call_id(record.round, "evaluate"),
            function=spec.evaluate_function,
            node_id=record.root,
            inputs=(self._vector(self.model(record.round), record.root),),
            arguments={"round": record.round, "config": dict(spec.config)},
        )

    def _merge(
        self, record: RoundRecord, site: AggregatorRecord, key: ObjectKey, purpose: str
    ) -> Call:
        """Return the step over one matrix, where it is."""
        strategy, root = self._spec.strategy, record.root
        assert root is not None
        rows, weights = _weights(record, site)
        shape = (len(site.clients), self._spec.parameter_count)
        matrix = self.key(record.round, ObjectKind.MATRIX)
        inputs = [Input(key=matrix, node_id=site.node_id, shape=shape)]
        arguments: dict[str, object] = {"step": "mean", "rows": rows, "weights": weights}
        match strategy.name:
            case "median":
                arguments = {"step": "median", "rows": rows}
            case "trimmed-mean":
                share = strategy.parameter("share")
                arguments = {"step": "trimmed-mean", "rows": rows, "share": share}
            case "multi-krum":
                inputs.append(self._vector(self.model(record.base_round), root))
                arguments["step"] = "multi-krum"
                arguments["byzantine_count"] = krum_bad_count(
                    len(rows), strategy.parameter("bad_share")
                )
                arguments["kept_count"] = min(int(strategy.parameter("kept")), len(rows))
        output = Output(key=key, node_id=root)
        if site.node_id != root and self._spec.encoding:
            base = self.model(record.base_round)
            output = replace(output, encoding=self._spec.encoding, relative_to=base)
        call_id = self.call_id(record.round, purpose)
        return self._fold(call_id, site.node_id, inputs, arguments, output, record)

    def _adam(self, record: RoundRecord, progress: JobProgress) -> list[Stage]:
        root, strategy = record.root, self._spec.strategy
        assert root is not None

        def vector(round_number: int, part: str) -> Input:
            return self._vector(self.key(round_number, ObjectKind.AGGREGATE, part), root)

        def output(part: str) -> Output:
            return Output(key=self.key(record.round, ObjectKind.AGGREGATE, part), node_id=root)

        base = vector(record.base_round, "")
        moments = []
        for part, beta in (("adam-first", "beta_1"), ("adam-second", "beta_2")):
            inputs = [base, vector(record.round, "mean")]
            if progress.moment_round:
                inputs.append(vector(progress.moment_round, part))
            arguments: dict[str, object] = {"step": part, "beta": strategy.parameter(beta)}
            call_id = self.call_id(record.round, part)
            moments.append(self._fold(call_id, root, inputs, arguments, output(part), record))
        inputs = [base, vector(record.round, "adam-first"), vector(record.round, "adam-second")]
        arguments = {
            "step": "adam-step",
            "rate": strategy.parameter("rate"),
            "floor": strategy.parameter("floor"),
        }
        call_id = self.call_id(record.round, "adam-step")
        return [moments, [self._fold(call_id, root, inputs, arguments, output(""), record)]]

    def _fold(
        self,
        call_id: RequestId,
        node_id: NodeId,
        inputs: Sequence[Input],
        arguments: Mapping[str, object],
        output: Output,
        record: RoundRecord,
    ) -> Call:
        counted = counted_of(record.updates)
        facts: dict[str, object] = {
            **self._spec.facts,
            "example_count": sum(each.example_count for each in counted),
            "client_count": len(counted),
            **mean_metrics(counted),
        }
        return Call(
            call_id=call_id,
            function=self._spec.aggregate_function,
            node_id=node_id,
            inputs=tuple(inputs),
            arguments={**arguments, "metadata": facts},
            output=output,
        )

    def _vector(self, key: ObjectKey, node_id: NodeId | None) -> Input:
        return Input(key=key, node_id=node_id, shape=(self._spec.parameter_count,))


def krum_bad_count(update_count: int, bad_share: float) -> int:
    """Return how many bad clients Krum reckons with: as many as are said, fewer if few came."""
    return max(0, min(-int(-bad_share * update_count // 1), update_count - 3))


def robust_quorum(spec: JobSpec) -> int:
    """Return how many updates the strategy needs at least."""
    return 3 if spec.strategy.name in ROBUST else 1


def counted_of(updates: Iterable[UpdateRecord]) -> list[UpdateRecord]:
    """Return the updates that count."""
    return [each for each in updates if each.state is UpdateState.COUNTED]


def mean_metrics(counted: Sequence[UpdateRecord]) -> dict[str, float]:
    """Return the mean of each metric over the updates that have it, by examples."""
    sums: dict[str, tuple[float, float]] = {}
    for each in counted:
        weight = each.example_count or 1.0
        for name, value in each.metrics.items():
            total, weights = sums.get(name, (0.0, 0.0))
            sums[name] = (total + weight * value, weights + weight)
    return {name: total / weights for name, (total, weights) in sorted(sums.items())}


def metrics_of(facts: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers among the facts of an update or a judgement, at most METRICS_MAX."""
    found: dict[str, float] = {}
    for name, value in facts.items():
        is_number = isinstance(value, int | float) and name not in _NO_METRICS
        if is_number and len(found) < METRICS_MAX:
            found[str(name)] = float(value)  # type: ignore[arg-type]  # see above
    return found


_NO_METRICS = frozenset(("example_count", "size_bytes", "digest", "node_id", "quarantined"))


def _weights(record: RoundRecord, site: AggregatorRecord) -> tuple[list[int], Weights]:
    """Return the rows of a matrix that count, and their weights.

    These are the example counts; if no client of the round has said any, all weigh the same.
    """
    known = {each.client: each.example_count for each in counted_of(record.updates)}
    rows = [row for row, client in enumerate(site.clients) if client in known]
    is_counting = any(known.values())
    return rows, [known[site.clients[row]] if is_counting else 1.0 for row in rows]


def _output(call: Call) -> Output:
    assert call.output is not None
    return call.output
