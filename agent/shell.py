"""The hands of the NodeMachine: carries out its commands and feeds back what happened.

Payload bytes live here, keyed by request id; the machine never sees them.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, assert_never

import structlog

from agent.decider import Decider
from agent.items import code_of, item_of, told, with_message
from agent.machine import NodeMachine
from agent.memory import GiveBack
from agent.objects import Cached, CallObjects, Carried
from agent.runtime.environments import Environments
from agent.runtime.runtime import InstanceStartError, ItemKind, ItemResult, RunReport, Runtime
from agent.sizing import sized
from tierwise.clock import monotonic_s
from tierwise.domain.command import (
    AskPolicy,
    CancelAt,
    Forward,
    KillRun,
    NodeCommand,
    Reply,
    ReplyAgain,
    Report,
    RunOn,
    StartInstance,
    StopInstance,
)
from tierwise.domain.event import (
    Arrived,
    CancelAsked,
    Decided,
    InstanceDied,
    InstanceFailed,
    InstanceStarted,
    NodeEvent,
    PeerFailed,
    PeerReplied,
    RunFinished,
    Ticked,
)
from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import FunctionId, InstanceId, NodeId, RequestId
from tierwise.domain.outcome import Outcome, OutcomeState
from tierwise.domain.request import Request
from tierwise.domain.sizing import Sizing
from tierwise.domain.view import NodeReading
from tierwise.errors import TierwiseError
from tierwise.v1 import types_pb2
from tierwise.wire import convert, payload
from tierwise.wire.handover import Handover
from tierwise.wire.memfd import Memfd

log = structlog.get_logger()

TICK_S = 0.05
ANSWERS_BYTES_MAX = 32 << 20
ANSWERS_KEPT_S = 120.0  # longer than any caller sends again
REPORTS_MAX = 10_000

# Ends after which the same request may come again, and is told when.
RETRIED = frozenset({"overloaded", "unplaceable"})

# How it ended, what it printed, who called, and when it ended on the monotonic clock.
ReportedCall = tuple[Outcome, str, str, float]
OnReply = Callable[[types_pb2.InvocationResult], None]


class Peers(Protocol):
    """Sends requests to other agents; every send ends in exactly one `on_result`."""

    def send(
        self,
        node_id: NodeId,
        invocation: types_pb2.Invocation,
        on_result: Callable[[types_pb2.InvocationResult | None], None],
    ) -> None:
        """Send one invocation; None as a result means that the peer could not be reached."""
        ...

    def cancel(self, node_id: NodeId, request_id: RequestId) -> None:
        """Tell the peer that the result is not wanted."""
        ...


class CodeStore(Protocol):
    """Where code blobs come from."""

    async def path(self, code_digest: str) -> Path:
        """Return a local file with that content, fetching it if needed."""
        ...


@dataclass(slots=True)
class Call:
    """The payload side of one unfinished request."""

    arguments: Sequence[bytes]
    on_reply: list[OnReply]
    caller: str
    items: Sequence[types_pb2.Item] = ()
    log: str = ""
    attachments: Sequence[Memfd] = ()  # the detached arrays of its arguments
    channel: Handover | None = None  # where those of its result may go
    cached: Cached | None = None  # what it reads from caches, and where its result goes


@dataclass(slots=True)
class _Answers:
    """Finished results, kept against duplicates; the oldest go first."""

    results: OrderedDict[str, types_pb2.InvocationResult] = field(default_factory=OrderedDict)
    put_at_s: dict[str, float] = field(default_factory=dict)
    size_bytes: int = 0

    def put(self, result: types_pb2.InvocationResult, now_s: float) -> None:
        if result.request_id in self.results:
            self._drop(result.request_id)
        size_bytes = _size_bytes(result)
        is_elsewhere = any(item.attachments for item in result.items)
        if is_elsewhere or size_bytes > ANSWERS_BYTES_MAX // 8:
            return
        self.results[result.request_id] = result
        self.put_at_s[result.request_id] = now_s
        self.size_bytes += size_bytes
        while self.size_bytes > ANSWERS_BYTES_MAX:
            self._drop(next(iter(self.results)))

    def expire(self, now_s: float) -> int:
        """Forget what is too old; return how many bytes that were."""
        size_bytes = self.size_bytes
        while self.results:
            oldest = next(iter(self.results))
            if self.put_at_s[oldest] > now_s - ANSWERS_KEPT_S:
                break
            self._drop(oldest)
        return size_bytes - self.size_bytes

    def _drop(self, request_id: str) -> None:
        del self.put_at_s[request_id]
        self.size_bytes -= _size_bytes(self.results.pop(request_id))


def _size_bytes(result: types_pb2.InvocationResult) -> int:
    return sum(len(item.value) for item in result.items) + 512


class Shell:
    """Drives one NodeMachine with real workers, peers and callers."""

    def __init__(
        self,
        machine: NodeMachine,
        *,
        runtime: Runtime,
        environments: Environments,
        code: CodeStore,
        peers: Peers,
        decider: Decider,
        group: asyncio.TaskGroup,
        slowdown: float = 1.0,
    ) -> None:
        """Wire the machine to its surroundings.

        Args:
            machine: The state machine.
            runtime: Starts and runs workers.
            environments: Interpreters per set of requirements.
            code: Where code blobs come from.
            peers: The way to other agents.
            decider: Asks the policies where requests run.
            group: Owns the tasks that start and stop instances.
            slowdown: ≥ 1; every run is held back to take this many times as long (*emulation*).
        """
        self.machine = machine
        self.decider = decider
        self.objects: CallObjects | None = None
        self.sizings: Mapping[FunctionId, Sizing] = {}
        self.reports: deque[ReportedCall] = deque()
        self.dropped_report_count = 0
        self._runtime = runtime
        self.environments = environments
        self._code = code
        self._peers = peers
        self._group = group
        self._slowdown = slowdown
        self._calls: dict[RequestId, Call] = {}
        self._answers = _Answers()
        self._memory = GiveBack()
        # Runs that are over and held back, per instance: what delivers them, and how to do it now.
        self._held: dict[InstanceId, tuple[asyncio.TimerHandle, Callable[[], None]]] = {}
        self._carried: dict[InstanceId, Carried] = {}  # runs with objects of the cache
        self._ended = Call((), [], "")  # the call of the latest Reply; its Report follows
        runtime.on_died = self._idle_instance_died
        self._is_stepping = False
        self._events: deque[NodeEvent] = deque()

    def invoke(
        self,
        request: Request,
        arguments: Sequence[bytes],
        on_reply: OnReply,
        *,
        caller: str = "",
        attachments: Sequence[Memfd] = (),
        channel: Handover | None = None,
        cached: Cached | None = None,
    ) -> None:
        """Take a request; `on_reply` gets its result once, perhaps before this returns.

        Args:
            request: What is asked for.
            arguments: Encoded argument sets.
            on_reply: Gets the result.
            caller: Who asks.
            attachments: Files with the arrays that the only argument set lacks.
            channel: Takes the files of the result, if the caller is on this machine.
            cached: What it reads from caches, and where its result goes.
        """
        call = self._calls.get(request.request_id)
        if call is not None:
            call.on_reply.append(on_reply)
        else:
            self._calls[request.request_id] = Call(
                arguments,
                [on_reply],
                caller,
                attachments=attachments,
                channel=channel,
                cached=cached,
            )
            if request.hops == 0:  # a peer has done so already
                request = sized(request, arguments, self.sizings)
        self.feed(Arrived(request=request))

    def cancel(self, request_id: str) -> None:
        """Cancel an unfinished request; its reply follows. Unknown ids are ignored."""
        if request_id in self._calls:
            self.feed(CancelAsked(request_id=RequestId(request_id)))

    def held_leases(self) -> list[tuple[RequestId, int]]:
        """Return the durable requests that are unfinished here."""
        return [
            (ticket.request.request_id, ticket.request.lease)
            for ticket in self.machine.tickets()
            if ticket.request.lease
        ]

    def feed(self, event: NodeEvent) -> None:
        """Give the machine one event and carry out what it asks for."""
        self._events.append(event)
        if self._is_stepping:
            return
        self._is_stepping = True
        try:
            while self._events:
                for command in self.machine.step(self._events.popleft(), monotonic_s()):
                    self._execute(command)
        finally:
            self._is_stepping = False

    async def tick_forever(self) -> None:
        """Tell the machine of the time, 20 times a second."""
        while True:
            await asyncio.sleep(TICK_S)
            self.feed(Ticked())
            now_s = monotonic_s()
            self._memory.freed(self._answers.expire(now_s))
            self._memory.tick(now_s)

    def _execute(self, command: NodeCommand) -> None:
        match command:
            case AskPolicy():
                self._decide(command)
            case RunOn():
                self._run(command)
            case Reply():
                self._reply(command.outcome, command.reading)
            case Report():
                self._report(command.outcome)
            case Forward():
                self._forward(command)
            case StartInstance():
                self._group.create_task(self._start(command))
            case StopInstance():
                self._group.create_task(self._runtime.stop(command.instance_id))
            case KillRun():
                self._kill(command.instance_id)
            case CancelAt():
                self._peers.cancel(command.node_id, command.request_id)
            case ReplyAgain():
                self._reply_again(command.request_id)
            case _:
                assert_never(command)

    def _decide(self, command: AskPolicy) -> None:
        request = command.request
        decision, policy_id = self.decider.decide(command.view, request)
        if self.decider.has_shadow:  # asked when the call is on its way: it need not wait
            asyncio.get_running_loop().call_soon(self.decider.ask_shadow, request.request_id)
        self._events.appendleft(
            Decided(request_id=request.request_id, decision=decision, policy_id=policy_id)
        )

    # -- workers --------------------------------------------------------------------------------

    async def _start(self, command: StartInstance) -> None:
        started_s = monotonic_s()
        spec = command.spec
        try:
            await self._start_worker(command.instance_id, spec)
        except InstanceStartError as error:
            message = f"{error}\n{error.remote_traceback}".strip()
            self.feed(
                InstanceFailed(
                    instance_id=command.instance_id, error_code="start_failed", message=message
                )
            )
        except (TierwiseError, OSError) as error:
            code = error.code if isinstance(error, TierwiseError) else "start_failed"
            self.feed(
                InstanceFailed(
                    instance_id=command.instance_id,
                    error_code=code,
                    message=f"{spec.function_id} could not be started: {error}",
                )
            )
        else:
            if self.machine.pool.get(command.instance_id) is None:
                await self._runtime.stop(command.instance_id)  # evicted while it started
                return
            cold_start_s = monotonic_s() - started_s
            wait_s = cold_start_s * (self._slowdown - 1.0)
            if wait_s > 0.0:
                await asyncio.sleep(wait_s)
            self.feed(
                InstanceStarted(instance_id=command.instance_id, cold_start_s=cold_start_s + wait_s)
            )

    async def _start_worker(self, instance_id: str, spec: FunctionSpec) -> None:
        # Its limit is set anew for each call, within what it starts with.
        limit_mib = (
            self.machine.node.capacity.memory_mib if spec.is_memory_auto else spec.memory_mib
        )
        environment = await self.environments.get(spec.requirements)
        await self._runtime.start(
            instance_id,
            code_digest=spec.code_digest,
            code_path=await self._code.path(spec.code_digest),
            environment=environment,
            memory_mib=limit_mib,
            cpus=spec.cpus,
            network=spec.network,
        )

    def _run(self, command: RunOn) -> None:
        call = self._calls[command.request_id]

        def finished(report: RunReport) -> None:
            self._carried.pop(command.instance_id, None)
            wait_s = report.run_s * (self._slowdown - 1.0)
            is_killed = any(item.kind is ItemKind.CANCELLED for item in report.items)
            if wait_s > 0.001 and not is_killed:
                self._hold(command, call, report, wait_s)
            else:
                self._run_finished(command, call, report)

        def start(
            attachments: Sequence[Memfd], timeout_s: float, on_done: Callable[[RunReport], None]
        ) -> None:
            self._runtime.run(
                command.instance_id,
                call.arguments,
                timeout_s=timeout_s,
                on_done=on_done,
                attachments=attachments,
                memory_mib=command.memory_mib,
            )

        if call.cached is None or self.objects is None:
            start(call.attachments, command.timeout_s, finished)
        else:
            self._carried[command.instance_id] = self.objects.carry(
                call.cached, call.arguments, command.timeout_s, start, finished
            )

    def _hold(self, command: RunOn, call: Call, report: RunReport, wait_s: float) -> None:
        """Deliver a report later (*emulation* of a slow node): until then the run goes on."""
        instance_id = command.instance_id

        def deliver() -> None:
            del self._held[instance_id]
            self._run_finished(command, call, report)

        def cut_short() -> None:
            killed = ItemResult(ItemKind.CANCELLED, message="cancelled")
            items = tuple([killed] * len(report.items))
            self._run_finished(command, call, replace(report, items=items))

        timer = asyncio.get_running_loop().call_later(wait_s, deliver)
        self._held[instance_id] = timer, cut_short

    def _kill(self, instance_id: InstanceId) -> None:
        carried = self._carried.get(instance_id)
        if carried is not None and carried.cut():
            return
        held = self._held.pop(instance_id, None)
        if held is None:
            self._runtime.cancel(instance_id)
            return
        timer, cut_short = held
        timer.cancel()
        cut_short()

    def _run_finished(self, command: RunOn, call: Call, report: RunReport) -> None:
        if not report.instance_alive:
            self._group.create_task(self._runtime.stop(command.instance_id))
        instance = self.machine.pool.get(command.instance_id)
        function = instance.spec.function_id if instance is not None else "the function"
        call.items = [item_of(result, function, call.channel) for result in report.items]
        call.log = report.log
        if report.refused_calls:  # a signal: ordinary functions have no need of these
            log.warning(
                "function.calls_refused",
                function_id=str(function),
                instance_id=command.instance_id,
                request_id=command.request_id,
                calls=dict(report.refused_calls),
            )
        failed = [item for item in report.items if item.kind is not ItemKind.OK]
        # A batch fails as a whole only if its worker went, or if it is a single call.
        is_whole = bool(failed) and (len(report.items) == 1 or not report.instance_alive)
        first = failed[0] if failed else None
        self.feed(
            RunFinished(
                instance_id=command.instance_id,
                request_id=command.request_id,
                run_s=report.run_s,
                is_instance_alive=report.instance_alive,
                failed_item_count=len(failed),
                peak_memory_mib=report.peak_memory_mib,
                cpu_s=report.cpu_s,
                response_bytes=sum(item.size_bytes for item in report.items),
                error_code=code_of(first) if first and is_whole else "",
                message=told(first, function) if first else "",
                is_out_of_memory=any(item.kind is ItemKind.OUT_OF_MEMORY for item in failed),
                refused_calls=tuple(sorted(report.refused_calls.items())),
            )
        )

    def _idle_instance_died(self, instance_id: str) -> None:
        self._group.create_task(self._runtime.stop(instance_id))
        self.feed(InstanceDied(instance_id=InstanceId(instance_id)))

    # -- peers and callers ----------------------------------------------------------------------

    def _forward(self, command: Forward) -> None:
        call = self._calls[command.request.request_id]
        request_id = command.request.request_id

        def replied(result: types_pb2.InvocationResult | None) -> None:
            if result is None:
                self.feed(PeerFailed(request_id=request_id, node_id=command.node_id))
                return
            call.items = result.items
            call.log = result.log
            try:
                outcome = convert.outcome_from_pb(result.outcome)
                has_reading = result.HasField("reading")
                reading = convert.reading_from_pb(result.reading) if has_reading else None
                if outcome.state is OutcomeState.REFUSED:
                    call.items = ()  # somebody else may take it, or we say why nobody did
            except TierwiseError:
                log.exception("peer.sent_nonsense", node_id=command.node_id)
                self.feed(PeerFailed(request_id=request_id, node_id=command.node_id))
                return
            self.feed(
                PeerReplied(
                    request_id=request_id,
                    node_id=command.node_id,
                    outcome=outcome,
                    reading=reading,
                )
            )

        arguments = call.arguments
        if call.attachments:
            try:
                views = [file.view() for file in call.attachments]
                arguments = [payload.inline(arguments[0], views)]
            except ValueError as error:  # the function's worker would say so, too
                log.warning("call.damaged", request_id=request_id, cause=str(error))
        invocation = convert.invocation_from_request(command.request, arguments)
        if call.cached is not None:
            call.cached.fill(invocation)
        self._peers.send(command.node_id, invocation, replied)

    def _reply(self, outcome: Outcome, reading: NodeReading | None) -> None:
        call = self._ended = self._calls.pop(outcome.request_id)
        items = call.items
        if len(items) != outcome.item_count:
            retry_after_s = 0.0
            if outcome.error_code in RETRIED:
                retry_after_s = self.machine.retry_after_s(outcome.function_id, monotonic_s())
            items = [
                types_pb2.Item(
                    error_code=outcome.error_code or "internal",
                    message=outcome.message,
                    retry_after_s=retry_after_s,
                )
            ] * outcome.item_count
        elif outcome.state is OutcomeState.EXPIRED:  # its own words, not those of the killed worker
            late = types_pb2.Item(error_code=outcome.error_code, message=outcome.message)
            items = [late if item.error_code else item for item in items]
        elif outcome.error_code == "function_died":  # the machine knows what follows from it
            items = [with_message(item, outcome) for item in items]
        result = types_pb2.InvocationResult(
            request_id=outcome.request_id,
            items=items,
            outcome=convert.outcome_to_pb(outcome, with_explanation=False),
            log=call.log,
            reading=None if reading is None else convert.reading_to_pb(reading),
        )
        for on_reply in call.on_reply:
            on_reply(result)
        if outcome.reason is None:  # a refusal is no answer: the request may come back
            self._answers.put(result, monotonic_s())
        self._memory.freed(sum(map(len, call.arguments)) + _size_bytes(result))
        # They may be large; what its report needs stays.
        call.arguments = call.items = call.attachments = ()

    def _reply_again(self, request_id: RequestId) -> None:
        call = self._calls.pop(request_id)
        result = self._answers.results.get(request_id)
        if result is None:
            item = types_pb2.Item(
                error_code="failed_precondition",
                message=f"call {request_id} ended before, and its result is no longer held; "
                "send it again under a new id",
            )
            result = types_pb2.InvocationResult(
                request_id=request_id, items=[item] * max(1, len(call.arguments))
            )
        for on_reply in call.on_reply:
            on_reply(result)

    def _report(self, outcome: Outcome) -> None:
        if len(self.reports) >= REPORTS_MAX:
            self.reports.popleft()
            self.dropped_report_count += 1
        now_s = monotonic_s()
        outcome = self.decider.reported(outcome, now_s)
        self.reports.append((outcome, self._ended.log, self._ended.caller, now_s))
