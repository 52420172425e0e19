"""Interpreters for functions: the agent's own, or a venv per set of requirements."""

import asyncio
import hashlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tierwise.errors import StartFailed

BUILD_TIMEOUT_S = 600.0
REASON_LENGTH_MAX = 1500
NOISE = ("WARNING:", "DEPRECATION:", "[notice]")
SHIM_REQUIREMENTS = ("cloudpickle", "msgspec")
PRELOAD = ("numpy",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """An interpreter and what its zygote imports before it forks."""

    environment_id: str
    python: Path
    preload: tuple[str, ...] = PRELOAD


HOST = Environment(environment_id="host", python=Path(sys.executable))


class Environments:
    """Builds venvs, each once; equal requirements share one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._locks: dict[str, asyncio.Lock] = {}

    async def get(self, requirements: tuple[str, ...]) -> Environment:
        """Return the environment for `requirements`; none of them means the agent's interpreter.

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
                await self._build(folder, requirements)
        return Environment(environment_id=name, python=folder / "bin/python")

    async def _build(self, folder: Path, requirements: tuple[str, ...]) -> None:
        """Install into a folder beside, and rename it when it is whole."""
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        await _run(sys.executable, "-m", "venv", str(partial))
        await _run(
            str(partial / "bin/python"),
            *("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"),
            *SHIM_REQUIREMENTS,
            *requirements,
        )
        partial.replace(folder)  # we call the interpreter by path: the move breaks nothing


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(BUILD_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
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
