"""Everything that rounds can be asked, by name.

What needs statistics only is answered here and now: `answer("krum", statistics, {"faulty": 2})`.
For the rest, `find(name).function` is shipped to the node that holds the vectors.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tierwise.functions.fl.answers import choice, facts, history, inference, likeness, models, worth
from tierwise.functions.fl.question import Answer, Question, named
from tierwise.functions.fl.statistics import RoundStatistics

QUESTIONS: Mapping[str, Question] = {
    question.name: question
    for module in (facts, likeness, choice, worth, history, inference, models)
    for question in module.QUESTIONS
}


def find(name: str) -> Question:
    """Return a question; underscores may stand for hyphens.

    Raises:
        ValueError: There is none of that name; the message names the nearest.
    """
    wanted = name.replace("_", "-").lower()
    if wanted in QUESTIONS:
        return QUESTIONS[wanted]
    near = difflib.get_close_matches(wanted, QUESTIONS, n=3, cutoff=0.5)
    hint = f"did you mean {named(near)}?" if near else f"ask one of {', '.join(QUESTIONS)}"
    raise ValueError(f"there is no question {name[:80]!r}: {hint}")


def answer(
    name: str,
    statistics: RoundStatistics | Sequence[RoundStatistics],
    arguments: Mapping[str, Any],
) -> Answer:
    """Answer a question that needs statistics only.

    Args:
        name: Of the question.
        statistics: Of one round; of several, oldest first, if `question.rounds` is not 1.
        arguments: What the question takes.

    Raises:
        ValueError: There is no such question, it needs the vectors, or it is asked wrongly.
    """
    question = find(name)
    if question.needs != "statistics":
        raise ValueError(
            f"{question.name} needs the vectors themselves: ask it where they are held, with "
            "Rounds.ask or `tierwise fl ask`"
        )
    return question.function(statistics, **question.checked(arguments))


def markdown() -> str:
    """Return all questions as the documentation shows them: a table, then their arguments."""
    lines = ["| question | what it answers | from what | source |", "|---|---|---|---|"]
    lines += [
        f"| `{each.name}` | {each.summary} | {_from_what(each)} | {each.source} |"
        for each in QUESTIONS.values()
    ]
    lines += ["", "| question | argument | default | meaning |", "|---|---|---|---|"]
    for each in QUESTIONS.values():
        for name, parameter in each.parameters.items():
            is_needed = parameter.default is parameter.empty
            default = "needed" if is_needed else f"`{json.dumps(parameter.default)}`"
            lines.append(f"| `{each.name}` | `{name}` | {default} | {each.arguments[name]} |")
    return "\n".join(lines) + "\n"


def _from_what(question: Question) -> str:
    if question.needs != "statistics":
        return " and ".join(_ARRAYS[name] for name in question.inputs)
    if question.rounds == 1:
        return "statistics of a round"
    many = "all rounds held" if question.rounds == 0 else f"up to {question.rounds} rounds"
    return f"statistics of {many}"


_ARRAYS = {
    "matrix": "the round's updates",
    "base": "its base",
    "aggregate": "its aggregate",
    "update": "a client's update",
    "model": "a client's update or the aggregate",
}
