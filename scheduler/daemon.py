"""The scheduler daemon: `python -m scheduler.daemon --config scheduler.toml`."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import msgspec
import structlog
import uvloop

from scheduler.authority import Authority
from scheduler.catalogue import FunctionCatalogue
from scheduler.dispatch import Dispatcher
from scheduler.gateway import ClusterGateway, JoinGateway
from scheduler.inventory import Sessions
from scheduler.machine import ControlPlane
from scheduler.policies import PolicyStore
from scheduler.queue import WorkQueue
from scheduler.store.store import Store
from scheduler.telemetry import Telemetry
from tierwise.config import ClientConfig, SchedulerConfig, dump, link_table, load
from tierwise.errors import InvalidArgument, TierwiseError
from tierwise.files import write_atomically
from tierwise.placement.policy import create
from tierwise.v1 import (
    call_pb2_grpc,
    cluster_pb2_grpc,
    function_pb2_grpc,
    join_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    policy_pb2_grpc,
    work_pb2_grpc,
)
from tierwise.wire.channel import AuthorizationInterceptor, new_server, server_credentials
from tierwise.wire.errors import ErrorInterceptor
from tierwise.wire.identity import Identity, Role
from tierwise.wire.daemon import configure_logs, follow_parent
from tierwise.wire.serving import add_health_and_reflection

log = structlog.get_logger()

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
    "CallService": dict.fromkeys(("ListCalls", "GetCall", "GetUsage"), _PEOPLE),
    "NodeService": {"Session": {Role.NODE}},
    "PolicyService": {
        "PublishPolicy": _PEOPLE,
        "ListPolicies": _PEOPLE,
        "PromotePolicy": _ADMINS,
        "RollBackPolicy": _ADMINS,
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
    authority = Authority(state / "authority")
    store = Store(config.database or f"sqlite:///{state / 'scheduler.db'}")
    policies = PolicyStore(store, config.policy)
    plane = ControlPlane(
        heartbeat_interval_s=config.heartbeat_interval_s, links=link_table(config.links)
    )
    dispatcher = Dispatcher(plane, policies.active(), create("ect"))
    try:
        async with asyncio.TaskGroup() as group:
            telemetry = Telemetry(
                store, plane.table, records_max=config.call_records_max, group=group
            )
            functions = FunctionCatalogue(store, telemetry.profile)
            sessions = Sessions(
                dispatcher,
                heartbeat_interval_s=config.heartbeat_interval_s,
                catalogue=functions.to_pb,
                assignment=policies.assignment,
                revoked=authority.revoked,
                on_calls=telemetry.take,
                on_result=lambda node_id, result: work.finished(node_id, result),
            )
            work = WorkQueue(
                store,
                dispatcher,
                sessions,
                functions,
                queue_max=config.work_queue_max,
                group=group,
                on_ended=telemetry.take_work,
            )
            dispatcher.work, dispatcher.nodes = work, sessions

            def catalogue_changed() -> None:
                sessions.broadcast(node_pb2.SessionResponse(catalogue=functions.to_pb()))

            def policy_promoted() -> None:
                dispatcher.policy = policies.active()
                sessions.broadcast(node_pb2.SessionResponse(policy=policies.assignment()))

            functions.on_changed = catalogue_changed
            policies.on_promoted = policy_promoted

            server = new_server([ErrorInterceptor(), AuthorizationInterceptor(ROLES, authority.is_revoked)])
            function_pb2_grpc.add_FunctionServiceServicer_to_server(functions, server)
            work_pb2_grpc.add_WorkServiceServicer_to_server(work, server)
            call_pb2_grpc.add_CallServiceServicer_to_server(telemetry, server)
            node_pb2_grpc.add_NodeServiceServicer_to_server(sessions, server)
            policy_pb2_grpc.add_PolicyServiceServicer_to_server(policies, server)
            cluster = ClusterGateway(dispatcher, sessions, authority)
            cluster_pb2_grpc.add_ClusterServiceServicer_to_server(cluster, server)
            add_health_and_reflection(server, *SERVICES)
            own = authority.issue(Identity(Role.SCHEDULER, "scheduler"))
            main = _bind(server, config.listen, server_credentials(own), config.advertise)

            join_server = new_server([ErrorInterceptor()])
            joining = JoinGateway(authority, lambda name: sessions.get(name) is not None, main)
            join_pb2_grpc.add_JoinServiceServicer_to_server(joining, join_server)
            join_tls = server_credentials(authority.join_credentials, require_client=False)
            join = _bind(join_server, config.join_listen, join_tls, config.advertise)

            await server.start()
            await join_server.start()
            _write_admin_context(state / "admin", authority, main)
            write_atomically(state / "address", msgspec.toml.encode({"main": main, "join": join}))
            log.info("scheduler.started", address=main, join_address=join)

            stop = asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            background = [
                group.create_task(dispatcher.tick_forever()),
                group.create_task(sessions.broadcast_views_forever()),
                group.create_task(work.refill_forever()),
                group.create_task(telemetry.store_forever()),
            ]
            await stop.wait()
            for task in background:
                task.cancel()
            await join_server.stop(grace=0.2)
            await server.stop(grace=0.5)
            (state / "address").unlink(missing_ok=True)
    finally:
        await store.close()
    log.info("scheduler.stopped")


def _bind(server: object, listen: str, credentials: object, advertise: str) -> str:
    """Open a port and return the address that others dial."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidArgument(f"listen address {listen!r}: write host:port")
    try:
        bound = server.add_secure_port(listen, credentials)  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise InvalidArgument(f"cannot listen on {listen}: {error}") from None
    return f"{advertise or host}:{bound}"


def _write_admin_context(folder: Path, authority: Authority, address: str) -> None:
    """Leave the operator's credentials in the state folder, renewed at every start."""
    authority.issue(Identity(Role.ADMIN, "admin")).save(folder)
    write_atomically(folder / "client.toml", dump(ClientConfig(scheduler=address)))


def main() -> int:
    """Parse the command line and run; return the exit code."""
    follow_parent()
    parser = argparse.ArgumentParser(prog="tierwise scheduler", description=serve.__doc__)
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
