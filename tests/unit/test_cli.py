"""The command line: what it prints where, and how it ends."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tierwise.cli import main
from tierwise.cli.output import table_lines
from tierwise.errors import ERROR_BY_CODE, NotFound, TierwiseError, error_from_code
from tierwise.placement.score import DEFAULT_WEIGHTS
from tierwise.sdk.local import default_nodes, parse_nodes
from tierwise.sdk.operator import Operator

VERBS = (
    *("up", "agent", "scheduler", "deploy", "invoke", "submit", "get", "describe", "logs"),
    *("usage", "explain", "top", "drain", "remove", "login", "token", "policy", "doctor"),
    *("version", "completion", "redrive", "delete", "bill", "budget"),
)

POLICY_VERBS = ("promote", "publish", "rollback", "shadow", "canary", "estimate")

NODE = {
    "node": {
        "node_id": "edge-1",
        "tier": "edge",
        "capacity": {"cpus": 1.0, "memory_mib": 768},
        "speed": 0.4,
        "address": "127.0.0.1:1",
    },
    "state": "ready",
    "reading": {
        "free": {"cpus": 0.5, "memory_mib": 700},
        "running": 1,
        "queued": 2,
        "warm": {"default/f@1": 3},
    },
    "host": {"cpu_percent": 12.0, "agent_rss_mib": 55.0},
    "age_s": 0.4,
    "policy_id": "ect@1",
    "policies": [
        {"policy_id": "odd@1", "duty": "active", "breaker": "open", "fallbacks": {"error": 9}},
        {"policy_id": "new@1", "duty": "shadow", "breaker": "open", "fallbacks": {"dropped": 5}},
    ],
}
IDLE = [
    {
        "namespace": "a",
        "function": "f",
        "node_id": "edge-1",
        "warm_count": 2,
        "idle_gb_s": 1.5,
        "idle_usd": 3e-6,
    }
]
BUDGET = {
    "namespace": "a",
    "function": "f",
    "usd_per_day": 1.0,
    "spent_usd": 1.5,
    "action": "refuse",
    "is_spent": True,
    "set_by": "tierwise://admin/admin",
}
CANDIDATE = {
    "node_id": "edge-1",
    "transfer_s": 0.0,
    "wait_s": 0.001,
    "cold_start_s": 0.2,
    "run_s": 0.05,
    "return_s": 0.0,
    "displaced_s": 0.0,
    "money_usd": 2e-7,
    "score": 0.25,
    "residual": -0.5,
    "propensity": 1.0,
}
W = DEFAULT_WEIGHTS
# transfer, wait, cold start, run, return, money; late by 0.02 s and a miss, both × urgency 1.5
PARTS = [0.02, 0.0, W.cold_start * 0.05, 0.04, 0.01, W.per_usd_s * 1e-6]
PARTS += [W.per_late_s * 1.5 * 0.02, W.per_miss_s * 1.5]
ELSEWHERE = {
    "node_id": "fog-1",
    "transfer_s": 0.02,
    "wait_s": 0.0,
    "cold_start_s": 0.05,
    "run_s": 0.04,
    "return_s": 0.01,
    "displaced_s": 0.0,
    "money_usd": 1e-6,
    "score": sum(PARTS),
    "residual": 0.0,
    "propensity": 0.0,
}
WHY = {
    "choice": "edge-1",
    "candidates": [CANDIDATE, ELSEWHERE],
    "masked": [{"node_id": "cloud-1", "reason": "over budget"}],
    "heuristic_choice": "edge-1",
    "fallback": "",
}
OUTCOME = {
    "request_id": "abc123",
    "function_id": "default/f@1",
    "state": "ok",
    "origin": "edge-2",
    "node_id": "edge-1",
    "latency": {
        "queue_s": 0.0,
        "transfer_s": 0.01,
        "cold_start_s": 0.1,
        "run_s": 0.05,
        "return_s": 0.01,
    },
    "deadline_s": 0.1,
    "priority": "high",
    "money_usd": 3e-7,
    "error_code": "",
    "message": "",
    "tried": [{"node_id": "fog-1", "reason": "queue full"}],
    "policy_id": "learned@1",
    "lease": 0,
    "energy_j": 0.0,
    "shadow": {
        "policy_id": "mine@2",
        "node_id": "fog-1",
        "is_same": False,
        "gain_s": 0.0125,
        "odds": [{"node_id": "fog-1", "chance": 1.0}],
        "error": "",
    },
    "trial_id": 3,
    "block": 12,
    "explanation": WHY,
}


POLICY = {
    "policy_id": "mine@2",
    "is_active": False,
    "is_builtin": False,
    "published_by": "ada",
    "card": "",
    "shadow": {
        "ended_unix_s": 0.0,
        "decision_count": 120,
        "same_share": 0.9,
        "mean_gain_s": 0.0015,
    },
    "canary": {
        "ended_unix_s": 0.0,
        "share": 0.2,
        "block_s": 30.0,
        "canary": {"call_count": 55},
        "cost_s": {"mean": -0.01, "low": -0.02, "high": 0.001},
    },
    "fallbacks": {"range": 4},
    "open_nodes": ["edge-1"],
}


class Asked:
    """Stands for the cluster: gives prepared records and remembers what was asked."""

    def __init__(self) -> None:
        self.orders: list[tuple[Any, ...]] = []
        self.outcome: dict[str, Any] = OUTCOME
        self.used: list[dict[str, Any]] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [NODE]

    def call(self, request_id: str) -> dict[str, Any]:
        return {"outcome": self.outcome, "log": "hello\n"}

    def policies(self) -> list[dict[str, Any]]:
        return [POLICY]

    def shadow(self, policy_id: str) -> None:
        self.orders.append(("shadow", policy_id))

    def canary(self, policy_id: str, share: float, block_s: float) -> None:
        self.orders.append(("canary", policy_id, share, block_s))

    def roll_back(self) -> dict[str, Any]:
        return {"policy": {"policy_id": "ect"}, "ended_canary": "mine@2"}

    def calls(self, function: str = "", node: str = "", limit: int = 50) -> list[dict[str, Any]]:
        return []

    def usage(self, namespace: str = "") -> list[dict[str, Any]]:
        return [row for row in self.used if namespace in ("", row["namespace"])]

    def namespace_usage(self, namespace: str = "") -> list[dict[str, Any]]:
        return Operator.namespace_usage(self, namespace)  # type: ignore[arg-type]

    def bill(
        self, namespace: str = "", by: Any = (), since: str = "", until: str = ""
    ) -> dict[str, Any]:
        self.orders.append(("bill", namespace, tuple(by), since, until))
        return {"usage": self.used, "total": self.used[0] if self.used else {}, "idle": IDLE}

    def budgets(self, namespace: str = "") -> list[dict[str, Any]]:
        return [BUDGET]

    def set_budget(
        self, namespace: str, function: str, usd_per_day: float, action: str
    ) -> dict[str, Any]:
        self.orders.append(("budget", namespace, function, usd_per_day, action))
        return BUDGET

    def remove_budget(self, namespace: str, function: str = "") -> None:
        self.orders.append(("no budget", namespace, function))

    def tokens(self) -> list[dict[str, Any]]:
        return []

    def work(self, state: str = "", limit: int = 100) -> list[dict[str, Any]]:
        return []

    def drain(self, node: str, *, is_on: bool) -> None:
        self.orders.append(("drain", node, is_on))

    def create_token(self, role: str, name: str, ttl_s: float) -> dict[str, Any]:
        self.orders.append(("token", role, name, ttl_s))
        return {"token": "tw1.pin.secret", "expires_unix_s": 0.0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    stand_in = Asked()

    @contextmanager
    def operator() -> Any:
        yield stand_in

    for module in ("get", "bill", "explain", "top", "admin", "common", "policy", "estimate"):
        monkeypatch.setattr(f"tierwise.cli.{module}.operator", operator)
    return stand_in


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main.app, list(arguments))


def run_process(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own."""
    code = "from tierwise.cli.main import run; run()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )


