"""A process that fills a cache and says what was acknowledged, until it is killed."""

import asyncio
import sys
from pathlib import Path

from tests.unit.cache_builders import aggregate, manifest, put, running, update, value_of, vector
from tierwise.domain.cache import ObjectKey

CLIENTS = 5


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def seed_of(at: ObjectKey) -> int:
    """Return what the vector of a key is made from."""
    return at.round * 1000 + (int(at.client[1:]) if at.client else 999)


async def main(folder: Path) -> None:
    async with running(folder, memory_mib=1) as store:
        start = max(store.rounds("default", "job"), default=0)
        for number in range(start, 10_000):
            base = aggregate(number - 1) if number else None
            await store.open_round(manifest(number, CLIENTS, base=base))
            say(f"opened {number}")

            async def _one(at: ObjectKey) -> None:
                if store.info(at) is None:
                    info = await put(store, at, vector(seed_of(at)), {"example_count": 7})
                    say(f"put {at.round} {at.client} {info.digest}")

            async with asyncio.TaskGroup() as group:
                for index in range(CLIENTS):
                    group.create_task(_one(update(number, f"c{index}")))
            if store.info(aggregate(number)) is None:
                await put(store, aggregate(number), vector(seed_of(aggregate(number))))
            say(f"ended {number}")
            assert (await value_of(store, aggregate(number))).any()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
