"""Which client is the fastest? What the rivals' tuning was chosen by: one round of ten vectors.

    .venv-flstore/bin/python -m benchmarks.flstore.fetches [--mb 47]

Every way brings the vectors into the same rows; in turns, on loopback, medians.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flstore import stores
from benchmarks.flstore.servers import BUCKET, KEY, SECRET, start_redis, start_s3
from tierwise.clock import precise_s

COUNT, ROUNDS = 10, 7
Rows = Sequence[memoryview]


def s3_ways(port: int, names: Sequence[str]) -> dict[str, Callable[[Rows], Any]]:
    """Return ways to read from S3."""
    import obstore
    from obstore.store import S3Store

    rust = S3Store(
        BUCKET,
        endpoint=f"http://127.0.0.1:{port}",
        access_key_id=KEY,
        secret_access_key=SECRET,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    client = stores.s3_client(port, KEY, SECRET)
    threads = ThreadPoolExecutor(stores.S3_CONNECTIONS)
    tuned = stores.S3Tuned(port, key=KEY, secret=SECRET, bucket=BUCKET)

    def rusty(pair: tuple[str, memoryview]) -> None:
        pair[1][:] = memoryview(obstore.get(rust, pair[0]).bytes())

    def read(pair: tuple[str, memoryview]) -> None:
        pair[1][:] = client.get_object(Bucket=BUCKET, Key=pair[0])["Body"].read()

    def in_parallel(one: Callable[[tuple[str, memoryview]], None]) -> Callable[[Rows], Any]:
        return lambda rows: list(threads.map(one, zip(names, rows, strict=True)))

    return {
        "S3, boto3, one after the other": lambda rows: [
            read(pair) for pair in zip(names, rows, strict=True)
        ],
        "S3, boto3 in parallel": in_parallel(read),
        "S3, obstore in parallel": in_parallel(rusty),
        "S3, boto3 readinto, parts in parallel (tuned)": lambda rows: tuned.fetch(names, rows),
    }


def redis_ways(port: int, names: Sequence[str]) -> dict[str, Callable[[Rows], Any]]:
    """Return ways to read from Redis."""
    import redis

    client = redis.Redis(port=port, socket_read_size=1 << 20)
    tuned = stores.RedisTuned(port)
    reader = stores.Reader(port)

    def copy(found: Sequence[Any], rows: Rows) -> None:
        for value, row in zip(found, rows, strict=True):
            row[:] = value

    def pipelined(rows: Rows) -> None:
        pipe = client.pipeline(transaction=False)
        for name in names:
            pipe.get(name)
        copy(pipe.execute(), rows)

    return {
        "Redis, redis-py with hiredis, MGET": lambda rows: copy(
            client.mget(list(names)),  # type: ignore[arg-type]
            rows,
        ),
        "Redis, redis-py with hiredis, pipelined": pipelined,
        "Redis, read into rows, one connection": lambda rows: reader.fetch(names, rows),
        "Redis, read into rows, two (tuned)": lambda rows: tuned.fetch(names, rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mb", type=int, default=47)
    size = 1_000_000 * parser.parse_args().mb // 4
    names = [f"round/{number}" for number in range(COUNT)]
    vectors = np.random.default_rng(0).standard_normal((COUNT, size), dtype=np.float32)
    target = np.zeros_like(vectors)
    rows = [memoryview(row).cast("B") for row in target]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with start_s3(folder / "s3") as weed, start_redis(folder / "redis") as redis:
            kept = (
                stores.S3Tuned(weed.port, key=KEY, secret=SECRET, bucket=BUCKET),
                stores.RedisTuned(redis.port),
            )
            kept[0].make_bucket()
            for store in kept:
                for key, vector in zip(names, vectors, strict=True):
                    store.put(key, memoryview(vector).cast("B"))
            ways = s3_ways(weed.port, names) | redis_ways(redis.port, names)
            figures: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(ROUNDS):
                for way, fetch in ways.items():
                    target[:] = 0.0
                    start_s = precise_s()
                    fetch(rows)
                    figures[way].append(precise_s() - start_s)
                    assert np.array_equal(target, vectors), way
    print(f"{COUNT} × {4 * size / 1e6:.0f} MB, median and range of {ROUNDS} in turns:")
    for way, found in figures.items():
        middle = float(np.median(found))
        rate = vectors.nbytes / middle / 1e6
        spread = f"[{min(found):.3f} … {max(found):.3f}]"
        print(f"  {way:<48} {middle:.3f} s {spread:>17} {rate:7,.0f} MB/s")


if __name__ == "__main__":
    main()
