"""What a message holds comes out as it went in."""

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: `make test-flower` runs these in .venv-flower")

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from tierwise.functions.flower import lift, lower, split
from tierwise.wire import payload


def records() -> RecordDict:
    """Return one of everything that Flower allows in a message."""
    strange = np.array([np.nan, -0.0, np.inf, 5e-324])
    arrays = {
        "empty": Array(np.zeros((0, 3), np.float32)),
        "scalar": Array(np.array(7, np.int8)),
        "by columns": Array(np.asfortranarray(np.arange(6.0).reshape(2, 3))),
        "halves": Array(np.arange(5, dtype=np.float16)),
        "strange": Array(strange),
        "of another framework": Array("bfloat16", (2, 2), "torch.save", b"\x80\x02 not for us"),
    }
    metrics = {"count": 3, "loss": 0.25, "losses": [0.5, 0.25], "none": [], "numpy": np.float64(1)}
    config = {"yes": True, "name": "é", "blob": b"\x00\xff", "blobs": [b"a", b""], "flags": [True]}
    return RecordDict(
        {
            "second": ArrayRecord({}),
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord(metrics),
            "config": ConfigRecord(config),
        }
    )


def travelled(found: RecordDict, *, joined: bool) -> RecordDict:
    """Return the records after the way that calls (joined) or results take."""
    values, parts = lower(found)
    arrays = [np.frombuffer(part, dtype=np.uint8) for part in parts]
    if joined:
        values, whole = payload.decode(payload.encode((values, np.concatenate(arrays))))
        return lift(values, split(values, whole))
    return lift(*payload.decode(payload.encode((values, arrays))))


@pytest.mark.parametrize("joined", [True, False])
def test_records_of_every_kind_come_out_as_they_went_in(joined: bool) -> None:
    before, after = records(), travelled(records(), joined=joined)
    assert list(before) == list(after)
    for name, record in before.items():
        assert type(after[name]) is type(record)
        assert list(after[name].items()) == list(record.items())
        assert [type(value) for value in after[name].values()] == [
            type(value) for value in record.values()
        ]
    assert before["arrays"].object_id == after["arrays"].object_id  # Flower's own digest


def test_an_array_that_numpy_cannot_read_is_refused_by_flower_not_run() -> None:
    evil = Array("object", (1,), "numpy.ndarray", b"\x93NUMPY\x01\x00" + b"\x80\x04cos\nsystem\n.")
    found = travelled(RecordDict({"arrays": ArrayRecord({"evil": evil})}), joined=True)
    with pytest.raises(ValueError):
        found["arrays"]["evil"].numpy()