# -- help and usage -----------------------------------------------------------------------------


def test_help_lists_every_verb_and_the_exit_codes() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for verb in VERBS:
        assert f" {verb} " in result.output, verb
    assert "130 interrupted" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "verb",
    [[v] for v in VERBS if v not in ("agent", "scheduler")]
    + [["token", "create"], *(["policy", verb] for verb in POLICY_VERBS)],
    ids=" ".join,
)
def test_every_verb_explains_itself(verb: list[str]) -> None:
    result = run(*verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["get"],
        ["get", "nodes", "-o", "xml"],
        ["frobnicate"],
        ["top", "--interval", "0"],
        ["invoke", "f", "--budget", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_two(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_help_loads_neither_grpc_nor_numpy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from tierwise.cli.main import app; "
        "CliRunner().invoke(app, ['--help']); "
        "print([m for m in ('grpc', 'numpy', 'cryptography', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_completion_prints_a_script_per_shell() -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_TIERWISE_COMPLETE" in run("completion", shell).output


# -- errors -------------------------------------------------------------------------------------


def test_every_error_has_one_of_the_documented_exit_codes() -> None:
    expected = {"not_found": 3, "unavailable": 4, "permission_denied": 5, "unauthenticated": 5}
    for code in ERROR_BY_CODE:
        wanted = expected.get(code)
        found = main.exit_code(error_from_code(code, "x"))
        assert found == wanted if wanted else found in (1, 2), code


def test_an_error_is_one_line_on_standard_error_without_a_traceback(tmp_path: Path) -> None:
    done = run_process("get", "nodes", TIERWISE_CONTEXT=str(tmp_path))
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "tierwise up" in done.stderr


def test_debugging_shows_the_traceback(tmp_path: Path) -> None:
    done = run_process("get", "nodes", TIERWISE_CONTEXT=str(tmp_path), TIERWISE_DEBUG="1")
    assert "Traceback" in done.stderr


def test_a_cluster_that_is_away_ends_with_four(tmp_path: Path) -> None:
    from scheduler.authority import Authority
    from tierwise.wire.identity import Identity, Role

    Authority(tmp_path / "ca").issue(Identity(Role.USER, "ada")).save(tmp_path / "client")
    (tmp_path / "client/client.toml").write_text('scheduler = "127.0.0.1:1"\n')
    done = run_process("get", "nodes", TIERWISE_CONTEXT=str(tmp_path / "client"))
    assert done.returncode == 4
    assert "nobody listens at 127.0.0.1:1" in done.stderr


def test_a_bug_is_named_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(**_: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 1
    assert "internal error, ZeroDivisionError: oh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["get", "moons"], "choose one of nodes"),
        (["describe", "moon", "x"], "describe 'moon'"),
        (["get", "work", "--state", "odd"], "--state 'odd'"),
        (["token", "create", "--role", "king"], "--role 'king'"),
        (["token", "create", "--ttl", "soon"], "'soon' is no duration"),
        (["up", "--nodes", "3x"], "1c,1f,2e"),
        (["usage", "--by", "moon"], "--by 'moon'"),
        (["bill", "--by", "day,moon"], "--by 'day,moon'"),
        (["bill", "--by", "day,day"], "--by 'day,day'"),
        (["budget", "set", "a", "--usd-per-day", "1", "--action", "cry"], "--action 'cry'"),
        (["completion", "tcsh"], "choose one of bash"),
    ],
)
def test_invalid_input_is_named(asked: Asked, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, TierwiseError)
    assert message in str(result.exception)
    assert main.exit_code(result.exception) == 2


# -- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "check"),
    [
        ("json", lambda text: json.loads(text)[0]["node"]["node_id"] == "edge-1"),
        ("yaml", lambda text: "node_id: edge-1" in text),
        ("name", lambda text: text == "edge-1\n"),
        ("table", lambda text: text.split()[:3] == ["NAME", "TIER", "STATE"]),
    ],
)
def test_nodes_come_in_every_format(
    asked: Asked, output: str, check: Callable[[str], bool]
) -> None:
    for verb in (["get", "nodes"], ["top", "--once"]):
        result = run(*verb, "-o", output)
        assert result.exit_code == 0, result.output
        assert check(result.stdout), result.stdout


def test_an_empty_list_leaves_standard_output_empty(asked: Asked) -> None:
    result = run("get", "calls")
    assert result.stdout == ""
    assert "no calls yet" in result.stderr


def test_explain_shows_candidates_masks_refusals_and_where_the_time_went(asked: Asked) -> None:
    text = run("explain", "abc").output
    for part in (
        "default/f@1",
        "ran on    edge-1",
        "learned@1",
        "deadline 100.0 ms missed",
        "fog-1: queue full",
        "cloud-1: over budget",
        "-0.50",
        "base score's choice",
        "predicted",
        "actual",
        "170.0 ms",
        "score alone: edge-1, the same",
        "mine@2: fog-1, estimated gain +12.50 ms",
        "trial 3, block 12",
        "shadow's choice",
    ):
        assert part in text, part
    assert json.loads(run("explain", "abc", "-o", "json").stdout)["request_id"] == "abc123"


def test_explain_shows_the_base_score_as_a_sum(asked: Asked) -> None:
    lines = run("explain", "abc").output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("BASE SCORE OF"))
    titles = lines[start].split()
    cells = next(line for line in lines[start:] if line.startswith("fog-1")).split()
    assert titles[3:] == [
        *("TRANSFER", "WAIT", "COLD", "START", "RUN", "RETURN", "MONEY", "LATE", "MISS"),
        *("REST", "SUM"),
    ]
    figures = [float(cell) for cell in cells[1:]]
    assert figures == pytest.approx([*PARTS, 0.0, sum(PARTS)], abs=1e-4)
    assert "rest: decided again" in "\n".join(lines)  # the other candidate's sum is made up


