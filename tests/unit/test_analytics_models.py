"""Questions on vectors: inference, scores, FedDebug, layers, combinations."""

from typing import Any

import numpy as np
import pytest
from rounds_builders import statistics_of
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier

from tierwise.functions.fl import debugging
from tierwise.functions.fl.answers import inference, models
from tierwise.functions.fl.answers.facts import facts
from tierwise.functions.fl.networks import Network, parts

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(120, 6)).astype(np.float32)
LABELS = (INPUTS[:, 0] + INPUTS[:, 1] > 0).astype(int) + (INPUTS[:, 2] > 0.5).astype(int)
LAYOUT = [[8, 6], [8], [3, 8], [3]]
LENGTH = 48 + 8 + 24 + 3


def facts_of(count: int = 5, length: int = LENGTH, **changes: Any) -> dict[str, Any]:
    return facts(statistics_of(np.ones((count, length)), **changes))


def flat(*arrays: Any) -> Any:
    return np.concatenate([np.ravel(array) for array in arrays]).astype(np.float32)


def trained(seed: int = 0, labels: Any = LABELS) -> Any:
    """Return a network's parameters as PyTorch would have them flat: (outputs, inputs)."""
    rng = np.random.default_rng(seed)
    w1, b1 = rng.normal(size=(8, 6)) * 0.5, np.zeros(8)
    w2, b2 = rng.normal(size=(3, 8)) * 0.5, np.zeros(3)
    onehot = np.eye(3)[labels]
    for _ in range(300):
        hidden = np.maximum(INPUTS @ w1.T + b1, 0.0)
        logits = hidden @ w2.T + b2
        chance = np.exp(logits - logits.max(axis=1, keepdims=True))
        off = (chance / chance.sum(axis=1, keepdims=True) - onehot) / len(INPUTS)
        back = (off @ w2) * (hidden > 0)
        w2, b2 = w2 - 0.5 * off.T @ hidden, b2 - 0.5 * off.sum(axis=0)
        w1, b1 = w1 - 0.5 * back.T @ INPUTS, b1 - 0.5 * back.sum(axis=0)
    return flat(w1, b1, w2, b2)


# -- inference ----------------------------------------------------------------------------------


def test_softmax_regression_predicts_as_scikit_learn_does() -> None:
    known = LogisticRegression().fit(INPUTS, LABELS)
    vector = flat(known.coef_, known.intercept_)
    facts = facts_of(length=len(vector), round_metadata={"layout": [[3, 6], [3]]})
    found = inference.predict(vector, facts=facts, inputs=INPUTS, with_chances=True)
    assert found["labels"] == known.predict(INPUTS).tolist()
    assert np.allclose(found["chances"], known.predict_proba(INPUTS), atol=1e-5)
    scored = inference.evaluate(vector, facts=facts, inputs=INPUTS.tolist(), labels=LABELS.tolist())
    assert scored["accuracy"] == pytest.approx(known.score(INPUTS, LABELS))
    assert scored["loss"] == pytest.approx(log_loss(LABELS, known.predict_proba(INPUTS)), rel=1e-5)


