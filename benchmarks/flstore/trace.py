"""The rounds and the queries that every system gets: drawn from one seed, the same for all. Pure.

Workloads and classes are FLStore's (Khan et al., MLSys 2025, arXiv:2503.00323; its public code has
one function per workload: inference, cosine similarity, malicious clients, clustering,
personalisation, scheduling, contribution, incentives, debugging):

    P1  the newest aggregate, or one client's newest update
    P2  all updates of one round
    P3  one client's updates over many rounds
    P4  metadata: losses, counts, times

As in its experiments a round has 10 of 250 clients. How often each takes part and how queries mix
is an *assumption*: participation falls with rank as 1/rank (a few clients are nearly always there),
and MIX. Questions arrive between rounds. Of those about a round AGE_SHARE are about older ones than
the newest, each round further back half as often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SEED = 20250323
CLIENTS, PER_ROUND = 250, 10
MIX = {"P1": 0.30, "P2": 0.40, "P3": 0.15, "P4": 0.15}
AGE_SHARE = 0.3
WATCHED = 3  # clients whose history is asked for
HISTORY_MODELS = 4
OF_HISTORY = ("history", "models")
RECORDS = 16  # rounds of metadata that schedulers look at
GROUPS = 3  # clients of one group move alike
MALICIOUS_SHARE = 0.2  # of clients: they send their update with the sign turned


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One kind of question.

    Attributes:
        name: What it is for, in FLStore's words.
        query_class: P1 … P4.
        reads: "model" (an aggregate, or an update), "statistics" or "matrix" (a round's updates),
            "history" (a client's updates and the ends of its rounds), "models" (its last
            HISTORY_MODELS updates) or "records" (metadata).
        question: As it is asked.
        arguments: Sent with every one.
        inputs: Arguments that are test data: inputs, labels.
        is_of_client: Whether it is about one client of the round.
        with_base: Whether the round's base is read with its updates.
    """

    name: str
    query_class: str
    reads: str
    question: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    is_of_client: bool = False
    with_base: bool = False


_TESTED = ("inputs", "labels")
WORKLOADS = (
    Workload(
        name="inference", query_class="P1", reads="model", question="predict", inputs=("inputs",)
    ),
    Workload(
        name="one client's model",
        query_class="P1",
        reads="model",
        question="evaluate",
        inputs=_TESTED,
        is_of_client=True,
    ),
    *(
        Workload(
            name=name,
            query_class="P2",
            reads="statistics",
            question=question,
            arguments=arguments,
            is_of_client=question == "similar-weights",
            with_base=True,
        )
        for name, question, arguments in (
            ("cosine similarity", "similarity", {"is_pairwise": True}),
            ("malicious clients", "malicious", {}),
            ("clustering", "clusters", {"k": GROUPS}),
            ("personalisation", "similar-weights", {}),
            ("scheduling by likeness", "schedule-diverse", {"count": 3}),
            ("contribution", "leave-one-out", {}),
            ("incentives", "payments", {"budget": 10_000}),
        )
    ),
    Workload(
        name="debugging",
        query_class="P2",
        reads="matrix",
        question="feddebug",
        arguments={"faulty": 2},
    ),
    Workload(
        name="models compared",
        query_class="P2",
        reads="matrix",
        question="score-clients",
        inputs=_TESTED,
    ),
    Workload(name="history", query_class="P3", reads="history", question="client-history"),
    Workload(
        name="models over time",
        query_class="P3",
        reads="models",
        question="evaluate",
        inputs=_TESTED,
    ),
    Workload(
        name="scheduling by use",
        query_class="P4",
        reads="records",
        question="schedule-oort",
        arguments={"count": 5},
    ),
    Workload(
        name="metrics",
        query_class="P4",
        reads="records",
        question="metrics",
        arguments={"only": "loss"},
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One question, asked after round `after` has ended.

    Attributes:
        round: Which round it is about; of histories and metadata the newest of them.
        client: Whose update or history; empty for the others.
    """

    number: int
    after: int
    workload: Workload
    round: int
    client: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Who took part in which round, and what is asked after it."""

    members: tuple[tuple[str, ...], ...]
    queries: tuple[Query, ...]

    def rounds_of(self, query: Query) -> list[int]:
        """Return the rounds that a query is about, ascending."""
        newest = query.after
        match query.workload.reads:
            case "history" | "models":
                found = [
                    number
                    for number, names in enumerate(self.members[: newest + 1])
                    if query.client in names
                ]
                return found if query.workload.reads == "history" else found[-HISTORY_MODELS:]
            case "records" if query.workload.question != "metrics":
                return list(range(max(0, newest + 1 - RECORDS), newest + 1))
            case _:
                return [query.round]


def make_trace(*, rounds: int, query_count: int, seed: int = SEED) -> Trace:
    """Return a trace. The workloads of a class are equally likely."""
    members_rng, queries_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2)
    )
    odds = 1.0 / np.arange(1, CLIENTS + 1)
    odds /= odds.sum()
    members = tuple(
        tuple(
            _name(int(client))
            for client in sorted(members_rng.choice(CLIENTS, PER_ROUND, replace=False, p=odds))
        )
        for _ in range(rounds)
    )
    by_class = {
        name: [workload for workload in WORKLOADS if workload.query_class == name] for name in MIX
    }
    names, shares = list(MIX), np.array(list(MIX.values()))
    after = np.sort(queries_rng.integers(rounds, size=query_count))
    queries = []
    for number, last in enumerate(after):
        choices = by_class[names[int(queries_rng.choice(len(names), p=shares / shares.sum()))]]
        workload = choices[int(queries_rng.integers(len(choices)))]
        queries.append(_query(number, int(last), workload, members, queries_rng))
    return Trace(members=members, queries=tuple(queries))


