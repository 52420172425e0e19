"""The project that `tierwise fl new` writes."""

from collections.abc import Mapping

TEMPLATE = '''"""Federated learning on scikit-learn's digits; each client has mostly its own digits.

    tierwise fl run {file}        # on the cluster that `tierwise up` has started, or any other
    tierwise fl log {job}
    tierwise fl ask {job} similarity

The pictures stay where they are; what travels is the model.
"""

import numpy as np

import tierwise


def share(index, count):
    """Return the pictures and labels that one client has: replace this by reading its own files.

    A function may read what the agent's configuration allows on its node (`data = [...]`).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits.data))[360:]  # the first 360 are for judging
    by_digit = order[np.argsort(digits.target[order] + rng.uniform(0, 6, len(order)))]
    mine = np.array_split(by_digit, count)[index]
    return digits.data[mine] / 16.0, digits.target[mine]


def probabilities(weights, bias, pictures):
    powers = np.exp(pictures @ weights + bias)
    return powers / powers.sum(axis=1, keepdims=True)


def client(arrays, config):
    """Train on what lies here; return the arrays, how many pictures they have seen, and metrics."""
    weights, bias = arrays
    pictures, labels = share(config["data"], config["count"])
    wanted = np.eye(10)[labels]
    rng = np.random.default_rng((config["round"], config["data"]))
    for _ in range(config["epochs"]):
        for rows in np.array_split(rng.permutation(len(pictures)), max(1, len(pictures) // 32)):
            slope = (probabilities(weights, bias, pictures[rows]) - wanted[rows]) / len(rows)
            weights -= config["rate"] * pictures[rows].T @ slope
            bias -= config["rate"] * slope.sum(axis=0)
    found = probabilities(weights, bias, pictures)
    loss = -np.log(np.maximum((found * wanted).sum(axis=1), 1e-9)).mean()
    return [weights, bias], len(pictures), {{"loss": loss}}


def evaluate(arrays, config):
    """Judge a model on pictures that no client has."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    held = np.random.default_rng(0).permutation(len(digits.data))[:360]
    found = probabilities(*arrays, digits.data[held] / 16.0).argmax(axis=1)
    return {{"accuracy": (found == digits.target[held]).mean()}}


job = tierwise.FederatedJob(
    "{job}",
    client,
    initial=[np.zeros((64, 10)), np.zeros(10)],
    clients={{
{clients}
    }},
    evaluate=evaluate,
    rounds=10,
    strategy="fedavg",  # or fedprox, fedadam, fedbuff, median, trimmed-mean, multi-krum
    config={{"epochs": 2, "rate": 0.2, "count": {count}}},
)
'''


def project(job: str, file: str, sites: Mapping[str, str]) -> str:
    """Return the file of a project.

    Args:
        job: The job's name.
        file: What the file is called.
        sites: The node of each client.
    """
    rows = [
        f'        "{client}": ("{node}", {index}),  # (node, what config["data"] is)'
        for index, (client, node) in enumerate(sites.items())
    ]
    return TEMPLATE.format(job=job, file=file, count=len(sites), clients="\n".join(rows))
