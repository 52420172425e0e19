"""The scheduler daemon: `python -m scheduler.daemon --config scheduler.toml`."""

import argparse
import asyncio
import fcntl
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import msgspec
import structlog
import uvloop

from scheduler.authority import Authority
from scheduler.budgets import Budgets
from scheduler.catalogue import FunctionCatalogue
from scheduler.dispatch import Dispatcher
from scheduler.federated import Federation
from scheduler.federated_driver import Surroundings
from scheduler.gateway import ClusterGateway, JoinGateway
from scheduler.inventory import Sessions
from scheduler.machine import ControlPlane
from scheduler.policies import FALLBACK, PolicyStore
from scheduler.queue import WorkQueue
from scheduler.roster import Roster
from scheduler.sizings import Sizings
from scheduler.store.store import Store
from scheduler.telemetry import Telemetry
from scheduler.window import WorkWindow
from tierwise.config import ClientConfig, SchedulerConfig, dump, link_table, load, load_prices
from tierwise.domain.ids import NodeId
from tierwise.errors import FailedPrecondition, InvalidArgument, TierwiseError
from tierwise.files import write_atomically
from tierwise.placement.policy import create
from tierwise.v1 import (
    advisor_pb2_grpc,
    budget_pb2_grpc,
    call_pb2_grpc,
    cluster_pb2_grpc,
    federated_pb2_grpc,
    function_pb2_grpc,
    join_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    policy_pb2_grpc,
    work_pb2_grpc,
)
from tierwise.wire import convert
from tierwise.wire.channel import AuthorizationInterceptor, new_server, server_credentials
from tierwise.wire.daemon import configure_logs, follow_parent
from tierwise.wire.errors import ErrorInterceptor
from tierwise.wire.identity import Identity, Role
from tierwise.wire.serving import add_health_and_reflection

log = structlog.get_logger()

JOIN_BYTES_MAX = 64 << 10  # anybody may dial that port
_EVERYONE = {Role.NODE, Role.USER, Role.ADMIN}
_PEOPLE = {Role.USER, Role.ADMIN}
_ADMINS = {Role.ADMIN}
_RIGHTS = {
    "FunctionService": {
        "DeployFunction": _PEOPLE,
        "ListFunctions": _PEOPLE,
        "GetFunction": _EVERYONE,
        "ListFunctionVersions": _PEOPLE,
        "DeleteFunction": _PEOPLE,
        "GetCode": {Role.NODE},
    },
    "WorkService": dict.fromkeys(
        ("Submit", "Watch", "GetResult", "Cancel", "ListWork", "Redrive"), _PEOPLE
    ),
    "AdvisorService": dict.fromkeys(("RecommendMemory", "ResizeFunction"), _PEOPLE),
    "CallService": dict.fromkeys(("ListCalls", "GetCall", "GetUsage"), _PEOPLE),
    "BudgetService": {"SetBudget": _ADMINS, "ListBudgets": _PEOPLE, "RemoveBudget": _ADMINS},
    "FederatedService": dict.fromkeys(
        ("CreateJob", "ListJobs", "GetJob", "WatchJob", "StopJob", "ResumeJob"), _PEOPLE
    ),
    "NodeService": {"Session": {Role.NODE}},
    "PolicyService": {
        "PublishPolicy": _PEOPLE,
        "ListPolicies": _PEOPLE,
        "PromotePolicy": _ADMINS,
        "RollBackPolicy": _ADMINS,
        "ShadowPolicy": _ADMINS,
        "CanaryPolicy": _ADMINS,
        "FetchPolicy": _EVERYONE,
    },
    "ClusterService": {
        "ListNodes": _PEOPLE,
        "GetView": _PEOPLE,
        "DrainNode": _ADMINS,
        "RemoveNode": _ADMINS,
        "CreateToken": _ADMINS,
        "ListTokens": _ADMINS,
        "GetIdentity": _EVERYONE,
    },
}
SERVICES = tuple(f"tierwise.v1.{service}" for service in _RIGHTS)
ROLES = {
    f"/tierwise.v1.{service}/{method}": roles
    for service, methods in _RIGHTS.items()
    for method, roles in methods.items()
}


