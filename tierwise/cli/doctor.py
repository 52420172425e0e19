"""`tierwise doctor`: what this machine can do, and what stands in the way of the rest."""

import os
import socket
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

import typer

from tierwise.cli.output import Format, Output, Record, show
from tierwise.errors import TierwiseError, Unavailable

OK, WARN, FAIL = "ok", "warn", "fail"
WEEK_S = 7 * 86_400.0
PACKAGES = ("grpcio", "protobuf", "uvloop", "cloudpickle", "numpy")
COLUMNS = [
    ("check", lambda record: record["check"]),
    ("result", lambda record: record["result"]),
    ("detail", lambda record: record["detail"]),
    ("hint", lambda record: record["hint"]),
]


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(doctor)


def doctor(output: Output = Format.TABLE) -> None:
    """Say what this machine can do, and what stands in the way; 1 if something fails."""
    checks = [
        _python(),
        *_packages(),
        _ports(),
        _cgroup(),
        _gpu(),
        *_layers(),
        *_context(),
    ]
    show(checks, output, COLUMNS, name=lambda record: str(record["check"]))
    if any(check["result"] == FAIL for check in checks):
        raise typer.Exit(1)


def _check(name: str, result: str, detail: str, hint: str = "") -> Record:
    return {"check": name, "result": result, "detail": detail, "hint": hint}


def _python() -> Record:
    is_new_enough = sys.version_info >= (3, 11)
    hint = "" if is_new_enough else "install Python 3.11 or newer"
    return _check("python", OK if is_new_enough else FAIL, sys.version.split()[0], hint)


def _packages() -> list[Record]:
    found = []
    for name in ("tierwise", *PACKAGES):
        try:
            found.append(_check(name, OK, installed_version(name)))
        except PackageNotFoundError:
            hint = f"pip install {name}"
            found.append(_check(name, FAIL, "not installed", hint))
    return found


def _ports() -> Record:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return _check("ports", OK, f"could listen on 127.0.0.1:{server.getsockname()[1]}")
    except OSError as error:
        return _check("ports", FAIL, str(error), "daemons must be allowed to listen on a port")


def _cgroup() -> Record:
    root = Path("/sys/fs/cgroup")
    kind = "v2" if (root / "cgroup.controllers").exists() else "v1"
    folder = root if kind == "v2" else root / "memory"
    if os.access(folder, os.W_OK):
        return _check("cgroup", OK, f"{kind}, writable")
    hint = "memory limits rest on rlimits alone; delegate a cgroup to the agent's user"
    return _check("cgroup", WARN, f"{kind}, not writable", hint)


def _gpu() -> Record:
    count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return _check("gpu", OK, f"{count} NVIDIA" if count else "none")


def _layers() -> list[Record]:
    import json
    import subprocess

    code = (
        "import json; from agent.runtime.sandbox import active_layers; print(json.dumps("
        "active_layers()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
    )
    if done.returncode:
        detail = (done.stderr.strip() or "no answer").splitlines()[-1]
        return [_check("sandbox", FAIL, detail, "the agent is not installed completely")]
    layers: dict[str, str] = json.loads(done.stdout)
    found = [_check(f"sandbox: {name}", OK, what) for name, what in layers.items()]
    missing = [name for name in ("namespaces", "landlock", "seccomp") if name not in layers]
    if missing:
        hint = "run only code that you trust"
        found.append(_check("sandbox: isolation", WARN, f"without {', '.join(missing)}", hint))
    return found


def _context() -> list[Record]:
    from tierwise.sdk.client import find_context
    from tierwise.wire.identity import Credentials

    try:
        folder = find_context()
        credentials = Credentials.load(folder)
    except TierwiseError as error:
        return [_check("context", WARN, error.message)]
    checks = [_check("context", OK, str(folder)), *_certificate(credentials.certificate)]
    return [*checks, _cluster()]


def _certificate(pem: bytes) -> list[Record]:
    from cryptography import x509

    from tierwise.cli.output import age
    from tierwise.clock import wall_s

    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        return [_check("certificate", FAIL, f"damaged: {error}", "`tierwise login` again")]
    now_s = wall_s()
    left_s = certificate.not_valid_after_utc.timestamp() - now_s
    early_s = certificate.not_valid_before_utc.timestamp() - now_s
    if left_s <= 0:
        validity = _check("certificate", FAIL, "expired", "`tierwise login` again")
    elif left_s < WEEK_S:
        validity = _check("certificate", WARN, f"valid for {age(left_s)}", "`tierwise login` soon")
    else:
        validity = _check("certificate", OK, f"valid for {age(left_s)}")
    if early_s > 0:
        detail = f"{age(early_s)} behind the start of the certificate"
        return [validity, _check("clock", FAIL, detail, "set this machine's clock")]
    return [validity, _check("clock", OK, "after the start of the certificate")]


def _cluster() -> Record:
    from tierwise.cli.common import operator

    try:
        with operator() as ask:
            identity = ask.identity()
            nodes = ask.nodes()
    except TierwiseError as error:
        hint = "is it running? `tierwise up`" if isinstance(error, Unavailable) else ""
        return _check("cluster", FAIL, error.message, hint)
    ready = sum(node["state"] == "ready" for node in nodes)
    detail = f"{identity['cluster_id']} as {identity['identity']}, {ready}/{len(nodes)} nodes ready"
    if ready == len(nodes):
        return _check("cluster", OK, detail)
    return _check("cluster", WARN, detail, "`tierwise get nodes` tells which are not")
