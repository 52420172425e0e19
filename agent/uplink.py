"""The one long-lived stream to the scheduler. The agent dials, so it works behind NAT."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol

import grpc
import structlog

from agent.billing import Billing
from agent.catalogue import FunctionIndex
from agent.objects import Cached
from agent.policies import PolicySlots
from agent.probe import Probe
from agent.runtime.environments import EnvironmentReading
from agent.shell import ReportedCall, Shell
from tierwise.clock import monotonic_s, wall_s
from tierwise.domain.cache import HeldRounds
from tierwise.domain.event import CatalogueReceived, DrainAsked, PricesReceived, ViewReceived
from tierwise.domain.function import Catalogue, FunctionSpec
from tierwise.errors import FailedPrecondition, NotFound, TierwiseError
from tierwise.v1 import (
    cache_pb2,
    function_pb2,
    function_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
    types_pb2,
)
from tierwise.wire import convert
from tierwise.wire.channel import diagnose, secure_channel
from tierwise.wire.convert_cache import held_to_pb
from tierwise.wire.errors import error_from_rpc, item_from_error
from tierwise.wire.identity import Credentials, scheduler_dns_name

log = structlog.get_logger()

RPC_TIMEOUT_S = 10.0
PULL_TIMEOUT_S = 2.0
GOODBYE_TIMEOUT_S = 1.0
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
REPORTS_PER_BEAT_MAX = 1000
EXPLANATIONS_PER_BEAT_MAX = 200
UNSTORED_BEATS_MAX = 32
OUTBOX_MAX = 10_000


class CacheSide(Protocol):
    """The cache as the session sees it."""

    def held(self) -> tuple[HeldRounds, ...]:
        """Return what it holds."""
        ...

    def received(self, view: ViewReceived) -> None:
        """Take over what other nodes hold."""
        ...

    async def open_round(self, manifest: cache_pb2.RoundManifest) -> None:
        """Open a round that the scheduler asks for."""
        ...


@dataclass(slots=True)
class _Outbox:
    """What goes up: results of durable work until acknowledged, and the next heartbeat."""

    results: OrderedDict[tuple[str, int], types_pb2.InvocationResult] = field(
        default_factory=OrderedDict
    )
    unsent: list[types_pb2.InvocationResult] = field(default_factory=list)
    answers: list[node_pb2.SessionRequest] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, result: types_pb2.InvocationResult) -> None:
        self.results[result.request_id, result.outcome.lease] = result
        if len(self.results) > OUTBOX_MAX:  # the scheduler leases it again: nothing is lost
            self.results.popitem(last=False)
        self.unsent.append(result)
        self.wake.set()


class Uplink:
    """Keeps the session: heartbeats and results up; catalogue, view, policy and work down."""

    def __init__(
        self,
        *,
        scheduler: str,
        credentials: Credentials,
        shell: Shell,
        functions: FunctionIndex,
        policies: PolicySlots,
        billing: Billing,
        probe: Probe,
        group: asyncio.TaskGroup,
        on_catalogue: Callable[[Catalogue], None] = lambda catalogue: None,
        cache: CacheSide | None = None,
    ) -> None:
        self.revoked: frozenset[str] = frozenset()
        self.is_connected = False
        self.on_welcome: Callable[[], None] = lambda: None
        self._scheduler = scheduler
        self._credentials = credentials
        self._shell = shell
        self._functions = functions
        self._policies = policies
        self._billing = billing
        # Call reports that were sent and are not known to be stored, by their number.
        self._unstored: OrderedDict[int, list[ReportedCall]] = OrderedDict()
        self._report_sequence = int(wall_s() * 1000)  # higher than before a restart
        self._probe = probe
        self._group = group
        self._on_catalogue = on_catalogue
        self._cache = cache
        self._told_held: tuple[HeldRounds, ...] | None = None
        self._next_beat_s = 0.0
        self._told_environments: list[EnvironmentReading] = []
        self._assigning = asyncio.Lock()  # the newest assignment must win
        self._outbox = _Outbox()
        self._interval_s = 1.0
        self._is_leaving = False
        self._left = asyncio.Event()
        self._channel = secure_channel(scheduler, credentials, scheduler_dns_name())
        self._function_stub = function_pb2_grpc.FunctionServiceStub(self._channel)
        self._policy_stub = policy_pb2_grpc.PolicyServiceStub(self._channel)

    async def run_forever(self) -> None:
        """Hold a session; when it ends, open the next one, waiting 0.1 to 5 s in between."""
        backoff_s = BACKOFF_FIRST_S
        while True:
            started_s = monotonic_s()
            try:
                await self._session()
                cause = "the scheduler ended the session"
            except grpc.RpcError as error:
                cause = str(error_from_rpc(error))
                if isinstance(error, grpc.aio.AioRpcError) and not self.is_connected:
                    cause = await self._diagnosis(error, cause)
            if self.is_connected:
                backoff_s = BACKOFF_FIRST_S
            self.is_connected = False
            if self._is_leaving:
                self._left.set()
                return
            log.warning("session.ended", cause=cause, retry_in_s=backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)
            if monotonic_s() - started_s > 60.0:
                backoff_s = BACKOFF_FIRST_S

    def beat_soon(self) -> None:
        """Send a heartbeat now: the cache holds a new round, and others look for it."""
        self._next_beat_s = 0.0
        self._outbox.wake.set()

    async def leave(self) -> None:
        """Send what is left to report and say goodbye, so that work goes elsewhere at once."""
        self._is_leaving = True
        if not self.is_connected:
            return
        self._outbox.wake.set()
        try:
            async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                await self._left.wait()  # the scheduler has heard it
        except TimeoutError:
            log.warning("session.no_goodbye", scheduler=self._scheduler)

    async def close(self) -> None:
        """Close the connection to the scheduler."""
        await self._channel.close()

    async def fetch_code(self, code_digest: str) -> bytes:
        """Return a code blob.

        Raises:
            TierwiseError: The scheduler has none such or cannot be reached.
        """
        request = function_pb2.GetCodeRequest(code_digest=code_digest)
        try:
            response = await self._function_stub.GetCode(request, timeout=RPC_TIMEOUT_S)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        return bytes(response.code)

    async def pull_function(self, function: str) -> FunctionSpec | None:
        """Ask for a function that the catalogue here does not have yet; None if there is none."""
        if not self.is_connected:
            return None
        request = function_pb2.GetFunctionRequest(function=function)
        try:
            response = await self._function_stub.GetFunction(request, timeout=PULL_TIMEOUT_S)
        except grpc.RpcError as failure:
            error = error_from_rpc(failure)
            if isinstance(error, NotFound):
                return None
            raise error from None
        spec = convert.spec_from_pb(response.spec)
        self._functions.add(spec)
        return spec

    # -- one session ----------------------------------------------------------------------------

    async def _session(self) -> None:
        call = node_pb2_grpc.NodeServiceStub(self._channel).Session()
        self._told_environments = []
        self._told_held = None
        try:
            await call.write(node_pb2.SessionRequest(hello=self._hello()))
            self._report_again()
            self._outbox.unsent = list(self._outbox.results.values())
            self._outbox.wake.set()
            writer = asyncio.ensure_future(self._write(call))
            try:
                while True:
                    message = await call.read()
                    if not isinstance(message, node_pb2.SessionResponse):
                        return
                    self._receive(message)
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        finally:
            call.cancel()

    def _hello(self) -> node_pb2.Hello:
        held = self._shell.held_leases() + [
            key for key in self._outbox.results if key not in self._shell.held_leases()
        ]
        return node_pb2.Hello(
            node=convert.node_to_pb(self._shell.machine.node),
            version=version("tierwise"),
            catalogue_revision=self._functions.catalogue.revision,
            policy_id=self._shell.decider.active_id,
            leases=[node_pb2.Lease(request_id=request, lease=lease) for request, lease in held],
        )

    async def _write(self, call: Any) -> None:
        """Send results at once and a heartbeat every interval; when the agent stops, goodbye."""
        self._next_beat_s = 0.0
        while True:
            unsent, self._outbox.unsent = self._outbox.unsent, []
            for result in unsent:
                await call.write(node_pb2.SessionRequest(work_result=result))
            while self._outbox.answers:
                await call.write(self._outbox.answers.pop(0))
            if self._is_leaving and not self._shell.reports:
                await call.write(node_pb2.SessionRequest(goodbye=node_pb2.Goodbye()))
                return
            now_s = monotonic_s()
            if now_s >= self._next_beat_s or self._is_leaving:
                self._next_beat_s = now_s + self._interval_s
                await call.write(node_pb2.SessionRequest(heartbeat=self._heartbeat()))
            self._outbox.wake.clear()
            if not (self._outbox.unsent or self._outbox.answers or self._is_leaving):
                try:
                    async with asyncio.timeout(max(0.0, self._next_beat_s - monotonic_s())):
                        await self._outbox.wake.wait()
                except TimeoutError:
                    pass

    def _report_again(self) -> None:
        """Queue call reports again whose session ended before they were acknowledged."""
        for calls in reversed(self._unstored.values()):
            self._shell.reports.extendleft(reversed(calls))
        self._unstored.clear()

    def _heartbeat(self) -> node_pb2.Heartbeat:
        shell = self._shell
        calls, sent = [], []
        has_room = len(self._unstored) < UNSTORED_BEATS_MAX
        for index in range(min(len(shell.reports), REPORTS_PER_BEAT_MAX) if has_room else 0):
            sent.append(shell.reports.popleft())
            outcome, printed, caller, ended_s = sent[-1]
            calls.append(
                node_pb2.CallReport(
                    outcome=convert.outcome_to_pb(
                        outcome, with_explanation=index < EXPLANATIONS_PER_BEAT_MAX
                    ),
                    log=printed,
                    caller=caller,
                    ended_ago_s=max(0.0, monotonic_s() - ended_s),
                )
            )
        if sent:
            self._report_sequence += 1
            self._unstored[self._report_sequence] = sent
        dropped_count, shell.dropped_report_count = shell.dropped_report_count, 0
        held = self._held()
        return node_pb2.Heartbeat(
            held=map(held_to_pb, held or ()),
            is_held_known=held is not None,
            reading=convert.reading_to_pb(shell.machine.reading(monotonic_s())),
            host=self._probe.read(instance_count=len(shell.machine.pool)),
            calls=calls,
            dropped_call_count=dropped_count,
            policy_id=shell.decider.active_id,
            policies=shell.decider.health(),
            environments=self._environments(),
            idle_gb_s=shell.machine.pool.take_idle_gb_s(monotonic_s()),
            report_sequence=self._report_sequence,
        )

    def _held(self) -> tuple[HeldRounds, ...] | None:
        """Return what the cache holds, or None if the scheduler has been told."""
        now = self._cache.held() if self._cache is not None else ()
        if now == self._told_held:
            return None
        self._told_held = now
        return now

    def _environments(self) -> list[node_pb2.EnvironmentReading]:
        """Return how far the environments are, if the scheduler has not been told."""
        now = self._shell.environments.readings()
        if now == self._told_environments:
            return []
        self._told_environments = now
        return [
            node_pb2.EnvironmentReading(
                requirements_digest=reading.requirements_digest,
                state=reading.state.value,
                message=reading.message,
            )
            for reading in now
        ]

    def _receive(self, message: node_pb2.SessionResponse) -> None:
        match message.WhichOneof("body"):
            case "welcome":
                self._interval_s = max(0.05, message.welcome.heartbeat_interval_s)
                self.revoked = frozenset(message.welcome.revoked_identities)
                if not self.is_connected:
                    self.is_connected = True
                    log.info("session.opened", scheduler=self._scheduler)
                    self.on_welcome()
            case "catalogue":
                catalogue = convert.catalogue_from_pb(message.catalogue)
                self._functions.replace(catalogue)
                self._shell.sizings = catalogue.sizings
                self._shell.feed(CatalogueReceived(catalogue=catalogue))
                self._on_catalogue(catalogue)
            case "view":
                view = convert.view_from_pb(message.view)
                self._shell.feed(view)
                if self._cache is not None:
                    self._cache.received(view)
            case "dispatch":
                self._group.create_task(self._dispatched(message.dispatch))
            case "cancel":
                self._shell.cancel(message.cancel.request_id)
            case "work_ack":
                ack = message.work_ack
                self._outbox.results.pop((ack.request_id, ack.lease), None)
            case "billing":
                self._billing.replace(message.billing)
                self._shell.feed(PricesReceived(prices=self._billing.prices))
            case "reports_ack":
                for number in [
                    n for n in self._unstored if n <= message.reports_ack.report_sequence
                ]:
                    del self._unstored[number]
            case "drain":
                if message.drain.is_on is not self._shell.machine.is_draining:
                    log.info("node.drained", is_on=message.drain.is_on)
                self._shell.feed(DrainAsked(is_on=message.drain.is_on))
            case "open_round":
                self._group.create_task(self._open_round(message.open_round))
            case "policy":
                self._group.create_task(self._assigned(message.policy, monotonic_s(), wall_s()))
            case None:
                log.warning("session.unknown_message")

    async def _dispatched(self, invocation: types_pb2.Invocation) -> None:
        """Run leased work; whatever goes wrong, the scheduler hears of it."""
        try:
            spec = self._functions.find(invocation.function)
            if spec is None:
                spec = await self.pull_function(invocation.function)
            if spec is None:
                raise NotFound(f"there is no function {invocation.function!r} any more")
            here = self._shell.machine.node.node_id
            request = convert.request_from_invocation(invocation, spec, origin=here)
            cached = Cached.of(invocation)
        except TierwiseError as error:
            self._outbox.put(
                types_pb2.InvocationResult(
                    request_id=invocation.request_id,
                    items=[item_from_error(error)] * max(1, len(invocation.arguments)),
                    outcome=types_pb2.Outcome(
                        request_id=invocation.request_id,
                        function_id=invocation.function,
                        state=types_pb2.OUTCOME_STATE_FAILED,
                        origin=self._shell.machine.node.node_id,
                        priority=types_pb2.PRIORITY_NORMAL,
                        item_count=max(1, len(invocation.arguments)),
                        error_code=error.code,
                        message=error.message,
                        lease=invocation.lease,
                    ),
                )
            )
            return
        self._shell.invoke(
            request, invocation.arguments, self._outbox.put, caller="scheduler", cached=cached
        )

    async def _open_round(self, manifest: cache_pb2.RoundManifest) -> None:
        answer = node_pb2.RoundOpened(
            namespace=manifest.namespace, job=manifest.job, round=manifest.round
        )
        try:
            if self._cache is None:
                raise FailedPrecondition("this node has no cache")
            await self._cache.open_round(manifest)
        except TierwiseError as error:
            answer.error_code, answer.message = error.code, error.message
        except Exception as error:  # a bug there must not end the agent
            log.exception("round.not_opened", job=f"{manifest.namespace}/{manifest.job}")
            answer.error_code, answer.message = "internal", repr(error)
        self._outbox.answers.append(node_pb2.SessionRequest(round_opened=answer))
        self._outbox.wake.set()

    async def _assigned(
        self, assignment: node_pb2.PolicyAssignment, came_at_s: float, came_unix_s: float
    ) -> None:
        async def fetch(policy_id: str) -> tuple[bytes, bytes]:
            request = policy_pb2.FetchPolicyRequest(policy_id=policy_id)
            try:
                response = await self._policy_stub.FetchPolicy(request, timeout=RPC_TIMEOUT_S)
            except grpc.RpcError as failure:
                raise error_from_rpc(failure) from None
            return bytes(response.weights), bytes(response.card)

        decider = self._shell.decider
        async with self._assigning:
            duties = await self._policies.assign(
                assignment, fetch, decider.duties.active, now_s=came_at_s, wall_s=came_unix_s
            )
            decider.use(duties)
        log.info(
            "policy.assigned",
            policy_id=decider.active_id,
            canary=assignment.canary.policy.policy_id,
            shadow=assignment.shadow.policy_id,
        )

    async def _diagnosis(self, error: grpc.aio.AioRpcError, cause: str) -> str:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return cause
        return await diagnose(self._scheduler, self._credentials, scheduler_dns_name())