def test_policies_and_nodes_show_trials_and_fallbacks(asked: Asked) -> None:
    text = run("get", "policies").output
    assert "shadow: 120 decisions, 90% the same, estimated gain +1.50 ms" in text
    assert "canary: 20% of 30 s blocks, 55 calls, cost -0.0100 [-0.0200, +0.0010]" in text
    assert "range:4" in text
    nodes = run("get", "nodes").output
    assert "error:9 odd@1 open" in nodes
    assert "dropped" not in nodes


def test_explain_tells_of_a_call_that_no_node_took(asked: Asked) -> None:
    failed = {
        **OUTCOME,
        "state": "unplaceable",
        "node_id": "",
        "latency": {"queue_s": 0.001},
        "error_code": "infeasible",
        "message": "no node can ever run it",
        "tried": [],
        "explanation": {**WHY, "candidates": [], "heuristic_choice": ""},
    }
    asked.outcome = failed
    text = run("explain", "abc").output
    for part in ("ran on    no node", "deadline 100.0 ms missed", "no node was a candidate"):
        assert part in text, part
    assert "masked    cloud-1: over budget" in text
    asked.outcome = {**failed, "explanation": None, "policy_id": ""}
    assert "before a policy was asked" in run("explain", "abc").output


def test_logs_print_what_a_call_printed(asked: Asked) -> None:
    assert run("logs", "abc").stdout == "--- abc123 on edge-1 ---\nhello\n"


