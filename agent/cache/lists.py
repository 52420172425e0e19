"""Lists of objects of several nodes as one. Pure."""

from collections.abc import Iterable

from tierwise.v1 import cache_pb2


def merged(
    own: cache_pb2.ListObjectsResponse, others: Iterable[cache_pb2.ListObjectsResponse]
) -> cache_pb2.ListObjectsResponse:
    """Return one row per object and digest: at all its nodes, as durable as at the best of them."""
    found: dict[bytes, cache_pb2.ObjectInfo] = {}
    for response in (own, *others):
        for info in response.objects:
            name = info.key.SerializeToString(deterministic=True) + info.digest.encode()
            known = found.setdefault(name, info)
            if known is info:
                continue
            known.node_ids.extend(n for n in info.node_ids if n not in known.node_ids)
            known.durability = max(known.durability, info.durability)
            known.is_in_memory = known.is_in_memory or info.is_in_memory
    rows = sorted(found.values(), key=_order)
    return cache_pb2.ListObjectsResponse(objects=rows, cache=own.cache)


def _order(info: cache_pb2.ObjectInfo) -> tuple[str, str, int, int, str]:
    key = info.key
    return key.namespace, key.job, key.round, key.kind, key.client
