"""memory="auto" on live agents: learnt from calls, retried at double, recommended with evidence."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tierwise
from tests.e2e.waiting import until
from tierwise.cli.main import app as cli
from tierwise.sdk.operator import Operator

app = tierwise.App("memory")


@app.function(memory="auto", deadline="20s", timeout="30s", tier="cloud")
def hold(mib: int) -> int:
    return len(b"x" * (mib << 20))


@app.function(memory="512MiB", deadline="20s", tier="cloud")
def declared(mib: int) -> int:
    import time

    time.sleep(0.05)  # as long for small inputs as for large ones
    return len(b"x" * (mib << 20))


@app.function(memory="auto", deadline="20s", timeout="30s", tier="cloud")
def hungry(mib: int) -> int:
    return len(b"x" * (mib << 20))


@app.function(memory="auto", deadline="20s", timeout="30s", tier="cloud")
def greedy(mib: int) -> int:
    return len(b"x" * (mib << 20))


@pytest.fixture(autouse=True)
def use_cluster(client: tierwise.Client) -> None:
    app.use(client)


@pytest.fixture
def command(
    cluster: tierwise.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    monkeypatch.setenv("TIERWISE_CONTEXT", str(cluster.context))

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli, list(arguments))

    yield run


def outcomes(ask: Operator, name: str, count: int) -> list[dict[str, Any]]:
    """Return the records of a function, newest first, when there are so many."""

    def enough() -> list[dict[str, Any]]:
        calls = [c["outcome"] for c in ask.calls(f"default/{name}", limit=500)]
        return calls if len(calls) >= count else []

    return list(until(enough, what=f"{count} records of {name}"))


def test_each_call_comes_to_get_what_its_input_needs(ask: Operator) -> None:
    sizes = [1, 30, 5, 60, 12, 90, 3, 45, 20, 75, 8, 100]
    for mib in sizes:
        assert hold.remote(mib) == mib << 20
    found = outcomes(ask, "hold", len(sizes))
    assert {o["memory_mib"] for o in found} == {256}  # nothing was known
    assert {o["measures"]["0"] for o in found} == set(map(float, sizes))
    for outcome in found:  # a warm instance's peak is that of its latest call
        assert outcome["measures"]["0"] - 1 <= outcome["peak_memory_mib"]
        assert outcome["peak_memory_mib"] <= outcome["measures"]["0"] + 8

    def allotted(mib: int) -> int:
        known = {c["outcome"]["request_id"] for c in ask.calls("default/hold", limit=500)}
        assert hold.remote(mib) == mib << 20

        def latest() -> list[int]:
            calls = [c["outcome"] for c in ask.calls("default/hold", limit=500)]
            return [o["memory_mib"] for o in calls if o["request_id"] not in known]

        return int(until(latest, what="the record of the call")[0])

    until(lambda: allotted(2) < 64, what="a small call that gets little")
    assert 70 <= allotted(70) <= 140
    assert 300 <= allotted(300) <= 600  # three times as large as any before, and it ran


def test_a_call_that_runs_out_runs_once_more_with_double_and_is_charged(ask: Operator) -> None:
    assert hungry.remote(400) == 400 << 20
    [outcome] = outcomes(ask, "hungry", 1)
    assert outcome["memory_mib"] == 512
    assert outcome["retried_gb_s"] > 0
    assert outcome["error_code"] == ""


def test_one_that_needs_more_than_double_fails_with_the_reason(ask: Operator) -> None:
    with pytest.raises(tierwise.FunctionOutOfMemory, match="512 MiB"):
        greedy.remote(700)


def test_recommend_says_why_and_apply_deploys_it(
    ask: Operator, command: Any, tmp_path: Path
) -> None:
    inputs = tmp_path / "inputs.jsonl"
    sizes = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    inputs.write_text("\n".join(json.dumps({"mib": mib}) for mib in sizes), "utf-8")
    declared.deploy()
    few = command("recommend", "declared")
    assert few.exit_code != 0
    assert "only 0 calls" in str(few.exception)
    ran = command("profile", "declared", "--inputs", str(inputs), "--repetitions", "2")
    assert ran.exit_code == 0, ran.output
    assert "mib=89" in ran.stdout
    shown = command("recommend", "declared")
    assert shown.exit_code == 0, shown.output
    assert 'memory="auto"' in shown.stdout
    assert "20 calls" in shown.stdout
    said = json.loads(command("recommend", "declared", "--apply", "-o", "json").stdout)
    assert said["is_memory_auto"]
    assert said["gb_s_recommended"] < said["gb_s_fixed"] < said["gb_s_declared"]
    assert said["applied"]["spec"]["version"] == 2
    assert ask.function("declared")["spec"]["is_memory_auto"]
    assert ask.function("declared")["spec"]["version"] == 2
    again = json.loads(command("recommend", "declared", "--apply", "-o", "json").stdout)
    assert again["applied"]["spec"]["version"] == 2  # it is so already


def test_profile_refuses_inputs_that_are_none(command: Any, tmp_path: Path) -> None:
    path = tmp_path / "inputs.jsonl"
    for text in ("", "3", "{", '"text"'):
        path.write_text(text, "utf-8")
        assert "inputs.jsonl" in str(command("profile", "hold", "--inputs", str(path)).exception)
