"""`capture`: a Flower project keeps its transport, and its rounds go to the cache as well."""

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from tierwise.errors import InvalidArgument
from tierwise.sdk.flower.grid import TierwiseGrid
from tierwise.sdk.flower.recorder import Recorder, Update
from tierwise.sdk.rounds import Rounds

WEIGHT = "num-examples"
OLD = ("fitins.", "evaluateins.")
ROUND_KEYS = ("server-round", "server_round")


def capture(
    target: Any,
    rounds: Rounds,
    *,
    weight: str = "",
    names: Mapping[int, str] | None = None,
) -> Any:
    """Write every round's updates, aggregate and metrics into the cache, beside the training.

        grid = flower.capture(grid, rounds)            # in a ServerApp, whatever its transport
        strategy = flower.capture(strategy, rounds)    # the same, where the strategy is made

    A strategy also tells the metrics it aggregates and the last model, which a grid sees only if
    it is evaluated by clients. Strategies of both kinds are understood, with messages and older.

    Args:
        target: A Grid, which is wrapped; or a strategy, which is given back with its methods
            wrapped.
        rounds: The job to write.
        weight: The metric with an update's number of examples; default: the strategy's own, or
            Flower's "num-examples".
        names: What clients are called in the cache, by Flower node id; default: the names of a
            TierwiseGrid's participants, "client-<node id>" elsewhere.

    Returns:
        The grid or the strategy to use from now on. Its attribute `capture` has `failures`, and
        `flush()`, which waits until everything is written.

    Raises:
        InvalidArgument: It is neither a grid nor a strategy.
    """
    own = weight or getattr(target, "weighted_by_key", WEIGHT)
    recorder = Recorder(rounds, weight=own)
    if isinstance(target, Grid):
        return CapturedGrid(target, recorder, _names(target, names))
    if isinstance(target, Strategy):
        return _with_messages(target, recorder, dict(names or {}))
    if hasattr(target, "configure_fit") and hasattr(target, "aggregate_fit"):
        return _without_messages(target, recorder, dict(names or {}))
    raise InvalidArgument(
        f"a {type(target).__name__} cannot be captured: give a Grid or a Strategy"
    )


class CapturedGrid(Grid):  # type: ignore[misc]
    """A grid that passes everything on, and tells a recorder what it saw."""

    def __init__(self, grid: Any, recorder: Recorder, names: Mapping[int, str]) -> None:
        self.inner = grid
        self.capture = recorder
        self._names = names
        self._asked: dict[str, tuple[int, Message]] = {}  # by message id
        self._newest = 0

    def __getattr__(self, name: str) -> Any:
        """Return what the grid has beyond those of all grids."""
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        """Pass on."""
        return self.inner.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Pass on."""
        return self.inner.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        return self.inner.get_node_ids()  # type: ignore[no-any-return]

    def get_nodes(self) -> Iterable[Any]:
        """Pass on."""
        return self.inner.get_nodes()  # type: ignore[no-any-return]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on, and note who is asked for what."""
        held = list(messages)
        round = self._begin(held)
        ids = list(self.inner.push_messages(held))
        self._note(round, held)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on, and note what came."""
        replies = list(self.inner.pull_messages(message_ids))
        self._came(replies)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass on, and note both."""
        held = list(messages)
        round = self._begin(held)
        replies = list(self.inner.send_and_receive(held, timeout=timeout))
        self._note(round, held)
        self._came(replies)
        for message in held:  # what has not come by now never will
            self._asked.pop(message.metadata.message_id, None)
        return replies

    def _begin(self, messages: list[Message]) -> int:
        training = [m for m in messages if _is(m, "train") and _model(m.content) is not None]
        judging = [m for m in messages if _is(m, "evaluate") and _model(m.content) is not None]
        for message in (training or judging)[:1]:
            content = message.content
            if any(name.startswith(OLD) for name in content):
                if training:
                    self.capture.fail(0, "old strategies send one by one: capture the strategy")
                return self._newest
            model = _model(content)
            assert model is not None
            round = _round(content) or self._newest + bool(training)
            self._newest = max(self._newest, round)
            if training:
                clients = [self._name(m.metadata.dst_node_id) for m in training]
                self.capture.begin(round, list(dict.fromkeys(clients)), model, _settings(content))
            else:
                self.capture.aggregate(round, model)
            return round
        return self._newest

    def _note(self, round: int, messages: list[Message]) -> None:
        self._asked |= {m.metadata.message_id: (round, m) for m in messages}

    def _came(self, replies: list[Message]) -> None:
        trained: dict[int, list[Update]] = {}
        judged: dict[int, dict[str, Any]] = {}
        for reply in replies:
            round, asked = self._asked.pop(reply.metadata.reply_to_message_id, (0, None))
            if asked is None or not reply.has_content():
                continue
            name = self._name(reply.metadata.src_node_id)
            if _is(asked, "train"):
                trained.setdefault(round, []).extend(_update(name, asked, reply))
            elif _is(asked, "evaluate"):
                judged.setdefault(round, {})[name] = _metrics(reply.content)
        for round, updates in trained.items():
            self.capture.updates(round, updates)
        for round, found in judged.items():
            self.capture.evaluations(round, found)

    def _name(self, node_id: int) -> str:
        return self._names.get(node_id, f"client-{node_id}")


