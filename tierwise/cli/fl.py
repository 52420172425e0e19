"""Federated learning: start a project, run its job, follow it, ask about its rounds."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tierwise.cli.common import complete_jobs, operator
from tierwise.cli.files import load_module
from tierwise.cli.fl_template import project
from tierwise.cli.output import Format, Output, Record, age, ms, say, show, show_value
from tierwise.clock import wall_s
from tierwise.domain.ids import is_name
from tierwise.errors import AlreadyExists, InvalidArgument, NotFound, TierwiseError

if TYPE_CHECKING:
    from tierwise.sdk.federated import FederatedJob

app = typer.Typer(help=__doc__, no_args_is_help=True)

Job = Annotated[str, typer.Argument(help="the job's name", autocompletion=complete_jobs)]
Namespace = Annotated[str, typer.Option(help="where the job lives")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, as -o json does")]
FILE = "train.py"
CLIENTS_MAX = 1000


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="of the project's folder and of its job")],
    clients: Annotated[int, typer.Option(help="how many", min=1, max=CLIENTS_MAX)] = 4,
) -> None:
    """Write a small project that works: ten rounds on scikit-learn's digits."""
    folder = Path(name)
    if not is_name(folder.name):
        raise InvalidArgument(f"{folder.name!r}: use a-z, 0-9, '-', '.', '_'")
    path = folder / FILE
    if path.exists():
        raise AlreadyExists(f"{path} exists already: choose another name, or remove it")
    nodes = _edges()
    sites = {f"client-{i + 1}": nodes[i % len(nodes)] for i in range(clients)}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(project(folder.name, str(path), sites), encoding="utf-8")
    say(f"{clients} clients on {', '.join(nodes)}; run it with: tierwise fl run {path}")
    print(path)


@app.command()
def run(
    target: Annotated[str, typer.Argument(help="FILE.py or its folder; FILE.py:job for one job")],
    fresh: Annotated[bool, typer.Option("--fresh", help="begin anew if it has run before")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="start it, and do not wait")] = False,
    output: Output = Format.TABLE,
    as_json: AsJson = False,
) -> None:
    """Start the job of a project, or go on with it, and show its rounds until it has ended.

    Ctrl-C stops showing; the job goes on.
    """
    from tierwise.sdk.client import Client

    job = _job_of(target)
    with Client() as client:
        job.use(client)
        started = job.start(fresh=fresh)
        if started["state"] in ("stopped", "failed"):
            say(f"{job.name} was {started['state']}; it goes on")
            started = job.resume()
        elif started["state"] == "succeeded":
            say(f"{job.name} has done all its rounds before; --fresh begins anew")
        if not detach and started["state"] == "running":
            started = _follow(job.watch(), job.name, int(started["spec"]["round_count"]))
    if output is Format.NAME:
        print(job.name)
    elif output is Format.TABLE and not as_json:
        _print_rounds(job.name, job.namespace)
    else:
        show_value(started, _format(output, as_json))
    if started["state"] == "failed":
        raise TierwiseError(f"the federated job {job.name} failed: {started['message']}")


@app.command(name="list")
def list_jobs(
    namespace: Annotated[str, typer.Option(help="this namespace only")] = "",
    output: Output = Format.TABLE,
    as_json: AsJson = False,
) -> None:
    """List federated jobs, the newest first."""
    with operator() as ask:
        found = ask.federated_jobs(namespace)
    empty = "no federated jobs yet: `tierwise fl new NAME`"
    name = JOB_COLUMNS[0][1]
    show(found, _format(output, as_json), JOB_COLUMNS, name=name, empty=empty)