def test_one_output_is_two_classes() -> None:
    labels = LABELS > 0
    known = LogisticRegression().fit(INPUTS, labels)
    vector = flat(known.coef_, known.intercept_)
    found = inference.predict(
        vector, facts=facts_of(length=7), layout=[[1, 6], [1]], inputs=INPUTS, with_chances=True
    )
    assert found["labels"] == known.predict(INPUTS).astype(int).tolist()
    assert np.allclose(found["chances"], known.predict_proba(INPUTS), atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic"])
@pytest.mark.filterwarnings("ignore")
def test_a_perceptron_predicts_as_scikit_learn_does(activation: str) -> None:
    known = MLPClassifier((8, 5), activation=activation, max_iter=30, random_state=0)
    known.fit(INPUTS, LABELS)
    layers = list(zip(known.coefs_, known.intercepts_, strict=True))
    vector = flat(*(array for layer in layers for array in layer))
    layout = [list(array.shape) for layer in layers for array in layer]
    found = inference.predict(
        vector,
        facts=facts_of(length=len(vector)),
        layout=layout,
        inputs=INPUTS,
        activation=activation,
        with_chances=True,
    )
    assert np.allclose(found["chances"], known.predict_proba(INPUTS), atol=1e-5)


def test_a_single_input_may_be_a_plain_list() -> None:
    found = inference.predict(
        trained(), facts=facts_of(), layout=LAYOUT, inputs=[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    )
    assert len(found["labels"]) == 1


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (None, "a layout is a list of the shapes"),
        ([], "a layout is a list"),
        ([[8, 6], [8]], "has 56 elements and the round's vectors 83"),
        ([[8, 6], [8], [3, 8], ["3"]], r"layout\[3\] is no shape"),
        ([[8, 6], [8], [3, 8], [-3]], r"layout\[3\] is no shape"),
        ([[83]], "only dense networks"),
        ([[2, 2, 2], [75]], "only dense networks"),
        ([[8, 6], [8], [8, 3], [3]], "do not follow"),
    ],
)
def test_a_layout_that_is_none_is_refused(layout: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inference.predict(trained(), facts=facts_of(), layout=layout, inputs=INPUTS)


def test_square_layers_need_their_order_said() -> None:
    with pytest.raises(ValueError, match="say `order`"):
        Network.of([[4, 4], [4]], 20, "auto", "relu")
    vector = np.arange(20, dtype=np.float32)
    one = np.eye(4, dtype=np.float32)[:1]
    out_in = Network.of([[4, 4], [4]], 20, "out_in", "relu").run(vector, one)[0]
    in_out = Network.of([[4, 4], [4]], 20, "in_out", "relu").run(vector, one)[0]
    assert out_in.tolist() == [[16.0, 21.0, 26.0, 31.0]]
    assert in_out.tolist() == [[16.0, 18.0, 20.0, 22.0]]
    for order, activation in (("sideways", "relu"), ("auto", "gelu")):
        with pytest.raises(ValueError, match="is "):
            Network.of(LAYOUT, LENGTH, order, activation)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (INPUTS[:, :5], r"takes \(n, 6\)"),
        ([], r"takes \(n, 6\)"),
        ("text", "list of equally long lists"),
        ([[1.0], [1.0, 2.0]], "list of equally long lists"),
        (np.full((2, 6), np.nan), "not finite"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inference.predict(trained(), facts=facts_of(), layout=LAYOUT, inputs=inputs)


@pytest.mark.parametrize("labels", [LABELS[:5], LABELS + 1, LABELS - 1, LABELS * 1.0, "abc"])
def test_labels_that_do_not_fit_are_refused(labels: Any) -> None:
    with pytest.raises(ValueError, match="`labels`"):
        inference.evaluate(trained(), facts=facts_of(), layout=LAYOUT, inputs=INPUTS, labels=labels)


def test_a_model_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="the round has no model"):
        inference.predict(None, facts=facts_of(), layout=LAYOUT, inputs=INPUTS)
    with pytest.raises(ValueError, match="no aggregate"):
        models.ditto(trained(), None, facts=facts_of(), client="a")


# -- matrices -----------------------------------------------------------------------------------


def test_rows_that_are_not_in_are_never_read() -> None:
    matrix = np.stack([trained(seed) for seed in range(4)])
    matrix[1] = np.nan
    late = facts_of(3, clients=("a", "c", "d"), expected=("a", "b", "c", "d"))
    scores = inference.score_clients(
        matrix, facts=late, layout=LAYOUT, inputs=INPUTS, labels=LABELS
    )
    assert list(scores["accuracy"]) == ["a", "c", "d"]
    alone = inference.evaluate(matrix[2], facts=late, layout=LAYOUT, inputs=INPUTS, labels=LABELS)
    assert scores["accuracy"]["c"] == alone["accuracy"]
    assert scores["loss"]["c"] == alone["loss"]
    weights = {"a": 1.0, "d": 3.0}
    made = models.combined(matrix, facts=late, weights=weights)["vector"]
    assert np.allclose(made, 0.25 * matrix[0] + 0.75 * matrix[3], atol=1e-6)
    with pytest.raises(ValueError, match="no model of 'b'; it has a, c, d"):
        models.combined(matrix, facts=late, weights={"b": 1.0})


def test_a_combination_reads_only_rows_with_weight() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 1000)).astype(np.float32)
    rows[2] = np.nan
    weights = np.array([0.5, 0.25, 0.0, 0.25, 0.0])
    asked = dict(zip("abcde", weights.tolist(), strict=True))
    found = models.combined(rows, facts=facts_of(5, 1000, clients=tuple("abcde")), weights=asked)
    assert np.allclose(found["vector"], weights[[0, 1, 3]] @ rows[[0, 1, 3]], atol=1e-6)


