"""A Flower Grid whose messages are invocations, and the participants behind it."""

import asyncio
import concurrent.futures
import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flwr
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from tierwise.clock import monotonic_s, wall_s
from tierwise.errors import (
    FunctionDied,
    FunctionError,
    FunctionOutOfMemory,
    FunctionRaised,
    InvalidArgument,
    NotFound,
    RetryLater,
    StartFailed,
    TierwiseError,
)
from tierwise.functions.flower import client_function, lift, lower
from tierwise.sdk.app import App
from tierwise.sdk.client import Client, default_client
from tierwise.sdk.shared import SharedArray

REQUIREMENT = f"flwr=={flwr.__version__}"
NODES_KNOWN_S = 1.0  # for how long the list of nodes that are there is taken as current
SENDS_MAX = 4  # of one message: once, and again when there is no room or its node is away
BACKOFF_FIRST_S = 0.2  # doubles with every send
PARTITION, PARTITIONS = "partition-id", "num-partitions"  # as Flower's simulation names them
METADATA = (
    *("run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id"),
    *("group_id", "created_at", "ttl", "message_type"),
)

Scalar = bool | int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """One client as Flower sees it: what it calls a node, with a share of the data.

    Attributes:
        name: Its Flower node id is derived from it, so that it is the same in every run.
        node: The tierwise node that holds its data and runs its ClientApp; empty: wherever the
            placement policy says.
        config: Its `context.node_config`.
    """

    name: str
    node: str = ""
    config: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def node_id(self) -> int:
        """Return its Flower node id: 63 bits, never that of the server."""
        digest = hashlib.blake2b(self.name.encode(), digest_size=8).digest()
        return max(int(SUPERLINK_NODE_ID) + 1, int.from_bytes(digest) >> 1)


def participants(count: int, nodes: Sequence[str] = ()) -> list[Participant]:
    """Return participants with a partition each, dealt out to nodes in turn, if there are any."""
    return [
        Participant(
            name=f"client-{index}",
            node=nodes[index % len(nodes)] if nodes else "",
            config={PARTITION: index, PARTITIONS: count},
        )
        for index in range(count)
    ]


@dataclass(slots=True, eq=False)
class _Sent:
    """One message that is under way or answered."""

    message: Message
    answer: "concurrent.futures.Future[dict[str, Any]]"
    task: "asyncio.Task[dict[str, Any]] | None" = None
    answered_s: float = 0.0  # wall time


