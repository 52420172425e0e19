"""Whatever answers come, in whatever order: nothing counts twice, and no job hangs or runs wild."""

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.workloads.federated_events import (
    CallEnded,
    Cancel,
    OpenRound,
    ResumeAsked,
    RoundOpened,
    Save,
    StopAsked,
    Submit,
)
from tests.unit.federated_builders import CLOUD, EDGES, FOG, Shell, job, receipt, view
from tierwise.domain.federated import JobState, Pace, RoundState, Topology, UpdateState
from tierwise.domain.topology import NodeState

ACTIONS = ("answer", "fail", "quarantine", "open", "tick", "lose", "restart", "stop", "resume")


@settings(max_examples=60, deadline=None)
@given(
    strategy=st.sampled_from(["fedavg", "fedadam", "fedbuff", "median"]),
    is_hierarchical=st.booleans(),
    quorum=st.integers(1, 4),
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 50)), max_size=120),
)
def test_any_history_keeps_the_books(
    strategy: str, is_hierarchical: bool, quorum: int, actions: list[tuple[str, int]]
) -> None:
    is_hierarchical = is_hierarchical and strategy in ("fedavg", "fedadam")
    spec = job(
        strategy,
        round_count=4,
        pace=Pace(quorum=quorum, deadline_s=20.0, failures_max=3, seed=1),
        topology=Topology(root=CLOUD, is_hierarchical=is_hierarchical),
    )
    shell = Shell(spec)
    open_calls: dict[str, Submit] = {}
    unopened: list[OpenRound] = []
    submitted: list[str] = []

    def take(made: list[object]) -> None:
        for command in made:
            if isinstance(command, Submit):
                submitted.append(command.call.call_id)
                open_calls[command.call.call_id] = command
            elif isinstance(command, OpenRound):
                unopened.append(command)
            elif isinstance(command, Cancel) and command.call_id in open_calls:
                del open_calls[command.call_id]
                ended = CallEnded(call_id=command.call_id, error_code="cancelled")
                take(list(shell.feed(ended)))
            elif isinstance(command, Save) and command.record is not None:
                record = command.record
                counted = [u for u in record.updates if u.state is UpdateState.COUNTED]
                assert len({u.client for u in counted}) == len(counted)
                if record.state is RoundState.DONE:
                    assert counted

    def act(action: str, pick: int) -> None:
        if action in ("answer", "fail", "quarantine") and open_calls:
            call_id = sorted(open_calls)[pick % len(open_calls)]
            call = open_calls.pop(call_id).call
            event = receipt(call, quarantined="bad" if action == "quarantine" else "")
            if action == "fail":
                event = CallEnded(call_id=call.call_id, error_code="unavailable", message="x")
            take(list(shell.feed(event)))
            take(list(shell.feed(event)))  # delivered twice
        elif action == "open" and unopened:
            told = unopened.pop(pick % len(unopened))
            number = told.manifest.round
            take(list(shell.feed(RoundOpened(node_id=told.node_id, round=number))))
        elif action == "tick":
            take(list(shell.tick(pick / 5.0)))
        elif action == "lose":
            names = [*EDGES, FOG, CLOUD]
            lost = names[pick % len(names)].replace("-", "_")
            shell.view = view(**{lost: NodeState.LOST}) if pick % 3 else view()
        elif action == "restart":
            progress = shell.planner.progress
            saved = shell.rounds.get(progress.round)
            is_open = saved is not None and saved.state in (
                RoundState.COLLECTING,
                RoundState.AGGREGATING,
            )
            fresh = Shell(spec, progress, saved if is_open else None)
            fresh.now_s, fresh.view, fresh.rounds = shell.now_s, shell.view, shell.rounds
            shell.__dict__.update(fresh.__dict__)
            open_calls.clear()
            unopened.clear()
            submitted.clear()
        elif action == "stop":
            take(list(shell.feed(StopAsked())))
        elif action == "resume":
            take(list(shell.feed(ResumeAsked())))

    for action, pick in actions:
        act(action, pick)
        assert len(set(submitted)) == len(submitted), "a call was asked for twice"
        assert shell.planner.progress.failure_count <= 4
    # Now all goes well, and so does the job.
    shell.view = view()
    act("resume", 0)
    for _ in range(400):
        if shell.planner.progress.state is not JobState.RUNNING:
            break
        while open_calls or unopened:
            act("open" if unopened else "answer", 0)
        take(list(shell.tick()))
    assert shell.planner.progress.state is JobState.SUCCEEDED
    done = [r for r in shell.rounds.values() if r.state is RoundState.DONE]
    assert len(done) == 4
