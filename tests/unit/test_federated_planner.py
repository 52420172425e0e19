"""Synchronous rounds as lists of commands: who is asked, what counts, how rounds fail and go on."""

from dataclasses import replace
from itertools import pairwise

import pytest

from scheduler.workloads.federated_calls import krum_bad_count
from scheduler.workloads.federated_events import (
    Call,
    CallEnded,
    Cancel,
    OpenRound,
    ResumeAsked,
    RoundOpened,
    Save,
    StopAsked,
    Submit,
)
from tests.unit.federated_builders import (
    CLOUD,
    EDGES,
    FOG,
    OFFSET_S,
    Shell,
    job,
    receipt,
    view,
)
from tierwise.domain.cache import ObjectKind
from tierwise.domain.federated import (
    JobState,
    Pace,
    RoundState,
    Topology,
    UpdateState,
)
from tierwise.domain.topology import NodeState


def silent(call: Call) -> CallEnded | None:
    return None


def kinds(commands: list[object]) -> list[str]:
    return [type(command).__name__ for command in commands]


def test_a_round_is_written_then_opened_then_asked_then_merged() -> None:
    shell = Shell(job(), answer=silent)
    first = shell.tick()
    assert kinds(first) == ["Save", "OpenRound"]
    opening = first[1]
    assert isinstance(opening, OpenRound) and opening.node_id == CLOUD
    assert [each.client for each in opening.manifest.clients] == ["c1", "c2", "c3", "c4"]
    assert opening.manifest.base is not None and opening.manifest.base.round == 0
    asked = shell.feed(RoundOpened(node_id=CLOUD, round=1))
    assert kinds(asked) == ["Submit"] * 4
    for command, edge in zip(asked, EDGES, strict=True):
        assert isinstance(command, Submit)
        call = command.call
        assert call.node_id == edge and call.output is not None and call.output.node_id == CLOUD
        assert call.inputs[0].key.kind is ObjectKind.AGGREGATE and call.inputs[0].node_id == CLOUD
        assert call.arguments["round"] == 1
    for call in shell.calls("client")[:3]:
        assert shell.feed(receipt(call)) == []
    closed = shell.feed(receipt(shell.calls("client")[3], example_count=30))
    assert kinds(closed) == ["Save", "Submit"]
    merge = shell.calls("merge")[0]
    assert merge.node_id == CLOUD and merge.inputs[0].shape == (4, 250_000)
    assert merge.arguments["rows"] == [0, 1, 2, 3]
    assert merge.arguments["weights"] == [10.0, 10.0, 10.0, 30.0]
    assert merge.arguments["metadata"] == {"example_count": 60.0, "client_count": 4, "loss": 0.5}
    done = shell.feed(receipt(merge))
    assert kinds(done) == ["Save"]
    assert shell.rounds[1].state is RoundState.DONE
    assert shell.rounds[1].digest == f"d-{merge.call_id}"
    assert shell.rounds[1].started_unix_s == OFFSET_S
    assert shell.planner.progress.base_round == 1 and shell.planner.progress.base_node == CLOUD


def test_a_job_runs_its_rounds_and_ends() -> None:
    shell = Shell(job(round_count=5))
    shell.run()
    assert shell.planner.progress.state is JobState.SUCCEEDED
    assert [r.state for r in shell.rounds.values()] == [RoundState.DONE] * 5
    bases = [call.inputs[0].key.round for call in shell.calls("client.c1")]
    assert bases == [0, 1, 2, 3, 4]
    assert shell.planner.due_s is None


def test_nobody_is_asked_before_every_aggregator_has_opened_the_round() -> None:
    shell = Shell(job(), answer=silent)
    shell.is_opening = False
    shell.do(shell.tick())
    assert not shell.calls()
    again = shell.tick(2.5)
    assert kinds(again) == ["OpenRound"], "a node that does not answer is told once more"
    shell.feed(RoundOpened(node_id=CLOUD, round=7))  # another round's answer
    assert not shell.calls()
    shell.feed(RoundOpened(node_id=CLOUD, round=1))
    assert len(shell.calls("client")) == 4
    assert shell.feed(RoundOpened(node_id=CLOUD, round=1)) == [], "nobody is asked twice"