def test_usage_is_summed_per_namespace(asked: Asked) -> None:
    def row(namespace: str, function: str, calls: int) -> dict[str, Any]:
        counts = dict.fromkeys(("item_count", "missed_count", "failed_count", "cold_count"), calls)
        amounts = {"call_count": calls, "gb_s": calls / 2, "cpu_s": 1.0, "money_usd": calls * 1e-6}
        return {"namespace": namespace, "function": function, **counts, **amounts}

    asked.used = [row("a", "f", 1), row("a", "g", 2), row("b", "f", 4)]
    totals = json.loads(run("usage", "--by", "namespace", "-o", "json").stdout)
    assert [(t["namespace"], t["function_count"], t["call_count"]) for t in totals] == [
        ("a", 2, 3),
        ("b", 1, 4),
    ]
    assert totals[0]["gb_s"] == 1.5
    assert totals[0]["money_usd"] == pytest.approx(3e-6)
    lines = run("usage", "--by", "namespace").stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["a", "2", "3"], ["b", "1", "4"]]
    assert run("usage", "--namespace", "b", "-o", "name").stdout == "b/f\n"
    assert "nothing used yet in c" in run("usage", "--namespace", "c").stderr


def test_a_bill_has_a_total_and_shows_idle_cost_and_spent_budgets_apart(asked: Asked) -> None:
    asked.used = [
        {
            "namespace": "a",
            "function": "f",
            "day": "2026-01-31",
            "call_count": 3,
            "item_count": 5,
            "gb_s": 0.5,
            "cpu_s": 0.25,
            "gpu_s": 0.0,
            "money_usd": 1e-5,
            "idle_gb_s": 2.0,
            "idle_usd": 1e-6,
            "moved_bytes": {"edge-cloud": 2_500_000},
        }
    ]
    shown = run("bill", "--by", "day,namespace", "--since", "2026-01-01", "--namespace", "a")
    assert asked.orders == [("bill", "a", ("day", "namespace"), "2026-01-01", "")]
    header, row, total, blank, title, _, idle = shown.stdout.splitlines()
    assert header.split()[:3] == ["DAY", "NAMESPACE", "CALLS"]
    assert row.split()[:4] == ["2026-01-31", "a", "3", "5"]
    assert "edge-cloud:2.5 MB" in row and "10.000 µ$" in row
    assert total.split()[0] == "total"
    assert blank == "" and "billed to nobody" in title
    assert idle.split() == ["a/f", "edge-1", "2", "1.5", "3.000", "µ$"]
    assert "a/f has spent 1.5000 $ of its 1.0000 $" in shown.stderr
    found = json.loads(run("bill", "-o", "json").stdout)
    assert set(found) == {"usage", "total", "idle", "budgets"}
    assert run("bill", "-o", "name").stdout == "a/f\n"


