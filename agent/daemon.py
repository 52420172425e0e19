"""The agent daemon: `python -m agent.daemon --config agent.toml`."""

import argparse
import asyncio
import os
import signal
import sys
import zlib
from pathlib import Path

import structlog
import uvloop

from agent import memory
from agent.billing import Billing
from agent.cache.peers import CachePeers
from agent.cache.room import ROLES as CACHE_ROLES
from agent.cache.room import CacheRoom
from agent.catalogue import CodeFolder, FunctionIndex
from agent.decider import Decider
from agent.door import Door
from agent.ingress import Ingress
from agent.machine import NodeMachine
from agent.peers import PeerStreams
from agent.policies import PolicySlots
from agent.preparation import Preparation
from agent.probe import Probe
from agent.runtime.environments import Environments
from agent.runtime.runtime import Runtime
from agent.runtime.sandbox import ISOLATIONS
from agent.shell import Shell
from agent.uplink import Uplink
from tierwise.clock import monotonic_s, wall_s
from tierwise.config import AgentConfig, load, python_version
from tierwise.domain.event import CatalogueReceived, DrainAsked, PricesReceived
from tierwise.domain.ids import NodeId, is_name
from tierwise.domain.resources import Resources
from tierwise.domain.topology import PYTHON_LABEL, Node, parse_tier
from tierwise.errors import FailedPrecondition, InvalidArgument, TierwiseError
from tierwise.files import write_atomically
from tierwise.placement.policy import create
from tierwise.v1 import cache_pb2_grpc, invocation_pb2_grpc
from tierwise.wire.channel import AuthorizationInterceptor, new_server, server_credentials
from tierwise.wire.daemon import configure_logs, follow_parent
from tierwise.wire.errors import ErrorInterceptor
from tierwise.wire.identity import Credentials, Role, join
from tierwise.wire.serving import add_health_and_reflection

log = structlog.get_logger()

ROLES = {
    "/tierwise.v1.InvocationService/Invoke": {Role.USER, Role.ADMIN, Role.NODE},
    "/tierwise.v1.InvocationService/InvokeStream": {Role.USER, Role.ADMIN, Role.NODE},
    **CACHE_ROLES,
}


async def serve(config: AgentConfig) -> None:
    """Run the agent until SIGTERM or SIGINT.

    Raises:
        TierwiseError: The configuration is wrong.
    """
    state = Path(config.state_dir)
    credentials = Credentials.load(_identity_folder(config))
    probe = Probe()
    host, _, port = config.listen.rpartition(":")

    async with asyncio.TaskGroup() as group:
        uplink: Uplink
        server = new_server(
            interceptors=[
                ErrorInterceptor(),
                AuthorizationInterceptor(ROLES, lambda identity: identity.uri in uplink.revoked),
            ]
        )
        bound_port = server.add_secure_port(f"{host}:{port}", server_credentials(credentials))
        node = _node(config, probe, f"{host}:{bound_port}")
        machine = NodeMachine(node, queue_max=config.queue_max, first_sequence=int(wall_s() * 1000))
        runtime = Runtime(
            state_dir=state / "runtime",
            imports=state / "imports.json",
            isolation=_isolation(config),
            data=[str(Path(path).absolute()) for path in config.data],
            may_reach_node=config.functions_reach_node,
        )
        await runtime.open()
        policies = PolicySlots(state / "policy")
        billing = Billing(state / "billing.pb")
        functions = FunctionIndex(state / "catalogue.pb")
        peers = PeerStreams(machine, credentials, emulate=config.emulate_links, seed=config.seed)
        cache = CacheRoom(
            state / "cache",
            config.cache,
            CachePeers(machine, credentials, emulate=config.emulate_links, seed=config.seed),
            node.node_id,
            group,
        )
        await cache.open()
        shell = Shell(
            machine,
            runtime=runtime,
            environments=Environments(state / "environments"),
            code=CodeFolder(state / "code", lambda digest: uplink.fetch_code(digest)),
            peers=peers,
            decider=Decider(
                policies.restore(config.policy, now_s=monotonic_s(), wall_s=wall_s()),
                fallback=create("ect"),
                seed=config.seed + zlib.crc32(config.name.encode()),  # no two nodes draw alike
            ),
            group=group,
            slowdown=max(1.0, 1.0 / config.speed) if config.emulate_speed else 1.0,
        )
        shell.sizings = functions.catalogue.sizings
        shell.objects = cache.objects
        # Floors hold from the start, also when the scheduler is away.
        shell.feed(CatalogueReceived(catalogue=functions.catalogue))
        shell.feed(PricesReceived(prices=billing.prices))
        preparation = Preparation(shell.environments, node, group)
        preparation.follow(functions.catalogue)
        uplink = Uplink(
            scheduler=config.scheduler,
            credentials=credentials,
            shell=shell,
            functions=functions,
            policies=policies,
            billing=billing,
            probe=probe,
            group=group,
            on_catalogue=preparation.follow,
            cache=cache,
        )
        cache.on_changed = uplink.beat_soon
        door = Door(node.node_id, node.address)
        door.open()
        ingress = Ingress(
            shell, functions, billing, uplink.pull_function, node.node_id, group, door
        )
        invocation_pb2_grpc.add_InvocationServiceServicer_to_server(ingress, server)
        cache_pb2_grpc.add_CacheServiceServicer_to_server(cache.ingress, server)
        services = ("tierwise.v1.InvocationService", "tierwise.v1.CacheService")
        add_health_and_reflection(server, *services)
        await server.start()
        write_atomically(state / "address", node.address.encode())
        log.info("agent.started", node_id=node.node_id, tier=node.tier.label, address=node.address)

        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        background = [
            group.create_task(uplink.run_forever()),
            group.create_task(shell.tick_forever()),
            group.create_task(cache.run_forever()),
        ]
        await stop.wait()
        shell.feed(DrainAsked(is_on=True))
        await server.stop(grace=0.5)
        await uplink.leave()
        for task in background:
            task.cancel()
        door.close()
        await runtime.close()
        await peers.close()
        await cache.close()
        await uplink.close()
        (state / "address").unlink(missing_ok=True)
        log.info("agent.stopped", node_id=node.node_id)