def test_more_clients_are_asked_than_wanted_and_the_slowest_are_left_behind() -> None:
    pace = Pace(clients_per_round=2, over_commit=0.5, seed=3)
    shell = Shell(job(pace=pace), answer=silent)
    shell.do(shell.tick())
    asked = shell.calls("client")
    assert len(asked) == 3
    shell.feed(receipt(asked[0]))
    closed = shell.feed(receipt(asked[2]))
    assert Cancel(call_id=asked[1].call_id) in closed
    record = shell.rounds[1]
    assert record.state is RoundState.AGGREGATING
    states = {each.client: each.state for each in record.updates}
    late = str(asked[1].arguments["client"])
    assert states[late] is UpdateState.LATE
    assert shell.calls("merge")[0].arguments["rows"] == [0, 2]
    # While its old call has not ended, it is not asked; afterwards it is again.
    shell.feed(receipt(shell.calls("merge")[0]))
    shell.do(shell.tick())
    second = {str(call.arguments["client"]) for call in shell.calls("client")[3:]}
    assert late not in second and len(second) == 3
    shell.feed(CallEnded(call_id=asked[1].call_id, error_code="cancelled"))
    again = Shell(job(pace=pace, round_count=30))
    again.run()
    assert len({call.arguments["client"] for call in again.calls("client")}) == 4


def test_the_same_seed_asks_the_same_clients() -> None:
    def asked(seed: int) -> list[object]:
        shell = Shell(job(pace=Pace(clients_per_round=2, seed=seed), round_count=6))
        shell.run()
        return [call.call_id for call in shell.calls("client")]

    assert asked(1) == asked(1) != asked(2)


def test_an_update_that_was_quarantined_does_not_count() -> None:
    def answer(call: Call) -> CallEnded:
        bad = call.arguments.get("client") == "c2"
        return receipt(call, quarantined="it has a NaN at 7" if bad else "")

    shell = Shell(job(pace=Pace(quorum=3)), answer=answer)
    shell.run()
    assert shell.planner.progress.state is JobState.SUCCEEDED
    found = {each.client: each for each in shell.rounds[1].updates}
    assert found["c2"].state is UpdateState.QUARANTINED and found["c2"].message.startswith("it has")
    assert shell.calls("merge")[0].arguments["rows"] == [0, 2, 3]


def test_a_round_waits_until_its_deadline_and_goes_on_with_a_quorum() -> None:
    pace = Pace(quorum=2, deadline_s=10.0)
    shell = Shell(job(pace=pace), answer=silent)
    shell.do(shell.tick())
    for call in shell.calls("client")[:2]:
        shell.feed(receipt(call))
    assert shell.tick(9.0) == []
    made = shell.tick(1.5)
    assert [c.call_id for c in made if isinstance(c, Cancel)] == [
        call.call_id for call in shell.calls("client")[2:]
    ]
    assert len(shell.calls("merge")) == 1


def test_a_round_without_its_quorum_fails_and_the_next_number_takes_its_place() -> None:
    fails = iter([True] * 4 + [False] * 100)

    def answer(call: Call) -> CallEnded:
        if ".client." in call.call_id and next(fails):
            return CallEnded(call_id=call.call_id, error_code="function_raised", message="boom")
        return receipt(call)

    shell = Shell(job(), answer=answer)
    shell.run()
    states = {number: record.state for number, record in shell.rounds.items()}
    assert states == {1: RoundState.FAILED, 2: RoundState.DONE, 3: RoundState.DONE}
    assert "0 of 4 updates counted (c1: function_raised: boom" in shell.rounds[1].message
    assert shell.planner.progress.done_count == 2
    bases = {call.inputs[0].key.round for call in shell.calls("client") if ".2." in call.call_id}
    assert bases == {0}, "the model is still that of before"


def test_too_many_failed_rounds_in_a_row_end_the_job_and_it_may_be_resumed() -> None:
    is_broken = True

    def answer(call: Call) -> CallEnded:
        if is_broken:
            return CallEnded(call_id=call.call_id, error_code="unavailable", message="gone")
        return receipt(call)

    shell = Shell(job(pace=Pace(failures_max=2)), answer=answer)
    shell.run()
    progress = shell.planner.progress
    assert progress.state is JobState.FAILED and "3 rounds in a row" in progress.message
    assert len(shell.rounds) == 3
    is_broken = False
    shell.feed(ResumeAsked())
    shell.run()
    assert shell.planner.progress.state is JobState.SUCCEEDED
    assert [n for n, r in shell.rounds.items() if r.state is RoundState.DONE] == [4, 5]


def test_a_failed_round_may_count_as_skipped() -> None:
    shell = Shell(
        job(pace=Pace(failures_max=9, is_skipping=True), round_count=3),
        answer=lambda call: CallEnded(call_id=call.call_id, error_code="unavailable"),
    )
    shell.run()
    assert shell.planner.progress.state is JobState.SUCCEEDED
    assert [r.state for r in shell.rounds.values()] == [RoundState.FAILED] * 3