async def serve(config: SchedulerConfig) -> None:
    """Run the scheduler until SIGTERM or SIGINT.

    Raises:
        TierwiseError: The configuration is wrong, or a port or the database cannot be opened.
    """
    state = Path(config.state_dir)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _lock(state):
        authority = Authority(state / "authority")
        store = Store(config.database or f"sqlite:///{state / 'scheduler.db'}")
        try:
            async with asyncio.TaskGroup() as group:
                await _serve(config, state, authority, store, group)
        finally:
            await store.close()
    log.info("scheduler.stopped")


async def _serve(
    config: SchedulerConfig,
    state: Path,
    authority: Authority,
    store: Store,
    group: asyncio.TaskGroup,
) -> None:
    plane = ControlPlane(
        heartbeat_interval_s=config.heartbeat_interval_s, links=link_table(config.links)
    )
    prices = plane.table.prices = load_prices(Path(config.prices) if config.prices else None)
    policies = PolicyStore(store, config.policy)
    dispatcher = Dispatcher(plane, policies.active(), create(FALLBACK))
    telemetry = Telemetry(store, plane.table, records_max=config.call_records_max)
    functions = FunctionCatalogue(store, telemetry.profile)
    roster = Roster(store, dispatcher)
    budgets = Budgets(store)
    dispatcher.spent = lambda: budgets.spent

    def opened(node_id: NodeId) -> None:
        roster.changed()
        window.node_opened(node_id)

    def billing() -> node_pb2.Billing:
        spent = map(convert.spent_to_pb, budgets.refusing)
        return node_pb2.Billing(prices=convert.prices_to_pb(prices), spent=spent)

    sessions = Sessions(
        dispatcher,
        heartbeat_interval_s=config.heartbeat_interval_s,
        catalogue=functions.to_pb,
        assignment=policies.assignment,
        revoked=authority.revoked,
        on_opened=opened,
        on_beat=telemetry.take,
        billing=billing,
        on_result=lambda node_id, result: window.finished(node_id, result),
    )
    window = WorkWindow(
        store,
        dispatcher,
        sessions,
        functions,
        write_call=telemetry.write_work,
        on_ended=telemetry.learn_work,
        heartbeat_interval_s=config.heartbeat_interval_s,
        group=group,
    )
    dispatcher.work, dispatcher.nodes = window, sessions
    functions.on_changed = sessions.catalogue_changed
    functions.nodes = lambda: [row.node for row in plane.table.rows()]
    functions.environments = sessions.environments

    def policy_changed() -> None:
        dispatcher.policy = policies.active()
        sessions.policy_changed()

    policies.on_changed = policy_changed
    policies.health = sessions.health
    telemetry.also_store = policies.trials.keep
    sizings = Sizings(store, functions)
    telemetry.also_learn = sizings.learn
    functions.sizing = sizings.sizing
    telemetry.acknowledge = sessions.acknowledge_reports
    budgets.on_changed = sessions.billing_changed

    server = new_server([ErrorInterceptor(), AuthorizationInterceptor(ROLES, authority.is_revoked)])
    queue = WorkQueue(store, window, functions, budgets, queue_max=config.work_queue_max)
    around = Surroundings(store, queue, window, dispatcher, sessions)
    federation = Federation(around, functions, group)
    cluster = ClusterGateway(store, dispatcher, sessions, authority)
    function_pb2_grpc.add_FunctionServiceServicer_to_server(functions, server)
    work_pb2_grpc.add_WorkServiceServicer_to_server(queue, server)
    advisor_pb2_grpc.add_AdvisorServiceServicer_to_server(sizings, server)
    budget_pb2_grpc.add_BudgetServiceServicer_to_server(budgets, server)
    call_pb2_grpc.add_CallServiceServicer_to_server(telemetry, server)
    federated_pb2_grpc.add_FederatedServiceServicer_to_server(federation, server)
    node_pb2_grpc.add_NodeServiceServicer_to_server(sessions, server)
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(policies, server)
    cluster_pb2_grpc.add_ClusterServiceServicer_to_server(cluster, server)
    add_health_and_reflection(server, *SERVICES)
    own = server_credentials(authority.issue(Identity(Role.SCHEDULER, "scheduler")))
    main = _bind(server, config.listen, own, config.advertise, state / "main.port")

    join_server = new_server([ErrorInterceptor()], message_bytes_max=JOIN_BYTES_MAX)
    joining = JoinGateway(authority, sessions, main)
    join_pb2_grpc.add_JoinServiceServicer_to_server(joining, join_server)
    add_health_and_reflection(join_server, "tierwise.v1.JoinService")
    join_tls = server_credentials(authority.join_credentials, require_client=False)
    join = _bind(join_server, config.join_listen, join_tls, config.advertise, state / "join.port")

    await server.start()
    await join_server.start()
    _write_admin_context(state / "admin", authority, main)
    write_atomically(state / "address", msgspec.toml.encode({"main": main, "join": join}))
    log.info("scheduler.started", address=main, join_address=join)

    await federation.resume()
    background = [
        group.create_task(dispatcher.tick_forever()),
        group.create_task(sessions.broadcast_views_forever()),
        group.create_task(window.run_forever()),
        group.create_task(telemetry.store_forever()),
        group.create_task(roster.store_forever()),
        group.create_task(sizings.fit_forever()),
        group.create_task(budgets.check_forever()),
    ]
    await _stop_asked()
    for task in background:
        task.cancel()
    federation.close()
    sessions.close()
    window.close()
    await join_server.stop(grace=0.2)
    await server.stop(grace=0.5)
    await telemetry.store_profiles()
    (state / "address").unlink(missing_ok=True)


