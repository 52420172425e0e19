"""Questions that compare or combine the updates themselves: shipped to the node that holds them."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tierwise.functions.fl import contribution, debugging, personalisation
from tierwise.functions.fl.answers.inputs import (
    INPUTS,
    LABELS,
    NETWORK,
    Facts,
    inputs_for,
    labels_for,
    layout_of,
    network_of,
    rows_in,
    vector_of,
)
from tierwise.functions.fl.blocks import mean
from tierwise.functions.fl.geometry import Index, shares
from tierwise.functions.fl.networks import Array, parts, probabilities, scored
from tierwise.functions.fl.question import (
    Answer,
    Question,
    by_client,
    check_choice,
    check_range,
    generator,
    named,
)

FIRED_MAX = 200_000_000  # neurons × inputs × clients


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
    permutations_max: int = 100,
    activation: str = "relu",
    order: str = "auto",
    seed: int = 0,
) -> Answer:
    """Return each client's Shapley value of a score on labelled inputs.

    v(S) = score(Σ_S n_i·u_i ÷ Σ_S n_i) − score(base), the score being accuracy or −loss.
    """
    rows, names = rows_in(matrix, facts)
    assert matrix is not None
    check_choice("metric", metric, ("accuracy", "loss"))
    check_range("between", between, 0.0, 1e6)
    check_range("within", within, 0.0, 1e6)
    count = len(rows)
    check_range("permutations_max", permutations_max, 1, contribution.PERMUTATIONS_MAX)
    network = network_of(facts, layout, activation, order)
    numbers = inputs_for(inputs, network)
    expected = labels_for(labels, len(numbers), network)
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

    before = score(vector_of(base, "base"))
    together = list(prefixes(np.arange(count)))[-1]
    values, permutations = contribution.gtg_shapley(
        prefixes,
        count,
        together,
        generator(seed),
        between=between,
        within=within,
        permutations_max=permutations_max,
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
    rows, names = rows_in(matrix, facts)
    assert matrix is not None
    if not 1 <= faulty <= len(rows) - 2:
        raise ValueError(
            f"`faulty` is from 1 to {len(rows) - 2}: of {len(rows)} clients two must be left to "
            "compare"
        )
    network = network_of(facts, layout, activation, order)
    check_range("input_count", input_count, 1, 10_000)
    if inputs is None:
        rng = generator(seed)
        numbers = debugging.random_inputs(input_count, network.input_count, rng)
    else:
        numbers = inputs_for(inputs, network)
    size = len(rows) * len(numbers) * network.neuron_count
    if size > FIRED_MAX:
        raise ValueError(
            f"{len(numbers)} inputs of {network.neuron_count} neurons in {len(rows)} models are "
            f"{size} to compare, the limit is {FIRED_MAX}: ask with fewer inputs"
        )
    fired = debugging.activations(network, [matrix[row] for row in rows], numbers, active_min)
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
    rows, names = rows_in(matrix, facts)
    assert matrix is not None
    check_range("score_max", score_max, 0.0, 1e6)
    tensors = parts(layout_of(facts, layout), matrix.shape[1])
    norms = debugging.layer_norms([matrix[row] for row in rows], base, tensors)
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
    rows, names = rows_in(matrix, facts)
    assert matrix is not None
    place = dict(zip(names, rows.tolist(), strict=True))
    if not isinstance(weights, dict) or not weights:
        raise ValueError("`weights` is a dict by client, as the questions on weights answer it")
    unknown = [name for name in weights if name not in place]
    if unknown:
        raise ValueError(f"the round has no model of {unknown[0]!r}; it has {named(names)}")
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)) or not 0.0 <= weight < np.inf:
            raise ValueError(f"the weight of {name!r} must be a number of 0 or more")
    used = sorted((place[name], weight) for name, weight in weights.items() if weight > 0.0)
    if not used:
        raise ValueError("all weights are 0: at least one client must count")
    return {"vector": mean(matrix, [row for row, _ in used], [weight for _, weight in used])}


def ditto(
    update: Array | None, aggregate: Array | None, *, facts: Facts, client: str, pull: float = 1.0
) -> Answer:
    """Return a client's personal model between its own update and the shared one, as its vector."""
    check_range("pull", pull, 0.0, 1e9)
    own = vector_of(update, f"update of {client!r}")
    shared = vector_of(aggregate, "aggregate")
    return {"vector": personalisation.ditto_mean(own, shared, pull=pull), "client": client}


QUESTIONS = (
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
        name="gtg-shapley",
        summary="Each client's fair share in a score on labelled inputs",
        needs="matrix",
        function=gtg_shapley,
        arguments={
            "inputs": INPUTS,
            "labels": LABELS,
            **NETWORK,
            "metric": "accuracy or loss",
            "between": "a round that changes the score by no more gives nobody anything",
            "within": "a permutation ends when its score is so near that of all",
            "permutations_max": "bound, 1 to 2,000: each scores at most one model per client",
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
            **NETWORK,
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
            "layout": NETWORK["layout"],
            "score_max": "robust standard deviations that are still ordinary",
        },
        source="Iglewicz and Hoaglin 1993",
        inputs=("matrix", "base"),
    ),
)
