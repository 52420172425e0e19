"""Does an agent's memory come back after large payloads?

    python -m benchmarks.bench_memory

A caller enters at an edge node and sends 20, 40 and 58 MiB to a function there and to one in the
cloud, which sends them back. Answers of up to 4 MiB are held two minutes against duplicates, at
most 32 MiB of them, so none of that size is sent.
"""

import tempfile
from pathlib import Path

import psutil

import tierwise
from benchmarks.report import make_table, show
from tierwise.clock import pause

SIZES_MIB = (20, 40, 58)
ROUNDS = 3
REST_S = 4.0  # memory is given back a second after the last large payload
NODES = ("edge-1", "cloud-1")

app = tierwise.App("bench")


@app.function(memory="512MiB", deadline="30s")
def echo(value: bytes) -> bytes:
    return value


def main() -> None:
    """Print the table."""
    table = make_table("resident memory of an agent, MB", ["after", *NODES])
    with tempfile.TemporaryDirectory() as folder:
        cluster = tierwise.LocalCluster(Path(folder), "1c,1e", policy="ect", emulate=False)

        def row(what: str) -> None:
            resident = [psutil.Process(cluster.pid(name)).memory_info().rss for name in NODES]
            table.add_row(what, *(f"{rss / 1e6:.0f}" for rss in resident))

        with cluster, tierwise.Client(cluster.context) as client:
            app.use(client)
            for name in NODES:
                assert echo.options(node=name).remote(b"warm") == b"warm"
            row("one small call")
            for number in range(ROUNDS):
                for name in NODES:
                    for size_mib in SIZES_MIB:
                        assert len(echo.options(node=name).remote(bytes(size_mib << 20))) > 0
                row(f"large calls, round {number + 1}")
                pause(REST_S)
                row(f"{REST_S:g} s of rest")
    show(table)


if __name__ == "__main__":
    main()
