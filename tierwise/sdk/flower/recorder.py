"""What a Flower project's rounds become in the cache: written beside the training, never before it.

Flower's round r is round r of the job; round 0 holds the initial model. A vector is the arrays of a
record one after the other, float32, in the order of the first record that was sent; names and
shapes are in the metadata of round 0, by which `arrays` gives a record back.
"""

import atexit
import io
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from tierwise.errors import FailedPrecondition, RetryLater, TierwiseError
from tierwise.sdk.rounds import Rounds

log = logging.getLogger("tierwise")

WAITING_MAX = 8  # steps, most of them a round's updates: what is slow holds that much memory
GIVE_WAY_S = 30.0  # a step that finds no room for so long is left out
FLUSH_S = 60.0
FAILURES_MAX = 100
LAYOUT = "layout"
LOSSES = ("loss", "train-loss", "train_loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one client sent.

    Attributes:
        client: Its name in the cache.
        arrays: By name; Flower's arrays or NumPy's.
        metrics: Numbers, and lists of them.
        duration_s: From message to reply, by the clocks of those who made them; None: not known.
    """

    client: str
    arrays: Mapping[str, Any]
    metrics: Mapping[str, Any]
    duration_s: float | None = None


class Recorder:
    """Writes rounds in a thread of its own.

    Nothing here raises into the training or stops it: what could not be written is counted in
    `failures` and logged, and a cluster that is away costs the rest of the round.
    """

    def __init__(self, rounds: Rounds, *, weight: str) -> None:
        """Make a recorder.

        Args:
            rounds: The job.
            weight: The metric that says how many examples an update stands for.
        """
        self.rounds = rounds
        self.failures: list[str] = []
        self.weight = weight
        self._layout: list[tuple[str, tuple[int, ...], str]] = []
        self._ended: set[int] = set()  # rounds of whose aggregate we were told
        self._held: set[int] = set()  # rounds whose aggregate is written
        self._facts: dict[int, dict[str, Any]] = {}
        self._newest = -1
        self._lost = -1  # the round that is given up, for the cluster is away
        self._steps: queue.Queue[tuple[int | None, Callable[[], None]]] = queue.Queue(WAITING_MAX)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    # -- called by the training -----------------------------------------------------------------

    def begin(
        self,
        round: int,
        clients: Sequence[str],
        arrays: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Say that clients are asked to train from `arrays`, and under which settings."""
        held = dict(arrays)
        self._facts.setdefault(round, {}).update(_plain(facts or {}))
        self._do(round, lambda: self._open(round, clients, held))

    def updates(self, round: int, found: Iterable[Update]) -> None:
        """Take in what came back."""
        held = list(found)
        self._do(round, lambda: self._put_updates(round, held))

    def aggregate(
        self, round: int, arrays: Mapping[str, Any], metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Take in the model after a round; the first to say so counts."""
        if round in self._ended:
            return
        self._ended.add(round)
        held, numbers = dict(arrays), _plain(metrics or {})
        self._do(round, lambda: self._put_aggregate(round, held, numbers))

    def evaluations(self, round: int, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in how clients judged the model after a round."""
        held = {client: _evaluated(metrics) for client, metrics in found.items()}
        self._do(round, lambda: self._put_metadata(round, held))

    def evaluated(self, round: int, metrics: Mapping[str, Any] | None) -> None:
        """Take in how they judged it together."""
        self._facts.setdefault(round, {}).update(_evaluated(metrics or {}))

    def fail(self, round: int, why: str) -> None:
        """Take note that something is not in the cache."""
        text = f"round {round} of {self.rounds.job}: {why}"
        if len(self.failures) < FAILURES_MAX:
            self.failures.append(text)
        log.warning("capture: %s", text)

    def flush(self, timeout: float = FLUSH_S) -> bool:
        """Wait until everything is written; return whether it is."""
        for round in sorted(self._facts):
            self._settle(round)
        if self._thread is None:
            return True
        done = threading.Event()
        try:
            self._steps.put((None, done.set), timeout=timeout)
        except queue.Full:
            return False
        return done.wait(timeout)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    # -- the thread -----------------------------------------------------------------------------

    def _do(self, round: int, step: Callable[[], None]) -> None:
        with self._starting:
            if self._thread is None:
                name = "tierwise-capture"
                self._thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._thread.start()
                atexit.register(self.flush)
        if round > self._newest:
            self._newest = round
            for earlier in [r for r in self._facts if r < round]:
                self._settle(earlier)
        try:
            self._steps.put((round, step), timeout=GIVE_WAY_S)
        except queue.Full:
            self.fail(round, "the cache takes rounds more slowly than they come")

    def _settle(self, round: int) -> None:
        """Put the facts of a round that is over."""
        facts = self._facts.pop(round)
        if facts:
            self._do(round, lambda: self._put_metadata(round, {"": facts}))

    def _work(self) -> None:
        while True:
            round, step = self._steps.get()
            if round is None:
                step()
            elif round != self._lost:
                self._try(round, step)

    def _try(self, round: int, step: Callable[[], None]) -> None:
        try:
            step()
        except TierwiseError as error:
            self.fail(round, f"{type(error).__name__}: {error.message}")
            if isinstance(error, RetryLater):
                self._lost = round
        except Exception as error:  # whatever arrays may do: the training goes on
            self.fail(round, f"{type(error).__name__}: {error}")

    # -- steps ----------------------------------------------------------------------------------

    def _open(self, round: int, clients: Sequence[str], arrays: Mapping[str, Any]) -> None:
        base = round - 1
        is_first = not self._layout
        if is_first:
            found = {name: _numpy(array) for name, array in arrays.items()}
            self._layout = [(name, array.shape, array.dtype.str) for name, array in found.items()]
        if base not in self._held:  # the initial model; or what we were not told, or lost
            vector = self._vector(arrays)
            try:
                self.rounds.put_aggregate(base, vector)
            except FailedPrecondition:
                self.rounds.open(base, [], vector.size)
                self.rounds.put_aggregate(base, vector)
            self._held.add(base)
        if is_first:
            layout = [[name, list(shape), dtype] for name, shape, dtype in self._layout]
            self.rounds.put_metadata(base, "", {LAYOUT: layout})
        self.rounds.open(round, clients, self._size(), base=base)

    def _put_updates(self, round: int, found: Sequence[Update]) -> None:
        for update in found:
            try:
                vector = self._vector(update.arrays)
            except ValueError as error:
                self.fail(round, f"{update.client}: {error}")
                continue
            metadata = self._metadata(update)
            try:
                self.rounds.put_update(round, update.client, vector, metadata)
            except RetryLater:
                raise
            except TierwiseError as error:  # this one is refused, the others may not be
                self.fail(round, f"{update.client}: {type(error).__name__}: {error.message}")

    def _put_aggregate(
        self, round: int, arrays: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> None:
        self.rounds.put_aggregate(round, self._vector(arrays), metrics)
        self._held.add(round)

    def _put_metadata(self, round: int, found: Mapping[str, Mapping[str, Any]]) -> None:
        for client, facts in found.items():
            self.rounds.put_metadata(round, client, facts)

    def _metadata(self, update: Update) -> dict[str, Any]:
        """Return metrics under their own names, and those that questions look for under theirs."""
        found = _plain(update.metrics)
        if self.weight in found:
            found["example_count"] = found[self.weight]
        losses = [found[name] for name in LOSSES if name in found]
        if losses:
            found["loss"] = losses[0]
        if update.duration_s is not None:
            found.setdefault("duration_s", update.duration_s)
        return found

    def _size(self) -> int:
        return sum(int(np.prod(shape, dtype=np.int64)) for _, shape, _ in self._layout)

    def _vector(self, arrays: Mapping[str, Any]) -> NDArray[np.float32]:
        """Return arrays as one vector.

        Raises:
            ValueError: They are not those of the first record.
        """
        if set(arrays) != {name for name, _, _ in self._layout}:
            raise ValueError("it has other arrays than the model that was sent first")
        vector = np.empty(self._size(), np.float32)
        start = 0
        for name, shape, _ in self._layout:
            array = _numpy(arrays[name])
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, in the model it is {shape}")
            vector[start : start + array.size] = array.reshape(-1)
            start += array.size
        return vector


def arrays(rounds: Rounds, round: int, kind: str = "aggregate", client: str = "") -> ArrayRecord:
    """Return what was captured as the record that it was: an aggregate, or a client's update.

    Raises:
        NotFound: There is none, or the job was not captured from Flower.
    """
    vector = rounds.get(round, kind, client)
    of_rounds = [o for o in rounds.list() if o["kind"] == "metadata" and not o["client"]]
    first = min((o["round"] for o in of_rounds), default=0)
    layout = rounds.get(first, "metadata")[LAYOUT]
    record = ArrayRecord()
    start = 0
    for name, shape, dtype in layout:
        count = int(np.prod(shape, dtype=np.int64))
        part = vector[start : start + count].reshape(shape).astype(np.dtype(dtype))
        record[name] = Array(part)
        start += count
    return record


def _numpy(array: Any) -> NDArray[Any]:
    if isinstance(array, np.ndarray):
        return array
    if isinstance(array, bytes):  # as in the parameters of old strategies
        found: NDArray[Any] = np.load(io.BytesIO(array), allow_pickle=False)
        return found
    held: NDArray[Any] = array.numpy()
    return held


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts that metadata can hold."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, bool | str | list):
            found[name] = value
        elif isinstance(value, int | float):  # NumPy's are among them
            found[name] = int(value) if isinstance(value, int) else float(value)
    return found


def _evaluated(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return evaluation metrics apart from those of training, but for the accuracy."""
    found = {f"evaluate-{name}": value for name, value in _plain(metrics).items()}
    if "accuracy" in metrics:
        found["accuracy"] = metrics["accuracy"]
    return found