async def _stop_asked() -> None:
    """Return at SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


@contextmanager
def _lock(state: Path) -> Iterator[None]:
    """Hold the state folder: two schedulers on one database would lease the same work.

    Raises:
        FailedPrecondition: Another process holds it.
    """
    with (state / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FailedPrecondition(
                f"another scheduler is running on {state}: stop it, or choose another state_dir"
            ) from None
        yield


def _bind(
    server: grpc.aio.Server,
    listen: str,
    credentials: grpc.ServerCredentials,
    advertise: str,
    last_port: Path,
) -> str:
    """Open a port and return the address that others dial.

    A port that the system chose is kept over restarts if it can be, for the agents know it.

    Raises:
        InvalidArgument: The address is malformed, in use or not allowed.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidArgument(f"listen address {listen!r}: write host:port")
    wanted = [port]
    if int(port) == 0 and last_port.exists():
        wanted.insert(0, last_port.read_text())
    bound = 0
    for number in wanted:
        try:
            bound = server.add_secure_port(f"{host}:{number}", credentials)
            break
        except RuntimeError as error:
            cause = error
    if not bound:
        raise InvalidArgument(f"cannot listen on {listen}: {cause}")
    write_atomically(last_port, str(bound).encode())
    if not advertise and host in ("0.0.0.0", "[::]"):  # noqa: S104 - only compared
        advertise = socket.gethostname()
    return f"{advertise or host}:{bound}"


def _write_admin_context(folder: Path, authority: Authority, address: str) -> None:
    """Leave the operator's credentials in the state folder, renewed at every start."""
    authority.issue(Identity(Role.ADMIN, "admin")).save(folder)
    write_atomically(folder / "client.toml", dump(ClientConfig(scheduler=address)))


def main() -> int:
    """Parse the command line and run; return the exit code."""
    follow_parent()
    parser = argparse.ArgumentParser(
        prog="tierwise scheduler", description=(serve.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", type=Path, help="scheduler.toml")
    for key in ("state-dir", "listen", "join-listen", "advertise", "database", "policy"):
        parser.add_argument(f"--{key}", help=f"overrides {key.replace('-', '_')} of the file")
    flags = vars(parser.parse_args())
    try:
        config = load(flags.pop("config"), SchedulerConfig, overrides=flags)
        configure_logs(config.log_level)
        uvloop.run(serve(config))
    except* TierwiseError as errors:
        error = errors.exceptions[0]
        print(f"tierwise scheduler: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidArgument) else 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
