"""Everything that rounds can be asked, by name.

What needs statistics only is answered here and now: `answer("krum", statistics, {"faulty": 2})`.
For the rest, `find(name).function` is shipped to the node that holds the vectors.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from tierwise.functions.fl.answers import choice, facts, history, likeness, models, worth
from tierwise.functions.fl.question import Answer, Question, named
from tierwise.functions.fl.statistics import RoundStatistics

QUESTIONS: Mapping[str, Question] = {
    question.name: question
    for module in (facts, likeness, choice, worth, history, models)
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
