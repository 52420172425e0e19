"""Federated training as its author writes it: what a client does, where the clients are."""

import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from tierwise.config import parse_duration_s
from tierwise.domain.federated import (
    FederatedClient,
    JobSpec,
    Pace,
    Strategy,
    Topology,
)
from tierwise.domain.ids import FunctionId, NodeId
from tierwise.errors import (
    Cancelled,
    InvalidArgument,
    NotFound,
    TierwiseError,
    Unavailable,
)
from tierwise.functions.fl.aggregate import fold
from tierwise.functions.fl.client import as_client, as_judge, flat, shaped
from tierwise.sdk.app import App, Function
from tierwise.sdk.client import Client
from tierwise.sdk.operator import Record, record
from tierwise.sdk.rounds import Rounds
from tierwise.sdk.verb import Verb
from tierwise.v1 import federated_pb2
from tierwise.wire import payload
from tierwise.wire.convert_federated import job_spec_from_pb, job_spec_to_pb
from tierwise.wire.errors import error_from_rpc

WATCH_TIMEOUT_S = 7 * 86_400.0
BASE_MIB = 192  # of an aggregator, besides what it computes with
STEP_MIB = 64
PARTS_MAX = 3  # vectors of its own that an aggregator holds at a time
_UNDEPLOYED = FunctionId("default/undeployed@1")

Arrays = Sequence[NDArray[Any]]
Clients = Mapping[str, "str | tuple[str, Any]"]