@pytest.mark.parametrize("weights", [{}, {"a": -1.0}, {"a": np.nan}, {"a": 0.0}, {"a": "1"}])
def test_weights_that_are_none_are_refused(weights: Any) -> None:
    with pytest.raises(ValueError, match="weight"):
        models.combined(np.ones((1, 4)), facts=facts_of(1, 4, clients=("a",)), weights=weights)


def test_a_round_without_updates_has_nothing_to_ask_of() -> None:
    empty = facts(statistics_of(np.zeros((0, LENGTH)), expected=("a", "b")))
    with pytest.raises(ValueError, match="no update counts in round 3"):
        models.feddebug(np.zeros((2, LENGTH), np.float32), facts=empty, layout=LAYOUT)


def test_shapley_values_of_a_score_hand_out_what_the_round_gained() -> None:
    matrix = np.stack([trained(seed) for seed in range(4)])
    matrix[3] = -matrix[3]
    base = np.zeros(LENGTH, dtype=np.float32)
    asked = {"facts": facts_of(4), "layout": LAYOUT, "inputs": INPUTS, "labels": LABELS}
    found = models.gtg_shapley(matrix, base, **asked, within=0.0, permutations_max=400)
    mean = inference.evaluate(matrix.mean(axis=0), **asked)["accuracy"]
    before = inference.evaluate(base, **asked)["accuracy"]
    assert found["together"] == pytest.approx(mean - before, abs=1e-6)
    assert sum(found["values"].values()) == pytest.approx(found["together"], abs=1e-6)
    assert min(found["values"], key=found["values"].get) == "client-3"
    assert found["evaluations"] <= 15, "each coalition is scored once"
    nothing = models.gtg_shapley(matrix, base, **asked, between=2.0)
    assert set(nothing["values"].values()) == {0.0}
    with pytest.raises(ValueError, match="no base"):
        models.gtg_shapley(matrix, None, **asked)


def test_shapley_values_of_a_loss_are_those_of_enumeration() -> None:
    matrix = np.stack([trained(seed) for seed in range(3)])
    base = np.zeros(LENGTH, dtype=np.float32)
    asked = {"facts": facts_of(3), "layout": LAYOUT, "inputs": INPUTS, "labels": LABELS}

    def value(*members: int) -> float:
        vector = matrix[list(members)].mean(axis=0) if members else base
        return -inference.evaluate(vector, **asked)["loss"]

    exact = (
        2 * (value(0) - value())
        + (value(0, 1) - value(1))
        + (value(0, 2) - value(2))
        + 2 * (value(0, 1, 2) - value(1, 2))
    ) / 6
    found = models.gtg_shapley(
        matrix, base, **asked, metric="loss", within=0.0, permutations_max=2000
    )
    assert found["values"]["client-0"] == pytest.approx(exact, abs=0.05 * abs(found["together"]))


# -- debugging ----------------------------------------------------------------------------------


def odd_ones_directly(fired: Any, faulty: int) -> list[int]:
    """FedDebug by its words: the group of K − 1 with most common neurons, sets and all."""
    votes = [0] * len(fired)
    for place in range(fired.shape[1]):
        rest = list(range(len(fired)))
        for _ in range(faulty):
            common = {
                out: np.logical_and.reduce([fired[row, place] for row in rest if row != out]).sum()
                for out in rest
            }
            if len(set(common.values())) == 1:
                break
            worst = max(rest, key=lambda out: (common[out], -out))
            votes[worst] += 1
            rest.remove(worst)
    return votes


