"""Where the rivals keep the rounds, and how they get at them: S3 naive and tuned, Redis tuned.

Every store puts vectors and small records and fetches vectors *into rows that are there already*,
which saves each rival a copy and the page faults of fresh memory. Tuned means the fastest of what
was tried on loopback; `python -m benchmarks.flstore.fetches` prints what the choices were between:

    S3     one object per client; boto3 with `readinto` into the row, connections kept open, 16 in
           parallel; a fetch of few objects is cut into byte ranges so that all of them work, none
           smaller than 8 MB (AWS suggests 8–16 MB, 85–90 MB/s each, 15 for 10 Gbit/s)
    Redis  one value per client; all GETs sent at once, replies read straight into the rows by a
           reader of 20 lines, on two connections (hiredis makes objects first, which costs a copy)
    Redis over S3: Redis with as much memory as tierwise's cache; the tuned S3 has the rest
    naive  one object per layer, one after the other, each on a connection of its own
"""

import http.client
import io
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Protocol
from urllib.parse import urlsplit

LAYERS = 62  # parameter tensors of a ResNet-18, the 47 MB model
S3_CONNECTIONS = 16
PART_BYTES_MIN = 8_000_000
REDIS_CONNECTIONS = 2
TIMEOUT_S = 300.0


class Store(Protocol):
    """One rival's storage. `request_count` counts what is billed per request."""

    request_count: int

    def put(self, name: str, value: memoryview) -> None:
        """Keep one object."""

    def fetch(self, names: Sequence[str], rows: Sequence[memoryview]) -> None:
        """Read objects into rows of their size."""

    def fetch_small(self, names: Sequence[str]) -> list[bytes]:
        """Read records whose size is not known."""

    def settle(self) -> None:
        """Do what can wait until a query has been answered."""


def update(round_number: int, client: str) -> str:
    """Return the key of an update, by the round's number in the trace."""
    return f"{round_number:04d}/update/{client}"


def aggregate(round_number: int) -> str:
    """Return the key of what a round ended with; −1: what the first one started from."""
    return f"{round_number + 1:04d}/aggregate"


def metadata(round_number: int) -> str:
    """Return the key of a round's record."""
    return f"{round_number + 1:04d}/metadata"


