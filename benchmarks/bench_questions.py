"""What does a question to a round cost, if it is answered from the statistics taken at ingest?

    python -m benchmarks.bench_questions

One thread, no wire: from the name of the question and its arguments to the answer as bytes, for 10
and for 250 clients in the round; questions over several rounds are given as many as they ask for,
at most 16. The rival of all of them is the first row: the Gram matrix, computed when it is needed
from updates of 10 MB each that lie in memory already. Rows are measured interleaved.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts its threads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks.report import at_most, interleaved, make_table, show, spread
from tierwise.functions.fl.questions import QUESTIONS, answer
from tierwise.functions.fl.statistics import RoundStatistics
from tierwise.wire import payload

SEED = 0
TARGET_US = 1000.0
PARAMETERS = 2_500_000
HISTORY = 16
ARGUMENTS: dict[str, dict[str, Any]] = {
    "similar-weights": {"client": "client-1"},
    "fedfomo-weights": {
        "client": "client-1",
        "losses": {f"client-{row}": 0.1 * row for row in range(10)},
        "loss_before": 0.5,
    },
    "schedule-oort": {"count": 5},
    "schedule-tifl": {"count": 5},
    "schedule-diverse": {"count": 5},
    "schedule-loss": {"count": 5},
    "payments": {"budget": 100_000, "basis": "shapley"},
    "rank": {"by": "loss"},
    "filter": {"where": {"loss": "> 0.5", "duration_s": "< 3"}},
    "client-history": {"client": "client-1"},
    "best-round": {"metric": "accuracy"},
    "settings": {"key": "lr", "metric": "accuracy"},
}


def make_round(number: int, client_count: int) -> RoundStatistics:
    """Return statistics of a round whose deltas have 64 directions that matter."""
    rng = np.random.default_rng((SEED, number, client_count))
    deltas = rng.normal(size=64) + rng.normal(size=(client_count, 64))
    gram = deltas @ deltas.T
    names = tuple(f"client-{row}" for row in range(client_count))
    columns = {
        name: rng.uniform(0.1, 5.0, client_count)
        for name in ("loss", "accuracy", "duration_s", "energy_j")
    }
    columns["lr"] = rng.choice([0.1, 0.01, 0.001], client_count)
    return RoundStatistics(
        namespace="bench",
        job="bench",
        round=number,
        clients=names,
        rows=np.arange(client_count),
        expected=names,
        parameter_count=PARAMETERS,
        gram=gram,
        norms=np.sqrt(np.diagonal(gram)),
        base_dots=np.zeros(client_count),
        base_norm=1.0,
        aggregate_dots=deltas @ deltas[0],
        aggregate_norm=float(np.linalg.norm(deltas[0])),
        example_counts=rng.integers(10, 1000, client_count).astype(np.float64),
        arrival_s=rng.uniform(0.0, 10.0, client_count),
        digests=tuple(f"{row:064x}" for row in range(client_count)),
        columns=columns,
        base_digest=f"{number:064x}",
        aggregate_digest=f"{number + 1:064x}",
    )


def asked(name: str, client_count: int) -> Callable[[], object]:
    """Return a call that answers a question as bytes."""
    wanted = QUESTIONS[name].rounds
    if wanted == 1:
        subject: Any = make_round(3, client_count)
    else:
        count = min(wanted or HISTORY, HISTORY)
        subject = [make_round(number, client_count) for number in range(count)]
    arguments = ARGUMENTS.get(name, {})
    return lambda: payload.encode(answer(name, subject, arguments))


def main() -> None:
    names = [name for name, question in QUESTIONS.items() if question.needs == "statistics"]
    few = interleaved({n: asked(n, 10) for n in names}, rounds=200, count=3, warm_up=20)
    many = interleaved({n: asked(n, 250) for n in names}, rounds=9, count=1, warm_up=1)
    updates = np.random.default_rng(SEED).normal(size=(10, PARAMETERS)).astype(np.float32)
    gram = interleaved({"gram": partial(gram_of, updates)}, rounds=9, count=1, warm_up=1)["gram"]
    table = make_table(
        "A question answered from ingest statistics, µs: median [10 % … 90 %]",
        ("question", "rounds", "10 clients", "target", "250 clients"),
        caption=f"Seed {SEED}",
    )
    table.add_row("(Gram matrix from 10 × 10 MB)", "1", spread(gram), "", "")
    for name in names:
        wanted = QUESTIONS[name].rounds
        table.add_row(
            name,
            str(min(wanted or HISTORY, HISTORY)),
            spread(few[name]),
            at_most(float(np.median(few[name])), TARGET_US),
            spread(many[name]),
        )
    show(table)


def gram_of(updates: np.ndarray[Any, Any]) -> object:
    """Return the Gram matrix in float64, in blocks that stay in the processor's cache."""
    total = np.zeros((len(updates), len(updates)))
    for start in range(0, updates.shape[1], 1 << 15):
        block = updates[:, start : start + (1 << 15)].astype(np.float64)
        total += block @ block.T
    return total


if __name__ == "__main__":
    main()
