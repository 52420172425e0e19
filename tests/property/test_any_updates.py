"""Whatever updates came, every question about them is answered in plain numbers or refused."""

import json
import sys
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from rounds_builders import statistics_of

from tierwise.functions.fl.geometry import distances_squared, embedding, norms, similarities
from tierwise.functions.fl.questions import QUESTIONS, answer

SMALL = st.integers(-3, 3).map(float)
DELTAS = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=SMALL)
ARGUMENTS = {
    "similar-weights": {"client": "client-0"},
    "fedfomo-weights": {"client": "client-0", "losses": {"client-0": 0.5}, "loss_before": 1.0},
    "schedule-oort": {"count": 1},
    "schedule-tifl": {"count": 1},
    "schedule-diverse": {"count": 1},
    "schedule-loss": {"count": 1},
    "payments": {"budget": 100},
    "rank": {"by": "norm"},
    "filter": {"where": {"norm": "> 1"}},
    "client-history": {"client": "client-0"},
    "best-round": {"metric": "loss"},
    "settings": {"key": "lr", "metric": "loss"},
    "provenance": {"since": 3},
}


@given(DELTAS, st.data())
@settings(max_examples=150, deadline=None)
def test_any_updates_give_plain_answers_without_a_warning(
    deltas: np.ndarray,
    data: st.DataObject,  # type: ignore[type-arg]
) -> None:
    n = len(deltas)
    numbers = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    columns = {name: data.draw(numbers, name) for name in ("loss", "duration_s", "accuracy", "lr")}
    rows = [{name: column[row] for name, column in columns.items()} for row in range(n)]
    statistics = statistics_of(deltas, counts=data.draw(numbers, "counts"), metadata=rows)
    for name, question in QUESTIONS.items():
        if question.needs != "statistics":
            continue
        subject = statistics if question.rounds == 1 else [statistics]
        with np.errstate(all="raise", under="ignore"):
            try:
                found = answer(name, subject, ARGUMENTS.get(name, {}))
            except ValueError:
                continue
        json.dumps(found, allow_nan=False)


@given(DELTAS)
@settings(max_examples=200, deadline=None)
def test_the_gram_matrix_says_of_any_vectors_what_they_say_themselves(
    deltas: np.ndarray,  # type: ignore[type-arg]
) -> None:
    gram = deltas @ deltas.T
    apart = ((deltas[:, None] - deltas[None]) ** 2).sum(axis=2)
    assert (distances_squared(gram) == apart).all(), "small whole numbers: exactly"
    lengths = np.linalg.norm(deltas, axis=1)
    assert np.allclose(norms(gram), lengths)
    cosines = similarities(gram)
    assert np.allclose(
        cosines * np.outer(lengths, lengths) * (1 - np.eye(len(deltas))),
        gram * (1 - np.eye(len(deltas))),
    )
    points = embedding(gram)
    assert np.allclose(points @ points.T, gram, atol=1e-6)
