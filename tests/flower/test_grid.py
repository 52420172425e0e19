"""The grid's ways: what travels, who is asked, what becomes of errors, time and dead nodes."""

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: `make test-flower` runs these in .venv-flower")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common import parameters_to_ndarrays
from flwr.common.constant import ErrorCode

import tierwise
from tests.flower import apps
from tests.flower.conftest import NODES
from tests.flower.test_records import records
from tierwise.errors import InvalidArgument, NotFound, StartFailed
from tierwise.sdk import flower

COUNT = 4


@pytest.fixture
def grid(client: tierwise.Client) -> Iterator[flower.TierwiseGrid]:
    clients = flower.participants(COUNT, NODES)
    with flower.TierwiseGrid(apps.app, clients, client=client, requirements=()) as made:
        yield made


def ask(grid: Any, action: str, content: RecordDict | None = None, **options: Any) -> list[Message]:
    """Send everybody the same, and return the replies."""
    content = content if content is not None else RecordDict()
    messages = [Message(content, node, f"query.{action}") for node in grid.get_node_ids()]
    return grid.send_and_receive(messages, **options)


def test_a_reply_brings_back_every_record_and_answers_its_message(grid: Any) -> None:
    content = records()
    messages = [Message(content, node, "query", group_id="7") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages)
    assert [r.metadata.src_node_id for r in replies] == list(grid.participants)
    for sent, reply in zip(messages, replies, strict=True):
        assert reply.metadata.reply_to_message_id == sent.metadata.message_id
        assert not reply.has_error(), reply.error.reason
        assert (reply.metadata.group_id, reply.metadata.run_id) == ("7", grid.run.run_id)
        assert reply.content.object_id == content.object_id


def test_large_arrays_travel_whole(grid: Any) -> None:
    rng = np.random.default_rng(0)
    large = {str(i): Array(rng.random(n)) for i, n in enumerate((300_000, 10, 500_000))}
    content = RecordDict({"arrays": ArrayRecord(large)})
    for reply in ask(grid, "default", content):
        assert reply.content.object_id == content.object_id


def test_the_state_of_a_context_lasts_from_message_to_message(grid: Any) -> None:
    for number in (1, 2, 3):
        for partition, reply in enumerate(ask(grid, "count")):
            assert dict(reply.content["found"]) == {"count": number, "partition": partition}


def test_a_client_that_fails_becomes_an_error_and_the_others_go_on(grid: Any) -> None:
    fine, raised, fine_too, died = ask(grid, "fail")
    assert fine.has_content() and fine_too.has_content()
    assert raised.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert raised.error.reason == "ZeroDivisionError: an odd partition"
    assert died.error.code == ErrorCode.CLIENT_APP_CRASHED
    (unknown,) = ask(grid, "missing")[:1]
    assert "No query function registered with name 'missing'" in unknown.error.reason


def test_who_is_late_is_left_out_and_stopped(grid: Any) -> None:
    ask(grid, "count")  # everybody is warm
    wait = RecordDict({"config": ConfigRecord({"seconds": [0.0, 60.0, 0.0, 60.0]})})
    replies = ask(grid, "wait", wait, timeout=3.0)
    there = [grid.participants[reply.metadata.src_node_id].name for reply in replies]
    assert there == ["client-0", "client-2"]
    started = time.monotonic()  # 1 and 3 share a node of one CPU: it must be free again
    assert len(ask(grid, "count", timeout=30.0)) == COUNT
    assert time.monotonic() - started < 30.0


def test_messages_can_be_pushed_and_their_replies_pulled_once(grid: Any) -> None:
    node = grid.get_node_ids()[0]
    slow = RecordDict({"config": ConfigRecord({"seconds": [1.0] * COUNT})})
    (message_id,) = grid.push_messages([Message(slow, node, "query.wait")])
    assert grid.pull_messages([message_id]) == []
    found: list[Message] = []
    while not found:
        time.sleep(0.02)
        found = grid.pull_messages([message_id])
    assert found[0].metadata.reply_to_message_id == message_id
    assert grid.pull_messages([message_id, "unknown"]) == []


def test_messages_that_nobody_can_answer_are_refused(grid: Any) -> None:
    node = grid.get_node_ids()[0]
    for bad in (
        Message(RecordDict(), 12345, "query"),
        Message(RecordDict(), node, "query", ttl=-1),
    ):
        with pytest.raises(InvalidArgument):
            grid.push_messages([bad])
    for nobody in (0, [flower.Participant(name="a"), flower.Participant(name="a")]):
        with pytest.raises(InvalidArgument):
            flower.TierwiseGrid(apps.app, nobody, client=grid._client)


def test_a_message_whose_time_is_over_is_answered_with_an_error(grid: Any) -> None:
    slow = RecordDict({"config": ConfigRecord({"seconds": [60.0] * COUNT})})
    node = grid.get_node_ids()[0]
    (reply,) = grid.send_and_receive([Message(slow, node, "query.wait", ttl=1.0)])
    assert reply.has_error()


def test_apps_as_they_were_written_before_messages_run_too(client: tierwise.Client) -> None:
    clients = flower.participants(COUNT, NODES)
    apps.histories.clear()
    with flower.TierwiseGrid(
        apps.old_client_app, clients, client=client, requirements=(), name="flower-old"
    ) as grid:
        flower.run(apps.old_server_app, grid)
    # Every client adds its number n to all parameters, with weight 1 + n: 20 / 10 per round.
    for found, expected in zip(apps.histories, (2.0, 4.0), strict=True):
        np.testing.assert_allclose(parameters_to_ndarrays(found)[0], [expected] * 3)