def s3_client(port: int, key: str, secret: str) -> Any:
    """Return a boto3 client that keeps connections open, once per request and no more."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name="us-east-1",
        config=Config(
            max_pool_connections=S3_CONNECTIONS,
            tcp_keepalive=True,
            read_timeout=TIMEOUT_S,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},
        ),
    )


class S3Tuned:
    """One object per client, in parallel, on connections that stay open."""

    def __init__(self, port: int, *, key: str, secret: str, bucket: str) -> None:
        self.request_count = 0
        self._client = s3_client(port, key, secret)
        self._bucket = bucket
        self._threads = ThreadPoolExecutor(S3_CONNECTIONS)

    def make_bucket(self) -> None:
        self._client.create_bucket(Bucket=self._bucket)

    def put(self, name: str, value: memoryview) -> None:
        self._client.put_object(Bucket=self._bucket, Key=name, Body=io.BytesIO(value))

    def fetch(self, names: Sequence[str], rows: Sequence[memoryview]) -> None:
        parts = cut(names, rows)
        self.request_count += len(parts)
        list(self._threads.map(self._fetch_part, parts))

    def fetch_small(self, names: Sequence[str]) -> list[bytes]:
        self.request_count += len(names)

        def get(name: str) -> bytes:
            found: bytes = self._client.get_object(Bucket=self._bucket, Key=name)["Body"].read()
            return found

        return list(self._threads.map(get, names))

    def settle(self) -> None:
        """Nothing waits."""

    def _fetch_part(self, part: tuple[str, int, memoryview, bool]) -> None:
        name, start, view, is_whole = part
        wanted = {} if is_whole else {"Range": f"bytes={start}-{start + len(view) - 1}"}
        body = self._client.get_object(Bucket=self._bucket, Key=name, **wanted)["Body"]
        place = 0
        while place < len(view):
            count = body.readinto(view[place:])
            if not count:
                raise EOFError(f"{name}: {place} of {len(view)} bytes")
            place += count
        body.close()


def cut(
    names: Sequence[str], rows: Sequence[memoryview]
) -> list[tuple[str, int, memoryview, bool]]:
    """Return (name, start, part of the row, is it all) so that every connection has work."""
    total = sum(len(row) for row in rows)
    size = max(PART_BYTES_MIN, -(-total // S3_CONNECTIONS))
    parts = []
    for name, row in zip(names, rows, strict=True):
        count = -(-len(row) // size)
        step = -(-len(row) // count)
        parts += [
            (name, start, row[start : start + step], count == 1)
            for start in range(0, len(row), step)
        ]
    return parts


class S3Naive:
    """One object per layer, one after the other, each on a connection of its own."""

    def __init__(self, port: int, *, key: str, secret: str, bucket: str) -> None:
        self.request_count = 0
        self._client = s3_client(port, key, secret)
        self._bucket = bucket

    def put(self, name: str, value: memoryview) -> None:
        for layer, part in enumerate(layers(value)):
            self._client.put_object(
                Bucket=self._bucket, Key=f"{name}/{layer:03d}", Body=io.BytesIO(part)
            )

    def fetch(self, names: Sequence[str], rows: Sequence[memoryview]) -> None:
        for name, row in zip(names, rows, strict=True):
            for layer, part in enumerate(layers(row)):
                part[:] = self._get(f"{name}/{layer:03d}")

    def fetch_small(self, names: Sequence[str]) -> list[bytes]:
        return [self._get(name) for name in names]

    def settle(self) -> None:
        """Nothing waits."""

    def _get(self, name: str) -> bytes:
        self.request_count += 1
        where = {"Bucket": self._bucket, "Key": name}
        url = urlsplit(self._client.generate_presigned_url("get_object", Params=where))
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", f"{url.path}?{url.query}", headers={"Connection": "close"})
            response = connection.getresponse()
            found = response.read()
            if response.status != 200:
                raise OSError(f"{name}: {response.status} {found[:200]!r}")
            return found
        finally:
            connection.close()


def layers(value: memoryview) -> list[memoryview]:
    """Return a vector cut into LAYERS layers of whole float32."""
    count = len(value) // 4
    edges = [4 * (count * layer // LAYERS) for layer in range(LAYERS + 1)]
    return [value[a:b] for a, b in pairwise(edges)]


class RedisTuned:
    """One value per client; replies are read into the rows."""

    def __init__(self, port: int) -> None:
        import redis

        self.request_count = 0  # Redis bills none
        self.client = redis.Redis(port=port, socket_timeout=TIMEOUT_S)
        self._readers = [Reader(port) for _ in range(REDIS_CONNECTIONS)]
        self._threads = ThreadPoolExecutor(REDIS_CONNECTIONS)

    def put(self, name: str, value: memoryview) -> None:
        self.client.set(name, value)  # type: ignore[arg-type] # it takes any buffer

    def fetch(self, names: Sequence[str], rows: Sequence[memoryview]) -> None:
        if missing := self.fetch_some(names, rows):
            raise KeyError(f"Redis has no {missing[0]}")

    def fetch_some(self, names: Sequence[str], rows: Sequence[memoryview]) -> list[str]:
        """Read what is there; return the names of what is not."""
        if len(names) == 1:
            return self._readers[0].fetch(names, rows)
        shares = [
            (reader, names[first :: len(self._readers)], rows[first :: len(self._readers)])
            for first, reader in enumerate(self._readers)
        ]
        found = self._threads.map(lambda share: share[0].fetch(share[1], share[2]), shares)
        return [name for missing in found for name in missing]

    def fetch_small(self, names: Sequence[str]) -> list[bytes]:
        return [bytes(value) for value in self.client.mget(list(names))]  # type: ignore

    def settle(self) -> None:
        """Nothing waits."""


class RedisOverS3:
    """Redis with a bound (it drops what was used least recently) in front of the tuned S3.

    What is written goes to both; who writes to S3 is the tuned store, whose objects are read here.
    What was missing is put into Redis after the answer.
    """

    def __init__(self, port: int, s3: dict[str, Any]) -> None:
        self._redis = RedisTuned(port)
        self._s3 = S3Tuned(**s3)
        self._missed: list[tuple[str, memoryview]] = []

    @property
    def request_count(self) -> int:
        """Return how often S3 was asked."""
        return self._s3.request_count

    def put(self, name: str, value: memoryview) -> None:
        self._redis.put(name, value)

    def fetch(self, names: Sequence[str], rows: Sequence[memoryview]) -> None:
        missing = set(self._redis.fetch_some(names, rows))
        self._missed = [pair for pair in zip(names, rows, strict=True) if pair[0] in missing]
        if self._missed:
            self._s3.fetch([name for name, _ in self._missed], [row for _, row in self._missed])

    def fetch_small(self, names: Sequence[str]) -> list[bytes]:
        found = dict(zip(names, self._redis.client.mget(list(names)), strict=True))  # type: ignore
        missing = [name for name, value in found.items() if value is None]
        found |= dict(zip(missing, self._s3.fetch_small(missing), strict=True))
        return [bytes(found[name]) for name in names]

    def settle(self) -> None:
        """Put what was missing into Redis."""
        for name, row in self._missed:
            self._redis.put(name, row)
        self._missed = []


class Reader:
    """Reads replies of Redis (RESP2 bulk strings) into memory that is there."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb", buffering=65_536)

    def fetch(self, names: Sequence[str], rows: Sequence[memoryview]) -> list[str]:
        """Send all GETs at once, read the replies in order; return the names of what is missing."""
        self._socket.sendall(b"".join(_command(name.encode()) for name in names))
        missing = []
        for name, row in zip(names, rows, strict=True):
            head = self._file.readline()
            if head == b"$-1\r\n":
                missing.append(name)
                continue
            if head != b"$%d\r\n" % len(row):
                raise OSError(f"{name}: Redis answers {head!r}")
            place = 0
            while place < len(row):
                place += self._file.readinto(row[place:])
            self._file.read(2)
        return missing


def _command(key: bytes) -> bytes:
    return b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key)
