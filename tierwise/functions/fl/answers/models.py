"""Questions that need the vectors themselves: shipped to the node that holds them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierwise.functions.fl import contribution, debugging, personalisation
from tierwise.functions.fl.geometry import Index, shares
from tierwise.functions.fl.networks import (
    Array,
    Network,
    parts,
    probabilities,
    scored,
)
from tierwise.functions.fl.question import (
    Answer,
    Question,
    by_client,
    check_choice,
    check_range,
    generator,
    named,
)

INPUTS_MAX = 50_000_000  # numbers in the inputs of one question
LABELS_MAX = 1_000_000
EVALUATIONS_MAX = 20_000
Facts = Mapping[str, Any]


def predict(
    model: Array | None,
    *,
    facts: Facts,
    inputs: Any,
    layout: list[Any] | None = None,
    activation: str = "relu",
    order: str = "auto",
    with_chances: bool = False,
) -> Answer:
    """Return the class of each input by a stored model, and the chances of all if asked."""
    vector = _vector(model, "model")
    network = _network(facts, layout, activation, order)
    chances = probabilities(network.run(vector, _inputs(inputs, network))[0])
    answer: Answer = {"labels": chances.argmax(axis=1).tolist()}
    if with_chances:
        answer["chances"] = chances.tolist()
    return answer


def evaluate(
    model: Array | None,
    *,
    facts: Facts,
    inputs: Any,
    labels: Any,
    layout: list[Any] | None = None,
    activation: str = "relu",
    order: str = "auto",
) -> Answer:
    """Return a stored model's accuracy and mean cross entropy on labelled inputs."""
    vector = _vector(model, "model")
    network = _network(facts, layout, activation, order)
    numbers = _inputs(inputs, network)
    expected = _labels(labels, len(numbers), network)
    accuracy, loss = scored(probabilities(network.run(vector, numbers)[0]), expected)
    return {"accuracy": accuracy, "loss": loss, "count": len(numbers)}


def score_clients(
    matrix: Array | None,
    *,
    facts: Facts,
    inputs: Any,
    labels: Any,
    layout: list[Any] | None = None,
    activation: str = "relu",
    order: str = "auto",
) -> Answer:
    """Return the accuracy and loss of every client's model on labelled inputs."""
    rows, names = _rows(matrix, facts)
    network = _network(facts, layout, activation, order)
    numbers = _inputs(inputs, network)
    expected = _labels(labels, len(numbers), network)
    assert matrix is not None
    found = [scored(probabilities(network.run(matrix[row], numbers)[0]), expected) for row in rows]
    return {
        "accuracy": {name: accuracy for name, (accuracy, _) in zip(names, found, strict=True)},
        "loss": {name: loss for name, (_, loss) in zip(names, found, strict=True)},
        "count": len(numbers),
    }


