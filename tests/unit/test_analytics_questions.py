"""The registry: what is documented is what is asked for; whoever asks wrongly learns how."""

import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rounds_builders import crowd, statistics_of

from tierwise.functions.fl.questions import QUESTIONS, answer, find, markdown
from tierwise.functions.fl.statistics import RoundStatistics
from tierwise.wire import payload

ROOT = Path(__file__).parents[2]
OF_STATISTICS = [name for name, each in QUESTIONS.items() if each.needs == "statistics"]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "similar-weights": {"client": "client-1"},
    "fedfomo-weights": {"client": "client-1", "losses": {"client-2": 0.5}, "loss_before": 1.0},
    "schedule-oort": {"count": 3},
    "schedule-tifl": {"count": 3},
    "schedule-diverse": {"count": 3},
    "schedule-loss": {"count": 3},
    "payments": {"budget": 100},
    "rank": {"by": "loss"},
    "filter": {"where": {"loss": "> 0.5"}},
    "client-history": {"client": "client-1"},
    "best-round": {"metric": "accuracy"},
    "settings": {"key": "lr", "metric": "accuracy"},
}


def round_of(number: int, n: int = 6) -> RoundStatistics:
    rows = [
        {"loss": 1.0 / (row + 1), "accuracy": 0.1 * row, "duration_s": 1.0 + row, "lr": row % 2}
        for row in range(n)
    ]
    return statistics_of(crowd(n, 30, seed=number), round_number=number, metadata=rows)


def subject_of(name: str) -> RoundStatistics | Sequence[RoundStatistics]:
    one = round_of(3)
    return one if QUESTIONS[name].rounds == 1 else [round_of(number) for number in range(4)]


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_argument_is_described_and_every_description_is_of_one(name: str) -> None:
    question = QUESTIONS[name]
    assert set(question.parameters) == set(question.arguments)
    first = list(inspect.signature(question.function).parameters)
    if question.needs == "statistics":
        assert first[0] in ("statistics", "history")
        assert (first[0] == "history") == (question.rounds != 1)
        assert question.inputs == ()
    else:
        assert tuple(first[: len(question.inputs)]) == question.inputs
        assert "facts" in first
        assert question.inputs
    assert question.function.__doc__


@pytest.mark.parametrize("name", OF_STATISTICS)
def test_every_answer_is_json_and_travels_as_it_is(name: str) -> None:
    found = answer(name, subject_of(name), ARGUMENTS.get(name, {}))
    assert found == json.loads(json.dumps(found, allow_nan=False))
    assert payload.decode(payload.encode(found)) == found


@pytest.mark.parametrize("name", OF_STATISTICS)
def test_statistics_are_left_as_they_were(name: str) -> None:
    subject = subject_of(name)
    for each in [subject] if isinstance(subject, RoundStatistics) else subject:
        for array in (each.gram, each.norms, each.example_counts, *each.columns.values()):
            array.flags.writeable = False  # as the cache hands them out
    answer(name, subject, ARGUMENTS.get(name, {}))


@pytest.mark.parametrize("name", OF_STATISTICS)
def test_a_round_without_updates_is_answered_or_refused_in_words(name: str) -> None:
    empty = statistics_of(np.zeros((0, 30)), expected=("client-1", "client-2"))
    subject = empty if QUESTIONS[name].rounds == 1 else [empty]
    try:
        found = answer(name, subject, {**ARGUMENTS.get(name, {}), **since_of(name)})
    except ValueError as error:
        assert "round" in str(error)
    else:
        json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("name", [name for name in OF_STATISTICS if QUESTIONS[name].rounds != 1])
def test_a_job_without_rounds_is_refused_in_words(name: str) -> None:
    with pytest.raises(ValueError, match="no round is held"):
        answer(name, [], ARGUMENTS.get(name, {}))


