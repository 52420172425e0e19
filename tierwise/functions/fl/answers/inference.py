"""Questions that run a stored model: shipped to the node that holds it."""

from typing import Any

from tierwise.functions.fl.answers.inputs import (
    INPUTS,
    LABELS,
    NETWORK,
    Facts,
    inputs_for,
    labels_for,
    network_of,
    rows_in,
    vector_of,
)
from tierwise.functions.fl.networks import Array, probabilities, scored
from tierwise.functions.fl.question import Answer, Question


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
    vector = vector_of(model, "model")
    network = network_of(facts, layout, activation, order)
    chances = probabilities(network.run(vector, inputs_for(inputs, network))[0])
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
    vector = vector_of(model, "model")
    network = network_of(facts, layout, activation, order)
    numbers = inputs_for(inputs, network)
    expected = labels_for(labels, len(numbers), network)
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
    rows, names = rows_in(matrix, facts)
    network = network_of(facts, layout, activation, order)
    numbers = inputs_for(inputs, network)
    expected = labels_for(labels, len(numbers), network)
    assert matrix is not None
    found = [scored(probabilities(network.run(matrix[row], numbers)[0]), expected) for row in rows]
    return {
        "accuracy": {name: accuracy for name, (accuracy, _) in zip(names, found, strict=True)},
        "loss": {name: loss for name, (_, loss) in zip(names, found, strict=True)},
        "count": len(numbers),
    }


QUESTIONS = (
    Question(
        name="predict",
        summary="Classes of inputs by any stored dense model",
        needs="vectors",
        function=predict,
        arguments={"inputs": INPUTS, **NETWORK, "with_chances": "also of every class"},
        source="softmax regression, multilayer perceptron",
        inputs=("model",),
    ),
    Question(
        name="evaluate",
        summary="Accuracy and loss of any stored dense model on labelled inputs",
        needs="vectors",
        function=evaluate,
        arguments={"inputs": INPUTS, "labels": LABELS, **NETWORK},
        source="cross entropy",
        inputs=("model",),
    ),
    Question(
        name="score-clients",
        summary="Accuracy and loss of every client's model on labelled inputs",
        needs="matrix",
        function=score_clients,
        arguments={"inputs": INPUTS, "labels": LABELS, **NETWORK},
        source="cross entropy",
        inputs=("matrix",),
    ),
)
