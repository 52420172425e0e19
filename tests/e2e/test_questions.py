"""Analytics run in real workers, which see nothing of tierwise but what is shipped to them."""

import numpy as np
import pytest

import tierwise
from tierwise.functions.fl.questions import QUESTIONS, find

RNG = np.random.default_rng(0)
LAYOUT = [[8, 6], [8], [3, 8], [3]]
BASE = RNG.normal(size=83).astype(np.float32)
MATRIX = (BASE + 0.1 * RNG.normal(size=(6, 83))).astype(np.float32)
MATRIX[4] *= -3.0
INPUTS = RNG.normal(size=(40, 6)).astype(np.float32)
LABELS = RNG.integers(0, 3, 40)
FACTS = {  # as the question "round" answers them
    "round": 3,
    "clients": [f"client-{row}" for row in range(6)],
    "is_in": [True] * 6,
    "example_counts": {f"client-{row}": 10.0 + row for row in range(6)},
    "parameter_count": 83,
    "round_metadata": {"layout": LAYOUT},
}
NETWORK = {"inputs": INPUTS, "labels": LABELS}
ASKED = {
    "predict": ((BASE,), {"inputs": INPUTS, "with_chances": True}),
    "evaluate": ((BASE,), NETWORK),
    "ditto": ((MATRIX[0], BASE), {"client": "client-0"}),
    "combine": ((MATRIX,), {"weights": {"client-0": 1.0, "client-2": 3.0}}),
    "score-clients": ((MATRIX,), NETWORK),
    "gtg-shapley": ((MATRIX, BASE), NETWORK),
    "feddebug": ((MATRIX,), {}),
    "layer-norms": ((MATRIX, BASE), {}),
}


def test_every_question_on_vectors_is_tried() -> None:
    assert set(ASKED) == {name for name, each in QUESTIONS.items() if each.needs != "statistics"}


@pytest.mark.parametrize("name", ASKED)
def test_a_worker_answers_as_the_function_does_here(client: tierwise.Client, name: str) -> None:
    app = tierwise.App("analytics", client=client)
    function = app.function(find(name).function, name=f"fl-{name}", memory="300MiB", timeout="20s")
    arrays, arguments = ASKED[name]
    found = function.remote(*arrays, facts=FACTS, **arguments)
    here = find(name).function(*arrays, facts=FACTS, **arguments)
    vector = here.pop("vector", None)
    if vector is not None:
        assert (found.pop("vector") == vector).all()
    assert found == here


def test_a_users_function_may_build_on_the_platforms(client: tierwise.Client) -> None:
    from tierwise.functions.fl import filtering
    from tierwise.functions.fl.geometry import norms

    app = tierwise.App("mine", client=client)

    @app.function(memory="300MiB")
    def suspicious(rows):  # type: ignore[no-untyped-def]
        gram = rows @ rows.T
        return int((~filtering.norm_outliers(gram)[0]).sum()), norms(gram)

    rows = (MATRIX - BASE).astype(np.float64)
    count, lengths = suspicious.remote(rows)
    assert count == 1
    assert np.allclose(lengths, np.linalg.norm(rows, axis=1))


def test_wrong_arguments_come_back_as_what_they_are(client: tierwise.Client) -> None:
    app = tierwise.App("analytics", client=client)
    function = app.function(find("predict").function, name="fl-predict", memory="300MiB")
    with pytest.raises(tierwise.FunctionRaised, match="the network takes") as caught:
        function.remote(BASE, facts=FACTS, inputs=INPUTS[:, :2])
    assert caught.value.remote_type == "ValueError"


def test_a_users_function_may_ask_questions_itself(client: tierwise.Client) -> None:
    from tierwise.functions.fl.questions import answer
    from tierwise.functions.fl.statistics import RoundStatistics

    app = tierwise.App("mine", client=client)

    @app.function(memory="300MiB")
    def ask(deltas):  # type: ignore[no-untyped-def]
        import numpy as np

        gram, names = deltas @ deltas.T, tuple("abcdef")
        statistics = RoundStatistics(
            namespace="mine",
            job="mine",
            round=0,
            clients=names,
            rows=np.arange(6),
            expected=names,
            parameter_count=deltas.shape[1],
            gram=gram,
            norms=np.sqrt(np.diagonal(gram)),
            base_dots=np.zeros(6),
            base_norm=0.0,
            aggregate_dots=np.full(6, np.nan),
            aggregate_norm=np.nan,
            example_counts=np.ones(6),
            arrival_s=np.zeros(6),
            digests=("",) * 6,
        )
        return answer("krum", statistics, {"faulty": 1})

    found = ask.remote((MATRIX - BASE).astype(np.float64))
    assert found["rejected"] == ["e"]
