"""Objects of federated jobs ⇄ protobuf: keys, manifests, infos, what a node holds."""

from collections.abc import Iterable, Mapping
from typing import Any

from tierwise.domain.cache import (
    Durability,
    HeldRounds,
    ObjectInfo,
    ObjectKey,
    ObjectKind,
    RoundClient,
    RoundManifest,
)
from tierwise.errors import InvalidArgument
from tierwise.v1 import cache_pb2, types_pb2
from tierwise.wire import checks, encodings, payload
from tierwise.wire.memfd import ATTACHMENTS_MAX

# Of a Put or Get. On loopback with mTLS 512 KiB and 1 MiB are equally fast, 650 to 750 MB/s, and
# 64 KiB a third of that: benchmarks/bench_cache_chunks.py.
CHUNK_BYTES = 512 << 10
DIGEST_ALGORITHM = "BLAKE2b-256"  # of objects
ROUND_MAX = 2**31 - 1
CLIENTS_MAX = 10_000
CLIENT_LENGTH_MAX = 128
PARAMETERS_MAX = 1 << 34
REPLICAS_MAX = 8
METADATA_BYTES_MAX = 256 << 10
URI_LENGTH_MAX = 200
HELD_JOBS_MAX = 256
HELD_ROUNDS_MAX = 64
DISTANCE_MAX = 1e300
QUARANTINED_LENGTH_MAX = 1_000
_PB_BY_KIND = {
    ObjectKind.UPDATE: cache_pb2.OBJECT_KIND_UPDATE,
    ObjectKind.AGGREGATE: cache_pb2.OBJECT_KIND_AGGREGATE,
    ObjectKind.METADATA: cache_pb2.OBJECT_KIND_METADATA,
    ObjectKind.MATRIX: cache_pb2.OBJECT_KIND_MATRIX,
}
_KIND_BY_PB = {pb: kind for kind, pb in _PB_BY_KIND.items()}


def key_to_pb(key: ObjectKey) -> cache_pb2.ObjectKey:
    """Return the message of a key."""
    return cache_pb2.ObjectKey(
        namespace=key.namespace,
        job=key.job,
        round=key.round,
        client=key.client,
        kind=_PB_BY_KIND[key.kind],
    )


def key_from_pb(pb: cache_pb2.ObjectKey, field: str = "key") -> ObjectKey:
    """Return the key of a message.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    kind = _KIND_BY_PB.get(pb.kind)
    if kind is None:
        known = ", ".join(kind.value for kind in ObjectKind)
        raise InvalidArgument(f"{field}.kind = {pb.kind} is not known here: use one of {known}")
    if pb.client:  # the cache itself says what may be in it
        checks.text(pb.client, f"{field}.client", CLIENT_LENGTH_MAX)
    if (kind is ObjectKind.UPDATE and not pb.client) or (kind is ObjectKind.MATRIX and pb.client):
        needed = "needs a client" if kind is ObjectKind.UPDATE else "is of a round, not of a client"
        raise InvalidArgument(f"{field}: {kind.value} {needed}")
    return ObjectKey(
        namespace=checks.name(pb.namespace, f"{field}.namespace"),
        job=checks.name(pb.job, f"{field}.job"),
        round=checks.integer(pb.round, f"{field}.round", 0, ROUND_MAX),
        kind=kind,
        client=pb.client,
    )


def manifest_to_pb(manifest: RoundManifest) -> cache_pb2.RoundManifest:
    """Return the message of a manifest."""
    return cache_pb2.RoundManifest(
        namespace=manifest.namespace,
        job=manifest.job,
        round=manifest.round,
        clients=[
            cache_pb2.RoundClient(client=each.client, writer=each.writer)
            for each in manifest.clients
        ],
        parameter_count=manifest.parameter_count,
        distance_max=manifest.distance_max,
        base=None if manifest.base is None else key_to_pb(manifest.base),
        replica_nodes=manifest.replica_nodes,
        owner=manifest.owner,
        home=manifest.home,
    )


def manifest_from_pb(pb: cache_pb2.RoundManifest) -> RoundManifest:
    """Return the manifest of a message.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    checks.at_most(pb.clients, "clients", CLIENTS_MAX)
    checks.at_most(pb.replica_nodes, "replica_nodes", REPLICAS_MAX)
    clients = tuple(
        RoundClient(
            client=checks.text(each.client, "clients.client", CLIENT_LENGTH_MAX),
            writer=checks.text(each.writer, "clients.writer", URI_LENGTH_MAX),
        )
        for each in pb.clients
    )
    if len({each.client for each in clients}) < len(clients):
        raise InvalidArgument("clients: a client is named twice")
    return RoundManifest(
        namespace=checks.name(pb.namespace, "namespace"),
        job=checks.name(pb.job, "job"),
        round=checks.integer(pb.round, "round", 0, ROUND_MAX),
        clients=clients,
        parameter_count=checks.integer(pb.parameter_count, "parameter_count", 1, PARAMETERS_MAX),
        distance_max=checks.number(pb.distance_max, "distance_max", 0.0, DISTANCE_MAX),
        base=key_from_pb(pb.base, "base") if pb.HasField("base") else None,
        replica_nodes=tuple(checks.name(node, "replica_nodes") for node in pb.replica_nodes),
        owner=checks.text(pb.owner, "owner", URI_LENGTH_MAX),
        home=checks.name(pb.home, "home") if pb.home else "",
    )


