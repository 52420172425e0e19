"""Objects of caches in calls: what a function reads where it lies, and where its result stays."""

from dataclasses import dataclass
from math import prod
from typing import Any

from tierwise.domain.cache import Durability, ObjectKey
from tierwise.v1 import cache_pb2
from tierwise.wire.convert_cache import info_from_pb, key_to_pb


@dataclass(frozen=True, slots=True)
class CachedArray:
    """Stands for an array that a cache holds: pass it to a call in the array's place.

    The function gets a read-only float32 array of this shape. On the node that holds it that is
    the cache's own memory; elsewhere it is fetched first. Nothing travels through this process.
    """

    key: ObjectKey
    shape: tuple[int, ...]
    node: str = ""  # where it is, if known

    @property
    def nbytes(self) -> int:
        """Return its size."""
        return 4 * prod(self.shape)

    @property
    def __tierwise_ref__(self) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape, which stand in the payload in its place."""
        return "<f4", self.shape

    def to_pb(self) -> cache_pb2.ObjectRef:
        """Return the message of the reference."""
        return cache_pb2.ObjectRef(key=key_to_pb(self.key), node_id=self.node)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedResult:
    """Where the result of a call goes: `function.options(output=…)`.

    The function returns (vector, dict): a one-dimensional float32 array of the round's length, and
    small facts such as `example_count`. Its caller gets a receipt: digest, size_bytes, node_id,
    durability, quarantined, and those facts.
    """

    key: ObjectKey
    node: str = ""
    encoding: str = ""
    durability: Durability | None = None
    relative_to: ObjectKey | None = None

    def to_pb(self) -> cache_pb2.ObjectSink:
        """Return the message of it."""
        pb = cache_pb2.ObjectSink(
            key=key_to_pb(self.key), node_id=self.node, encoding=self.encoding
        )
        if self.durability is not None:
            pb.durability = cache_pb2.Durability.ValueType(self.durability)
        if self.relative_to is not None:
            pb.relative_to.CopyFrom(key_to_pb(self.relative_to))
        return pb


def plain(info: cache_pb2.ObjectInfo) -> dict[str, Any]:
    """Return what is known of an object as plain values, as lists and JSON show it."""
    found = info_from_pb(info)
    key = found.key
    return {
        "namespace": key.namespace,
        "job": key.job,
        "round": key.round,
        "kind": key.kind.value,
        "client": key.client,
        "size_bytes": found.size_bytes,
        "digest": found.digest,
        "durability": found.durability.name.lower(),
        "node_ids": list(found.node_ids),
        "is_in_memory": found.is_in_memory,
        "quarantined": found.quarantined,
        "metadata": dict(found.metadata or {}),
    }
