"""A discrete-event simulation whose nodes and scheduler are the production state machines.

Only the hands are simulated here: workers that take sampled times, links that delay, a clock that
jumps from event to event. `NodeMachine` and `ControlPlane` are the classes that the daemons run.
"""

import hashlib
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from agent.machine import NodeMachine
from envs.hazards import Hazards
from envs.schedule import Schedule
from envs.traces import Arrival
from envs.world import World
from scheduler.machine import ControlPlane
from tierwise.cost.profiles import Profiles
from tierwise.domain.command import (
    AskPolicy,
    CancelAt,
    ControlCommand,
    DeadLetter,
    Dispatch,
    Forward,
    KillRun,
    NodeCommand,
    Record,
    Reply,
    ReplyAgain,
    RunOn,
    StartInstance,
)
from tierwise.domain.decision import Decision
from tierwise.domain.event import (
    Arrived,
    CancelAsked,
    ControlEvent,
    Decided,
    HeartbeatReceived,
    InstanceStarted,
    NodeEvent,
    PeerFailed,
    PeerReplied,
    RunFinished,
    SessionClosed,
    SessionOpened,
    Submitted,
    Ticked,
    ViewReceived,
    WorkFinished,
)
from tierwise.domain.ids import NodeId, PolicyId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.request import Request
from tierwise.domain.topology import Channel, Node
from tierwise.domain.view import NodeReading
from tierwise.placement.policy import Learner, Policy

TICK_S = 0.25
SESSION_DELAY_S = 0.01
BROKEN_AFTER_S = 0.05  # how long until a sender notices that a peer's host is down
SETTLE_S = 120.0  # simulated time after the last arrival in which everything must end
SCHEDULER = NodeId("scheduler")


@dataclass(slots=True)
class _SimNode:
    """One simulated host. `life` counts its restarts: events of an earlier life are void."""

    node: Node
    machine: NodeMachine
    life: int = 0
    is_up: bool = True
    is_cut: bool = False
    callers: dict[RequestId, NodeId | None] = field(default_factory=dict)
    answers: dict[RequestId, Outcome] = field(default_factory=dict)
    outbox: dict[RequestId, Outcome] = field(default_factory=dict)
    reports: list[Outcome] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Question:
    """A node asks where to run a request. Answer it with `Simulator.answer`."""

    ask: AskPolicy
    node_id: NodeId


def service_stream(seed: int) -> np.random.Generator:
    """Return the stream of service times of the runs with `seed`."""
    return np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])


