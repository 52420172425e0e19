"""`tierwise doctor`: what this machine can do, and what stands in the way of the rest."""

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
LAYER_HINTS = {
    "control group": "run the agent as root, or under systemd with Delegate= and DelegateSubgroup=",
    "process namespace": "run the agent as root, or allow user namespaces",
    "network namespace": "run the agent as root, or allow user namespaces",
    "private mounts": "run the agent as root, or allow user namespaces",
    "own user": "run the agent as root",
    "user namespace": "raise sysctl user.max_user_namespaces",
    "landlock": "Linux 5.13 or newer, with landlock among its `lsm=`",
    "seccomp": "Linux 5.0 or newer on x86-64 or aarch64",
    "refusal reports": "do not run the agent under another seccomp supervisor",
}
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


def _gpu() -> Record:
    count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return _check("gpu", OK, f"{count} NVIDIA" if count else "none")


def _layers() -> list[Record]:
    """Try the seal on a process of its own, as an agent started from here would put it on."""
    import json
    import subprocess

    code = "import json; from agent.runtime.seal import survey; print(json.dumps(survey()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
    )
    if done.returncode or not done.stdout:
        detail = (done.stderr.strip() or "no answer").splitlines()[-1]
        return [_check("seal", FAIL, detail, "the agent is not installed completely")]
    found = json.loads(done.stdout)
    active, missing = found["active"], found["missing"]
    checks = [_check(f"seal: {layer}", OK, what) for layer, what in active.items()]
    for layer, why in missing.items():
        checks.append(_check(f"seal: {layer}", WARN, why, LAYER_HINTS.get(layer, "")))
    if missing:
        hint = 'isolation = "strict" would run nothing here: functions must be trusted that far'
    else:
        hint = ""
    total = len(active) + len(missing)
    return [*checks, _check("seal", WARN if missing else OK, f"{len(active)}/{total} layers", hint)]


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
