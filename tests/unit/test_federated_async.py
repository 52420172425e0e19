"""Buffers of asynchronous updates: who is at work, how stale what comes is, what is carried on."""

from scheduler.workloads.federated_events import Call, CallEnded, Cancel, Save, StopAsked, Submit
from tests.unit.federated_builders import CLOUD, EDGES, Shell, job, receipt, view
from tierwise.domain.cache import ObjectKind
from tierwise.domain.federated import FederatedClient, JobState, RoundState, UpdateState
from tierwise.domain.topology import NodeState

SIX = tuple(
    FederatedClient(client=f"c{i}", node_id=EDGES[i % len(EDGES)], data=i) for i in range(1, 7)
)


def silent(call: Call) -> CallEnded | None:
    return None


def merging(call: Call) -> CallEnded | None:
    """Answer for the aggregator, not for clients."""
    return None if ".client." in call.call_id else receipt(call)


def begin(**changes: object) -> Shell:
    parameters = {"buffer": 2.0, "concurrency": 3.0, **changes.pop("parameters", {})}  # type: ignore[dict-item]
    shell = Shell(job("fedbuff", parameters, clients=SIX, **changes), answer=merging)
    made = shell.tick()
    while made:
        made = shell.do(made)
    return shell


def answer(shell: Shell, call: Call, **facts: object) -> None:
    made = shell.feed(receipt(call, **facts))
    while made:
        made = shell.do(made)
        if not made and shell.planner.due_s is not None and shell.planner.due_s <= shell.now_s:
            made = shell.tick()


def test_so_many_clients_are_at_work_and_another_begins_when_one_has_answered() -> None:
    shell = begin()
    assert len(shell.calls("client")) == 3
    answer(shell, shell.calls("client")[0])
    names = [call.arguments["client"] for call in shell.calls("client")]
    assert len(names) == 4 and len(set(names)) == 4


def test_a_full_buffer_is_added_to_the_newest_model_and_the_rest_goes_on() -> None:
    shell = begin(round_count=9)
    first, second, third = shell.calls("client")
    answer(shell, first)
    answer(shell, second)
    (buffer,) = shell.calls("buffer")
    assert [str(each.key) for each in buffer.inputs] == [
        "default/j/000000/aggregate",
        "default/j/000000/aggregate",
        "default/j/000001/matrix",
    ]
    rows = sorted(int(str(call.arguments["client"])[1]) - 1 for call in (first, second))
    assert buffer.arguments["groups"] == [{"rows": rows, "weights": [1.0, 1.0]}]
    assert buffer.arguments["count"] == 2
    assert buffer.output is not None and buffer.output.key.client == "model"
    assert shell.rounds[1].state is RoundState.DONE
    assert not [c for c in shell.commands if isinstance(c, Cancel)], "nobody is cut off"
    # What was under way counts in the next buffer, a little less.
    answer(shell, third)
    late = next(u for u in shell.planner.record.updates if u.client == third.arguments["client"])  # type: ignore[union-attr]
    assert (late.state, late.asked_round, late.staleness) == (UpdateState.COUNTED, 1, 1)
    newest = [call for call in shell.calls("client") if call.arguments["round"] == 2]
    assert newest and all(call.inputs[0].key.round == 1 for call in newest)
    answer(shell, newest[0])
    later = shell.calls("buffer")[1]
    assert [group["weights"] for group in later.arguments["groups"]] == [[0.5**0.5], [1.0]]  # type: ignore[attr-defined]
    assert [(each.key.kind, each.key.round) for each in later.inputs] == [
        (ObjectKind.AGGREGATE, 1),
        (ObjectKind.AGGREGATE, 0),
        (ObjectKind.MATRIX, 1),
        (ObjectKind.AGGREGATE, 1),
        (ObjectKind.MATRIX, 2),
    ]
    # The first round is ended in the cache once nobody works for it any more, not sooner.
    assert not shell.calls("close")
    for call in shell.calls("client")[3:]:
        if call.call_id not in (first.call_id, second.call_id, newest[0].call_id):
            answer(shell, call)
    closed = shell.calls("close")
    assert closed and closed[0].inputs[0].key.round == 1
    assert closed[0].output is not None and closed[0].output.key.client == ""


