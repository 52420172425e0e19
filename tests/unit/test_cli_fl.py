"""`tierwise fl`: what it writes, what it shows, how it refuses."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tierwise.cli import fl, main
from tierwise.cli.files import load_module
from tierwise.errors import AlreadyExists, InvalidArgument, NotFound, TierwiseError

UPDATE = {
    "client": "client-1",
    "node_id": "edge-1",
    "state": "counted",
    "example_count": 360.0,
    "elapsed_s": 0.5,
    "staleness": 0,
    "metrics": {"loss": 0.25},
    "message": "",
}
ROUND = {
    "round": 7,
    "state": "done",
    "updates": [UPDATE, {**UPDATE, "client": "client-2", "state": "late", "message": "so\nlate"}],
    "aggregators": [{"node_id": "fog-1"}, {"node_id": "cloud-1"}],
    "collect_s": 0.5,
    "aggregate_s": 0.02,
    "metrics": {"accuracy": 0.9},
    "wanted_count": 2,
    "message": "",
}
JOB = {
    "spec": {
        "job": "digits",
        "namespace": "default",
        "round_count": 10,
        "strategy": {"name": "fedavg"},
        "clients": [{}, {}],
    },
    "state": "running",
    "done_count": 7,
    "root": "cloud-1",
    "created_unix_s": 0.0,
    "message": "waiting for clients",
}


class Answers:
    """What the scheduler would say."""

    def federated_jobs(self, namespace: str = "") -> list[dict[str, Any]]:
        return [JOB]

    def federated_job(self, job: str, namespace: str, limit: int = 100) -> dict[str, Any]:
        if job != "digits":
            raise NotFound(f"there is no federated job {namespace}/{job}")
        return {"job": JOB, "rounds": [ROUND]}

    def stop_federated(self, job: str, namespace: str) -> dict[str, Any]:
        return {**JOB, "state": "stopped"}

    def resume_federated(self, job: str, namespace: str, rounds: int) -> dict[str, Any]:
        return {**JOB, "spec": {**JOB["spec"], "round_count": rounds}}  # type: ignore[dict-item]

    def nodes(self) -> list[dict[str, Any]]:
        names = [("cloud-1", "cloud"), ("edge-a", "edge"), ("edge-b", "edge")]
        return [{"node": {"node_id": n, "tier": t}, "state": "ready"} for n, t in names]


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def operator() -> Iterator[Answers]:
        yield Answers()

    monkeypatch.setattr(fl, "operator", operator)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main.app, ["fl", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_a_new_project_names_the_nodes_that_there_are_and_is_a_job() -> None:
    assert run("new", "my-digits", "--clients", "3").strip() == "my-digits/train.py"
    job = fl._job_of("my-digits")
    sites = {each.client: each.node_id for each in job._spec.clients}
    assert sites == {"client-1": "edge-a", "client-2": "edge-b", "client-3": "edge-a"}
    assert fl._job_of("my-digits/train.py:job").name == "my-digits"
    with pytest.raises(NotFound, match="named other"):
        fl._job_of("my-digits/train.py:other")
    with pytest.raises(AlreadyExists, match="exists already"):
        run("new", "my-digits")
    with pytest.raises(InvalidArgument):
        run("new", "My Digits")


def test_the_functions_of_a_new_project_learn() -> None:
    run("new", "p")
    module = load_module(Path("p/train.py"))
    arrays = [np.zeros((64, 10)), np.zeros(10)]
    accuracies = []
    for number in range(1, 4):
        updates = [
            module.client(
                [array.copy() for array in arrays],
                {"data": i, "count": 4, "round": number, "epochs": 2, "rate": 0.2},
            )
            for i in range(4)
        ]
        total = sum(count for _, count, _ in updates)
        arrays = [sum(count * a[k] for a, count, _ in updates) / total for k in (0, 1)]
        accuracies.append(module.evaluate(arrays, {})["accuracy"])
    assert total == 1797 - 360
    assert accuracies[-1] > accuracies[0] > 0.5


def test_rounds_and_clients_are_shown_as_tables_and_as_json() -> None:
    table = run("log", "digits").splitlines()
    assert table[1].split()[:3] == ["7", "done", "1/2"]
    assert "fog-1,cloud-1" in table[1] and "accuracy 0.9" in table[1]
    clients = run("log", "digits", "--round", "7").splitlines()
    assert [line.split()[0] for line in clients[1:]] == ["client-1", "client-2"]
    assert "so late" in clients[2]
    assert json.loads(run("log", "digits", "--json"))["rounds"][0]["round"] == 7
    assert json.loads(run("log", "digits", "--round", "7", "--json"))["round"] == 7
    assert json.loads(run("list", "--json"))[0]["spec"]["job"] == "digits"
    assert run("list", "-o", "name").strip() == "digits"
    assert "7/10" in run("list")
    with pytest.raises(NotFound, match="has no round 8"):
        run("log", "digits", "--round", "8")


def test_questions_are_listed_and_their_arguments_read() -> None:
    names = {each["question"] for each in json.loads(run("ask", "digits", "--json"))}
    assert {"similarity", "krum", "shapley"} <= names
    assert fl._arguments(["count=3", "names=[1]", "text=abc", 'client="7"']) == {
        "count": 3,
        "names": [1],
        "text": "abc",
        "client": "7",
    }
    with pytest.raises(InvalidArgument, match="write NAME=VALUE"):
        run("ask", "digits", "krum", "3")


def test_stop_and_resume_say_what_became_of_it() -> None:
    stopped = CliRunner().invoke(main.app, ["fl", "stop", "digits"])
    assert "default/digits is stopped after 7 rounds" in stopped.stderr
    resumed = CliRunner().invoke(main.app, ["fl", "resume", "digits", "--rounds", "12"])
    assert "running" in resumed.stderr


def test_a_file_that_makes_no_job_or_several_is_refused_with_what_to_do() -> None:
    Path("none.py").write_text("x = 1\n")
    with pytest.raises(NotFound, match="it makes none"):
        run("run", "none.py")
    with pytest.raises(NotFound, match="`tierwise fl new NAME` writes one"):
        run("run", "missing.py")
    Path("broken.py").write_text("1/0\n")
    with pytest.raises(InvalidArgument, match="ZeroDivisionError"):
        run("run", "broken.py")


class Changes:
    """A job that is followed, and interrupted if `is_cut`."""

    def __init__(self, is_cut: bool) -> None:
        self.is_cut = is_cut

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"job": JOB, "round": {**ROUND, "state": "collecting"}}
        if self.is_cut:
            raise KeyboardInterrupt
        yield {"job": {**JOB, "state": "succeeded", "message": ""}, "round": ROUND}


def test_ctrl_c_leaves_the_job_running_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert fl._follow(Changes(False), "digits", 10)["state"] == "succeeded"
    with pytest.raises(KeyboardInterrupt):
        fl._follow(Changes(True), "digits", 10)
    told = capsys.readouterr().err
    assert "digits goes on" in told and "tierwise fl stop digits" in told


def test_without_a_cluster_a_project_is_for_the_nodes_of_tierwise_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def nobody() -> Iterator[Answers]:
        raise TierwiseError("there is no cluster")
        yield Answers()

    monkeypatch.setattr(fl, "operator", nobody)
    assert fl._edges() == ["edge-1", "edge-2"]


@pytest.mark.parametrize("verb", ["new", "run", "list", "log", "stop", "resume", "ask"])
def test_every_verb_explains_itself(verb: str) -> None:
    help_text = run(verb, "--help")
    assert "Usage" in help_text and len(help_text.splitlines()) > 5