class FederatedJob:
    """A model that many nodes train, each on its own data, which stays there.

    `start`, `wait`, `stop`, `resume`, `state` and `arrays` block; each has an `.aio` twin.
    """

    def __init__(
        self,
        name: str,
        client: Callable[..., Any],
        initial: Arrays,
        clients: Clients,
        *,
        rounds: int = 10,
        strategy: str = "fedavg",
        config: Mapping[str, Any] | None = None,
        evaluate: Callable[..., Any] | None = None,
        evaluate_every: int = 1,
        clients_per_round: int = 0,
        over_commit: float = 0.0,
        quorum: int = 0,
        deadline: str | float = "10m",
        failures: int = 3,
        skip_failed: bool = False,
        seed: int = 0,
        root: str = "",
        hierarchical: bool = False,
        aggregators: int = 3,
        distance_max: float = 0.0,
        encoding: str = "auto",
        replica_nodes: Sequence[str] = (),
        namespace: str = "default",
        memory: str | int = "512MiB",
        timeout: str | float = "10m",
        requirements: Sequence[str] = (),
        cluster: Client | None = None,
        **parameters: float,
    ) -> None:
        """Describe a job; nothing is sent before `start`.

        Args:
            name: Of the job; a name stands for one job at a time.
            client: `def client(arrays, config) -> (arrays, example_count, metrics)`: trains on what
                lies on its node, beginning with `arrays`. `config` is that of the job, with
                `client`, `round` and `data`. Or a function of an app, whose options hold then.
            initial: The arrays that the first round begins with.
            clients: By name the node that holds the data, or (node, what the function gets as
                `config["data"]`, a path for instance).
            rounds: How many rounds should succeed.
            strategy: fedavg, fedprox, fedadam, fedbuff (asynchronous), median, trimmed-mean or
                multi-krum.
            config: What every client is told: plain values.
            evaluate: `def evaluate(arrays, config) -> metrics`: judges an aggregate, at the root.
            evaluate_every: Every how many rounds.
            clients_per_round: Updates that a round wants; 0: one of every client.
            over_commit: So many more clients are asked, as a share; the slowest are left behind.
            quorum: Updates without which a round fails; 0: as many as it wants.
            deadline: A round waits no longer for updates.
            failures: Rounds that may fail in a row.
            skip_failed: A failed round counts, instead of being replaced.
            seed: Of the sampling of clients.
            root: The node that has the results; default: chosen by the placement.
            hierarchical: Merge updates on their way, at nodes that the placement chooses.
            aggregators: At most so many of those.
            distance_max: Updates farther from the model are quarantined; 0: none is.
            encoding: How updates travel: auto (what is fastest over the link), fp16, int8, or
                empty: as they are.
            replica_nodes: Nodes that get a copy of what the root takes.
            namespace: Where it lives and is billed.
            memory: What one client may use.
            timeout: How long one client may run.
            requirements: Packages that its functions need; none means those of the agents' host.
            cluster: The cluster; default: that of `tierwise.connect`, or the usual context.
            **parameters: Of the strategy: `rate=0.02` of fedadam, for example.

        Raises:
            InvalidArgument: Something is not understood.
        """
        try:
            arrays = [np.asarray(array, dtype=np.float32) for array in initial]
            self._shapes = [array.shape for array in arrays]
            self._initial = flat(arrays, self._shapes)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"initial: {error}") from None
        app = App(name, namespace=namespace, client=cluster)
        options = {"memory": memory, "timeout": timeout, "requirements": tuple(requirements)}
        self._functions = {
            "client": _declared(app, f"{name}-client", client, as_client, self._shapes, options),
            "fold": app.function(
                fold, name="fl-aggregate", tier=("fog", "cloud"), memory=self._fold_mib()
            ),
        }
        if evaluate is not None:
            self._functions["evaluate"] = _declared(
                app, f"{name}-evaluate", evaluate, as_judge, self._shapes, options
            )
        self.name = name
        self.namespace = namespace
        self._app = app
        self._spec = JobSpec(
            namespace=namespace,
            job=name,
            client_function=_UNDEPLOYED,
            aggregate_function=_UNDEPLOYED,
            evaluate_function=_UNDEPLOYED if evaluate is not None else None,
            clients=tuple(_member(client_name, site) for client_name, site in clients.items()),
            parameter_count=len(self._initial),
            round_count=rounds,
            strategy=Strategy(name=strategy, parameters=parameters),
            pace=Pace(
                clients_per_round=clients_per_round,
                over_commit=over_commit,
                quorum=quorum,
                deadline_s=parse_duration_s(deadline),
                failures_max=failures,
                is_skipping=skip_failed,
                seed=seed,
                evaluate_every=evaluate_every,
            ),
            topology=Topology(
                root=NodeId(root) if root else None,
                is_hierarchical=hierarchical,
                aggregators_max=aggregators,
            ),
            config=dict(config or {}),
            distance_max=distance_max,
            encoding=encoding,
            replica_nodes=tuple(map(NodeId, replica_nodes)),
            facts={**_numbers(config or {}), "layout": [list(shape) for shape in self._shapes]},
        )
        try:
            job_spec_from_pb(job_spec_to_pb(self._spec))  # the scheduler's checks, early
        except payload.PayloadError as error:
            raise InvalidArgument(str(error)) from None
        self.start = Verb(app.client, self._start)
        self.state = Verb(app.client, self._state)
        self.wait = Verb(app.client, self._wait)
        self.stop = Verb(app.client, self._stop)
        self.resume = Verb(app.client, self._resume)
        self.arrays = Verb(app.client, self._arrays)
        self.watch = WatchVerb(app.client, namespace, name)

    @property
    def rounds(self) -> Rounds:
        """Return the rounds as the caches hold them: updates, aggregates, questions."""
        return Rounds(self._app.client(), self.name, self.namespace)

    def use(self, cluster: Client) -> None:
        """Use this client from now on."""
        self._app.use(cluster)

    # -- verbs ----------------------------------------------------------------------------------

    async def _start(self, *, fresh: bool = False) -> Record:
        """Start the job; if it is known with equal content, return that as it stands.

        Args:
            fresh: Begin anew with the initial arrays, even if it has run before. What is held of
                earlier rounds is forgotten.

        Raises:
            AlreadyExists: Another job of this name is running.
        """
        spec = await self._deployed()
        known = await self._known()
        if known is not None and not fresh:
            same = replace(spec, run=known.spec.run, initial_node=NodeId(known.spec.initial_node))
            if job_spec_to_pb(same) == known.spec:
                return record(known)
        if known is not None:
            await self._make_room(known, fresh=fresh)
            spec = replace(spec, run=secrets.token_hex(4))
        spec = replace(spec, initial_node=await self._put_initial(spec))
        request = federated_pb2.CreateJobRequest(spec=job_spec_to_pb(spec))
        return record((await self._ask("CreateJob", request)).job)

    async def _state(self) -> Record:
        """Return how far the job is.

        Raises:
            NotFound: It was never started.
        """
        request = federated_pb2.GetJobRequest(namespace=self.namespace, job=self.name)
        return record(await self._ask("GetJob", request))

    async def _wait(self) -> Record:
        """Wait until the job has ended; return how it did.

        Raises:
            Cancelled: Somebody stopped it.
            TierwiseError: It failed; the message says why.
        """
        job: Record = {}
        async for change in self.watch.aio():
            job = change["job"]
        if job["state"] == "stopped":
            raise Cancelled(f"the federated job {self.name} was stopped")
        if job["state"] == "failed":
            raise TierwiseError(f"the federated job {self.name} failed: {job['message']}")
        return job

    async def _stop(self) -> Record:
        """Stop the job; the round under way is given up."""
        request = federated_pb2.StopJobRequest(namespace=self.namespace, job=self.name)
        return record((await self._ask("StopJob", request)).job)

    async def _resume(self, rounds: int = 0) -> Record:
        """Go on from the newest model, to this many rounds in all; 0: as many as before."""
        request = federated_pb2.ResumeJobRequest(
            namespace=self.namespace, job=self.name, round_count=rounds
        )
        return record((await self._ask("ResumeJob", request)).job)

    async def _arrays(self, number: int = -1) -> list[NDArray[np.float32]]:
        """Return the model after a round, in its shapes; −1: the newest there is.

        Raises:
            NotFound: There is no such round, or it left no model.
        """
        request = federated_pb2.GetJobRequest(namespace=self.namespace, job=self.name)
        job = (await self._ask("GetJob", request)).job
        number = job.base_round if number < 0 else number
        is_part = job.spec.strategy.name == "fedbuff" and number > 0
        root = Rounds(self._app.client(), self.name, self.namespace, node=job.root)
        vector = await root.get.aio(number, "aggregate", "model" if is_part else "")
        return shaped(vector, self._shapes)

    # -- inside ---------------------------------------------------------------------------------

    def _fold_mib(self) -> int:
        own_mib = PARTS_MAX * self._initial.nbytes / (1 << 20)
        return STEP_MIB * -int(-(BASE_MIB + own_mib) // STEP_MIB)

    async def _deployed(self) -> JobSpec:
        versions = {
            name: (await function.deploy.aio()).function_id
            for name, function in self._functions.items()
        }
        return replace(
            self._spec,
            client_function=versions["client"],
            aggregate_function=versions["fold"],
            evaluate_function=versions.get("evaluate"),
        )

    async def _known(self) -> federated_pb2.FederatedJob | None:
        request = federated_pb2.GetJobRequest(namespace=self.namespace, job=self.name)
        try:
            found: federated_pb2.FederatedJob = (await self._ask("GetJob", request)).job
        except NotFound:
            return None
        return found

    async def _make_room(self, known: federated_pb2.FederatedJob, *, fresh: bool) -> None:
        """Stop the job of before if it is asked for, and forget its rounds."""
        if known.state == federated_pb2.FEDERATED_JOB_STATE_RUNNING:
            if not fresh:
                return  # the scheduler will say that it runs
            await self._stop()
        await self.rounds.forget.aio()

    async def _put_initial(self, spec: JobSpec) -> NodeId:
        """Put the initial model where the results will be, or near; return that node.

        Raises:
            AlreadyExists: The caches hold another round 0 of this name.
        """
        connection = self._app.client().connection()
        agents = await connection.agents()
        if not agents:
            raise Unavailable("the cluster has no node that could hold the model; start one")
        node = spec.topology.root or max(agents, key=lambda a: (a.tier, a.node_id)).node_id
        rounds = Rounds(self._app.client(), self.name, self.namespace, node=node)
        await rounds.open.aio(0, (), len(self._initial))
        await rounds.put_aggregate.aio(0, self._initial)
        return NodeId(node)

    async def _ask(self, method: str, request: Any) -> Any:
        connection = self._app.client().connection()
        return await connection.ask(getattr(connection.federated, method), request)


class WatchVerb:
    """`.watch()` as an iterator, `.watch.aio()` as an asynchronous one."""

    def __init__(self, client: Callable[[], Client], namespace: str, job: str) -> None:
        self._client = client
        self._request = federated_pb2.WatchJobRequest(namespace=namespace, job=job)

    def __call__(self) -> Iterator[Record]:
        """Yield `job` and its newest `round` at every change, until the job has ended."""
        client = self._client()
        changes = self.aio()

        async def following() -> Record | None:
            return await anext(changes, None)

        try:
            while (change := client.run(following)) is not None:
                yield change
        finally:
            client.run(lambda: _close(changes))

    async def aio(self) -> AsyncIterator[Record]:
        """Yield as `__call__` does, without blocking the loop.

        Raises:
            NotFound: There is no such job.
            Unavailable: The scheduler went away; the job goes on when it is back.
        """
        call = (
            self._client().connection().federated.WatchJob(self._request, timeout=WATCH_TIMEOUT_S)
        )
        try:
            async for response in call:
                yield record(response)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        finally:
            call.cancel()


async def _close(changes: AsyncIterator[Record]) -> None:
    close = getattr(changes, "aclose", None)
    if close is not None:
        await close()


def _numbers(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the settings by which rounds can be compared."""
    return {
        name: value
        for name, value in config.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _member(name: str, site: "str | tuple[str, Any]") -> FederatedClient:
    node, data = (site, None) if isinstance(site, str) else site
    return FederatedClient(client=name, node_id=NodeId(node), data=data)


def _declared(
    app: App,
    name: str,
    code: Callable[..., Any],
    wrap: Callable[..., Callable[..., Any]],
    shapes: Sequence[tuple[int, ...]],
    options: Mapping[str, Any],
) -> Function:
    """Return a wrapped function under its name, with its own options if it is declared already."""
    if isinstance(code, Function):
        wrapped = wrap(code.code, shapes)
        made: Function = app.function(wrapped, name=name)
        spec = replace(code.spec, namespace=app.namespace, name=name)
        return Function(app, made.code, spec)
    declared: Function = app.function(wrap(code, shapes), name=name, deadline="10m", **options)
    return declared
