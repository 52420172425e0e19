"""What lossy encodings have lost so far, per client: added to the client's next vector."""

from collections import OrderedDict

import numpy as np

from tierwise.domain.cache import ObjectKey, ObjectKind
from tierwise.wire.compression import Vector

_Name = tuple[str, str, str, ObjectKind]


class Residuals:
    """Bounded; who has not sent for longest goes first, and begins at zero again."""

    def __init__(self, bytes_max: int) -> None:
        self._kept: OrderedDict[_Name, Vector] = OrderedDict()
        self._bytes_max = bytes_max

    def copy_of(self, key: ObjectKey, element_count: int) -> Vector:
        """Return what was lost so far, shape (P,), to be changed by the next encoding."""
        kept = self._kept.get(_name(key))
        if kept is None or len(kept) != element_count:
            return np.zeros(element_count, np.float32)
        return kept.copy()

    def keep(self, key: ObjectKey, residual: Vector) -> None:
        """Keep what the encoding that has arrived has lost in all."""
        name = _name(key)
        self._kept[name] = residual
        self._kept.move_to_end(name)
        while sum(each.nbytes for each in self._kept.values()) > self._bytes_max:
            self._kept.popitem(last=False)

    def forget(self, namespace: str, job: str) -> None:
        """Drop those of a job."""
        for name in [name for name in self._kept if name[:2] == (namespace, job)]:
            del self._kept[name]


def _name(key: ObjectKey) -> _Name:
    return key.namespace, key.job, key.client, key.kind