class TierwiseGrid(Grid):  # type: ignore[misc]
    """A Flower Grid whose nodes are participants on a tierwise cluster.

    Thread-safe, as Flower's own are. What a ClientApp leaves in `context.state` comes back with the
    reply, is kept here, and goes out with the participant's next message: workers keep nothing.
    """

    def __init__(
        self,
        client_app: Any,
        clients: int | Sequence[Participant],
        *,
        reference: str = "",
        client: Client | None = None,
        run_config: Mapping[str, Scalar] | None = None,
        requirements: Iterable[str] = (REQUIREMENT,),
        name: str = "flower-client",
        namespace: str = "default",
        memory: str | int = "512MiB",
        cpus: float = 1.0,
        timeout: str | float = "1h",
        deadline: str | float = "60s",
        keeps_state: bool = True,
        **options: Any,
    ) -> None:
        """Make a grid; nothing is deployed before the first message.

        Args:
            client_app: The ClientApp; or the bytes of a FAB, in which `reference` names one.
            clients: How many, wherever the placement policy puts them; or who they are.
            reference: "package.module:app" in a FAB.
            client: The cluster; default: that of `tierwise.connect`, or the usual context.
            run_config: The ClientApp's `context.run_config`.
            requirements: Packages of its environment; none: what the nodes' own interpreter has.
            name: Of the function that the ClientApp becomes.
            namespace: Where it lives and is billed.
            memory: What one call may use.
            cpus: What one call takes.
            timeout: A call that runs longer is killed.
            deadline: How soon a reply should be there; placement works for it.
            keeps_state: Take what a ClientApp leaves in its context's state along, from message to
                message. It passes through this process: without it, it never leaves the worker.
            **options: Others of `App.function`.

        Raises:
            InvalidArgument: There are no participants, or two of one name.
        """
        everyone = participants(clients) if isinstance(clients, int) else list(clients)
        self.participants = {one.node_id: one for one in everyone}
        if not everyone or len(self.participants) != len(everyone):
            raise InvalidArgument("clients: name at least one, and each by a name of its own")
        self._client = client or default_client()
        self._function = App("flower", namespace=namespace, client=self._client).function(
            name=name,
            memory=memory,
            cpus=cpus,
            timeout=timeout,
            deadline=deadline,
            requirements=requirements,
            **options,
        )(client_function(client_app, reference, keeps_state=keeps_state))
        self._run_config = dict(run_config or {})
        self._states: dict[int, tuple[list[Any], list[bytes]]] = {}
        self._deploying = asyncio.Lock()
        self._sent: dict[str, _Sent] = {}
        self._nodes: tuple[float, frozenset[str]] = (-NODES_KNOWN_S, frozenset())
        self.set_run(Run.create_empty(run_id=uuid.uuid4().int >> 65))

    def __enter__(self) -> "TierwiseGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way."""
        for message_id in list(self._sent):
            self._forget(message_id)

    # -- what Flower calls ----------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run
        # Messages that a ServerApp makes take these from their process; Flower's runtime sets them.
        TaskIdentity.run_id, TaskIdentity.node_id = run.run_id, SUPERLINK_NODE_ID
        TaskIdentity.task_id = 1

    @property
    def run(self) -> Run:
        """Return a copy of the run."""
        return Run(**vars(self._run))

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message, as old ServerApps do."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of the participants whose nodes are there, in the order given."""
        known_s, nodes = self._nodes
        if monotonic_s() - known_s >= NODES_KNOWN_S:
            agents = self._client.run(lambda: self._client.connection().agents())
            nodes = frozenset(agent.node_id for agent in agents)
            self._nodes = monotonic_s(), nodes
        everybody = self.participants.items()
        return [node_id for node_id, one in everybody if not one.node or one.node in nodes]

    def get_nodes(self) -> list[NodeInfo]:
        """Return the same as `get_node_ids`, as Flower's records."""
        return [NodeInfo(node_id=node_id) for node_id in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages and return their ids, by which replies are pulled.

        Raises:
            InvalidArgument: A message is for nobody here, has no content, or has expired.
        """
        lowered: dict[int, tuple[RecordDict, list[Any], Any]] = {}  # by identity, which they keep
        ids = []
        for message in messages:
            self._check(message)
            content = message.content
            if id(content) not in lowered:  # strategies send the same records to everyone
                records, parts = lower(content)
                joined = SharedArray.joined(parts) if parts else None
                lowered[id(content)] = content, records, joined
            _, records, joined = lowered[id(content)]
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            sent = _Sent(message, concurrent.futures.Future())
            self._sent[message_id] = sent
            self._client.call_soon(self._start, sent, records, joined)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, each once, without waiting."""
        ids = [message_id for message_id in message_ids if message_id in self._sent]
        return [self._reply(one) for one in ids if self._sent[one].answer.done()]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and wait for the replies, at most `timeout` seconds.

        Returns:
            Replies in the order of the messages. Calls that are late are cancelled: nobody could
            read what they answer.
        """
        ids = self.push_messages(messages)
        try:
            concurrent.futures.wait([self._sent[one].answer for one in ids], timeout)
            return self.pull_messages(ids)
        finally:
            for message_id in ids:
                self._forget(message_id)

    # -- messages as calls ----------------------------------------------------------------------

    def _check(self, message: Message) -> None:
        metadata = message.metadata
        if metadata.dst_node_id not in self.participants:
            raise InvalidArgument(f"message for node {metadata.dst_node_id}: there is no such node")
        if not message.has_content():
            raise InvalidArgument("a message to a client has to have content")
        if metadata.ttl <= 0 or metadata.reply_to_message_id:
            raise InvalidArgument(f"message to node {metadata.dst_node_id}: expired, or a reply")

    def _start(self, sent: _Sent, records: list[Any], joined: Any) -> None:
        """Begin a call; runs on the client's loop."""
        if sent.answer.cancelled():
            sent.answer.set_running_or_notify_cancel()
            return
        sent.task = asyncio.get_running_loop().create_task(self._call(sent, records, joined))

        def settle(task: "asyncio.Task[dict[str, Any]]") -> None:
            sent.answered_s = wall_s()
            if not sent.answer.set_running_or_notify_cancel():
                return
            if task.cancelled():
                sent.answer.set_exception(concurrent.futures.CancelledError())
            elif (error := task.exception()) is not None:
                sent.answer.set_exception(error)
            else:
                sent.answer.set_result(task.result())

        sent.task.add_done_callback(settle)

    async def _call(self, sent: _Sent, records: list[Any], joined: Any) -> dict[str, Any]:
        metadata = sent.message.metadata
        participant = self.participants[metadata.dst_node_id]
        state, state_arrays = self._states.get(metadata.dst_node_id, ([], []))
        message = {"metadata": _plain(metadata), "records": records}
        context = {
            "node_config": dict(participant.config),
            "run_config": self._run_config,
            "state": state,
            "state_arrays": state_arrays,
        }
        async with self._deploying:  # once for all, and before the wishes of each call are set
            await self._function.deploy.aio()
        ends_s = monotonic_s() + metadata.created_at + metadata.ttl - wall_s()
        for send in range(SENDS_MAX):
            left_s = max(0.001, ends_s - monotonic_s())  # waiting in queues counts, too
            function = self._function.options(node=participant.node, timeout=left_s)
            try:
                answer: dict[str, Any] = await function.remote.aio(message, joined, context)
                return answer
            except RetryLater as error:
                pause_s = max(error.retry_after_s or 0.0, BACKOFF_FIRST_S * 2**send)
                if send + 1 == SENDS_MAX or monotonic_s() + pause_s >= ends_s:
                    raise
                await asyncio.sleep(pause_s)
        raise AssertionError("unreachable")

    def _reply(self, message_id: str) -> Message:
        """Return the reply to a message that is answered, and forget both."""
        sent = self._sent.pop(message_id)
        try:
            answer = sent.answer.result()
            reply = _message(answer, sent.message)
        except TierwiseError as error:
            answer, reply = {}, Message(_error(error), reply_to=sent.message)
        if "state" in answer:
            arrays = [bytes(memoryview(part)) for part in answer["state_arrays"]]
            self._states[sent.message.metadata.dst_node_id] = answer["state"], arrays
        reply.metadata.created_at = sent.answered_s
        reply.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        return reply

    def _forget(self, message_id: str) -> None:
        sent = self._sent.pop(message_id, None)
        if sent is not None and sent.answer.cancel():
            self._client.call_soon(_stop, sent)


def _stop(sent: _Sent) -> None:
    if sent.task is not None:
        sent.task.cancel()


def _plain(metadata: Any) -> dict[str, Any]:
    return {name: getattr(metadata, name) for name in METADATA}


def _message(answer: dict[str, Any], asked: Message) -> Message:
    if "error" in answer:
        code, reason = answer["error"]
        return Message(Error(code=code, reason=reason), reply_to=asked)
    return Message(lift(answer["records"], answer["arrays"]), reply_to=asked)


def _error(error: TierwiseError) -> Error:
    """Return what Flower's strategies are told of a client that failed, in Flower's own codes."""
    match error:
        case FunctionRaised():
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        case StartFailed():
            code = ErrorCode.LOAD_CLIENT_APP_EXCEPTION
        case FunctionDied() | FunctionOutOfMemory() | FunctionError():
            code = ErrorCode.CLIENT_APP_CRASHED
        case RetryLater() | NotFound():
            code = ErrorCode.NODE_UNAVAILABLE
        case _:
            code = ErrorCode.UNKNOWN
    kind = error.remote_type or type(error).__name__
    return Error(code=code, reason=f"{kind}: {error.message}")
