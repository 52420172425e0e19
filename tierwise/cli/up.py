"""`tierwise up`: a whole cluster on this machine, for as long as the command runs."""

import signal
import threading
from collections import deque
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from tierwise.cli.output import print_table, say
from tierwise.clock import monotonic_s

if TYPE_CHECKING:
    from tierwise.sdk.local import LocalCluster

DEFAULT_STATE = Path(".tierwise")
RESTARTS_MAX = 5  # of one process within RESTARTS_S; then it is left alone
RESTARTS_S = 60.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Nodes = Annotated[
    str,
    typer.Option(
        help="how many of each, c(loud), f(og), e(dge), for example 1c,1f,2e; default: an edge "
        "per CPU, 2 to 8, with 1 cloud and 1 fog (2 with 8 edges)",
        show_default=False,
    ),
]
State = Annotated[Path, typer.Option(help="folder for everything it writes")]
Policy = Annotated[str, typer.Option(help="built-in policy to begin with")]
Clean = Annotated[bool, typer.Option("--clean", help="forget the state of earlier runs")]
Real = Annotated[bool, typer.Option("--no-emulation", help="no emulated links and device speeds")]


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(up)


def up(
    nodes: Nodes = "",
    state: State = DEFAULT_STATE,
    policy: Policy = "learned",
    clean: Clean = False,
    real: Real = False,
) -> None:
    """Start a local cluster of real processes; Ctrl-C stops it."""
    from rich.console import Console

    from tierwise.sdk.local import LocalCluster

    stop = threading.Event()

    def stop_later(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    def stop_now(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt  # `start` stops what it has started, then passes it on

    status = Console(stderr=True).status("starting")
    cluster = LocalCluster(state, nodes, policy=policy, emulate=not real, on_progress=status.update)
    for number in STOP_SIGNALS:
        signal.signal(number, stop_now)
    with status:
        if clean:
            cluster.clean()
        cluster.start()
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, stop_later)
        _introduce(cluster, state, is_emulated=not real)
        _watch(cluster, state, stop)
    finally:
        say("stopping")
        cluster.stop()


def _introduce(cluster: "LocalCluster", state: Path, *, is_emulated: bool) -> None:
    from tierwise.sdk.local import CPUS, LINKS, MEMORY_MIB, SPEED

    rows = [
        (
            node.name,
            node.tier.label,
            f"{CPUS[node.tier]:g}",
            MEMORY_MIB[node.tier],
            f"{SPEED[node.tier] if is_emulated else 1.0:g}",
            (state / "agents" / node.name / "address").read_text(),
        )
        for node in cluster.plan
    ]
    print_table(["node", "tier", "cpus", "memory mib", "speed", "address"], rows)
    say(f"\n{len(rows)} nodes are ready. Their state, logs and keys are in {state}/.")
    if is_emulated:
        say("Emulated, not measured: one machine plays all tiers. Results are held back to run as")
        say("slow as `speed` says, and traffic between nodes takes as long as these links would:")
        tiers = {node.tier.label for node in cluster.plan}
        for name, link in LINKS.items():
            if set(name.split("-")) <= tiers:
                say(
                    f"  {name:11} {link.rtt_ms:g} ms round trip ± {link.jitter_ms:g}, "
                    f"{link.bandwidth_mbit_per_s:g} Mbit/s"
                )
    flag = "" if state == DEFAULT_STATE else f"--context {cluster.context} "
    say("\nIn another terminal:")
    for verb in ("deploy FILE.py", "invoke FUNCTION 21", "get calls", "explain CALL", "top"):
        say(f"  tierwise {flag}{verb}")
    say("Ctrl-C stops everything.")


def _watch(cluster: "LocalCluster", state: Path, stop: threading.Event) -> None:
    """Restart what ends, until told to stop; what ends again and again is left alone."""
    restarts: dict[str, deque[float]] = {}
    while not stop.wait(0.5):
        for name in cluster.ended():
            recent = restarts.setdefault(name, deque(maxlen=RESTARTS_MAX))
            now_s = monotonic_s()
            if len(recent) == RESTARTS_MAX and now_s - recent[0] < RESTARTS_S:
                continue
            recent.append(now_s)
            say(f"{name} has ended and is started again; its log is {state}/logs/{name}.log")
            if len(recent) == RESTARTS_MAX and now_s - recent[0] < RESTARTS_S:
                say(f"that was the {RESTARTS_MAX}th time in a minute: {name} gets a rest")
            cluster.restart(name)
