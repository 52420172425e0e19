"""The rounds of a federated job, as the caches of the nodes hold them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierwise.domain.cache import (
    Durability,
    ObjectInfo,
    ObjectKey,
    ObjectKind,
    RoundClient,
    RoundManifest,
)
from tierwise.domain.ids import is_name
from tierwise.errors import InvalidArgument, NotFound
from tierwise.sdk.asking import Asking
from tierwise.sdk.cached import CachedArray, CachedResult, plain
from tierwise.sdk.client import Client, default_client
from tierwise.sdk.verb import Verb
from tierwise.v1 import cache_pb2
from tierwise.wire import compression
from tierwise.wire.convert_cache import (
    CHUNK_BYTES,
    info_from_pb,
    key_to_pb,
    manifest_to_pb,
    metadata_from_bytes,
    metadata_to_bytes,
)

Vector = NDArray[np.float32]


class Rounds:
    """One job: `rounds = tierwise.Rounds(client, "digits")`.

    Every method is a verb: `rounds.get(3)` blocks, `await rounds.get.aio(3)` does not. A vector is
    flat float32; its length is the round's. Rounds are opened before anything is put into them.
    """

    def __init__(
        self, client: Client | None, job: str, namespace: str = "default", *, node: str = ""
    ) -> None:
        """Name a job; nothing is asked yet.

        Args:
            client: The cluster; None: that of `tierwise.connect`, or the usual context.
            job: Its name.
            namespace: Where it lives and whose quota it uses.
            node: Open rounds at this node, and ask it; default: the node that takes the calls.

        Raises:
            InvalidArgument: A name is none.
        """
        for label, text in (("job", job), ("namespace", namespace)):
            if not is_name(text):
                raise InvalidArgument(f"{label} {text!r}: use a-z, 0-9, '-', '.', '_'")
        self.job = job
        self.namespace = namespace
        self.node = node
        self._client = client
        self._shapes: dict[int, tuple[int, int]] = {}  # rows, parameters
        self._asking = Asking(self)
        self.open = Verb(self.client, self._open)
        self.put_update = Verb(self.client, self._put_update)
        self.put_aggregate = Verb(self.client, self._put_aggregate)
        self.put_metadata = Verb(self.client, self._put_metadata)
        self.get = Verb(self.client, self._get)
        self.info = Verb(self.client, self._info)
        self.newest = Verb(self.client, self._newest)
        self.ask = Verb(self.client, self._asking.ask)
        self.list = Verb(self.client, self._list)
        self.forget = Verb(self.client, self._forget)
        self.ref = Verb(self.client, self._ref)

    def client(self) -> Client:
        """Return the client that this job uses."""
        return self._client or default_client()

    def key(self, round: int, kind: str, client: str = "") -> ObjectKey:
        """Return the key of an object.

        Raises:
            InvalidArgument: The kind is none.
        """
        try:
            found = ObjectKind(kind)
        except ValueError:
            known = ", ".join(each.value for each in ObjectKind)
            raise InvalidArgument(f"kind {kind!r}: use one of {known}") from None
        return ObjectKey(
            namespace=self.namespace, job=self.job, round=round, kind=found, client=client
        )

    def result(
        self,
        round: int,
        kind: str = "update",
        client: str = "",
        *,
        node: str = "",
        encoding: str = "",
        durability: str | Durability | None = None,
        relative_to: ObjectKey | None = None,
    ) -> CachedResult:
        """Return where the result of a call should go: `function.options(output=…)`.

        Args:
            round: Which round.
            kind: update, aggregate or metadata.
            client: Whose update it is.
            node: The node whose cache takes it; default: the one that holds the round.
            encoding: fp16, int8, or auto: what is fastest over the link; default: as it is.
            durability: As in `put_update`.
            relative_to: Send the difference from this object, which both sides can get.
        """
        return CachedResult(
            key=self.key(round, kind, client),
            node=node,
            encoding=encoding,
            durability=parse_durability(durability),
            relative_to=relative_to,
        )

    # -- verbs ----------------------------------------------------------------------------------

    async def _open(
        self,
        round: int,
        clients: Sequence[str] | Mapping[str, str],
        parameter_count: int,
        *,
        base: int | None = None,
        distance_max: float = 0.0,
        replica_nodes: Sequence[str] = (),
    ) -> None:
        """Say what a round will bring, and from whom. The same again is no error.

        Args:
            round: Its number.
            clients: Their names; or by name the identity (URI) that may put its update.
            parameter_count: Elements of each vector.
            base: The round whose aggregate the updates start from.
            distance_max: Updates farther from the base are quarantined; 0: none is.
            replica_nodes: Nodes that get a copy of everything.

        Raises:
            AlreadyExists: The round is open with other clients or sizes.
            PermissionDenied: The job is somebody else's.
        """
        writers = clients if isinstance(clients, Mapping) else dict.fromkeys(clients, "")
        manifest = RoundManifest(
            namespace=self.namespace,
            job=self.job,
            round=round,
            clients=tuple(RoundClient(client=name, writer=writers[name]) for name in writers),
            parameter_count=parameter_count,
            distance_max=distance_max,
            base=None if base is None else self.key(base, "aggregate"),
            replica_nodes=tuple(replica_nodes),
        )
        request = cache_pb2.OpenRoundRequest(manifest=manifest_to_pb(manifest))
        await self._ask("OpenRound", request)
        self._shapes[round] = len(writers), parameter_count

    async def _put_update(
        self,
        round: int,
        client: str,
        vector: Any,
        metadata: Mapping[str, Any] | None = None,
        *,
        durability: str | Durability | None = None,
        encoding: str = "",
    ) -> ObjectInfo:
        """Put what a client has learnt. The same again is no error.

        Args:
            round: Which round, open.
            client: Who.
            vector: Its parameters, float32 of the round's length.
            metadata: Small facts: example_count, loss, metrics.
            durability: Return when it is as safe as memory, disk (the default), replicated or
                stored.
            encoding: fp16 or int8 for the way.

        Returns:
            What became of it; `quarantined` says why it does not count.

        Raises:
            AlreadyExists: The client has sent another one.
            PermissionDenied: You may not put this client's.
            FailedPrecondition: The round is not open.
            Overloaded: The cache or the quota is full.
        """
        key = self.key(round, "update", client)
        return await self._put(key, _flat(vector), metadata, durability, encoding)

    async def _put_aggregate(
        self,
        round: int,
        vector: Any,
        metadata: Mapping[str, Any] | None = None,
        *,
        part: str = "",
        durability: str | Durability | None = None,
    ) -> ObjectInfo:
        """Put what a round ended with; `part` names one of a hierarchy."""
        key = self.key(round, "aggregate", part)
        return await self._put(key, _flat(vector), metadata, durability, "")

    async def _put_metadata(
        self,
        round: int,
        client: str,
        mapping: Mapping[str, Any],
    ) -> ObjectInfo:
        """Put small facts of a client, or of the round (client "")."""
        key = self.key(round, "metadata", client)
        blob = metadata_to_bytes(mapping)
        return await self._put(key, np.frombuffer(blob, np.uint8), None, None, "")

    async def _put(
        self,
        key: ObjectKey,
        array: NDArray[Any],
        metadata: Mapping[str, Any] | None,
        durability: str | Durability | None,
        encoding: str,
    ) -> ObjectInfo:
        compression.check(encoding)
        head = cache_pb2.ObjectHead(
            key=key_to_pb(key),
            size_bytes=array.nbytes,
            metadata=metadata_to_bytes(metadata),
            encoding=encoding,
        )
        if (wanted := parse_durability(durability)) is not None:
            head.durability = cache_pb2.Durability.ValueType(wanted)

        def chunks() -> Iterator[Any]:
            if encoding:
                yield from compression.encoded(array, encoding)
                return
            view = array.view(np.uint8).data
            for start in range(0, len(view), CHUNK_BYTES):
                yield view[start : start + CHUNK_BYTES]

        caches = self.client().connection().caches
        return info_from_pb(await caches.put(self.node, head, chunks))

    async def _get(
        self,
        round: int,
        kind: str = "aggregate",
        client: str = "",
    ) -> Any:
        """Return an object: a read-only array, (K, P) for a matrix; a dict for metadata.

        Raises:
            NotFound: There is none, or it is quarantined.
        """
        key = self.key(round, kind, client)
        request = cache_pb2.GetRequest(key=key_to_pb(key))
        head, body = await self.client().connection().caches.get(self.node, request)
        if key.kind is ObjectKind.METADATA:
            return metadata_from_bytes(body.tobytes())
        found = body.view(np.float32)
        if key.kind is ObjectKind.MATRIX:
            found = found.reshape(head.row_count, -1)
        found.flags.writeable = False
        return found

    async def _info(
        self,
        round: int,
        kind: str = "aggregate",
        client: str = "",
    ) -> ObjectInfo:
        """Return what is known of an object, without its bytes.

        Raises:
            NotFound: There is none, or it is quarantined.
        """
        key = self.key(round, kind, client)
        head = await self._head(key)
        return ObjectInfo(
            key=key,
            size_bytes=head.size_bytes,
            digest=head.digest,
            durability=Durability(head.durability),
            metadata=metadata_from_bytes(head.metadata),
        )

    async def _head(self, key: ObjectKey) -> cache_pb2.ObjectHead:
        request = cache_pb2.GetRequest(key=key_to_pb(key), is_head_only=True)
        head, _ = await self.client().connection().caches.get(self.node, request)
        return head

    async def _newest(self) -> int:
        """Return the newest round that has ended: whose aggregate is held.

        Raises:
            NotFound: None has.
        """
        response = await self._objects()
        found = [
            info.key.round
            for info in response.objects
            if info.key.kind == cache_pb2.OBJECT_KIND_AGGREGATE and not info.key.client
        ]
        if not found:
            raise NotFound(f"no round of {self.namespace}/{self.job} has an aggregate yet")
        return max(found)

    async def _list(self) -> list[dict[str, Any]]:
        """Return every object of the job, wherever it is, as plain dicts in the order of keys."""
        response = await self._objects()
        return [plain(info) for info in response.objects]

    async def _objects(self) -> cache_pb2.ListObjectsResponse:
        request = cache_pb2.ListObjectsRequest(
            namespace=self.namespace, job=self.job, is_everywhere=True
        )
        response: cache_pb2.ListObjectsResponse = await self._ask("ListObjects", request)
        return response

    async def _forget(self, *, with_store: bool = False) -> int:
        """Forget the job on every node, and in the store if asked; return how many objects."""
        request = cache_pb2.ForgetJobRequest(
            namespace=self.namespace, job=self.job, with_store=with_store
        )
        response: cache_pb2.ForgetJobResponse = await self._ask("ForgetJob", request)
        self._shapes.clear()
        return response.object_count

    async def _ref(
        self,
        round: int,
        kind: str = "aggregate",
        client: str = "",
    ) -> CachedArray:
        """Return what stands for an array in the arguments of a call.

        Raises:
            NotFound: There is no such object, and nobody knows its size.
            InvalidArgument: It is metadata, which travels as what it is.
        """
        key = self.key(round, kind, client)
        if key.kind is ObjectKind.METADATA:
            raise InvalidArgument("metadata is small: get it and pass it on as it is")
        if round not in self._shapes:
            head = await self._head(key)
            count = head.size_bytes // 4
            is_matrix = key.kind is ObjectKind.MATRIX
            shape = (head.row_count, count // max(1, head.row_count)) if is_matrix else (count,)
            return CachedArray(key=key, shape=shape)
        rows, parameters = self._shapes[round]
        is_matrix = key.kind is ObjectKind.MATRIX
        return CachedArray(key=key, shape=(rows, parameters) if is_matrix else (parameters,))

    async def _ask(self, method: str, request: Any) -> Any:
        return await self.client().connection().caches.ask(self.node, method, request)


def parse_durability(value: str | Durability | None) -> Durability | None:
    """Return the durability of a name.

    Raises:
        InvalidArgument: It is none.
    """
    if value is None or isinstance(value, Durability):
        return value
    try:
        return Durability[value.upper()]
    except KeyError:
        raise InvalidArgument(
            f"durability {value!r}: use memory, disk, replicated or stored"
        ) from None


def _flat(vector: Any) -> Vector:
    found: Vector = np.ascontiguousarray(vector, dtype=np.float32).reshape(-1)
    return found