@app.command()
def log(
    job: Job,
    number: Annotated[
        int | None, typer.Option("--round", help="its clients, one by one", min=0)
    ] = None,
    limit: Annotated[int, typer.Option(help="at most so many rounds", min=1)] = 50,
    namespace: Namespace = "default",
    output: Output = Format.TABLE,
    as_json: AsJson = False,
) -> None:
    """Show what became of the rounds of a job, or of each client in one of them."""
    form = _format(output, as_json)
    with operator() as ask:
        found = ask.federated_job(job, namespace, 1000 if number is not None else limit)
    if number is None:
        _print_records(found, form)
        return
    rounds = [each for each in found["rounds"] if each["round"] == number]
    if not rounds:
        raise NotFound(f"{namespace}/{job} has no round {number} that is kept")
    if form is not Format.TABLE:
        show_value(rounds[0], form)
        return
    show(rounds[0]["updates"], form, UPDATE_COLUMNS, name=UPDATE_COLUMNS[0][1])
    if rounds[0]["message"]:
        say(rounds[0]["message"])


@app.command()
def stop(job: Job, namespace: Namespace = "default") -> None:
    """Stop a job; `resume` goes on from its newest model."""
    with operator() as ask:
        found = ask.stop_federated(job, namespace)
    say(f"{namespace}/{job} is {found['state']} after {found['done_count']} rounds")


@app.command()
def resume(
    job: Job,
    rounds: Annotated[int, typer.Option(help="how many in all; default: as before", min=0)] = 0,
    namespace: Namespace = "default",
) -> None:
    """Go on with a job that was stopped or has failed, or give it more rounds."""
    with operator() as ask:
        found = ask.resume_federated(job, namespace, rounds)
    say(f"{namespace}/{job} is {found['state']}, {found['done_count']} rounds are done")


@app.command()
def ask(
    job: Job,
    question: Annotated[
        str, typer.Argument(help="such as cosine; without one: what there is")
    ] = "",
    arguments: Annotated[list[str] | None, typer.Argument(help="NAME=VALUE, JSON or text")] = None,
    number: Annotated[int, typer.Option("--round", help="default: the newest", min=-1)] = -1,
    namespace: Namespace = "default",
    output: Output = Format.JSON,
    as_json: AsJson = False,
) -> None:
    """Ask about the rounds of a job: who is like whom, who helps, whom to distrust."""
    from tierwise.functions.fl.questions import QUESTIONS
    from tierwise.sdk.client import Client
    from tierwise.sdk.rounds import Rounds

    if not question:
        known = [{"question": each.name, "says": each.summary} for each in QUESTIONS.values()]
        form = Format.JSON if as_json else Format.TABLE
        show(known, form, QUESTION_COLUMNS, name=QUESTION_COLUMNS[0][1])
        return
    given = _arguments(arguments or [])
    with Client() as client:
        found = Rounds(client, job, namespace).ask(question, round=number, **given)
    show_value(_plain(found), _format(output, as_json))


def _follow(changes: Any, name: str, round_count: int) -> Record:
    """Show the rounds of a job as they end; return how the job did."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    job: Record = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(name, total=round_count)
        try:
            for change in changes:
                job = change["job"]
                total = int(job["spec"]["round_count"])
                words = _words(job, change.get("round"))
                progress.update(bar, completed=job["done_count"], total=total, description=words)
        except KeyboardInterrupt:
            progress.stop()
            say(
                f"{name} goes on: `tierwise fl log {name}` shows its rounds, "
                f"`tierwise fl stop {name}` stops it"
            )
            raise
    return job


def _words(job: Record, round_: Record | None) -> str:
    """Return what a job does at present, in a few words."""
    name = job["spec"]["job"]
    if job["message"]:
        return f"{name}: {job['message'][:100]}"
    if round_ is None:
        return str(name)
    if round_["state"] == "collecting":
        return f"{name}: round {round_['round']}, {_count(round_, 'counted')} of " + str(
            round_["wanted_count"]
        )
    return f"{name}: round {round_['round']} {round_['state']} {_metrics(round_)}".rstrip()


def _print_rounds(job: str, namespace: str) -> None:
    with operator() as ask:
        _print_records(ask.federated_job(job, namespace), Format.TABLE)


def _print_records(found: Record, form: Format) -> None:
    if form in (Format.JSON, Format.YAML):
        show_value(found, form)
        return
    job = found["job"]
    waits = job["message"] or "no rounds yet"
    show(found["rounds"], form, ROUND_COLUMNS, name=ROUND_COLUMNS[0][1], empty=waits)
    if job["message"] and found["rounds"]:
        say(f"{job['state']}: {job['message']}")


def _job_of(target: str) -> "FederatedJob":
    """Import a project's file and return its one job, or the named one."""
    from tierwise.sdk.federated import FederatedJob

    file, _, name = target.partition(":")
    path = Path(file) / FILE if Path(file).is_dir() else Path(file)
    if not path.exists():
        raise NotFound(f"there is no file {path}; `tierwise fl new NAME` writes one")
    module = load_module(path)
    jobs = {key: value for key, value in vars(module).items() if isinstance(value, FederatedJob)}
    if name:
        if name not in jobs:
            raise NotFound(f"{path} has no tierwise.FederatedJob named {name}")
        return jobs[name]
    if len({id(job) for job in jobs.values()}) != 1:
        many = f"several, name one: {path}:{' or :'.join(jobs)}" if jobs else "none"
        raise NotFound(f"{path} should make one tierwise.FederatedJob; it makes {many}")
    return next(iter(jobs.values()))