def test_clients_whose_nodes_are_away_are_asked_when_they_are_back() -> None:
    shell = Shell(job(pace=Pace(quorum=3), round_count=2))
    shell.view = view(edge_2=NodeState.LOST)
    made = shell.tick()
    while made:
        made = shell.do(made)
    assert {call.node_id for call in shell.calls("client")} == {"edge-1", "edge-3", "edge-4"}
    shell.view = view()
    shell.run()
    assert len([call for call in shell.calls("client") if call.node_id == "edge-2"]) == 1


def test_a_job_waits_for_nodes_and_says_so_once() -> None:
    shell = Shell(job())
    shell.view = view(edge_2=NodeState.LOST, edge_3=NodeState.SUSPECT)
    made = shell.tick()
    assert kinds(made) == ["Save"]
    assert "2 of 4 can be asked, a round needs 4" in shell.planner.progress.message
    assert shell.tick() == [] and shell.planner.due_s is not None
    shell.view = view(cloud_1=NodeState.LOST, fog_1=NodeState.LOST)
    assert "no node may aggregate" in _message(shell)
    shell.view = view()
    shell.run()
    assert shell.planner.progress.state is JobState.SUCCEEDED


def _message(shell: Shell) -> str:
    shell.tick()
    return shell.planner.progress.message


def test_a_client_that_fails_again_and_again_rests() -> None:
    def answer(call: Call) -> CallEnded:
        if call.arguments.get("client") == "c3":
            return CallEnded(call_id=call.call_id, error_code="function_raised", message="no")
        return receipt(call)

    shell = Shell(job(pace=Pace(quorum=3), round_count=20), answer=answer)
    shell.run()
    assert len(shell.rounds) == 20
    rounds = [int(call.arguments["round"]) for call in shell.calls("client.c3")]  # type: ignore[call-overload]
    gaps = [b - a for a, b in pairwise(rounds)]
    assert gaps == sorted(gaps) and gaps[0] == 1 and gaps[-1] == 8


def test_a_lost_aggregator_fails_the_round_and_another_takes_over() -> None:
    spec = job(topology=Topology(root=CLOUD, is_hierarchical=True), round_count=1)
    shell = Shell(spec, answer=silent)
    shell.do(shell.tick())
    assert {site.node_id for site in shell.rounds[1].aggregators} == {FOG, CLOUD}
    shell.view = view(fog_1=NodeState.LOST)
    made = shell.tick(1.0)
    assert len([c for c in made if isinstance(c, Cancel)]) == 4
    assert shell.rounds[1].state is RoundState.FAILED
    assert "fog-1 was lost" in shell.rounds[1].message
    shell.do(made)
    shell.answer = receipt
    shell.run()
    assert [site.node_id for site in shell.rounds[2].aggregators] == [CLOUD]
    assert shell.planner.progress.state is JobState.SUCCEEDED


def test_the_caches_may_let_go_of_every_round() -> None:
    """A round ends in a cache with a model: its own, or that of before if it has none."""
    fails = iter([True] * 4 + [False] * 100)

    def answer(call: Call) -> CallEnded:
        if ".client." in call.call_id and next(fails):
            return CallEnded(call_id=call.call_id, error_code="function_raised", message="boom")
        return receipt(call)

    shell = Shell(job(topology=Topology(root=CLOUD, is_hierarchical=True)), answer=answer)
    shell.run()
    assert [r.state for r in shell.rounds.values()] == [RoundState.FAILED] + [RoundState.DONE] * 2
    ended = {
        (call.node_id, call.output.key.round): call.inputs[0].key.round
        for call in shell.calls("close")
        if call.output is not None
    }
    # At the fog, the second round ends with the model that the third one brings.
    assert ended == {(FOG, 1): 0, (CLOUD, 1): 0, (FOG, 3): 3}


def test_a_root_that_is_lost_may_come_back_before_the_deadline() -> None:
    shell = Shell(job(pace=Pace(deadline_s=30.0)), answer=silent)
    shell.do(shell.tick())
    shell.view = view(cloud_1=NodeState.LOST)
    assert shell.tick(5.0) == []
    shell.view = view()
    for call in shell.calls("client"):
        shell.feed(receipt(call))
    assert len(shell.calls("merge")) == 1
    shell.view = view(cloud_1=NodeState.LOST)
    shell.tick(40.0)
    assert "cloud-1 was lost" in shell.rounds[1].message


def test_a_node_that_cannot_open_the_round_fails_it_in_words() -> None:
    shell = Shell(job(), answer=silent)
    shell.tick()
    shell.feed(RoundOpened(node_id=CLOUD, round=1, error_code="overloaded", message="memory full"))
    assert shell.rounds[1].message == "cloud-1 did not open the round: memory full"