def gtg_shapley(
    matrix: Array | None,
    base: Array | None,
    *,
    facts: Facts,
    inputs: Any,
    labels: Any,
    layout: list[Any] | None = None,
    metric: str = "accuracy",
    between: float = 0.0,
    within: float = 0.001,
    sweeps_max: int = 3,
    activation: str = "relu",
    order: str = "auto",
    seed: int = 0,
) -> Answer:
    """Return each client's Shapley value of a score on labelled inputs.

    v(S) = score(Σ_S n_i·u_i ÷ Σ_S n_i) − score(base), the score being accuracy or −loss.
    """
    rows, names = _rows(matrix, facts)
    assert matrix is not None
    check_choice("metric", metric, ("accuracy", "loss"))
    check_range("between", between, 0.0, 1e6)
    check_range("within", within, 0.0, 1e6)
    count = len(rows)
    check_range("sweeps_max", sweeps_max, 1, max(EVALUATIONS_MAX // count**2, 1))
    network = _network(facts, layout, activation, order)
    numbers = _inputs(inputs, network)
    expected = _labels(labels, len(numbers), network)
    weights = shares([float(facts["example_counts"].get(name, 1.0)) for name in names])
    known: dict[int, float] = {}

    def score(vector: Array) -> float:
        accuracy, loss = scored(probabilities(network.run(vector, numbers)[0]), expected)
        return accuracy if metric == "accuracy" else -loss

    def prefixes(order: Index) -> Iterable[float]:
        total = np.zeros(matrix.shape[1], dtype=np.float32)
        code, weight = 0, 0.0
        for client in order:
            total += np.float32(weights[client]) * matrix[rows[client]]
            weight += float(weights[client])
            code |= 1 << int(client)
            if code not in known:
                known[code] = score(total / np.float32(weight)) - before if weight > 0.0 else 0.0
            yield known[code]

    before = score(_vector(base, "base"))
    together = list(prefixes(np.arange(count)))[-1]
    values, permutations = contribution.gtg_shapley(
        prefixes,
        count,
        together,
        generator(seed),
        between=between,
        within=within,
        sweeps_max=sweeps_max,
    )
    return {
        "values": by_client(names, values),
        "together": together,
        "permutations": permutations,
        "evaluations": len(known),
    }


def feddebug(
    matrix: Array | None,
    *,
    facts: Facts,
    layout: list[Any] | None = None,
    faulty: int = 1,
    input_count: int = 10,
    inputs: Any = None,
    active_min: float = debugging.ACTIVE_MIN,
    activation: str = "relu",
    order: str = "auto",
    seed: int = 0,
) -> Answer:
    """Return whose neurons fire unlike everybody's, on random inputs or on given ones."""
    rows, names = _rows(matrix, facts)
    assert matrix is not None
    if not 1 <= faulty <= len(rows) - 2:
        raise ValueError(
            f"`faulty` is from 1 to {len(rows) - 2}: of {len(rows)} clients two must be left to "
            "compare"
        )
    network = _network(facts, layout, activation, order)
    check_range("input_count", input_count, 1, 10_000)
    if inputs is None:
        rng = generator(seed)
        numbers = debugging.random_inputs(input_count, network.input_count, rng)
    else:
        numbers = _inputs(inputs, network)
    fired = debugging.activations(network, matrix[rows], numbers, active_min)
    votes = debugging.odd_ones(fired, faulty)
    most = np.argsort(-votes, kind="stable")[:faulty]
    return {
        "suspects": [names[row] for row in most if votes[row] > 0],
        "votes": by_client(names, votes),
        "input_count": len(numbers),
        "active_share": by_client(names, fired.mean(axis=(1, 2))),
    }


def layer_norms(
    matrix: Array | None,
    base: Array | None,
    *,
    facts: Facts,
    layout: list[Any] | None = None,
    score_max: float = 3.5,
) -> Answer:
    """Return the length of each layer's delta, and where a client is out of the ordinary."""
    rows, names = _rows(matrix, facts)
    assert matrix is not None
    check_range("score_max", score_max, 0.0, 1e6)
    tensors = parts(_layout(facts, layout), matrix.shape[1])
    norms = debugging.layer_norms(matrix[rows], base, tensors)
    scores = debugging.layer_scores(norms)
    outliers = [
        {
            "client": names[row],
            "layer": tensors[place].name,
            "norm": float(norms[row, place]),
            "score": float(scores[row, place]),
        }
        for row, place in np.argwhere(np.abs(scores) > score_max)
    ]
    outliers.sort(key=lambda found: -abs(float(str(found["score"]))))
    return {
        "layers": [tensor.name for tensor in tensors],
        "norms": by_client(names, norms),
        "outliers": outliers,
        "is_of_deltas": base is not None,
    }


def combined(matrix: Array | None, *, facts: Facts, weights: dict[str, float]) -> Answer:
    """Return a weighted mean of clients' models, as its vector: what weights were asked for."""
    rows, names = _rows(matrix, facts)
    assert matrix is not None
    place = dict(zip(names, rows, strict=True))
    if not isinstance(weights, dict) or not weights:
        raise ValueError("`weights` is a dict by client, as the questions on weights answer it")
    unknown = [name for name in weights if name not in place]
    if unknown:
        raise ValueError(f"the round has no model of {unknown[0]!r}; it has {named(names)}")
    total = np.zeros(len(matrix))
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)) or not 0.0 <= weight < np.inf:
            raise ValueError(f"the weight of {name!r} must be a number of 0 or more")
        total[place[name]] = weight
    if total.sum() <= 0.0:
        raise ValueError("all weights are 0: at least one client must count")
    return {"vector": personalisation.combined(matrix, total / total.sum())}


def ditto(
    update: Array | None, aggregate: Array | None, *, facts: Facts, client: str, pull: float = 1.0
) -> Answer:
    """Return a client's personal model between its own update and the shared one, as its vector."""
    check_range("pull", pull, 0.0, 1e9)
    own = _vector(update, f"update of {client!r}")
    shared = _vector(aggregate, "aggregate")
    return {"vector": personalisation.ditto_mean(own, shared, pull=pull), "client": client}


def _vector(vector: Array | None, name: str) -> Array:
    if vector is None:
        raise ValueError(f"the round has no {name}: ask of a round that has")
    return vector


def _rows(matrix: Array | None, facts: Facts) -> tuple[Index, list[str]]:
    """Return the rows that count, and their clients."""
    clients, is_in = facts["clients"], facts["is_in"]
    if matrix is None or not any(is_in):
        raise ValueError(f"no update counts in round {facts['round']}: ask of another round")
    rows = np.flatnonzero(np.array(is_in))
    return rows, [clients[row] for row in rows]


def _layout(facts: Facts, layout: list[Any] | None) -> Any:
    return layout if layout is not None else facts["round_metadata"].get("layout")