def test_an_update_that_is_too_stale_does_not_count() -> None:
    shell = begin(parameters={"buffer": 1.0, "staleness_max": 1.0}, round_count=9)
    slow = shell.calls("client")[0]
    for _ in range(3):
        fast = [c for c in shell.calls("client") if c is not slow][-1]
        answer(shell, fast)
    answer(shell, slow)
    record = shell.planner.record
    assert record is not None
    found = next(u for u in record.updates if u.client == slow.arguments["client"])
    assert found.state is UpdateState.LATE
    assert "3 aggregates have been made since it began" in found.message


def test_a_buffer_is_taken_as_it_is_when_nobody_is_at_work_any_more() -> None:
    spec = job("fedbuff", {"buffer": 4.0}, round_count=2)
    shell = Shell(
        spec,
        answer=lambda call: (
            CallEnded(call_id=call.call_id, error_code="function_raised", message="no")
            if call.arguments.get("client") == "c4"
            else receipt(call)
        ),
    )
    shell.run()
    assert shell.planner.progress.state is JobState.SUCCEEDED
    assert shell.calls("buffer")[0].arguments["count"] == 3


def test_a_job_of_which_nothing_comes_fails_after_some_rounds() -> None:
    shell = Shell(
        job("fedbuff"),
        answer=lambda call: CallEnded(call_id=call.call_id, error_code="unavailable"),
    )
    shell.run()
    assert shell.planner.progress.state is JobState.FAILED
    assert len(shell.rounds) == 4


def test_after_a_restart_everybody_under_way_is_asked_for_again() -> None:
    before = begin()
    answer(before, before.calls("client")[0])
    asked = {call.call_id: call for call in before.calls("client")}
    spec = job("fedbuff", {"buffer": 2.0, "concurrency": 3.0}, clients=SIX)
    after = Shell(spec, before.planner.progress, before.rounds[1], answer=merging)
    made = after.tick()
    while made:
        made = after.do(made)
    again = {call.call_id: call for call in after.calls("client")}
    open_calls = {k: v for k, v in asked.items() if v is not before.calls("client")[0]}
    assert again == open_calls
    # Once more while it aggregates: the others still belong to the next buffer.
    after.answer = silent
    after.do(after.feed(receipt(next(iter(again.values())))))
    saved = [c.record for c in after.commands if isinstance(c, Save) and c.record is not None][-1]
    assert saved.state is RoundState.AGGREGATING
    third = Shell(spec, after.planner.progress, saved, answer=merging)
    made = third.tick()
    while made:
        made = third.do(made)
    assert [call.call_id for call in third.calls("buffer")] == [
        call.call_id for call in after.calls("buffer")
    ]
    assert len(third.calls("client")) == 2
    third.do(third.tick())
    for call in list(third.calls("client"))[:2]:
        answer(third, call)
    assert [r.state for r in third.rounds.values()].count(RoundState.DONE) == 2


def test_at_the_end_nobody_is_left_at_work_and_no_round_open() -> None:
    shell = begin(round_count=1)
    for call in shell.calls("client")[:2]:
        answer(shell, call)
    assert shell.planner.progress.state is JobState.SUCCEEDED
    assert [c for c in shell.commands if isinstance(c, Cancel)]
    assert [call.inputs[0].key.round for call in shell.calls("close")] == [1]


def test_a_stop_cancels_everybody_who_is_at_work() -> None:
    shell = begin()
    made = shell.feed(StopAsked())
    assert len([c for c in made if isinstance(c, Cancel)]) == 3
    assert shell.rounds[1].state is RoundState.STOPPED


def test_only_clients_whose_nodes_are_there_are_asked() -> None:
    shell = Shell(job("fedbuff", {"buffer": 1.0}, clients=SIX), answer=silent)
    shell.view = view(edge_1=NodeState.LOST, edge_2=NodeState.SUSPECT)
    shell.do(shell.tick())
    assert {call.node_id for call in shell.calls("client")} == {"edge-3", "edge-4"}
    shell.view = view()
    shell.tick(1.0)
    assert {call.node_id for call in shell.calls("client")} == set(EDGES)
    assert all(
        c.call.output is not None and c.call.output.node_id == CLOUD
        for c in shell.commands
        if isinstance(c, Submit)
    )