class Simulator:
    """One run of a world. The same world, seed and answers give the same outcomes."""

    def __init__(self, world: World, seed: int, *, service_seed: int | None = None) -> None:
        """Prepare a run.

        Args:
            world: Nodes, links, workload and faults.
            seed: Of the streams of service times, links, faults and cold starts; adding one moves
                no other.
            service_seed: Takes the service times of that seed's run instead, to vary the rest.
        """
        self.world = world
        self.now_s = 0.0
        self.outcomes: list[Outcome] = []  # what users got, in order
        self.recorded: list[tuple[Outcome, bool]] = []  # durable work, True if dead-lettered
        self.decision_count = 0
        self.on_step: Callable[[NodeMachine], None] | None = None
        names = ("service", "links", "faults", "cold starts", "overheads")
        streams = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(len(names)))
        service, self._link_rng, faults, self._cold_rng, self._overhead_rng = streams
        self._hazards = Hazards(world.faults, faults)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._nodes = {node.node_id: _SimNode(node, NodeMachine(node)) for node in world.nodes}
        self._channels: dict[tuple[NodeId, NodeId], Channel] = {}
        self._profiles = Profiles()
        self._told_profiles = self._profiles.snapshot()
        self._requests: dict[RequestId, Request] = {}
        self._question: Question | None = None
        self._waiting_events: list[tuple[_SimNode, NodeEvent]] = []
        self._plane = ControlPlane(
            heartbeat_interval_s=world.heartbeat_interval_s, links=world.links
        )
        self._plane_policy: Policy | None = None
        self._learner: Learner | None = None
        self._rng = np.random.default_rng(seed)
        if service_seed is not None:
            service = service_stream(service_seed)
        self.schedule = Schedule(world.trace, service)
        self._ends_s = max(self.schedule.last_arrival_s, world.faults.until_s) + SETTLE_S
        self._start()

    # -- driving --------------------------------------------------------------------------------

    def run(self, policy: Policy) -> list[Outcome]:
        """Run to the end with one policy; return what users got. A learner starts afresh."""
        if isinstance(policy, Learner):
            policy = self._learner = policy.fresh()
        self._plane_policy = policy
        while (question := self.next_question()) is not None:
            decision = policy.decide(question.ask.view, question.ask.request, self._rng)
            self.answer(decision, policy.policy_id)
        return self.outcomes

    def next_question(self) -> Question | None:
        """Advance until a node asks for a decision; None when the run has ended."""
        heap = self._heap
        while self._question is None:
            if self._waiting_events:
                sim, event = self._waiting_events.pop(0)
                self._step(sim, event)
                continue
            if not heap or self.schedule.open_count <= 0 or heap[0][0] > self._ends_s:
                return None
            self.now_s, _, action = heapq.heappop(heap)
            action()
        return self._question

    def answer(self, decision: Decision, policy_id: PolicyId) -> None:
        """Answer the open question."""
        question, self._question = self._question, None
        assert question is not None, "there is no open question"
        self.decision_count += 1
        sim = self._nodes[question.node_id]
        self._step(
            sim,
            Decided(
                request_id=question.ask.request.request_id, decision=decision, policy_id=policy_id
            ),
        )

    def log_digest(self) -> str:
        """Return a hash of every outcome so far; equal runs have equal digests."""
        digest = hashlib.sha256()
        for outcome in self.outcomes:
            digest.update(
                f"{outcome.request_id} {outcome.state} {outcome.node_id} {outcome.latency} "
                f"{outcome.money_usd}\n".encode()
            )
        return digest.hexdigest()

    def machines(self) -> list[NodeMachine]:
        """Return the state machines of the nodes, for checks of invariants."""
        return [sim.machine for sim in self._nodes.values()]

    def stop_arrivals_after(self, count: int) -> None:
        """Let only so many more requests of the trace arrive, and what follows from these."""
        last_s = self.schedule.cut_after(count)
        self._ends_s = SETTLE_S + (self.now_s if last_s is None else last_s)

    @property
    def unfinished_count(self) -> int:
        """Return how many requests have no end yet."""
        return self.schedule.open_count

    # -- the world ------------------------------------------------------------------------------

    def _start(self) -> None:
        for sim in self._nodes.values():
            self._tell_plane(SessionOpened(node=sim.node))
        for sim in self._nodes.values():
            self._inform(sim)
            offset_s = self._hazards.offset_s(self.world.heartbeat_interval_s)
            self._at(offset_s, self._heartbeat, sim)
        self._at(TICK_S, self._tick)
        if self.world.overheads.view_interval_s:
            self._at(self.world.overheads.view_interval_s, self._broadcast)
        self._next_arrival()
        if (wait_s := self._hazards.next_crash_s()) is not None:
            self._at(wait_s, self._crash)
        if (wait_s := self._hazards.next_cut_s()) is not None:
            self._at(wait_s, self._partition)

    def _next_arrival(self) -> None:
        named = self.schedule.next()
        if named is not None:
            self._at(named[1].at_s - self.now_s, self._arrive_next, *named)

    def _arrive_next(self, request_id: RequestId, arrival: Arrival) -> None:
        self._next_arrival()
        self._arrive(request_id, arrival)

    def _arrive(self, request_id: RequestId, arrival: Arrival) -> None:
        request = self.schedule.begin(request_id, arrival)
        self._requests[request_id] = request
        if arrival.is_durable:
            self._tell_plane(Submitted(request=replace(request, origin=SCHEDULER)))
            return
        sim = self._nodes[arrival.origin]
        if not sim.is_up:
            self._lost_to_user(request)
            return
        sim.callers[request.request_id] = None
        self._step(sim, Arrived(request=request))

    def _lost_to_user(self, request: Request) -> None:
        """The user's node is down: the user gets an error at once."""
        self._user_got(
            Outcome(
                request_id=request.request_id,
                function_id=request.function_id,
                state=OutcomeState.FAILED,
                origin=request.origin,
                node_id=None,
                latency=LatencySplit(queue_s=BROKEN_AFTER_S),
                deadline_s=request.deadline_s,
                priority=request.priority,
                error_code="unavailable",
            )
        )

    def _user_got(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._ended(outcome)

    def _ended(self, outcome: Outcome) -> None:
        """Learn from it, and begin the next stage if it was the last of its own."""
        self._learn(outcome)
        for request_id, arrival in self.schedule.end(outcome.request_id):
            self._at(0.0, self._arrive, request_id, arrival)

    def _learn(self, outcome: Outcome) -> None:
        """Let the function's profile follow, as the scheduler's telemetry does."""
        if self.world.overheads.reports_late and outcome.origin in self._nodes:
            self._nodes[outcome.origin].reports.append(outcome)
        else:
            self._taught(outcome)

    def _taught(self, outcome: Outcome) -> None:
        speed = None if outcome.node_id is None else self._nodes[outcome.node_id].node.speed
        self._profiles.learn(outcome, speed, self.now_s)
        if self._learner is not None:
            self._learner.learn(outcome)

    # -- nodes ----------------------------------------------------------------------------------

    def _step(self, sim: _SimNode, event: NodeEvent) -> None:
        """Give a node's machine an event; while a question is open, later events wait."""
        if self._question is not None:
            self._waiting_events.append((sim, event))
            return
        if not sim.is_up:
            return
        for command in sim.machine.step(event, self.now_s):
            self._execute(sim, command)
        if self.on_step is not None:
            self.on_step(sim.machine)

    def _execute(self, sim: _SimNode, command: NodeCommand) -> None:
        match command:
            case AskPolicy():
                self._question = Question(command, sim.node.node_id)
            case RunOn():
                self._run(sim, command)
            case StartInstance():
                profile = self.world.trace.behaviours[command.spec.function_id].profile
                noise = self.world.overheads.cold.draw(self._cold_rng)
                noise = noise or float(self._cold_rng.lognormal(0.0, 0.25))
                cold_s = profile.cold_start_s * noise / sim.node.speed
                started = InstanceStarted(instance_id=command.instance_id, cold_start_s=cold_s)
                self._at(cold_s, self._alive_step, sim, sim.life, started)
            case Forward():
                self._send(
                    sim,
                    command.node_id,
                    command.request.request_bytes,
                    lambda peer: self._arrive_forwarded(sim.node.node_id, peer, command.request),
                    on_broken=PeerFailed(
                        request_id=command.request.request_id, node_id=command.node_id
                    ),
                )
            case Reply():
                self._reply(sim, command.outcome, command.reading)
            case ReplyAgain():
                known = sim.answers.get(command.request_id)
                if known is not None:
                    self._reply(sim, known)
            case CancelAt():
                cancel = CancelAsked(request_id=command.request_id)
                self._send(sim, command.node_id, 64, lambda peer: self._step(peer, cancel))
            case KillRun():
                killed = RunFinished(
                    instance_id=command.instance_id,
                    request_id=command.request_id,
                    run_s=0.0,
                    is_instance_alive=False,
                    error_code="cancelled",
                )
                self._at(0.0, self._alive_step, sim, sim.life, killed)
            case _:
                pass  # StopInstance needs no hands here; Report is what `_user_got` sees anyway

    def _run(self, sim: _SimNode, command: RunOn) -> None:
        instance = sim.machine.pool.get(command.instance_id)
        assert instance is not None, "a command names an instance that the machine has"
        behaviour = self.world.trace.behaviours[instance.spec.function_id]
        request = self._requests[command.request_id]
        noise = math.exp(behaviour.run_sigma * self.schedule.noise(command.request_id))
        overheads = self.world.overheads
        added_s = overheads.run_s.draw(self._overhead_rng)
        work_s = behaviour.profile.run_s * request.item_count * noise + added_s
        run_s = max(0.0, work_s) / sim.node.speed + overheads.call_s
        if request.data_nodes and sim.node.node_id not in request.data_nodes:
            run_s += self.world.links.default.transfer_s(request.data_bytes)
        is_late = run_s > command.timeout_s
        finished = RunFinished(
            instance_id=command.instance_id,
            request_id=command.request_id,
            run_s=min(run_s, command.timeout_s),
            is_instance_alive=not is_late,
            response_bytes=behaviour.profile.response_bytes * request.item_count,
            error_code="function_timed_out" if is_late else "",
        )
        self._at(finished.run_s, self._alive_step, sim, sim.life, finished)

    def _alive_step(self, sim: _SimNode, life: int, event: NodeEvent) -> None:
        if sim.is_up and sim.life == life:
            self._step(sim, event)

    def _arrive_forwarded(self, caller: NodeId, peer: _SimNode, request: Request) -> None:
        peer.callers[request.request_id] = caller
        self._step(peer, Arrived(request=request))

    def _reply(self, sim: _SimNode, outcome: Outcome, reading: NodeReading | None = None) -> None:
        request_id = outcome.request_id
        if outcome.lease:
            sim.outbox[request_id] = outcome
            self._flush_outbox(sim)
            return
        if outcome.state is not OutcomeState.REFUSED:
            sim.answers[request_id] = outcome
        caller = sim.callers.get(request_id)
        if caller is None:
            if sim.callers.pop(request_id, SCHEDULER) is None:
                self._user_got(outcome)
            return
        replied = PeerReplied(
            request_id=request_id, node_id=sim.node.node_id, outcome=outcome, reading=reading
        )
        self._send(
            sim, caller, outcome.response_bytes + 256, lambda peer: self._step(peer, replied)
        )

    # -- links ----------------------------------------------------------------------------------

    def _send(
        self,
        sim: _SimNode,
        target_id: NodeId,
        size_bytes: int,
        deliver: Callable[[_SimNode], None],
        *,
        on_broken: PeerFailed | None = None,
    ) -> None:
        """Move a message to a peer through the link, or through what goes wrong with it."""
        target = self._nodes.get(target_id)
        if target is None or not target.is_up or target.is_cut or sim.is_cut:
            if on_broken is not None:
                self._at(BROKEN_AFTER_S, self._alive_step, sim, sim.life, on_broken)
            return
        key = (sim.node.node_id, target_id)
        channel = self._channels.get(key)
        if channel is None:
            link = self.world.links.between(sim.node, target.node)
            channel = self._channels[key] = Channel(link)
        delay_s = channel.delay_s(size_bytes, self.now_s, float(self._link_rng.random()))
        delay_s += max(0.0, self.world.overheads.message_s.draw(self._overhead_rng))
        life = target.life

        def arrive() -> None:
            if target.is_up and target.life == life:
                deliver(target)
            elif on_broken is not None:
                self._alive_step(sim, sim_life, on_broken)

        sim_life = sim.life
        mishap = self._hazards.mishap(self.now_s)
        if mishap.is_doubled:
            self._at(delay_s * 1.5 + 0.01, arrive)
        if not mishap.is_lost:
            self._at(delay_s + mishap.late_s, arrive)

    # -- the scheduler --------------------------------------------------------------------------

    def _tell_plane(self, event: ControlEvent) -> None:
        queue = [event]
        while queue:
            for command in self._plane.step(queue.pop(0), self.now_s):
                answer = self._execute_plane(command)
                if answer is not None:
                    queue.insert(0, answer)

    def _execute_plane(self, command: ControlCommand) -> ControlEvent | None:
        match command:
            case AskPolicy():
                assert self._plane_policy is not None, "durable work needs `run`"
                policy = self._plane_policy
                decision = policy.decide(command.view, command.request, self._rng)
                return Decided(
                    request_id=command.request.request_id,
                    decision=decision,
                    policy_id=policy.policy_id,
                )
            case Dispatch():
                sim = self._nodes[command.node_id]
                self._at(SESSION_DELAY_S, self._dispatched, sim, sim.life, command.request)
            case Record() | DeadLetter():
                is_dead = isinstance(command, DeadLetter)
                self.recorded.append((command.outcome, is_dead))
                self._ended(command.outcome)
            case CancelAt():
                sim = self._nodes[command.node_id]
                cancel = CancelAsked(request_id=command.request_id)
                self._at(SESSION_DELAY_S, self._alive_step, sim, sim.life, cancel)
            case _:
                pass  # states reach the nodes with the next heartbeat
        return None

    def _dispatched(self, sim: _SimNode, life: int, request: Request) -> None:
        if not sim.is_cut:
            self._alive_step(sim, life, Arrived(request=request))

    def _flush_outbox(self, sim: _SimNode) -> None:
        """Send results of durable work; they stay in the outbox while the link is cut."""
        if sim.is_cut or not sim.is_up:
            return
        for outcome in list(sim.outbox.values()):
            self._at(SESSION_DELAY_S, self._result_arrived, sim, sim.life, outcome)

    def _result_arrived(self, sim: _SimNode, life: int, outcome: Outcome) -> None:
        if sim.is_cut or not sim.is_up or sim.life != life:
            return
        if sim.outbox.get(outcome.request_id) == outcome:
            del sim.outbox[outcome.request_id]
        self._tell_plane(WorkFinished(node_id=sim.node.node_id, outcome=outcome))

    def _heartbeat(self, sim: _SimNode) -> None:
        self._at(self.world.heartbeat_interval_s, self._heartbeat, sim)
        if not sim.is_up or sim.is_cut:
            return
        reading = sim.machine.reading(self.now_s)
        self._tell_plane(HeartbeatReceived(node_id=sim.node.node_id, reading=reading))
        for outcome in sim.reports:
            self._taught(outcome)
        sim.reports.clear()
        if not self.world.overheads.view_interval_s:
            self._inform(sim)

    def _broadcast(self) -> None:
        """Send everybody the view, as the scheduler does when anything has changed."""
        self._at(self.world.overheads.view_interval_s, self._broadcast)
        for sim in self._nodes.values():
            if sim.is_up and not sim.is_cut:
                self._inform(sim)

    def _inform(self, sim: _SimNode) -> None:
        """Send a node the scheduler's view, as the session does after each heartbeat."""
        if not self.world.overheads.reports_late:
            self._told_profiles = self._profiles.snapshot()
        event = ViewReceived(
            peers=self._plane.peers(self.now_s),
            links=self.world.links,
            profiles=self._told_profiles,
            is_full=True,
        )
        self._at(SESSION_DELAY_S, self._alive_step, sim, sim.life, event)

    def _tick(self) -> None:
        self._at(TICK_S, self._tick)
        self._tell_plane(Ticked())
        self._told_profiles = self._profiles.snapshot()  # telemetry stores as often
        for sim in self._nodes.values():
            self._step(sim, Ticked())

    # -- faults ---------------------------------------------------------------------------------

    def _crash(self) -> None:
        if self._hazards.is_over(self.now_s):
            return
        self._at(self._hazards.next_crash_s() or 0.0, self._crash)
        up = [sim for sim in self._nodes.values() if sim.is_up]
        if len(up) < 2:
            return
        sim = self._hazards.pick(up)
        sim.is_up = False
        sim.life += 1
        for ticket in sim.machine.tickets():
            if sim.callers.get(ticket.request.request_id, SCHEDULER) is None:
                self._lost_to_user(ticket.request)  # the user's connection breaks
        for other in self._nodes.values():  # and so do the streams of its peers
            for ticket in other.machine.tickets():
                if ticket.node_id == sim.node.node_id and other is not sim:
                    failed = PeerFailed(
                        request_id=ticket.request.request_id, node_id=sim.node.node_id
                    )
                    self._at(BROKEN_AFTER_S, self._alive_step, other, other.life, failed)
        self._waiting_events = [pair for pair in self._waiting_events if pair[0] is not sim]
        if self._question is not None and self._question.node_id == sim.node.node_id:
            self._question = None
        self._tell_plane(SessionClosed(node_id=sim.node.node_id))
        self._at(self.world.faults.down_s, self._restart, sim)

    def _restart(self, sim: _SimNode) -> None:
        sequence = int(self.now_s * 1000) + 1_000_000 * sim.life
        sim.machine = NodeMachine(sim.node, first_sequence=sequence)
        sim.callers.clear()
        sim.answers.clear()
        sim.outbox.clear()
        sim.is_up = True
        self._reconnect(sim)

    def _partition(self) -> None:
        if self._hazards.is_over(self.now_s):
            return
        self._at(self._hazards.next_cut_s() or 0.0, self._partition)
        sim = self._hazards.pick(list(self._nodes.values()))
        if sim.is_cut:
            return
        sim.is_cut = True
        self._tell_plane(SessionClosed(node_id=sim.node.node_id))
        self._at(self.world.faults.partition_s, self._heal, sim)

    def _heal(self, sim: _SimNode) -> None:
        sim.is_cut = False
        self._reconnect(sim)

    def _reconnect(self, sim: _SimNode) -> None:
        if not sim.is_up or sim.is_cut:
            return
        held = [
            (ticket.request.request_id, ticket.request.lease)
            for ticket in sim.machine.tickets()
            if ticket.request.lease
        ]
        held += [(outcome.request_id, outcome.lease) for outcome in sim.outbox.values()]
        self._tell_plane(SessionOpened(node=sim.node, leases=tuple(held)))
        self._inform(sim)
        self._flush_outbox(sim)

    def _at(self, delay_s: float, action: Callable[..., None], *arguments: object) -> None:
        self._sequence += 1
        call = (lambda: action(*arguments)) if arguments else action
        heapq.heappush(self._heap, (self.now_s + delay_s, self._sequence, call))
