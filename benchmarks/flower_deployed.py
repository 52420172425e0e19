"""Flower as it is deployed: a SuperLink and SuperNodes, processes of their own on loopback."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tierwise.clock import monotonic_s, pause

BIN = Path(sys.executable).parent
START_S = 90.0
RUN_S = 170.0
POLL_VARIABLE = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"  # Flower's own knob: 1 s, at least 0.01

POLL_S = "0.25"

# Not a knob: what Flower would cost if its fixed sleeps of 3 s, in the grid and in every SuperNode,
# were shorter. Python imports it in every process that finds it. Shorter still is slower: a message
# is a new process, and on two cores ten SuperNodes that poll leave little to those.
PATCH = """
import time
_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.5))
"""
VARIANTS: Mapping[str, str] = {
    "defaults": "Flower, deployed",
    "tuned": f"Flower, task polling at {POLL_S} s",
    "patched": "Flower, patched: no sleep over 0.5 s",
}


class DeployedFlower:
    """A deployment that is up for as long as its `with` block."""

    def __init__(self, folder: Path, client_count: int, variant: str = "defaults") -> None:
        """Plan it; `variant` is one of VARIANTS."""
        self._folder = folder
        self._count = client_count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        if variant == "tuned":
            self._environment[POLL_VARIABLE] = POLL_S
        if variant == "patched":
            (folder / "patch").mkdir(parents=True)
            (folder / "patch/sitecustomize.py").write_text(PATCH)
            before = os.environ.get("PYTHONPATH", "")
            self._environment["PYTHONPATH"] = f"{folder / 'patch'}:{before}"

    def __enter__(self) -> "DeployedFlower":
        (self._folder / "home").mkdir(parents=True)
        port = _free_port()
        address = f"127.0.0.1:{port}"
        connection = f'[superlink]\ndefault = "b"\n[superlink.b]\naddress = "{address}"\n'
        (self._folder / "home/config.toml").write_text(f"{connection}insecure = true\n")
        try:
            self._start(
                *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)),
                "--disable-runtime-dependency-installation",
            )
            _wait_for(port)
            for index in range(self._count):
                config = f"partition-id={index} num-partitions={self._count}"
                self._start(
                    *("flower-supernode", "--insecure", "--superlink", address),
                    *("--port", str(_free_port()), "--node-config", config),
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10.0)
        for process in self._processes:  # their groups: the executors that they have started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, project: Path, config: Mapping[str, int | str]) -> list[float]:
        """Run a project that writes JSON to the path in its config's `out`; return that.

        Raises:
            RuntimeError: It did not; the message has the end of what Flower said.
        """
        out = self._folder / "out.json"
        out.unlink(missing_ok=True)
        values = {**config, "clients": self._count, "out": str(out)}
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        ran = subprocess.run(
            [str(BIN / "flwr"), "run", str(project), "b", "--run-config", text],
            env=self._environment,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=RUN_S,
        )
        ends_s = monotonic_s() + RUN_S
        while not (out.exists() and out.stat().st_size):
            if monotonic_s() > ends_s or ran.returncode:
                logs = "".join(path.read_text()[-400:] for path in self._folder.glob("*.log"))
                raise RuntimeError(f"Flower did not run: {ran.stdout}{ran.stderr}{logs}"[-3000:])
            pause(0.2)
        return [float(seconds) for seconds in json.loads(out.read_text())]

    def _start(self, name: str, *arguments: str) -> None:
        path = self._folder / f"{len(self._processes)}.log"
        with path.open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [str(BIN / name), *arguments],
                    env=self._environment,
                    cwd=self._folder,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_for(port: int) -> None:
    ends_s = monotonic_s() + START_S
    while monotonic_s() < ends_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        pause(0.1)
    raise RuntimeError(f"the SuperLink did not come up in {START_S:.0f} s")