def test_budgets_are_set_listed_and_removed(asked: Asked) -> None:
    assert run("budget", "set", "a/f", "--usd-per-day", "1.5", "--action", "warn").exit_code == 0
    assert run("budget", "set", "a", "--usd-per-day", "2").exit_code == 0
    assert run("budget", "rm", "a").exit_code == 0
    assert asked.orders == [
        ("budget", "a", "f", 1.5, "warn"),
        ("budget", "a", "", 2.0, "refuse"),
        ("no budget", "a", ""),
    ]
    assert run("budget", "list").stdout.splitlines()[1].split()[0] == "a/f"
    assert run("budget", "list", "-o", "name").stdout == "a/f\n"


# -- orders -------------------------------------------------------------------------------------


def test_a_node_is_drained_and_taken_back(asked: Asked) -> None:
    assert run("drain", "edge-1").exit_code == 0
    assert run("drain", "edge-1", "--undo").exit_code == 0
    assert asked.orders == [("drain", "edge-1", True), ("drain", "edge-1", False)]


def test_trials_of_policies_are_begun_and_ended(asked: Asked) -> None:
    assert run("policy", "shadow", "mine@2").exit_code == 0
    assert run("policy", "canary", "mine@2", "--share", "0.5", "--block", "2m").exit_code == 0
    assert run("policy", "shadow", "--off").exit_code == 0
    assert asked.orders == [
        ("shadow", "mine@2"),
        ("canary", "mine@2", 0.5, 120.0),
        ("shadow", ""),
    ]
    for wrong in (["shadow"], ["canary", "mine@2", "--off"]):
        assert main.exit_code(run("policy", *wrong).exception) == 2  # type: ignore[arg-type]
    result = run("policy", "rollback")
    assert "the canary of mine@2 has ended: ect decides alone" in result.stderr


