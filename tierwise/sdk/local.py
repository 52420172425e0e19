"""A whole cluster of real processes on this machine, with emulated links and device speeds."""

import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tierwise.clock import monotonic_s, pause
from tierwise.config import AgentConfig, ClientConfig, LinkConfig, SchedulerConfig, dump
from tierwise.domain.topology import Tier
from tierwise.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from tierwise.files import write_atomically
from tierwise.placement.policy import create
from tierwise.sdk.client import Client
from tierwise.v1 import cluster_pb2, types_pb2
from tierwise.wire.daemon import PARENT_VARIABLE
from tierwise.wire.identity import Credentials

VIEW_S = 0.6  # within which agents know whom the scheduler knows
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0

# What each kind of node is declared, and emulated, to be. A cloud CPU is the reference.
CPUS = {Tier.CLOUD: 4.0, Tier.FOG: 2.0, Tier.EDGE: 1.0}
MEMORY_MIB = {Tier.CLOUD: 4096, Tier.FOG: 2048, Tier.EDGE: 768}
SPEED = {Tier.CLOUD: 1.0, Tier.FOG: 0.6, Tier.EDGE: 0.15}
# Order of magnitude of DETERMINISTIC6G's measured paths (12–29 ms to edge and cloud at p50) plus
# a wide-area leg to the cloud; uplinks between LTE (31 Mbit/s) and 5G (72–77), SIGCOMM'21.
LINKS = {
    "edge-edge": LinkConfig(rtt_ms=12, bandwidth_mbit_per_s=70, jitter_ms=1.5),
    "edge-fog": LinkConfig(rtt_ms=8, bandwidth_mbit_per_s=70, jitter_ms=1),
    "edge-cloud": LinkConfig(rtt_ms=50, bandwidth_mbit_per_s=70, jitter_ms=6),
    "fog-fog": LinkConfig(rtt_ms=6, bandwidth_mbit_per_s=1000, jitter_ms=0.5),
    "fog-cloud": LinkConfig(rtt_ms=40, bandwidth_mbit_per_s=500, jitter_ms=4),
    "cloud-cloud": LinkConfig(rtt_ms=1, bandwidth_mbit_per_s=10_000),
}


@dataclass(frozen=True, slots=True)
class NodePlan:
    """One node of the local cluster."""

    name: str
    tier: Tier


def parse_nodes(text: str) -> list[NodePlan]:
    """Return the nodes that "1c,2f,4e" means: cloud, fog and edge counts.

    Raises:
        InvalidArgument: It is not of that form, or asks for none or more than 64.
    """
    counts: dict[Tier, int] = {}
    letters = {"c": Tier.CLOUD, "f": Tier.FOG, "e": Tier.EDGE}
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)([cfe])", part)
        if match is None:
            raise InvalidArgument(f"nodes {text!r}: write for example 1c,1f,2e (cloud, fog, edge)")
        counts[letters[match[2]]] = counts.get(letters[match[2]], 0) + int(match[1])
    if not 1 <= sum(counts.values()) <= 64:
        raise InvalidArgument(f"nodes {text!r}: ask for 1 to 64 in all")
    return [
        NodePlan(f"{tier.label}-{index + 1}", tier)
        for tier in sorted(counts, reverse=True)
        for index in range(counts[tier])
    ]


def default_nodes(cpu_count: int) -> str:
    """Return the cluster that a machine of so many CPUs plays well.

    Edges are what there are many of: one per CPU, from two to eight, and a second fog beside
    eight of them. An idle agent takes about 70 MB, a busy one a CPU.
    """
    edge_count = min(8, max(2, cpu_count))
    fog_count = 2 if edge_count == 8 else 1
    return f"1c,{fog_count}f,{edge_count}e"