def test_secure_aggregation_of_flower_runs_with_its_mod_and_workflow(
    client: tierwise.Client,
) -> None:
    clients = flower.participants(COUNT, NODES)
    apps.histories.clear()
    with flower.TierwiseGrid(
        apps.masked_client_app, clients, client=client, requirements=(), name="flower-masked"
    ) as grid:
        flower.run(apps.masked_server_app, grid)
    (found,) = apps.histories
    assert found is not None
    # Client n adds n, with weight 1 + n; Flower quantises what it masks.
    np.testing.assert_allclose(parameters_to_ndarrays(found)[0], [2.0] * 3, atol=1e-3)


def test_a_state_that_must_stay_is_not_taken_along(client: tierwise.Client) -> None:
    clients = flower.participants(COUNT, NODES)
    with flower.TierwiseGrid(
        apps.app, clients, client=client, requirements=(), keeps_state=False
    ) as grid:
        for _ in range(2):
            found = [reply.content["found"]["count"] for reply in ask(grid, "count")]
            assert found == [1] * COUNT
        assert not grid._states


def test_clients_without_a_node_are_placed_by_the_policy(client: tierwise.Client) -> None:
    with flower.TierwiseGrid(apps.app, 3, client=client, requirements=()) as grid:
        assert [reply.has_content() for reply in ask(grid, "count")] == [True] * 3


def test_a_whole_project_runs_unmodified_and_learns(project: Any, client: tierwise.Client) -> None:
    clients = flower.participants(6, NODES)
    with project.grid(clients, client=client, requirements=()) as grid:
        context = flower.run(project.server_app, grid, project.run_config)
    accuracies = context.state["judged"]["accuracy"]
    assert len(accuracies) == 1 + project.run_config["num-server-rounds"]
    assert accuracies[-1] > accuracies[0] + 0.2


def test_a_project_runs_from_the_command_line_and_is_captured(
    project: Any, cluster: tierwise.LocalCluster, client: tierwise.Client
) -> None:
    command = [sys.executable, "-m", "tierwise.sdk.flower", str(project.folder)]
    command += ["--context", str(cluster.context), "--clients", "3", "--node", "edge-1"]
    ran = subprocess.run(
        [*command, "-c", "num-server-rounds=2", "--capture", "by-hand", "--host-environment"],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert tierwise.Rounds(client, "by-hand").newest() == 2
    for wrong, said in (("no-such-key=1", "no-such-key"), ("nonsense", "--run-config")):
        ran = subprocess.run([*command, "-c", wrong], capture_output=True, text=True, timeout=90)
        assert ran.returncode == 1
        assert said in ran.stderr and "Traceback" not in ran.stderr


def test_a_project_says_what_is_wrong_with_it(tmp_path: Any, project: Any) -> None:
    with pytest.raises(NotFound):
        flower.load_project(tmp_path)
    with pytest.raises(InvalidArgument, match="no-such-key"):
        flower.load_project(project.folder, {"no-such-key": 1})
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'none'\n")
    with pytest.raises(InvalidArgument):
        flower.load_project(tmp_path)
    assert flower.load_project(project.folder, {"alpha": 0.1}).run_config["alpha"] == 0.1
    assert project.requirements[0].startswith("flwr==")
    assert not any(text.startswith("flwr") for text in project.requirements[1:])
    assert project.bundle() == project.bundle()


def test_an_environment_of_its_own_has_flower_inside_the_seal(
    client: tierwise.Client, cluster: tierwise.LocalCluster
) -> None:
    clients = flower.participants(1, ["cloud-1"])
    with flower.TierwiseGrid(
        apps.app, clients, client=client, name="flower-own", tier="cloud"
    ) as grid:
        (reply,) = ask(grid, "where")
    if reply.has_error() and reply.error.code == ErrorCode.LOAD_CLIENT_APP_EXCEPTION:
        assert StartFailed.__name__ in reply.error.reason
        pytest.skip(f"this node cannot install packages: {reply.error.reason[:200]}")
    found = reply.content["config"]
    assert found["flwr"].startswith(str(cluster.state / "agents/cloud-1/environments"))
    assert found["home"] == "/nonexistent"


def test_a_node_that_dies_is_an_error_then_missing_then_back(
    grid: Any, cluster: tierwise.LocalCluster
) -> None:
    everybody = grid.get_node_ids()
    cluster.kill("edge-2")
    try:
        replies = ask(grid, "count", timeout=60.0)
        there = [r.metadata.src_node_id for r in replies if r.has_content()]
        assert set(there) >= {everybody[0], everybody[2]}
        assert all(
            r.error.code in (ErrorCode.NODE_UNAVAILABLE, ErrorCode.UNKNOWN)
            for r in replies
            if r.has_error()
        )
        while len(grid.get_node_ids()) > 2:
            time.sleep(0.2)
        assert grid.get_node_ids() == [everybody[0], everybody[2]]
    finally:
        cluster.restart("edge-2")
        cluster.wait_ready()
    while grid.get_node_ids() != everybody:
        time.sleep(0.2)
    assert all(reply.has_content() for reply in ask(grid, "count", timeout=60.0))
