"""Processes: up, agent, scheduler, doctor, version."""

import os
import signal
import sys
import threading
from importlib.metadata import version as installed_version
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from tierwise.cli.output import Format, Output, say, show
from tierwise.errors import TierwiseError

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(up)
    app.command(context_settings=_PASS_ON)(agent)
    app.command(context_settings=_PASS_ON)(scheduler)
    app.command()(doctor)
    app.command()(version)


def up(
    nodes: Annotated[str, typer.Option(help="how many of each: c(loud), f(og), e(dge)")] = "1c,1f,2e",
    state: Annotated[Path, typer.Option(help="folder for everything it writes")] = Path(".tierwise"),
    policy: Annotated[str, typer.Option(help="built-in policy to begin with")] = "learned",
    clean: Annotated[bool, typer.Option("--clean", help="forget the state of earlier runs")] = False,
    real: Annotated[
        bool, typer.Option("--no-emulation", help="no emulated links and device speeds")
    ] = False,
) -> None:
    """Start a local cluster of real processes; Ctrl-C stops it."""
    from rich.console import Console

    from tierwise.sdk.local import CPUS, LINKS, MEMORY_MIB, SPEED, LocalCluster

    stop = threading.Event()

    def stop_on(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    console = Console(stderr=True)
    with console.status("starting") as status:
        cluster = LocalCluster(
            state, nodes, policy=policy, emulate=not real, on_progress=status.update
        )
        if clean:
            cluster.clean()
        cluster.start()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop_on)
        say(f"{len(cluster.plan)} nodes are ready. Their state, logs and keys are in {state}/.")
        if not real:
            say("Emulated, not measured (one machine plays all tiers):")
            for tier in sorted({node.tier for node in cluster.plan}):
                say(
                    f"  {tier.label:5} node: {CPUS[tier]:g} CPU, {MEMORY_MIB[tier]} MiB, "
                    f"speed {SPEED[tier]:g} (results held back to run that much slower)"
                )
            tiers = {node.tier.label for node in cluster.plan}
            for name, link in LINKS.items():
                if set(name.split("-")) <= tiers:
                    say(
                        f"  {name:11} link: {link.rtt_ms:g} ms round trip ± {link.jitter_ms:g}, "
                        f"{link.bandwidth_mbit_per_s:g} Mbit/s"
                    )
        flag = "" if state == Path(".tierwise") else f"--context {cluster.context} "
        say(f"Try:  tierwise {flag}get nodes      tierwise {flag}top      Ctrl-C stops everything.")
        while not stop.wait(0.5):
            for name in cluster.ended():
                say(f"{name} has ended; its log is {state}/logs/{name}.log. Restarting it.")
                cluster.restart(name)
    finally:
        say("stopping")
        cluster.stop()


def agent(context: typer.Context) -> None:
    """Run the agent daemon on this machine: tierwise agent --config agent.toml [--token T]."""
    _become("agent.daemon", context.args)


def scheduler(context: typer.Context) -> None:
    """Run the scheduler daemon: tierwise scheduler --config scheduler.toml."""
    _become("scheduler.daemon", context.args)


def version() -> None:
    """Print the version."""
    print(installed_version("tierwise"))


def doctor(output: Output = Format.TABLE) -> None:
    """Say what this machine can do, and what stands in the way of the rest."""
    checks = [_python(), _cgroup(), _gpu(), *_layers(), *_context()]
    show(
        checks,
        output,
        [
            ("check", lambda r: r["check"]),
            ("result", lambda r: r["result"]),
            ("detail", lambda r: r["detail"]),
        ],
        name=lambda r: str(r["check"]),
    )
    if any(check["result"] == "fail" for check in checks):
        raise typer.Exit(1)


def _become(module: str, arguments: list[str]) -> None:
    """Replace this process by a daemon; the command line stays light that way."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def _check(name: str, result: str, detail: str) -> dict[str, str]:
    return {"check": name, "result": result, "detail": detail}


def _python() -> dict[str, str]:
    is_new_enough = sys.version_info >= (3, 11)
    return _check("python", "ok" if is_new_enough else "fail", sys.version.split()[0])


def _cgroup() -> dict[str, str]:
    root = Path("/sys/fs/cgroup")
    kind = "v2" if (root / "cgroup.controllers").exists() else "v1"
    folder = root if kind == "v2" else root / "memory"
    is_writable = os.access(folder, os.W_OK)
    hint = "" if is_writable else "; memory limits then rest on rlimits and on watching"
    return _check("cgroup", "ok" if is_writable else "warn", f"{kind}, writable: {is_writable}{hint}")


def _gpu() -> dict[str, str]:
    count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return _check("gpu", "ok", f"{count} NVIDIA" if count else "none")


def _layers() -> list[dict[str, str]]:
    import json
    import subprocess

    code = "import json; from agent.runtime.sandbox import active_layers as a; print(json.dumps(a()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return [_check("sandbox", "fail", done.stderr.strip().splitlines()[-1])]
    layers: dict[str, str] = json.loads(done.stdout)
    found = [_check(f"sandbox: {name}", "ok", what) for name, what in layers.items()]
    missing = "namespaces, landlock and seccomp are not there yet: run only code that you trust"
    return [*found, _check("sandbox: isolation", "warn", missing)]


def _context() -> list[dict[str, str]]:
    from tierwise.cli.common import operator
    from tierwise.cli.output import age
    from tierwise.clock import wall_s
    from tierwise.sdk.client import find_context
    from tierwise.wire.identity import Credentials, expiry_unix_s

    try:
        folder = find_context()
        left_s = expiry_unix_s(Credentials.load(folder)) - wall_s()
    except TierwiseError as error:
        return [_check("context", "warn", error.message)]
    certificate = _check(
        "certificate",
        "ok" if left_s > 7 * 86400 else "warn" if left_s > 0 else "fail",
        f"{folder}: valid for {age(left_s)}" if left_s > 0 else "expired: `tierwise login` again",
    )
    try:
        with operator() as ask:
            identity = ask.identity()
            nodes = ask.nodes()
    except TierwiseError as error:
        return [certificate, _check("cluster", "fail", error.message)]
    ready = sum(node["state"] == "ready" for node in nodes)
    detail = f"{identity['cluster_id']} as {identity['identity']}, {ready}/{len(nodes)} nodes ready"
    return [certificate, _check("cluster", "ok" if ready == len(nodes) else "warn", detail)]