class LocalCluster:
    """Starts, watches and stops the processes. Everything it writes is in one state folder.

    The processes end with the thread that called `start`, however it ends: start from the main
    thread, or from one that lives as long as the cluster should.
    """

    def __init__(
        self,
        state: Path,
        nodes: str = "",
        *,
        policy: str = "learned",
        emulate: bool = True,
        links: Mapping[str, LinkConfig] = LINKS,
        on_progress: Callable[[str], None] = lambda text: None,
        seed: int = 0,
        adjust: Callable[[AgentConfig], AgentConfig] = lambda config: config,
    ) -> None:
        """Plan a cluster.

        Args:
            state: Folder for configurations, identities, data and logs.
            nodes: For example "1c,1f,2e"; empty: sized to this machine.
            policy: Built-in policy to begin with.
            emulate: Delay traffic by `links` and hold results back by SPEED.
            links: Paths between tiers.
            on_progress: Told in words what happens.
            seed: Of jitter and of policies that draw.
            adjust: Given each agent's configuration, returns the one that is used.

        Raises:
            InvalidArgument: `nodes` is not of that form.
            NotFound: There is no such policy.
        """
        create(policy)  # before anything is written
        self.state = state.resolve()
        self.plan = parse_nodes(nodes or default_nodes(len(os.sched_getaffinity(0))))
        self._policy = policy
        self._emulate = emulate
        self._links = dict(links)
        self._on_progress = on_progress
        self._seed = seed
        self._adjust = adjust
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._addresses: dict[str, str] = {}
        self._lock: int | None = None

    @property
    def context(self) -> Path:
        """Return the context folder for clients."""
        return self.state / "client"

    def __enter__(self) -> "LocalCluster":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and return when every node is ready.

        Raises:
            FailedPrecondition: A cluster runs in this folder already.
            Unavailable: A process ended or did not come up; the message has the end of its log.
        """
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._take_lock()
        try:
            self._start_scheduler()
            with Client(self.state / "scheduler/admin") as admin:
                for node in self.plan:
                    self._start_agent(node, admin)
                self._wait_ready(admin)
            self._write_context()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop every process: politely, then by force. Safe to call twice."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        ends_s = monotonic_s() + STOP_TIMEOUT_S
        for process in self._processes.values():
            try:
                process.wait(max(0.1, ends_s - monotonic_s()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        self._release_lock()

    def kill(self, name: str) -> None:
        """Kill a process as a crash would: "scheduler" or a node's name.

        Raises:
            NotFound: There is no such process.
        """
        process = self._process(name)
        process.kill()
        process.wait()

    def restart(self, name: str) -> None:
        """Start a process that has ended again, with its old identity and state.

        Returns at once; `wait_ready` waits until it serves.

        Raises:
            NotFound: There is no such process.
            FailedPrecondition: It is running.
        """
        if self._process(name).poll() is None:
            raise FailedPrecondition(f"{name} is running; kill it first")
        if name == "scheduler":
            self._spawn(name, "scheduler.daemon", self.state / "scheduler.toml")
        else:
            self._spawn(name, "agent.daemon", self.state / "agents" / name / "agent.toml")

    def wait_ready(self) -> None:
        """Return when every node is ready.

        Raises:
            Unavailable: A process has ended, or one is not ready after a minute.
        """
        with Client(self.state / "scheduler/admin") as admin:
            self._wait_ready(admin)

    def pid(self, name: str) -> int:
        """Return the process id of "scheduler" or a node."""
        return self._process(name).pid

    def ended(self) -> list[str]:
        """Return the names of processes that have ended."""
        return [name for name, process in self._processes.items() if process.poll() is not None]

    def clean(self) -> None:
        """Remove what earlier runs left in the state folder.

        Raises:
            FailedPrecondition: A cluster runs in it.
        """
        if not self.state.exists():
            return
        self._take_lock()
        try:
            for path in self.state.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        finally:
            self._release_lock()

    # -- processes ------------------------------------------------------------------------------

    def _start_scheduler(self) -> None:
        self._on_progress("starting the scheduler")
        folder = self.state / "scheduler"
        path = self.state / "scheduler.toml"
        config = SchedulerConfig(
            state_dir=str(folder),
            listen=self._address_before("main"),
            join_listen=self._address_before("join"),
            heartbeat_interval_s=0.5,
            policy=self._policy,
            links=self._links,
        )
        write_atomically(path, dump(config))
        (folder / "address").unlink(missing_ok=True)
        self._spawn("scheduler", "scheduler.daemon", path)
        self._wait_for(folder / "address", "scheduler")
        written = (folder / "address").read_bytes()
        self._addresses = msgspec.toml.decode(written, type=dict[str, str])
        write_atomically(self.state / "addresses.toml", written)
        # A scheduler that crashes must come back where agents and clients look for it.
        main, join = self._addresses["main"], self._addresses["join"]
        write_atomically(path, dump(msgspec.structs.replace(config, listen=main, join_listen=join)))

    def _address_before(self, key: str) -> str:
        """Return the address of the run before if it is free, so that contexts go on working."""
        try:
            written = (self.state / "addresses.toml").read_bytes()
            known = msgspec.toml.decode(written, type=dict[str, str])[key]
        except (OSError, msgspec.DecodeError, KeyError):
            return "127.0.0.1:0"
        return known if _is_free(known) else "127.0.0.1:0"

    def _process(self, name: str) -> subprocess.Popen[bytes]:
        try:
            return self._processes[name]
        except KeyError:
            known = ", ".join(self._processes) or "nothing"
            raise NotFound(f"there is no process {name!r} here; running: {known}") from None

    def _start_agent(self, node: NodePlan, admin: Client) -> None:
        self._on_progress(f"starting {node.name}")
        folder = self.state / "agents" / node.name
        data = self.state / "data"  # what functions may read on every node, as if it lay there
        data.mkdir(exist_ok=True)
        config = AgentConfig(
            name=node.name,
            tier=node.tier.label,
            scheduler=self._addresses["main"],
            join=self._addresses["join"],
            state_dir=str(folder),
            cpus=CPUS[node.tier],
            memory_mib=MEMORY_MIB[node.tier],
            speed=SPEED[node.tier] if self._emulate else 1.0,
            policy=self._policy,
            data=[str(data.resolve())],
            emulate_links=self._emulate,
            emulate_speed=self._emulate,
            seed=self._seed,
        )
        write_atomically(folder / "agent.toml", dump(self._adjust(config)))
        token = ""
        if not (folder / "credentials/cert.pem").exists():
            request = cluster_pb2.CreateTokenRequest(role=cluster_pb2.ROLE_NODE, name=node.name)

            async def create() -> str:
                connection = admin.connection()
                return (await connection.ask(connection.cluster.CreateToken, request)).token

            token = admin.run(create)
        (folder / "address").unlink(missing_ok=True)
        self._spawn(node.name, "agent.daemon", folder / "agent.toml", token)

    def _spawn(self, name: str, module: str, config: Path, token: str = "") -> None:
        logs = self.state / "logs"
        logs.mkdir(exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TIERWISE_")}
        # One thread per process: two cores carry a whole cluster.
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment[PARENT_VARIABLE] = str(os.getpid())
        if token:
            environment["TIERWISE_TOKEN"] = token
        with (logs / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process, which stops them in order
            )

    def _wait_ready(self, admin: Client) -> None:
        names = {node.name for node in self.plan}
        ends_s = monotonic_s() + START_TIMEOUT_S
        told = ""

        async def ready() -> set[str]:
            connection = admin.connection()
            try:
                response = await connection.ask(
                    connection.cluster.ListNodes, cluster_pb2.ListNodesRequest()
                )
            except Unavailable:
                return set()  # the scheduler is being restarted
            return {
                n.node.node_id
                for n in response.nodes
                if n.state == types_pb2.NODE_STATE_READY and n.policy_id
            }

        while not names <= (there := admin.run(ready)):
            self._check_alive()
            if monotonic_s() > ends_s:
                raise Unavailable(f"not ready in time: {', '.join(sorted(names - there))}")
            text = f"{len(names & there)} of {len(names)} nodes ready"
            if text != told:
                self._on_progress(told := text)
            pause(0.05)
        pause(VIEW_S)  # the last ones are news to the others, which hear of it five times a second

    def _wait_for(self, path: Path, name: str) -> None:
        ends_s = monotonic_s() + START_TIMEOUT_S
        while not path.exists():
            self._check_alive()
            if monotonic_s() > ends_s:
                raise Unavailable(f"{name} did not come up in {START_TIMEOUT_S:.0f} s")
            pause(0.02)

    def _check_alive(self) -> None:
        for name in self.ended():
            log = self.state / "logs" / f"{name}.log"
            tail = log.read_text(errors="replace").strip().splitlines()[-5:]
            raise Unavailable(f"{name} ended while starting:\n" + "\n".join(tail))

    def _write_context(self) -> None:
        admin = self.state / "scheduler/admin"
        Credentials.load(admin).save(self.context)
        config = ClientConfig(scheduler=self._addresses["main"])
        write_atomically(self.context / "client.toml", dump(config))

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        self._lock = os.open(self.state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise FailedPrecondition(
                f"a cluster runs in {self.state} already: stop it, or choose another --state"
            ) from None


def _is_free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_server((host, int(port))):
            return True
    except (OSError, ValueError):
        return False
