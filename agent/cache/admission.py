"""What may be opened and put, by whom, and how large it may be. Raises, and does nothing else."""

import re

from agent.cache.index import Index, Round
from tierwise.domain.cache import IncomingHead, ObjectKey, ObjectKind, RoundManifest
from tierwise.errors import FailedPrecondition, InvalidArgument, Overloaded, PermissionDenied
from tierwise.wire import checks
from tierwise.wire.convert_cache import METADATA_BYTES_MAX, REPLICAS_MAX

CLIENTS_MAX = 1000  # per round and node: statistics take K² numbers, and K² · P / 2 products
PARAMETERS_MAX = 2**31
ROUND_MAX = 10**6 - 1
OBJECTS_MAX = 200_000
MISFIT_FACTOR = 4  # how many times its size a wrong update may be, to be told so

_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,127}")


def check_manifest(manifest: RoundManifest, index: Index) -> None:
    """Let a round be opened, or not.

    Raises:
        InvalidArgument: A name or number is out of bounds.
        PermissionDenied: The job belongs to another owner.
        FailedPrecondition: A later round has ended.
    """
    checks.name(manifest.namespace, "namespace")
    checks.name(manifest.job, "job")
    checks.integer(manifest.round, "round", 0, ROUND_MAX)
    clients = [each.client for each in manifest.clients]
    if len(clients) > CLIENTS_MAX:
        raise InvalidArgument(
            f"{len(clients)} clients in one round: {CLIENTS_MAX} at most per node; aggregate "
            "over several nodes"
        )
    if len(set(clients)) != len(clients):
        raise InvalidArgument("clients: each may be named once")
    for client in clients:
        _check_client(client)
    checks.integer(manifest.parameter_count, "parameter_count", 1, PARAMETERS_MAX)
    if not 0.0 <= manifest.distance_max < float("inf"):
        raise InvalidArgument(f"distance_max = {manifest.distance_max}: 0 or more, and finite")
    checks.at_most(manifest.replica_nodes, "replica_nodes", REPLICAS_MAX)
    if manifest.base is not None:
        _check_base(manifest, manifest.base)
    job = index.jobs.get((manifest.namespace, manifest.job))
    if job is None:
        return
    if job.owner != manifest.owner:
        raise PermissionDenied(f"job {manifest.namespace}/{manifest.job} belongs to another owner")
    if manifest.round not in job.rounds and manifest.round < job.newest_ended:
        raise FailedPrecondition(
            f"round {manifest.round} is out of order: round {job.newest_ended} has ended"
        )


def check_put(head: IncomingHead, blob: bytes, round_: Round | None, writer_uri: str) -> str:
    """Let an object begin to come, or not.

    Args:
        head: What is said of it.
        blob: Its metadata, encoded.
        round_: Its round.
        writer_uri: Who puts it; empty: the cluster itself.

    Returns:
        Why it can never count, if it is an update that does not fit its manifest; else "".

    Raises:
        InvalidArgument: A field is wrong, the client is not in the manifest.
        PermissionDenied: Not this client's writer, or not the owner.
        FailedPrecondition: The round is not open, or has ended.
    """
    key = head.key
    if key.kind not in (ObjectKind.UPDATE, ObjectKind.AGGREGATE, ObjectKind.METADATA):
        raise InvalidArgument(f"{key}: a {key.kind} cannot be put; put updates")
    if key.client:
        _check_client(key.client)
    if len(blob) > METADATA_BYTES_MAX:
        raise InvalidArgument(f"{key}: {len(blob)} bytes of metadata; {METADATA_BYTES_MAX} at most")
    if round_ is None:
        raise FailedPrecondition(
            f"round {key.round} of {key.namespace}/{key.job} is not open here: open it first"
        )
    _check_writer(key, round_, writer_uri)
    if key.kind is ObjectKind.METADATA:
        if not 1 <= head.size_bytes <= METADATA_BYTES_MAX:
            raise InvalidArgument(
                f"{key}: {head.size_bytes} bytes; metadata is from 1 to {METADATA_BYTES_MAX}"
            )
        return ""
    wanted = round_.row_bytes
    if key.kind is ObjectKind.AGGREGATE:
        if head.size_bytes != wanted:
            raise InvalidArgument(f"{key}: {head.size_bytes} bytes; the round's are {wanted}")
        return ""
    is_late = round_.has_ended and not head.is_replica  # a copy was in time where it was taken
    if (key.kind, key.client) not in round_.entries and is_late:
        raise FailedPrecondition(f"{key}: round {key.round} has ended")
    if not 0 < head.size_bytes <= MISFIT_FACTOR * wanted:
        raise InvalidArgument(f"{key}: {head.size_bytes} bytes; the round's are {wanted}")
    if head.size_bytes != wanted:
        return f"{head.size_bytes} bytes instead of {wanted}"
    return ""


def check_count(index: Index) -> None:
    """Bound the index itself.

    Raises:
        Overloaded: It is full.
    """
    if index.object_count >= OBJECTS_MAX:
        raise Overloaded(
            f"the cache lists {OBJECTS_MAX} objects, as many as it may: forget jobs",
            retry_after_s=60.0,
        )


def _check_client(client: str) -> None:
    if not _CLIENT.fullmatch(client) or client.endswith(".") or ".." in client:
        raise InvalidArgument(
            f"client = {client[:80]!r}: use letters, digits and . _ : @ = + - inside, at most 128"
        )


def _check_base(manifest: RoundManifest, base: ObjectKey) -> None:
    is_of_job = (base.namespace, base.job) == (manifest.namespace, manifest.job)
    if not is_of_job or base.kind is not ObjectKind.AGGREGATE or base.round >= manifest.round:
        raise InvalidArgument(f"base = {base}: use an aggregate of an earlier round of this job")


def _check_writer(key: ObjectKey, round_: Round, writer_uri: str) -> None:
    owner = round_.manifest.owner
    row = round_.row_of.get(key.client)
    if key.kind is ObjectKind.UPDATE and row is None:
        raise InvalidArgument(f"{key}: round {key.round} expects no client {key.client!r}")
    if not writer_uri:
        return
    allowed = {owner}
    if key.kind is not ObjectKind.AGGREGATE and row is not None:
        writer = round_.manifest.clients[row].writer or owner
        allowed = {writer} if key.kind is ObjectKind.UPDATE else {writer, owner}
    if writer_uri not in allowed:
        raise PermissionDenied(f"{key}: {writer_uri} is not who may put it")