@pytest.mark.parametrize("faulty", [1, 2])
def test_counting_finds_the_odd_ones_that_sets_find(faulty: int) -> None:
    fired = np.random.default_rng(faulty).random((6, 20, 40)) < 0.7
    assert debugging.odd_ones(fired, faulty).tolist() == odd_ones_directly(fired, faulty)


def test_feddebug_finds_the_client_whose_neurons_fire_unlike_the_others() -> None:
    start = trained()
    rng = np.random.default_rng(5)
    matrix = np.stack([start + 0.01 * rng.normal(size=LENGTH) for _ in range(6)]).astype(np.float32)
    matrix[4] = trained(9, labels=2 - LABELS)
    found = models.feddebug(matrix, facts=facts_of(6), layout=LAYOUT, input_count=20)
    assert found["suspects"] == ["client-4"]
    assert found["votes"]["client-4"] >= 15
    assert found == models.feddebug(matrix, facts=facts_of(6), layout=LAYOUT, input_count=20)
    same = models.feddebug(np.stack([start] * 3), facts=facts_of(3), layout=LAYOUT)
    assert same["suspects"] == []
    own = models.feddebug(matrix, facts=facts_of(6), layout=LAYOUT, inputs=INPUTS[:7])
    assert own["input_count"] == 7
    with pytest.raises(ValueError, match="`faulty` is from 1 to 1"):
        models.feddebug(np.stack([start] * 3), facts=facts_of(3), layout=LAYOUT, faulty=2)


def test_more_than_can_be_compared_is_refused_before_it_is_computed() -> None:
    wide = [[9000, 6], [9000], [3, 9000], [3]]
    length = 9000 * 10 + 3
    matrix = np.zeros((3, length), dtype=np.float32)
    asked = {"facts": facts_of(3, length), "layout": wide, "input_count": 10_000}
    with pytest.raises(ValueError, match="ask with fewer inputs"):
        models.feddebug(matrix, **asked)


def test_random_inputs_keep_to_their_bounds() -> None:
    found = debugging.random_inputs(500, 24, np.random.default_rng(0))
    assert found.dtype == np.float32
    assert np.abs(found).max() <= 0.5
    assert found.std() == pytest.approx(0.5 / np.sqrt(3), rel=0.02)


def test_a_client_that_changed_one_layer_too_much_is_found_with_that_layer() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=LENGTH).astype(np.float32)
    matrix = (base + 0.1 * rng.normal(size=(7, LENGTH))).astype(np.float32)
    matrix[2, 56:80] += 5.0
    layout = [
        {"name": "hidden.weight", "shape": [8, 6]},
        {"name": "hidden.bias", "shape": [8]},
        {"name": "out.weight", "shape": [3, 8]},
        {"name": "out.bias", "shape": [3]},
    ]
    found = models.layer_norms(matrix, base, facts=facts_of(7), layout=layout, score_max=10.0)
    assert [(row["client"], row["layer"]) for row in found["outliers"]] == [
        ("client-2", "out.weight")
    ]
    delta = (matrix[3].astype(np.float64) - base)[48:56]
    assert found["norms"]["client-3"][1] == pytest.approx(np.linalg.norm(delta))
    whole = np.array(found["norms"]["client-5"])
    assert np.sqrt((whole**2).sum()) == pytest.approx(
        np.linalg.norm(matrix[5].astype(np.float64) - base)
    )
    assert found["is_of_deltas"]
    assert not models.layer_norms(matrix, None, facts=facts_of(7), layout=layout)["is_of_deltas"]


def test_a_layout_names_its_parts() -> None:
    found = parts([{"shape": [2, 3]}, {"name": "b", "shape": (2,)}], 8)
    assert [(part.name, part.start, part.stop) for part in found] == [("part 0", 0, 6), ("b", 6, 8)]