def _with_messages(strategy: Any, recorder: Recorder, names: dict[int, str]) -> Any:
    """Wrap a strategy that sends messages: its rounds are told by its own methods."""
    configure_train, configure_evaluate = strategy.configure_train, strategy.configure_evaluate
    aggregate_train, aggregate_evaluate = strategy.aggregate_train, strategy.aggregate_evaluate
    asked: dict[int, list[Message]] = {}

    def name(node_id: int) -> str:
        return names.get(node_id, f"client-{node_id}")

    def configured(server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        for node_id, known in _names(grid, None).items():
            names.setdefault(node_id, known)
        messages = list(configure_train(server_round, arrays, config, grid))
        asked.clear()
        asked[server_round] = messages
        clients = list(dict.fromkeys(name(m.metadata.dst_node_id) for m in messages))
        if clients:
            recorder.begin(server_round, clients, arrays, dict(config))
        return messages

    def aggregated(server_round: int, replies: Iterable[Message]) -> Any:
        held = list(replies)
        sent = {m.metadata.message_id: m for m in asked.pop(server_round, [])}
        updates: list[Update] = []
        for reply in held:
            question = sent.get(reply.metadata.reply_to_message_id)
            if question is not None and reply.has_content():
                updates += _update(name(reply.metadata.src_node_id), question, reply)
        if updates:
            recorder.updates(server_round, updates)
        arrays, metrics = aggregate_train(server_round, held)
        if arrays is not None:
            recorder.aggregate(server_round, arrays, metrics)
        return arrays, metrics

    def judged(server_round: int, replies: Iterable[Message]) -> Any:
        held = list(replies)
        contents = {name(r.metadata.src_node_id): r.content for r in held if r.has_content()}
        found = {client: _metrics(content) for client, content in contents.items()}
        if found:
            recorder.evaluations(server_round, found)
        metrics = aggregate_evaluate(server_round, held)
        recorder.evaluated(server_round, metrics)
        return metrics

    strategy.configure_train, strategy.configure_evaluate = configured, configure_evaluate
    strategy.aggregate_train, strategy.aggregate_evaluate = aggregated, judged
    strategy.capture = recorder
    return strategy


def _without_messages(strategy: Any, recorder: Recorder, names: dict[int, str]) -> Any:
    """Wrap a strategy of the kind before messages: parameters have numbers for names."""
    configure_fit, aggregate_fit = strategy.configure_fit, strategy.aggregate_fit
    aggregate_evaluate = strategy.aggregate_evaluate

    def name(proxy: Any) -> str:
        node_id = getattr(proxy, "node_id", None)
        return names.get(node_id or 0, f"client-{proxy.cid}")

    def arrays(parameters: Any) -> dict[str, Any]:
        return {str(index): tensor for index, tensor in enumerate(parameters.tensors)}

    def configured(server_round: int, parameters: Any, client_manager: Any) -> Any:
        asked = configure_fit(server_round, parameters, client_manager)
        if asked:
            clients = list(dict.fromkeys(name(proxy) for proxy, _ in asked))
            recorder.begin(server_round, clients, arrays(parameters), asked[0][1].config)
        return asked

    def aggregated(server_round: int, results: Any, failures: Any) -> Any:
        updates = [
            Update(
                client=name(proxy),
                arrays=arrays(found.parameters),
                metrics={**found.metrics, recorder.weight: found.num_examples},
            )
            for proxy, found in results
        ]
        if updates:
            recorder.updates(server_round, updates)
        parameters, metrics = aggregate_fit(server_round, results, failures)
        if parameters is not None:
            recorder.aggregate(server_round, arrays(parameters), metrics)
        return parameters, metrics

    def judged(server_round: int, results: Any, failures: Any) -> Any:
        found = {name(proxy): {**one.metrics, "loss": one.loss} for proxy, one in results}
        if found:
            recorder.evaluations(server_round, found)
        loss, metrics = aggregate_evaluate(server_round, results, failures)
        recorder.evaluated(server_round, {**(metrics or {}), "loss": loss})
        return loss, metrics

    strategy.configure_fit, strategy.aggregate_fit = configured, aggregated
    strategy.aggregate_evaluate = judged
    strategy.capture = recorder
    return strategy


def _names(grid: Any, names: Mapping[int, str] | None) -> dict[int, str]:
    known = grid.participants if isinstance(grid, TierwiseGrid) else {}
    return {node_id: one.name for node_id, one in known.items()} | dict(names or {})


def _is(message: Message, category: str) -> bool:
    return str(message.metadata.message_type).partition(".")[0] == category


def _model(content: RecordDict) -> ArrayRecord | None:
    return next((r for r in content.values() if isinstance(r, ArrayRecord)), None)


def _settings(content: RecordDict) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in content.values():
        if isinstance(record, ConfigRecord):
            found |= record
    return found


def _round(content: RecordDict) -> int:
    """Return the number of the round that a message says it is for; 0: it does not say."""
    settings = _settings(content)
    numbers = [settings[key] for key in ROUND_KEYS if isinstance(settings.get(key), int)]
    return numbers[0] if numbers else 0


def _metrics(content: RecordDict) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in content.metric_records.values():
        found |= record
    return found


def _update(name: str, asked: Message, reply: Message) -> list[Update]:
    model = _model(reply.content)
    if model is None:
        return []
    took_s = reply.metadata.created_at - asked.metadata.created_at
    arrays = dict(model)  # strategies may empty the record when they aggregate it
    return [Update(client=name, arrays=arrays, metrics=_metrics(reply.content), duration_s=took_s)]
