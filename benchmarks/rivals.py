"""The rivals of `bench_runtime`, each in a process of its own and with its own interpreter.

    .venv-rivals/bin/python benchmarks/rivals.py ray|parsl|dask

Stands alone: nothing of tierwise is imported. Orders come on standard input, one a line; each is
answered by one line of JSON: `call N` by seconds per call, `map N` by items per second, `array N`
by seconds per call with an array of 100 MB that the system has been given before, `plain N` with
one that it has not. An order that a rival has no answer to gives [].
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

ARRAY_ITEMS = 12_500_000  # float64: 100 MB


def timed(call: Callable[[], Any], count: int) -> list[float]:
    found = []
    for _ in range(count):
        start_s = time.perf_counter()
        call()
        found.append(time.perf_counter() - start_s)
    return found


def rate(values: Callable[[], Iterator[int]], count: int) -> list[float]:
    start_s = time.perf_counter()
    assert sum(values()) == count * (count - 1) // 2
    return [count / (time.perf_counter() - start_s)]


def same(value: Any) -> Any:
    return value


def size(array: Any) -> int:
    return int(array.nbytes)


Orders = dict[str, Callable[[int], list[float]]]


def ray_orders(stack: ExitStack) -> Orders:
    import numpy as np
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    stack.callback(ray.shutdown)

    @ray.remote
    class Echo:
        def same(self, value: int) -> int:
            return value

        def size(self, array: Any) -> int:
            return int(array.nbytes)

    task = ray.remote(same)
    actor = Echo.remote()
    array = np.random.default_rng(0).random(ARRAY_ITEMS)
    held = ray.put(array)
    return {
        "call": lambda n: timed(lambda: ray.get(actor.same.remote(1)), n),
        "map": lambda n: rate(lambda: iter(ray.get([task.remote(i) for i in range(n)])), n),
        "array": lambda n: timed(lambda: ray.get(actor.size.remote(held)), n),
        "plain": lambda n: timed(lambda: ray.get(actor.size.remote(array)), n),
    }


def parsl_orders(stack: ExitStack) -> Orders:
    import parsl
    from parsl.config import Config
    from parsl.executors import HighThroughputExecutor
    from parsl.providers import LocalProvider

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    os.chdir(folder)
    executor = HighThroughputExecutor(
        label="htex",
        address="127.0.0.1",
        max_workers_per_node=1,
        provider=LocalProvider(init_blocks=1, max_blocks=1),
        encrypted=False,
    )
    stack.enter_context(parsl.load(Config(executors=[executor], run_dir=folder, usage_tracking=0)))
    app = parsl.python_app(same)
    return {
        "call": lambda n: timed(lambda: app(1).result(), n),
        "map": lambda n: rate(lambda: (f.result() for f in [app(i) for i in range(n)]), n),
    }


def dask_orders(stack: ExitStack) -> Orders:
    import numpy as np
    from distributed import Client, LocalCluster

    cluster = stack.enter_context(
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None)
    )
    client = stack.enter_context(Client(cluster))
    array = np.random.default_rng(0).random(ARRAY_ITEMS)
    held = client.scatter(array)
    return {
        "call": lambda n: timed(lambda: client.submit(same, 1, pure=False).result(), n),
        "map": lambda n: rate(
            lambda: iter(client.gather(client.map(same, range(n), pure=False))), n
        ),
        "array": lambda n: timed(lambda: client.submit(size, held, pure=False).result(), n),
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the rivals print must not look like answers
    with ExitStack() as stack:
        kinds = {"ray": ray_orders, "parsl": parsl_orders, "dask": dask_orders}
        orders = kinds[sys.argv[1]](stack)
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            name, count = line.split()
            found = orders[name](int(count)) if name in orders else []
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
