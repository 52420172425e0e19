"""What caches do elsewhere: LRU, LFU and FIFO, filled by writes and reads or by reads alone.

They know nothing of rounds. Reading a MATRIX counts as reading each of its updates.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from agent.cache.policies import Adaptive, CachePolicy, Tailored, bound, first_of
from tierwise.domain.cache import ObjectKey, ObjectKind

REMEMBERED_MAX = 100_000  # keys, held or not


class Classic:
    """Drops what was used least recently, least often, or came first."""

    def __init__(self, order: str, *, is_write_allocate: bool) -> None:
        """Choose.

        Args:
            order: "lru", "lfu" or "fifo".
            is_write_allocate: Whether what is written is kept, or only what was read once.

        Raises:
            ValueError: Another order.
        """
        if order not in ("lru", "lfu", "fifo"):
            raise ValueError(f"no such order: {order!r}")
        self._order = order
        self._is_write_allocate = is_write_allocate
        self._number = 0
        self._used: OrderedDict[ObjectKey, int] = OrderedDict()  # when last, as a running number
        self._came: OrderedDict[ObjectKey, int] = OrderedDict()  # when first
        self._reads: OrderedDict[ObjectKey, int] = OrderedDict()  # how often

    def ingested(self, key: ObjectKey, size_bytes: int) -> None:
        """Count as a use if writes allocate."""
        if self._is_write_allocate:
            self._use(key)

    def read(self, key: ObjectKey, is_hit: bool) -> Sequence[ObjectKey]:
        """Count; fetch nothing ahead."""
        if not is_hit:
            self._came.pop(key, None)  # it comes anew
        self._use(key)
        self._reads[key] = self._reads.pop(key, 0) + 1
        bound(self._reads, REMEMBERED_MAX)
        return ()

    def is_admitted(self, key: ObjectKey) -> bool:
        """Return whether it was read, or writes allocate."""
        return self._is_write_allocate or any(k in self._reads for k in _names(key))

    def victims(self, held: Mapping[ObjectKey, int], need_bytes: int) -> list[ObjectKey]:
        """Drop in the chosen order; among equals, what was used least recently."""
        return first_of(sorted(held, key=self._rank), held, need_bytes)

    def chosen(self, namespace: str, job: str) -> str:
        """Return the order."""
        return self._order if self._is_write_allocate else f"{self._order}, reads only"

    def forget(self, namespace: str, job: str) -> None:
        """Drop its keys."""
        for known in (self._used, self._came, self._reads):
            for key in [k for k in known if (k.namespace, k.job) == (namespace, job)]:
                del known[key]

    def _rank(self, key: ObjectKey) -> tuple[int, int, ObjectKey]:
        used = max(self._used.get(k, 0) for k in _names(key))
        match self._order:
            case "lru":
                return used, 0, key
            case "lfu":
                return sum(self._reads.get(k, 0) for k in _names(key)), used, key
            case _:
                return max(self._came.get(k, 0) for k in _names(key)), 0, key

    def _use(self, key: ObjectKey) -> None:
        self._number += 1
        self._used.pop(key, None)
        self._used[key] = self._number
        self._came.setdefault(key, self._number)
        bound(self._used, REMEMBERED_MAX)
        bound(self._came, REMEMBERED_MAX)


def policy(name: str) -> CachePolicy:
    """Return a new policy by its name.

    Raises:
        ValueError: There is none of that name; the message lists all.
    """
    if name == "adaptive":
        return Adaptive()
    if name in TAILORED:
        return Tailored(*TAILORED[name])
    order, _, rest = name.partition("-")
    if order in ("lru", "lfu", "fifo") and rest in ("", "reads"):
        return Classic(order, is_write_allocate=not rest)
    raise ValueError(f"no cache policy {name!r}: use one of {', '.join(NAMES)}")


TAILORED = {"newest": ("P1",), "rounds": ("P2",), "histories": ("P3",), "metadata": ("P4",)}
NAMES = (
    "adaptive",
    *TAILORED,
    *(order + rest for order in ("lru", "lfu", "fifo") for rest in ("", "-reads")),
)


def _names(key: ObjectKey) -> tuple[ObjectKey, ...]:
    """Return the key, and that of the matrix which it is a row of."""
    if key.kind is not ObjectKind.UPDATE:
        return (key,)
    return key, replace(key, kind=ObjectKind.MATRIX, client="")