def metadata_to_bytes(metadata: Mapping[str, Any] | None) -> bytes:
    """Return small facts as they travel; none is empty.

    Raises:
        InvalidArgument: Something inside cannot travel, or they are too large.
    """
    if metadata is None:
        return b""
    try:
        blob = payload.encode(dict(metadata), "metadata")
    except payload.PayloadError as error:
        raise InvalidArgument(str(error)) from None
    if len(blob) > METADATA_BYTES_MAX:
        raise InvalidArgument(f"metadata has {len(blob)} bytes: use at most {METADATA_BYTES_MAX}")
    return blob


def metadata_from_bytes(blob: bytes) -> dict[str, Any] | None:
    """Return the facts of a message; empty means none.

    Raises:
        InvalidArgument: It is no payload, or no dict with texts as keys, or too large.
    """
    if not blob:
        return None
    if len(blob) > METADATA_BYTES_MAX:
        raise InvalidArgument(f"metadata has {len(blob)} bytes: use at most {METADATA_BYTES_MAX}")
    try:
        found = payload.decode(blob)
    except payload.PayloadError as error:
        raise InvalidArgument(f"metadata: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InvalidArgument("metadata: send a dict with texts as keys")
    return found


def durability_from_pb(value: int) -> Durability:
    """Return the durability of a message; unspecified is DISK.

    Raises:
        InvalidArgument: It is none.
    """
    return checks.member(Durability, value, "durability") if value else Durability.DISK


def info_to_pb(info: ObjectInfo) -> cache_pb2.ObjectInfo:
    """Return the message of an object's description."""
    return cache_pb2.ObjectInfo(
        key=key_to_pb(info.key),
        size_bytes=info.size_bytes,
        digest=info.digest,
        durability=cache_pb2.Durability.ValueType(info.durability),
        node_ids=info.node_ids,
        is_in_memory=info.is_in_memory,
        quarantined=checks.clean(info.quarantined, QUARANTINED_LENGTH_MAX),
        metadata=metadata_to_bytes(info.metadata),
    )


def info_from_pb(pb: cache_pb2.ObjectInfo) -> ObjectInfo:
    """Return an object's description.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    return ObjectInfo(
        key=key_from_pb(pb.key),
        size_bytes=checks.integer(pb.size_bytes, "size_bytes", 0, 2**62),
        digest=checks.digest(pb.digest, "digest", DIGEST_ALGORITHM),
        durability=durability_from_pb(pb.durability),
        node_ids=tuple(checks.name(node, "node_ids") for node in pb.node_ids),
        is_in_memory=pb.is_in_memory,
        quarantined=pb.quarantined[:QUARANTINED_LENGTH_MAX],
        metadata=metadata_from_bytes(pb.metadata),
    )


def check_objects(invocation: types_pb2.Invocation, caller: str = "") -> bool:
    """Check what a call reads from caches and where its result goes; return whether it does either.

    Args:
        invocation: As it came. Names of who reads and puts are filled in.
        caller: Who that is; empty: it came from somebody who says for whom it is.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    has_output = invocation.HasField("output")
    if not invocation.inputs and not has_output:
        return False
    if len(invocation.arguments) != 1:
        raise InvalidArgument("inputs and output go with a single argument set")
    if invocation.attachments and invocation.inputs:
        raise InvalidArgument("inputs: not together with attachments")
    checks.at_most(invocation.inputs, "inputs", ATTACHMENTS_MAX)
    for each in (*invocation.inputs, *((invocation.output,) if has_output else ())):
        key_from_pb(each.key)
        if each.node_id:
            checks.name(each.node_id, "node_id")
        each.caller = checks.text(caller or each.caller, "caller", URI_LENGTH_MAX)
    if has_output:
        _check_sink(invocation.output)
    return True


def _check_sink(sink: cache_pb2.ObjectSink) -> None:
    if sink.encoding != encodings.AUTO:
        encodings.check(sink.encoding)
    durability_from_pb(sink.durability)
    if sink.HasField("relative_to"):
        key_from_pb(sink.relative_to, "relative_to")
    if sink.key.kind == cache_pb2.OBJECT_KIND_MATRIX:
        raise InvalidArgument("output: a matrix is made of updates; put those")


def held_to_pb(held: HeldRounds) -> cache_pb2.HeldRounds:
    """Return the message of what a node holds of a job."""
    return cache_pb2.HeldRounds(
        namespace=held.namespace,
        job=held.job,
        rounds=held.rounds[-HELD_ROUNDS_MAX:],
        size_bytes=held.size_bytes,
        owner=held.owner,
        is_copy=held.is_copy,
        newest_done=held.newest_done if held.newest_done >= 0 else None,
    )


def held_from_pb(rows: Iterable[cache_pb2.HeldRounds]) -> tuple[HeldRounds, ...]:
    """Return what a node holds.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    found = tuple(_held_from_pb(pb) for pb in rows)
    checks.at_most(found, "held", HELD_JOBS_MAX)
    return found


def _held_from_pb(pb: cache_pb2.HeldRounds) -> HeldRounds:
    checks.at_most(pb.rounds, "held.rounds", HELD_ROUNDS_MAX)
    return HeldRounds(
        namespace=checks.name(pb.namespace, "held.namespace"),
        job=checks.name(pb.job, "held.job"),
        rounds=tuple(checks.integer(each, "held.rounds", 0, ROUND_MAX) for each in pb.rounds),
        size_bytes=checks.integer(pb.size_bytes, "held.size_bytes", 0, 2**62),
        owner=checks.text(pb.owner, "held.owner", URI_LENGTH_MAX),
        is_copy=pb.is_copy,
        newest_done=(
            checks.integer(pb.newest_done, "held.newest_done", 0, ROUND_MAX)
            if pb.HasField("newest_done")
            else -1
        ),
    )
