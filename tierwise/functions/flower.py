"""Flower's messages as plain values, and what runs a ClientApp in a worker.

Nothing here is pickled but code: the records of a message become lists of names and numbers, and
its arrays the very bytes that Flower keeps of them (`Array.data`, NumPy's own format for
`numpy.ndarray`), so that what comes out is what went in, bit by bit, whatever made the bytes.
Flower is imported when it is first needed: agents and clients without it can import this module.
"""

from collections.abc import Iterable, Mapping
from typing import Any

ARRAYS, METRICS, CONFIGS = "arrays", "metrics", "configs"


def lower(records: Mapping[str, Any]) -> tuple[list[Any], list[bytes]]:
    """Return a RecordDict as values that can travel, and the bytes of its arrays in order.

    A record is `[name, kind, content]`; the content of one of arrays is a list of
    `[name, dtype, shape, serialisation, byte count]`, that of another is a dict.
    """
    from flwr.app import ArrayRecord, MetricRecord

    found: list[Any] = []
    parts: list[bytes] = []
    for name, record in records.items():
        if not isinstance(record, ArrayRecord):
            kind = METRICS if isinstance(record, MetricRecord) else CONFIGS
            found.append([name, kind, dict(record)])
            continue
        heads = []
        for key, array in record.items():
            heads.append([key, array.dtype, list(array.shape), array.stype, len(array.data)])
            parts.append(array.data)
        found.append([name, ARRAYS, heads])
    return found, parts


def lift(found: list[Any], parts: Iterable[Any]) -> Any:
    """Return the RecordDict that `lower` was given; parts may be bytes or uint8 arrays."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    records = RecordDict()
    rest = iter(parts)
    for name, kind, content in found:
        if kind == ARRAYS:
            record = ArrayRecord()
            for key, dtype, shape, stype, _ in content:
                record[key] = Array(dtype, tuple(shape), stype, bytes(memoryview(next(rest))))
            records[name] = record
        else:
            records[name] = (MetricRecord if kind == METRICS else ConfigRecord)(content)
    return records


def split(found: list[Any], joined: Any) -> list[memoryview]:
    """Return the bytes of each array of `found`, which lie one after the other in `joined`."""
    counts = [head[4] for _, kind, content in found if kind == ARRAYS for head in content]
    if not counts:
        return []
    view = memoryview(joined)
    parts, start = [], 0
    for count in counts:
        parts.append(view[start : start + count])
        start += count
    return parts


def client_function(app: Any, reference: str = "", *, keeps_state: bool = True) -> type:
    """Return a class that runs a ClientApp on one message at a time, for workers.

    Args:
        app: The ClientApp, which is pickled with the code; or a whole project as Flower bundles it
            (the bytes of a FAB, a zip file), which a worker unpacks and imports.
        reference: Where the ClientApp is in such a project, "package.module:app".
        keeps_state: Return the state that the ClientApp leaves in its context.
    """

    class FlowerClient:
        """Runs a Flower ClientApp on one message."""

        def enter(self) -> None:
            """Load the ClientApp."""
            self.client_app = _unpacked(app, reference) if isinstance(app, bytes) else app

        def __call__(
            self, message: dict[str, Any], joined: Any, client: dict[str, Any]
        ) -> dict[str, Any]:
            """Answer one message.

            Args:
                message: Its metadata and its lowered records.
                joined: The bytes of all its arrays, shape (n,), uint8; None: there are none.
                client: `node_config`, `run_config`, and the lowered state of the client's context.

            Returns:
                The lowered reply or its error, and the state that the ClientApp left.
            """
            from flwr.app import Context, Message, Metadata
            from flwr.app.message import make_message

            metadata = message["metadata"]
            had = client["state"]
            context = Context(
                run_id=metadata["run_id"],
                node_id=metadata["dst_node_id"],
                node_config=dict(client["node_config"]),
                state=lift(had, client["state_arrays"]),
                run_config=dict(client["run_config"]),
            )
            content = lift(message["records"], split(message["records"], joined))
            received = make_message(metadata=Metadata(**metadata), content=content)
            reply = self.client_app(message=received, context=context)
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned a {type(reply).__name__}, not a Message")
            answer: dict[str, Any] = {}
            if reply.has_error():
                answer["error"] = [reply.error.code, reply.error.reason]
            else:
                answer["records"], answer["arrays"] = _as_arrays(*lower(reply.content))
            if keeps_state and (context.state or had):
                answer["state"], answer["state_arrays"] = _as_arrays(*lower(context.state))
            return answer

    return FlowerClient


def _as_arrays(found: list[Any], parts: list[bytes]) -> tuple[list[Any], list[Any]]:
    """Return parts as arrays, which travel beside a result instead of inside it."""
    import numpy as np

    return found, [np.frombuffer(part, dtype=np.uint8) for part in parts]


def _unpacked(fab: bytes, reference: str) -> Any:
    """Unpack a project into this worker's own folder, and import its ClientApp."""
    import hashlib
    import importlib
    import io
    import sys
    import zipfile
    from functools import reduce
    from pathlib import Path

    folder = Path.cwd() / f"fab-{hashlib.sha256(fab).hexdigest()[:16]}"
    with zipfile.ZipFile(io.BytesIO(fab)) as archive:
        archive.extractall(folder)  # made by the owner of the code, unpacked inside the seal
    sys.path.insert(0, str(folder))
    module, _, attributes = reference.partition(":")
    return reduce(getattr, attributes.split("."), importlib.import_module(module))