def write_log(folder: Path, count: int, **changes: Any) -> str:
    path = folder / "log.json"
    path.write_text(json.dumps([{"outcome": {**OUTCOME, **changes}}] * count))
    return str(path)


def test_an_estimate_from_a_file_needs_no_cluster(tmp_path: Path) -> None:
    log = write_log(tmp_path, 40)
    done = run_process("policy", "estimate", "mine@2", "--log", log, TIERWISE_CONTEXT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "its own chances, logged in the shadow" in done.stdout
    assert "support    0.0%" in done.stdout
    assert "too little support" in done.stderr
    assert "A canary measures that" in done.stderr
    done = run_process("policy", "estimate", "ect", "--log", log, "-o", "json")
    found = json.loads(done.stdout)
    assert found["count"] == 40
    assert found["unsupported_share"] == 1.0
    assert found["snips"]["mean"] is None


@pytest.mark.parametrize(
    ("policy", "changes", "words"),
    [
        ("no-such@1", {"shadow": None}, "these records do not tell"),
        ("ect", {"explanation": None}, "40 hold no explanation"),
        ("ect", {"latency": {"run_s": "much"}}, "40 are not as they should be"),
        ("ect", {"state": "cancelled"}, "40 were cancelled"),
        ("ect", {"lease": 2}, "40 were durable work"),
        ("ect --lam 0.5", {}, "for a learned policy"),
        ("learned --lam -1", {}, "not negative"),
    ],
)
def test_what_cannot_be_estimated_says_why(
    tmp_path: Path, policy: str, changes: dict[str, Any], words: str
) -> None:
    log = write_log(tmp_path, 40, **changes)
    result = run("policy", "estimate", *policy.split(), "--log", log)
    assert isinstance(result.exception, TierwiseError), result.output
    assert words in str(result.exception)


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", "\x80\x04."])
def test_a_log_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "log.json"
    path.write_text(content)
    result = run("policy", "estimate", "ect", "--log", str(path))
    assert isinstance(result.exception, TierwiseError)


def test_a_token_goes_alone_to_standard_output(asked: Asked) -> None:
    result = run("token", "create", "--role", "user", "--name", "ada", "--ttl", "10m")
    assert result.stdout == "tw1.pin.secret\n"
    assert asked.orders == [("token", "user", "ada", 600.0)]


def test_a_node_that_is_not_there_is_named_before_anybody_is_asked(asked: Asked) -> None:
    result = CliRunner().invoke(main.app, ["remove", "edge-9"], input="y\n")
    assert isinstance(result.exception, NotFound)
    assert "remove edge-9 and" not in result.output


def test_removing_a_node_asks_first(asked: Asked) -> None:
    result = CliRunner().invoke(main.app, ["remove", "edge-1"], input="n\n")
    assert result.exit_code == 1
    assert asked.orders == []


# -- doing --------------------------------------------------------------------------------------


def test_arguments_are_json_where_they_are_json_and_text_otherwise(tmp_path: Path) -> None:
    from tierwise.cli.work import _values

    data = tmp_path / "data"
    data.write_bytes(b"\x00raw")
    assert _values(["1", "[2, 3]", '"x"', "plain"], data) == [1, [2, 3], "x", "plain", b"\x00raw"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "makes no tierwise.App"),
        ("1/0", "ZeroDivisionError"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_deployed_says_why(
    tmp_path: Path, content: str, message: str
) -> None:
    from tierwise.cli.work import _apps

    file = tmp_path / "mine_to_deploy.py"
    file.write_text(content)
    with pytest.raises(TierwiseError, match=message):
        _apps(str(file))


def test_a_named_app_is_found_even_if_the_file_is_named_like_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierwise.cli.work import _apps

    monkeypatch.setattr(sys, "path", [*sys.path])  # processes of later tests need the real json
    file = tmp_path / "json.py"
    file.write_text("import tierwise\nfirst = tierwise.App('one')\nsecond = tierwise.App('two')\n")
    assert [app.name for app in _apps(f"{file}:second")] == ["two"]
    assert sorted(app.name for app in _apps(str(file))) == ["one", "two"]
    assert json.loads("1") == 1
    with pytest.raises(TierwiseError, match="App named third"):
        _apps(f"{file}:third")


def test_the_doctor_answers_for_every_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIERWISE_CONTEXT", str(tmp_path))
    result = run("doctor", "-o", "json")
    checks = {check["check"]: check for check in json.loads(result.stdout)}
    assert checks["python"]["result"] == "ok"
    assert checks["ports"]["result"] == "ok"
    assert checks["context"]["result"] == "warn"
    assert {"seal", "seal: resource limits", "gpu", "grpcio"} <= set(checks)
    assert all(
        check["hint"] or check["result"] == "ok"
        for check in checks.values()
        if check["check"] != "context"
    )


def test_a_policy_that_is_not_there_leaves_no_state(tmp_path: Path) -> None:
    result = run("up", "--policy", "bogus", "--state", str(tmp_path / "state"))
    assert isinstance(result.exception, NotFound)
    assert "'bogus'" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_default_cluster_grows_with_the_machine_within_bounds() -> None:
    sizes = {cpus: default_nodes(cpus) for cpus in (1, 2, 4, 8, 16, 128)}
    assert sizes == {
        1: "1c,1f,2e",
        2: "1c,1f,2e",
        4: "1c,1f,4e",
        8: "1c,2f,8e",
        16: "1c,2f,8e",
        128: "1c,2f,8e",
    }
    assert all(len(parse_nodes(nodes)) <= 11 for nodes in sizes.values())


@pytest.mark.parametrize("module", ["agent.daemon", "scheduler.daemon"])
def test_the_daemons_explain_themselves_to_users(module: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "until SIGTERM or SIGINT." in done.stdout
    assert "Raises" not in done.stdout


def test_a_login_writes_the_context_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierwise.wire import identity
    from tierwise.wire.identity import Credentials, Identity, Role

    async def joined(*_: object) -> tuple[Credentials, str, Identity]:
        return (
            Credentials(key=b"k", certificate=b"c", authority=b"a"),
            "s:1",
            Identity(Role.USER, "ada"),
        )

    monkeypatch.setattr(identity, "join", joined)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TIERWISE_CONTEXT", raising=False)
    by_flag, by_folder = tmp_path / "flag", tmp_path / "folder"
    login = ["login", "j:1", "--name", "ada", "--token", "t"]
    assert run("--context", str(by_flag), *login).exit_code == 0
    assert run("--context", str(by_flag), *login, "--folder", str(by_folder)).exit_code == 0
    monkeypatch.delenv("TIERWISE_CONTEXT")
    assert run(*login).exit_code == 0
    home = tmp_path / "home/.tierwise/client"
    assert all((folder / "client.toml").exists() for folder in (by_flag, by_folder, home))


def test_columns_do_not_move_with_what_stands_in_them() -> None:
    for call in ("1a2b", "f00d", "77"):
        header, line = table_lines(["call", "count", "note"], [[call, 7, "x"]])
        assert line.startswith(call)
        assert line.index("7", len(call)) == header.index("COUNT") + 4
    lines = table_lines(["call", "age", "note"], [["a", "3s", "2 nodes"], ["b", "12s", ""]])
    assert lines == ["CALL  AGE  NOTE", "a      3s  2 nodes", "b     12s"]
    wide = table_lines(["name", "n"], [["äö日本", 1.5], ["a\x1b[2J\nb", 10]])
    assert wide[1:] == ["äö日本   1.5", "a [2J b   10"]


def test_top_does_not_cut_what_goes_into_a_pipe(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tierwise.cli.top.pause", interrupt)
    header, line = run("top").stdout.splitlines()
    assert header.split()[-1] == "MIB"
    assert line.split()[-1] == "55"


def test_publishing_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"")
    ended = run("policy", "publish", str(tmp_path))
    assert isinstance(ended.exception, NotFound)
    assert f"tierwise policy train --resume {tmp_path}" in str(ended.exception)