def test_after_a_restart_the_same_calls_are_asked_for_again() -> None:
    before = Shell(job(), answer=silent)
    before.do(before.tick())
    asked = before.calls("client")
    before.feed(receipt(asked[0]))  # written nowhere: the store has its result
    saved, progress = before.rounds[1], before.planner.progress
    after = Shell(job(), progress, saved, answer=silent)
    made = after.tick()
    assert kinds(made) == ["OpenRound"]
    after.do(made)
    assert after.calls("client") == asked
    for call in asked:
        after.feed(receipt(call))
    merging = after.rounds[1]
    assert merging.state is RoundState.AGGREGATING
    # Once more, while it aggregates: what counts was written, and is not asked for again.
    third = Shell(job(), after.planner.progress, merging, answer=silent)
    third.do(third.tick())
    assert third.calls() == after.calls("merge")
    third.answer = receipt
    third.feed(receipt(third.calls()[0]))
    third.run()
    assert third.planner.progress.state is JobState.SUCCEEDED
    assert third.planner.progress.done_count == 2


def test_answers_of_before_count_although_the_deadline_passed_meanwhile() -> None:
    before = Shell(job(pace=Pace(deadline_s=10.0)), answer=silent)
    before.do(before.tick())
    after = Shell(job(pace=Pace(deadline_s=10.0)), before.planner.progress, before.rounds[1])
    after.now_s = 500.0
    after.planner.due_s = 500.0
    after.run()
    assert after.rounds[1].state is RoundState.DONE


def test_a_stopped_job_cancels_what_runs_and_goes_on_with_a_new_round() -> None:
    shell = Shell(job(), answer=silent)
    shell.do(shell.tick())
    made = shell.feed(StopAsked())
    assert sorted(c.call_id for c in made if isinstance(c, Cancel)) == sorted(
        call.call_id for call in shell.calls("client")
    )
    assert shell.planner.progress.state is JobState.STOPPED and shell.planner.due_s is None
    assert shell.rounds[1].state is RoundState.STOPPED
    assert shell.feed(StopAsked()) == []
    assert shell.tick() == [], "a stopped job does nothing"
    shell.do(made)
    shell.answer = receipt
    shell.feed(ResumeAsked(round_count=3))
    shell.run()
    assert shell.planner.progress.done_count == 3
    assert sorted(shell.rounds) == [1, 2, 3, 4]


def test_a_hierarchy_merges_near_the_clients_and_combines_by_examples() -> None:
    def answer(call: Call) -> CallEnded | None:
        return receipt(call, example_count={"c1": 1, "c2": 2, "c3": 3, "c4": 4}.get(_client(call)))

    spec = job(topology=Topology(root=CLOUD, is_hierarchical=True), encoding="auto", round_count=1)
    shell = Shell(spec, answer=answer)
    shell.run()
    assert shell.planner.progress.state is JobState.SUCCEEDED
    opened = {
        c.node_id: [each.client for each in c.manifest.clients]
        for c in shell.commands
        if isinstance(c, OpenRound)
    }
    assert opened == {FOG: ["c1", "c2", "c3", "c4"], CLOUD: []}
    for call in shell.calls("client"):
        assert call.output is not None and call.output.node_id == FOG
        assert call.inputs[0].node_id == FOG, "the model comes from the fog, not over the slow way"
    (part,) = shell.calls("part")
    assert part.node_id == FOG and part.output is not None and part.output.node_id == CLOUD
    assert part.output.encoding == "auto" and part.output.relative_to is not None
    assert part.arguments["weights"] == [1.0, 2.0, 3.0, 4.0]
    (combine,) = shell.calls("combine")
    assert combine.node_id == CLOUD and combine.arguments["weights"] == [10.0]


def _client(call: Call) -> str:
    return str(call.arguments.get("client"))


def test_aggregators_are_looked_for_now_and_then_and_at_once_when_one_is_away() -> None:
    spec = job(topology=Topology(root=CLOUD, is_hierarchical=True), round_count=9)
    shell = Shell(spec)
    sites = []
    for now_s, cluster in ((0.0, view()), (1.0, view()), (2.0, view(fog_1=NodeState.DRAINING))):
        shell.now_s, shell.view = now_s, cluster
        made = shell.tick(0.0)
        while made:
            made = shell.do(made)
        newest = shell.rounds[shell.planner.progress.round]
        assert newest.planned_cost_s > 0.0
        sites.append([site.node_id for site in newest.aggregators])
    assert sites == [[FOG, CLOUD], [FOG, CLOUD], [CLOUD]]
    assert shell.rounds[3].is_moved and not shell.rounds[2].is_moved


