"""Interpreters for functions: the agent's own, or a venv per set of requirements.

A venv is named by what it is made of: interpreter and requirements. Wheels are fetched into a
folder of this node first and installed from there, without an index: what was fetched once is
there when the index is not. Only wheels are taken, for building a source package would run its
code here, outside of any sandbox.
"""

import asyncio
import hashlib
import os
import shutil
import sys
from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import structlog

from tierwise.clock import monotonic_s
from tierwise.domain.function import requirements_digest
from tierwise.errors import StartFailed

log = structlog.get_logger()

BUILD_TIMEOUT_S = 600.0
REASON_LENGTH_MAX = 1500
NOISE = ("WARNING:", "DEPRECATION:", "[notice]")
SHIM_REQUIREMENTS = ("cloudpickle", "msgspec")
PRELOAD = ("numpy",)
FAILURE_KEPT_S = 30.0  # then the next call tries again
READINGS_MAX = 256
WHEELS_BYTES_MAX = 4 << 30
BUILDS_AT_ONCE = 1
PIP_OPTIONS = ("--quiet", "--disable-pip-version-check", "--no-input", "--only-binary", ":all:")
PIP_PATIENCE = {"PIP_RETRIES": "1", "PIP_TIMEOUT": "10"}  # unless the operator says otherwise


def python_version() -> str:
    """Return the minor version of Python that functions get on this node, "3.11"."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """An interpreter and what its zygote imports before it forks."""

    environment_id: str
    python: Path
    preload: tuple[str, ...] = PRELOAD


HOST = Environment(environment_id="host", python=Path(sys.executable))


class EnvironmentState(StrEnum):
    """How far an environment is."""

    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentReading:
    """What a node says of the environment of one set of requirements."""

    requirements_digest: str
    state: EnvironmentState
    message: str = ""


class Environments:
    """Builds venvs, each once; equal requirements share one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._wheels = root / "wheels"
        self._locks: dict[str, asyncio.Lock] = {}
        self._building = asyncio.Semaphore(BUILDS_AT_ONCE)
        self._failures: dict[str, tuple[float, str]] = {}  # when, and why
        self._readings: OrderedDict[str, EnvironmentReading] = OrderedDict()

    async def get(self, requirements: tuple[str, ...]) -> Environment:
        """Return the environment for `requirements`; none of them means the agent's interpreter.

        A failure is remembered for half a minute, so that not every call pays for it.

        Raises:
            StartFailed: They could not be installed; the message has pip's reason.
        """
        if not requirements:
            return HOST
        text = "\n".join([sys.version, *sorted(requirements)])
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        folder = self._root / name
        async with self._locks.setdefault(name, asyncio.Lock()):
            if not folder.exists():
                self._raise_known_failure(name)
                await self._make(name, folder, requirements)
            elif requirements_digest(requirements) not in self._readings:
                self._note(requirements, EnvironmentState.READY)
        return Environment(environment_id=name, python=folder / "bin/python")

    def readings(self) -> list[EnvironmentReading]:
        """Return the state of every environment that was asked for, the newest last."""
        return list(self._readings.values())

    def _raise_known_failure(self, name: str) -> None:
        failed_at_s, message = self._failures.get(name, (-FAILURE_KEPT_S, ""))
        if monotonic_s() - failed_at_s < FAILURE_KEPT_S:
            raise StartFailed(message)
        self._failures.pop(name, None)

    async def _make(self, name: str, folder: Path, requirements: tuple[str, ...]) -> None:
        self._note(requirements, EnvironmentState.BUILDING)
        started_s = monotonic_s()
        try:
            async with self._building:
                await self._build(folder, requirements)
        except (StartFailed, OSError) as error:
            failure = error if isinstance(error, StartFailed) else StartFailed(f"no venv: {error}")
            self._failures[name] = monotonic_s(), failure.message
            self._note(requirements, EnvironmentState.FAILED, failure.message)
            log.warning("environment.not_built", environment_id=name, cause=failure.message)
            raise failure from None
        self._note(requirements, EnvironmentState.READY)
        log.info("environment.built", environment_id=name, took_s=monotonic_s() - started_s)

    async def _build(self, folder: Path, requirements: tuple[str, ...]) -> None:
        """Install into a folder beside, and rename it when it is whole."""
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self._wheels.mkdir(parents=True, exist_ok=True)
        wanted = (*SHIM_REQUIREMENTS, *requirements)
        await _run(sys.executable, "-m", "venv", str(partial))
        pip = (str(partial / "bin/python"), "-m", "pip")
        links = ("--find-links", str(self._wheels))
        # An index that is away is no failure if the wheels are here from another time.
        await _run(*pip, "download", *PIP_OPTIONS, *links, "-d", links[1], *wanted)
        await _run(*pip, "install", *PIP_OPTIONS, "--no-index", *links, *wanted)
        await asyncio.to_thread(self._trim_wheels)
        partial.replace(folder)  # we call the interpreter by path: the move breaks nothing

    def _trim_wheels(self) -> None:
        """Bound the cache: what was fetched longest ago goes first."""
        files = sorted(self._wheels.iterdir(), key=lambda file: -file.stat().st_mtime)
        size_bytes = 0
        for file in files:
            size_bytes += file.stat().st_size
            if size_bytes > WHEELS_BYTES_MAX:
                file.unlink()

    def _note(
        self, requirements: tuple[str, ...], state: EnvironmentState, message: str = ""
    ) -> None:
        digest = requirements_digest(requirements)
        self._readings[digest] = EnvironmentReading(
            requirements_digest=digest, state=state, message=message
        )
        self._readings.move_to_end(digest)
        while len(self._readings) > READINGS_MAX:
            self._readings.popitem(last=False)


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**PIP_PATIENCE, **os.environ},
    )
    try:
        async with asyncio.timeout(BUILD_TIMEOUT_S):
            output, _ = await process.communicate()
    except BaseException as error:
        process.kill()
        await process.wait()
        if not isinstance(error, TimeoutError):
            raise
        raise StartFailed(
            f"installing the requirements took more than {BUILD_TIMEOUT_S:.0f} s; ask for fewer"
        ) from None
    if process.returncode:
        raise StartFailed(
            f"the requirements could not be installed on this node; correct them and deploy "
            f"again. pip said:\n{reason(output.decode(errors='replace'))}"
        )


def reason(output: str) -> str:
    """Return why pip failed: its errors, or the end of what it said if it named none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = list(dict.fromkeys(line for line in lines if line.startswith("ERROR:")))
    others = [line for line in lines if not line.startswith(NOISE)]
    return "\n".join(errors or others or lines)[-REASON_LENGTH_MAX:].strip()