def _network(facts: Facts, layout: list[Any] | None, activation: str, order: str) -> Network:
    return Network.of(_layout(facts, layout), facts["parameter_count"], order, activation)


def _inputs(inputs: Any, network: Network) -> Array:
    """Return inputs as float32, shape (n, width)."""
    try:
        found = np.asarray(inputs, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError("`inputs` is an array, or a list of equally long lists of numbers") from (
            None
        )
    if found.ndim == 1 and len(found) == network.input_count:
        found = found[None, :]
    if found.ndim != 2 or found.shape[1] != network.input_count or len(found) == 0:
        raise ValueError(
            f"`inputs` has shape {list(found.shape)}, and the network takes (n, "
            f"{network.input_count})"
        )
    if found.size > INPUTS_MAX:
        raise ValueError(f"`inputs` has {found.size} numbers, the limit is {INPUTS_MAX}: split it")
    if not np.isfinite(found).all():
        raise ValueError("`inputs` has numbers that are not finite: leave those rows out")
    return found


def _labels(labels: Sequence[int] | NDArray[Any], count: int, network: Network) -> Index:
    found = np.asarray(labels)
    classes = max(network.output_count, 2)
    if found.shape != (count,) or found.dtype.kind not in "iu" or count > LABELS_MAX:
        raise ValueError(
            f"`labels` is a whole number for each of the {count} inputs (at most {LABELS_MAX})"
        )
    if not ((found >= 0) & (found < classes)).all():
        raise ValueError(f"`labels` are classes from 0 to {classes - 1}")
    return found.astype(np.intp)


_NETWORK = {
    "layout": "shapes of all parameters in order; the round's metadata `layout` if not given",
    "activation": "of hidden layers: relu, tanh or logistic",
    "order": "of matrices: out_in (PyTorch), in_out, or auto",
}
_INPUTS = "array or list of shape (n, inputs)"
_LABELS = "class of each input"

QUESTIONS = (
    Question(
        name="predict",
        summary="Classes of inputs by any stored dense model",
        needs="vectors",
        function=predict,
        arguments={"inputs": _INPUTS, **_NETWORK, "with_chances": "also of every class"},
        source="softmax regression, multilayer perceptron",
        inputs=("model",),
    ),
    Question(
        name="evaluate",
        summary="Accuracy and loss of any stored dense model on labelled inputs",
        needs="vectors",
        function=evaluate,
        arguments={"inputs": _INPUTS, "labels": _LABELS, **_NETWORK},
        source="cross entropy",
        inputs=("model",),
    ),
    Question(
        name="ditto",
        summary="A client's own model, between its update and the shared one",
        needs="vectors",
        function=ditto,
        arguments={"client": "whose model", "pull": "λ: 0 its own, larger ones nearer to all"},
        source="Li, Hu, Beirami and Smith, ICML 2021, section 3",
        inputs=("update", "aggregate"),
    ),
    Question(
        name="combine",
        summary="A model made of the clients' by weights",
        needs="matrix",
        function=combined,
        arguments={"weights": "by client; made to sum to 1"},
        source="McMahan et al., AISTATS 2017",
        inputs=("matrix",),
    ),
    Question(
        name="score-clients",
        summary="Accuracy and loss of every client's model on labelled inputs",
        needs="matrix",
        function=score_clients,
        arguments={"inputs": _INPUTS, "labels": _LABELS, **_NETWORK},
        source="cross entropy",
        inputs=("matrix",),
    ),
    Question(
        name="gtg-shapley",
        summary="Each client's fair share in a score on labelled inputs",
        needs="matrix",
        function=gtg_shapley,
        arguments={
            "inputs": _INPUTS,
            "labels": _LABELS,
            **_NETWORK,
            "metric": "accuracy or loss",
            "between": "a round that changes the score by no more gives nobody anything",
            "within": "a permutation ends when its score is so near that of all",
            "sweeps_max": "bound on sweeps of permutations, one for each client",
            "seed": "of the permutations",
        },
        source="Liu et al., ACM TIST 2022, Alg. 1",
        inputs=("matrix", "base"),
    ),
    Question(
        name="feddebug",
        summary="Whose neurons fire unlike everybody's, without test data",
        needs="matrix",
        function=feddebug,
        arguments={
            **_NETWORK,
            "faulty": "how many clients to look for",
            "input_count": "random inputs",
            "inputs": "these instead of random ones",
            "active_min": "from which a neuron fires",
            "seed": "of the random inputs",
        },
        source="Gill, Anwar and Gulzar, ICSE 2023",
        inputs=("matrix",),
    ),
    Question(
        name="layer-norms",
        summary="Length of each layer's delta, and whose is out of the ordinary",
        needs="matrix",
        function=layer_norms,
        arguments={
            "layout": _NETWORK["layout"],
            "score_max": "robust standard deviations that are still ordinary",
        },
        source="Iglewicz and Hoaglin 1993",
        inputs=("matrix", "base"),
    ),
)