def warm_up(trace: Trace) -> list[Query]:
    """Return every workload once, after the first round; they are timed apart from the trace."""
    client = trace.members[0][0]
    return [
        Query(
            number=-1 - number,
            after=0,
            workload=workload,
            round=0,
            client=client if workload.is_of_client or workload.reads in OF_HISTORY else "",
        )
        for number, workload in enumerate(WORKLOADS)
    ]


def _query(
    number: int,
    after: int,
    workload: Workload,
    members: Sequence[Sequence[str]],
    rng: np.random.Generator,
) -> Query:
    about, client = after, ""
    age = int(rng.geometric(0.5)) if rng.random() < AGE_SHARE else 0
    member, watched = int(rng.integers(PER_ROUND)), int(rng.integers(WATCHED))
    if workload.reads in ("statistics", "matrix"):
        about = max(0, after - age)
    if workload.reads in OF_HISTORY:
        client = _name(watched)
        if not any(client in names for names in members[: after + 1]):
            client = members[after][member]
    elif workload.is_of_client:
        client = members[about][member]
    return Query(number=number, after=after, workload=workload, round=about, client=client)


def _name(client: int) -> str:
    return f"client-{client:03d}"


class Vectors:
    """Updates that look like a round's: groups, noise, and some with the sign turned.

    Every vector follows from the seed; noise of different clients is cut from one pool at different
    places, which is as good as orthogonal and costs one pass instead of a draw.
    """

    def __init__(self, parameter_count: int, *, seed: int = SEED) -> None:
        """Draw the pool: 1.5 × the vector's length."""
        rng = np.random.default_rng([seed, parameter_count])
        self.parameter_count = parameter_count
        self._pool = rng.standard_normal(parameter_count * 3 // 2, dtype=np.float32)
        self._places = rng.integers(parameter_count // 2, size=CLIENTS * 64)
        self._turned = rng.random(CLIENTS) < MALICIOUS_SHARE

    def first(self) -> NDArray[np.float32]:
        """Return what round 0 starts from, shape (P,)."""
        return 0.1 * self._pool[: self.parameter_count]

    def fill(
        self,
        row: NDArray[np.float32],
        base: NDArray[np.float32],
        client: str,
        round_number: int,
    ) -> None:
        """Write one client's update of a round into `row`, shape (P,)."""
        number = int(client.rpartition("-")[2])
        noise = self._cut(GROUPS + CLIENTS * (round_number % 63) + number)
        np.multiply(self._cut(number % GROUPS), np.float32(0.01), out=row)
        row += np.float32(0.02) * noise
        if self._turned[number]:
            np.negative(row, out=row)
        row += base

    def metadata(self, client: str, round_number: int) -> dict[str, float]:
        """Return what a client says of its update."""
        number = int(client.rpartition("-")[2])
        rng = np.random.default_rng([number, round_number])
        loss = float(2.3 * np.exp(-0.1 * round_number) + 0.1 * rng.random())
        return {
            "example_count": float(100 + 7 * (number % 40)),
            "loss": loss,
            "accuracy": float(np.exp(-loss)),
            "duration_s": float(5.0 + 10.0 * rng.random() * (1 + number % 5)),
        }

    def _cut(self, place: int) -> NDArray[np.float32]:
        start = int(self._places[place % len(self._places)])
        return self._pool[start : start + self.parameter_count]
