"""User code in rounds: its own shapes on one side, one vector on the other; refusals in words."""

from typing import Any

import numpy as np
import pytest

import tierwise
from tierwise.functions.fl.client import as_client, as_judge, flat, shaped

SHAPES = [(3, 2), (4,), ()]
ARGUMENTS = {"config": {"rate": 0.5}, "client": "c1", "round": 3, "data": "/a"}


def model() -> list[Any]:
    return [np.arange(6.0).reshape(3, 2), np.ones(4), np.float64(7.0)]


def test_arrays_come_back_as_they_went() -> None:
    vector = flat(model(), SHAPES)
    assert vector.dtype == np.float32 and vector.shape == (11,)
    for before, after in zip(model(), shaped(vector, SHAPES), strict=True):
        np.testing.assert_array_equal(before, after)


def test_user_code_may_change_what_it_is_given_although_it_is_shared() -> None:
    vector = flat(model(), SHAPES)
    vector.flags.writeable = False

    def train(arrays: Any, config: dict[str, Any]) -> Any:
        for array in arrays:
            array += config["rate"]
        return arrays, 10, {"loss": np.float32(0.25), "client": config["client"]}

    trained, facts = as_client(train, SHAPES)([vector], ARGUMENTS)
    np.testing.assert_array_equal(trained, vector + 0.5)
    assert facts.pop("duration_s") >= 0.0
    assert facts == {"loss": 0.25, "client": "c1", "example_count": 10.0}
    assert type(facts["loss"]) is float


@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        (None, TypeError, "a client returns three things"),
        (([], 1), TypeError, "a client returns three things"),
        ((model()[:2], 1, {}), ValueError, "there are 2 arrays, and the model has 3"),
        (([*model()[:1], np.ones(5), 1.0], 1, {}), ValueError, r"array 1 has shape \(5,\)"),
        ((model(), 1, [0.5]), TypeError, "metrics are a dict"),
        ((model(), "many", {}), ValueError, "could not convert"),
    ],
)
def test_what_breaks_the_promise_is_told_in_words(
    result: Any, error: type[Exception], words: str
) -> None:
    wrapped = as_client(lambda arrays, config: result, SHAPES)
    with pytest.raises(error, match=words):
        wrapped([flat(model(), SHAPES)], ARGUMENTS)


def test_a_judge_returns_metrics() -> None:
    def judge(arrays: Any, config: dict[str, Any]) -> Any:
        return {"accuracy": np.mean(arrays[0]), "round": config["round"]}

    found = as_judge(judge, SHAPES)([flat(model(), SHAPES)], {"config": {}, "round": 2})
    assert found == {"accuracy": 2.5, "round": 2}
    with pytest.raises(TypeError, match="returns a dict"):
        as_judge(lambda arrays, config: 1.0, SHAPES)(
            [flat(model(), SHAPES)], {"config": {}, "round": 2}
        )


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has 11 parameters"):
        shaped(np.zeros(12, dtype=np.float32), SHAPES)


def job(**changes: Any) -> tierwise.FederatedJob:
    options: dict[str, Any] = {"initial": model(), "clients": {"a": "edge-1"}, **changes}
    return tierwise.FederatedJob("digits", lambda arrays, config: None, **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"initial": []}, "at least one array"),
        ({"initial": ["x"]}, "initial"),
        ({"clients": {}}, "at least one"),
        ({"clients": {"A b": "edge-1"}}, "clients.client"),
        ({"strategy": "best"}, "use one of fedavg"),
        ({"strategy": "fedadam", "mu": 0.1}, "has rate"),
        ({"strategy": "median", "hierarchical": True}, "needs every update in one place"),
        ({"quorum": 2}, "quorum"),
        ({"deadline": "soon"}, "soon"),
        ({"encoding": "zip"}, "encoding"),
        ({"config": {"f": object()}}, "config"),
        ({"rounds": 0}, "round_count"),
    ],
)
def test_a_job_that_cannot_be_is_refused_before_anything_is_sent(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(tierwise.InvalidArgument, match=words):
        job(**changes)


def test_a_function_of_an_app_keeps_its_options() -> None:
    app = tierwise.App("own")

    @app.function(memory="1GiB", timeout="3m")
    def train(arrays: Any, config: Any) -> Any:
        return arrays, 1, {}

    made = tierwise.FederatedJob("digits", train, model(), {"a": "edge-1"})
    spec = made._functions["client"].spec
    assert (spec.name, spec.memory_mib, spec.timeout_s) == ("digits-client", 1024, 180.0)