def test_fedadam_keeps_its_moments_from_round_to_round() -> None:
    shell = Shell(job("fedadam", {"rate": 0.5}, round_count=2))
    shell.run()
    first = [
        call for call in shell.calls() if ".1." in call.call_id and "client" not in call.call_id
    ]
    assert [call.call_id.rpartition(".")[2] for call in first] == [
        "merge",
        "adam-first",
        "adam-second",
        "adam-step",
    ]
    assert [len(call.inputs) for call in first] == [1, 2, 2, 3]
    second = [call for call in shell.calls("adam-first") if ".2." in call.call_id]
    assert second[0].inputs[2].key.round == 1 and second[0].inputs[2].key.client == "adam-first"
    step = shell.calls("adam-step")[1]
    assert step.arguments["rate"] == 0.5
    assert step.output is not None and step.output.key.client == ""


def test_fedprox_tells_its_clients_how_strongly_to_hold_on() -> None:
    shell = Shell(job("fedprox", {"mu": 0.3}, config={"epochs": 2}))
    shell.run()
    assert shell.calls("client")[0].arguments["config"] == {"epochs": 2, "proximal_mu": 0.3}


def test_multi_krum_says_whom_it_left_out() -> None:
    def answer(call: Call) -> CallEnded:
        facts = {"kept_rows": [0, 1, 3]} if ".merge" in call.call_id else {}
        return receipt(call, **facts)

    shell = Shell(job("multi-krum", {"bad_share": 0.25}, round_count=1), answer=answer)
    shell.run()
    merge = shell.calls("merge")[0]
    assert merge.arguments["byzantine_count"] == 1 and len(merge.inputs) == 2
    left = [each.client for each in shell.rounds[1].updates if "left out" in each.message]
    assert left == ["c3"]


@pytest.mark.parametrize(("count", "bad"), [(20, 4), (10, 2), (9, 2), (4, 1), (3, 0), (2, 0)])
def test_krum_reckons_with_no_more_bad_clients_than_it_can(count: int, bad: int) -> None:
    assert krum_bad_count(count, 0.2) == bad


def test_the_judge_adds_to_the_metrics_and_its_failure_fails_nothing() -> None:
    def answer(call: Call) -> CallEnded:
        if "evaluate" in call.call_id:
            if call.arguments["round"] == 2:
                return CallEnded(call_id=call.call_id, error_code="function_raised", message="boom")
            return CallEnded(call_id=call.call_id, value={"accuracy": 0.9, "note": "fine"})
        return receipt(call)

    shell = Shell(job(evaluate_function="default/judge@1"), answer=answer)
    shell.run()
    assert shell.rounds[1].metrics == {"loss": 0.5, "accuracy": 0.9}
    assert shell.rounds[2].state is RoundState.DONE
    assert shell.rounds[2].message == "the evaluation failed: boom"
    every = Shell(job(evaluate_function="default/judge@1", pace=Pace(evaluate_every=2)))
    every.run()
    assert [call.arguments["round"] for call in every.calls("evaluate")] == [2]


def test_a_failed_aggregation_fails_the_round() -> None:
    def answer(call: Call) -> CallEnded:
        if ".1.merge" in call.call_id:
            return CallEnded(call_id=call.call_id, error_code="function_died", message="killed")
        return receipt(call)

    shell = Shell(job(round_count=1), answer=answer)
    shell.run()
    assert shell.rounds[1].message == "the aggregation failed: killed"
    assert shell.rounds[2].state is RoundState.DONE


@pytest.mark.parametrize("facts", [{"digest": ""}, {"example_count": -1}, {"example_count": "x"}])
def test_a_receipt_that_makes_no_sense_counts_as_a_failure(facts: dict[str, object]) -> None:
    def answer(call: Call) -> CallEnded:
        return receipt(call, **(facts if _client(call) == "c1" else {}))

    shell = Shell(job(pace=Pace(quorum=3), round_count=1), answer=answer)
    shell.run()
    assert shell.rounds[1].updates[0].state is UpdateState.FAILED


def test_what_is_saved_comes_before_what_is_done() -> None:
    shell = Shell(job(round_count=3))
    shell.run()
    seen: set[int] = set()
    for command in shell.commands:
        if isinstance(command, Save) and command.record is not None:
            seen.add(command.record.round)
        elif isinstance(command, OpenRound):
            assert command.manifest.round in seen
    assert replace(shell.rounds[3], updates=()).base_round == 2