def _edges() -> list[str]:
    """Return the edge nodes of the cluster, if there is one here; else those of `tierwise up`."""
    try:
        with operator() as ask:
            nodes = [row["node"] for row in ask.nodes() if row["state"] == "ready"]
    except TierwiseError:
        nodes = []
    edges = sorted(node["node_id"] for node in nodes if node["tier"] == "edge")
    return edges or sorted(node["node_id"] for node in nodes) or ["edge-1", "edge-2"]


def _arguments(texts: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            raise InvalidArgument(f"{text!r}: write NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _plain(value: Any) -> Any:
    """Return an answer as JSON can show it."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _format(output: Format, as_json: bool) -> Format:
    return Format.JSON if as_json else output


def _count(round_: Record, state: str) -> int:
    return sum(update["state"] == state for update in round_["updates"])


def _metrics(round_: Record) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(round_["metrics"].items()))


JOB_COLUMNS = [
    ("job", lambda r: r["spec"]["job"]),
    ("namespace", lambda r: r["spec"]["namespace"]),
    ("state", lambda r: r["state"]),
    ("rounds", lambda r: f"{r['done_count']}/{r['spec']['round_count']}"),
    ("strategy", lambda r: r["spec"]["strategy"]["name"]),
    ("clients", lambda r: len(r["spec"]["clients"])),
    ("root", lambda r: r["root"]),
    ("age", lambda r: age(wall_s() - r["created_unix_s"])),
    ("message", lambda r: r["message"][:60]),
]
ROUND_COLUMNS = [
    ("round", lambda r: r["round"]),
    ("state", lambda r: r["state"]),
    ("counted", lambda r: f"{_count(r, 'counted')}/{len(r['updates'])}"),
    ("late", lambda r: _count(r, "late")),
    ("quarantined", lambda r: _count(r, "quarantined")),
    ("failed", lambda r: _count(r, "failed")),
    ("aggregators", lambda r: ",".join(a["node_id"] for a in r["aggregators"])),
    ("collect", lambda r: ms(r["collect_s"])),
    ("aggregate", lambda r: ms(r["aggregate_s"])),
    ("metrics", _metrics),
    ("message", lambda r: r["message"][:60]),
]
UPDATE_COLUMNS = [
    ("client", lambda r: r["client"]),
    ("node", lambda r: r["node_id"]),
    ("state", lambda r: r["state"]),
    ("examples", lambda r: f"{r['example_count']:g}"),
    ("took", lambda r: ms(r["elapsed_s"])),
    ("staleness", lambda r: r["staleness"]),
    ("metrics", _metrics),
    ("message", lambda r: r["message"][:60]),
]
QUESTION_COLUMNS = [("question", lambda r: r["question"]), ("says", lambda r: r["says"])]