def _node(config: AgentConfig, probe: Probe, address: str) -> Node:
    """Describe this node: what the file says, and what the machine has where it is silent."""
    real = probe.capacity()
    if not is_name(config.name):
        raise InvalidArgument(f"name = {config.name!r}: use letters a-z, digits, '-', '.', '_'")
    try:
        tier = parse_tier(config.tier)
    except ValueError as error:
        raise InvalidArgument(f"tier: {error}") from None
    if not 0.0 < config.speed <= 1000.0:
        raise InvalidArgument(f"speed = {config.speed}: it must be over 0; 1.0 is the reference")
    return Node(
        node_id=NodeId(config.name),
        tier=tier,
        capacity=Resources(
            cpus=config.cpus or real.cpus,
            memory_mib=config.memory_mib or real.memory_mib,
            gpu_slots=config.gpu_slots or real.gpu_slots,
        ),
        speed=config.speed,
        address=config.advertise or address,
        zone=config.zone,
        labels=tuple(sorted({**config.labels, PYTHON_LABEL: python_version()}.items())),
    )


def _isolation(config: AgentConfig) -> str:
    if config.isolation not in ISOLATIONS:
        words = ", ".join(ISOLATIONS)
        raise InvalidArgument(f"isolation = {config.isolation!r}: use one of {words}")
    return config.isolation


async def _join(config: AgentConfig, token: str) -> None:
    """Get this node its certificate.

    Raises:
        TierwiseError: There is no token, or the scheduler refused it.
    """
    if not token or not config.join:
        raise FailedPrecondition(
            f"{config.name} has no certificate yet: give the scheduler's join address (join = "
            '"host:port") and a token (`tierwise token create --role node`) in TIERWISE_TOKEN'
        )
    credentials, _, identity = await join(config.join, token, config.name)
    credentials.save(_identity_folder(config))
    log.info("node.joined", identity=identity.uri)


def _identity_folder(config: AgentConfig) -> Path:
    return Path(config.state_dir) / "credentials"


def main() -> int:
    """Parse the command line and run; return the exit code."""
    follow_parent()
    memory.set_up()
    parser = argparse.ArgumentParser(
        prog="tierwise agent", description=(serve.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", type=Path, required=True, help="agent.toml")
    parser.add_argument("--token", default="", help="one-time join token (or TIERWISE_TOKEN)")
    for key in ("name", "tier", "scheduler", "join", "listen", "state-dir"):
        parser.add_argument(f"--{key}", help=f"overrides {key.replace('-', '_')} of the file")
    flags = vars(parser.parse_args())
    path, token = flags.pop("config"), flags.pop("token") or os.environ.pop("TIERWISE_TOKEN", "")
    try:
        config = load(path, AgentConfig, overrides=flags)
        configure_logs(config.log_level)
        Path(config.state_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (_identity_folder(config) / "cert.pem").exists():
            uvloop.run(_join(config, token))
            # A fresh start: what made the key and the request weighs 13 MB and is not needed again.
            os.execv(sys.executable, [sys.executable, "-m", "agent.daemon", *sys.argv[1:]])
        uvloop.run(serve(config))
    except* TierwiseError as errors:
        error = errors.exceptions[0]
        print(f"tierwise agent: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidArgument) else 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