@pytest.mark.parametrize("name", OF_STATISTICS)
def test_a_single_client_is_answered_or_refused_in_words(name: str) -> None:
    alone = round_of(3, n=1)
    arguments = json.loads(json.dumps(ARGUMENTS.get(name, {})).replace("client-1", "client-0"))
    arguments = json.loads(json.dumps(arguments).replace("client-2", "client-0"))
    if "count" in arguments:
        arguments["count"] = 1
    subject = alone if QUESTIONS[name].rounds == 1 else [alone]
    try:
        found = answer(name, subject, {**arguments, **since_of(name)})
    except ValueError as error:
        assert "needs" in str(error)
    else:
        json.dumps(found, allow_nan=False)


def since_of(name: str) -> dict[str, int]:
    return {"since": 3} if name == "provenance" else {}


def test_an_unknown_question_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean krum"):
        find("krumm")
    with pytest.raises(ValueError, match="ask one of round, metrics"):
        find("xyzzy-plugh")
    assert find("Multi_Krum".replace("Multi_", "")) is QUESTIONS["krum"]
    assert find("leave_one_out") is QUESTIONS["leave-one-out"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("krum", {"f": 1}, "takes no argument 'f'; it takes: faulty, keep"),
        ("leave-one-out", {"x": 1}, "it takes: none"),
        ("rank", {}, "rank needs `by`: column of the metadata"),
        ("krum", {"faulty": 1.5}, "`faulty` of krum must be a whole number"),
        ("krum", {"faulty": True}, "must be a whole number"),
        ("map", {"is_by_direction": 1}, "must be true or false"),
        ("cosine-filter", {"slack": "2"}, "must be a finite number"),
        ("cosine-filter", {"slack": float("nan")}, "must be a finite number"),
        ("rank", {"by": 3}, "must be text"),
        ("similarity", {"client": "eve"}, "has no client 'eve'; it has client-0, client-1"),
        ("clusters", {"k": 7}, "`k` is from 0 to 6, not 7"),
        ("clusters", {"seed": -1}, "`seed` is 0 or more"),
        ("krum", {"faulty": 3}, "or more, and the round has 6"),
        ("krum", {"keep": 9}, "`keep` is how many clients stay: 1 to 6"),
        ("schedule-diverse", {"count": 0}, "`count` is how many clients to choose: 1 to 6"),
        ("schedule-oort", {"count": 1, "newcomers": "ab"}, "`newcomers` is a list"),
        ("payments", {"budget": -3}, "`budget` is in the smallest unit"),
        ("feddebug", {}, "feddebug needs the vectors themselves"),
    ],
)
def test_whoever_asks_wrongly_learns_how_to_ask(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    subject = round_of(3) if name == "feddebug" else subject_of(name)
    with pytest.raises(ValueError, match=message):
        answer(name, subject, arguments)


def test_a_client_that_does_not_count_is_told_apart_from_one_that_is_not_there() -> None:
    statistics = statistics_of(
        crowd(2, 8), expected=("client-0", "client-1", "late", "bad"), quarantined={"bad": "NaN"}
    )
    for client, message in (
        ("bad", "is quarantined: NaN"),
        ("late", "has no update of 'late' yet"),
    ):
        with pytest.raises(ValueError, match=message):
            answer("similarity", statistics, {"client": client})


def test_numbers_of_numpy_are_numbers() -> None:
    found = answer("krum", round_of(3), {"faulty": np.int64(1)})
    assert found["faulty_max"] == 1
    answer("cosine-filter", round_of(3), {"slack": np.float32(2.0)})


def test_questions_load_numpy_and_nothing_else() -> None:
    code = (
        "import sys, numpy; before = set(sys.modules); import tierwise.functions.fl.questions; "
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(' '.join(names - set(sys.stdlib_module_names)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    runtime = {name for name in ran.stdout.split() if "cython" in name}  # of numpy.random
    assert set(ran.stdout.split()) - runtime <= {"tierwise", "numpy"}


def test_the_documentation_lists_what_can_be_asked() -> None:
    text = (ROOT / "docs" / "federated.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- questions -->\n")[2].partition("<!-- end of questions -->")[0]
    assert shown.strip() == markdown().strip(), (
        "put this between the marks: python -c "
        '"from tierwise.functions.fl.questions import markdown; print(markdown())"'
    )
