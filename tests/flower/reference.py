"""Flower's own in-process runtime, with threads in place of Ray: what ours is compared with."""

import contextlib
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Context, Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce.backend import Backend
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.fleet.vce.vce_api import _register_nodes, run_api
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from flwr.compat.client.run_info_store import DeprecatedRunInfoStore  # isort: skip


class Threads(Backend):
    """Runs the ClientApp in the threads that wait for it."""

    def __init__(self) -> None:
        self._app: Any = None

    def build(self, app_fn: Any) -> None:
        self._app = app_fn()

    @property
    def num_workers(self) -> int:
        return 2

    def is_worker_idle(self) -> bool:
        return True

    def terminate(self) -> None:
        pass

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        return self._app(message=message, context=context), context


@contextlib.contextmanager
def in_process(
    client_app: Any, client_count: int, run_config: Mapping[str, Any]
) -> Iterator["InOrder"]:
    """Yield Flower's InMemoryGrid with so many clients, in order."""
    factory = LinkStateFactory(
        FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
    )
    run = Run.create_empty(run_id=secrets.randbits(63))
    run.primary_task_id = secrets.randbits(63)
    run.federation_id = NOOP_FEDERATION_ID
    state = factory.state()
    state.run_ids[run.run_id] = RunRecord(run=run)
    state.task_store[run.primary_task_id] = Task(task_id=run.primary_task_id, run_id=run.run_id)
    grid = InMemoryGrid(state_factory=factory, pull_interval=0.01)
    grid.set_run(run)
    partitions = _register_nodes(client_count, factory)
    stores = {}
    for node_id, partition in partitions.items():
        config = {"partition-id": partition, "num-partitions": client_count}
        stores[node_id] = DeprecatedRunInfoStore(node_id=node_id, node_config=config)
        stores[node_id].register_context(run_id=run.run_id, run=run)
        info = stores[node_id].run_infos[run.run_id]
        info.initial_run_config = dict(run_config)
        info.context.run_config = dict(run_config)
    stop = threading.Event()
    arguments = (lambda: client_app, Threads, partitions, factory, stores, stop, VceMetrics())
    thread = threading.Thread(target=run_api, args=arguments)
    thread.start()
    try:
        yield InOrder(grid, partitions)
    finally:
        stop.set()
        thread.join()


class InOrder(Grid):
    """A grid that lists nodes and gives replies in the order of partitions.

    Flower's own keep them in sets, whose order is another each time, and sums of floating-point
    numbers with it.
    """

    def __init__(self, grid: Grid, partitions: Mapping[int, int]) -> None:
        self.inner = grid
        self._partitions = partitions

    def set_run(self, run: Run) -> None:
        self.inner.set_run(run)
        TaskIdentity.task_id, TaskIdentity.run_id = 1, run.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    @property
    def run(self) -> Run:
        return self.inner.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.inner.create_message(*args, **kwargs)

    def get_node_ids(self) -> list[int]:
        return sorted(self.inner.get_node_ids(), key=self._partitions.__getitem__)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = self.inner.send_and_receive(messages, timeout=timeout)
        return sorted(replies, key=lambda m: self._partitions[m.metadata.src_node_id])
