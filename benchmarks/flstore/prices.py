"""What a thousand queries cost on each system, under several ways to bill. Pure.

    usd per query = busy seconds × GB × price per GB-s                      (compute)
                  + requests to the object store + the call itself          (requests)
                  + memory that is held between queries × seconds           (held, replicas)
                  + bytes in the object store × seconds                     (stored)

Busy seconds are what the query took, in whole milliseconds; GB is BASE_GB for the process plus the
bytes of the objects that it reads, the same formula for everybody. Prices per GB-second, per call
and per idle GB-second are tierwise's (docs/prices.toml); the others are AWS' list prices,
us-east-1: S3 Standard 0.023 USD per GB-month and 0.0004 per 1,000 GET (writing is billed to
nobody); ElastiCache cache.r6g.xlarge 0.411 USD per hour for 26.32 GiB, taken by the byte (whole
nodes cost more); SageMaker ml.m5.4xlarge, 64 GiB, 0.922 USD per hour. Bytes within a region and
zone are free there, for every system alike, and are listed, not billed.

What memory that waits costs decides much, so each way to bill is a table of its own:

    listed   each where it runs: rivals' aggregators as cloud functions, billed only while busy (the
             cheapest way to run them), tierwise on its fog node; functions' idle memory is free, as
             it is to caches made of functions (InfiniCache, FAST'20); Redis' node is not
    server   as listed, but the rivals' aggregator is a server that is always there: an FL server
    equal    as listed, with tierwise at the cloud's price per GB-second and per call
    held     as equal, and everything that is held is billed: tierwise's whole cache and its replica
             at the price of provisioned concurrency, Redis with a replica node, and what lies in
             the object store, which is the same bytes for all but the Redis that has none behind it
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tierwise.domain.prices import DEFAULT_PRICES, billed_s
from tierwise.domain.topology import Tier

GIB = 1.073741824  # GB
HOUR_S = 3600.0
MONTH_S = 30 * 24 * HOUR_S
S3_USD_PER_GET = 0.0004 / 1000
S3_USD_PER_GB_S = 0.023 / MONTH_S
REDIS_USD_PER_GB_S = 0.411 / (26.32 * GIB) / HOUR_S
SERVER_USD_PER_S = 0.922 / HOUR_S
BASE_GB = 0.25
BILLS = ("listed", "server", "equal", "held")
QUERIES_PER_HOUR = 60.0  # an assumption; what is held is shared by so many


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What one query took: busy seconds, GB in use while busy, requests to the object store."""

    busy_s: float
    read_gb: float
    get_count: int = 0

    @property
    def gb_s(self) -> float:
        """Return billed GB-seconds."""
        return billed_s(self.busy_s) * (BASE_GB + self.read_gb)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a system keeps between queries.

    Attributes:
        kind: "tierwise", "redis" or "s3".
        held_gb: In memory; the budget, not what happens to be in it.
        replica_gb: Of that, again in another memory.
        stored_gb: In the object store.
    """

    kind: str
    held_gb: float = 0.0
    replica_gb: float = 0.0
    stored_gb: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """USD per 1,000 queries, by what it is for."""

    compute: float
    requests: float
    held: float
    stored: float

    @property
    def total(self) -> float:
        """Return the sum."""
        return self.compute + self.requests + self.held + self.stored


def cost(
    uses: Sequence[Use], holding: Holding, bill: str, queries_per_hour: float = QUERIES_PER_HOUR
) -> Cost:
    """Return USD per 1,000 queries like these."""
    is_ours = holding.kind == "tierwise"
    price = DEFAULT_PRICES.by_tier[
        Tier.FOG if is_ours and bill in ("listed", "server") else Tier.CLOUD
    ]
    between_s = HOUR_S / queries_per_hour
    count = len(uses)
    gb_s = sum(use.gb_s for use in uses) / count
    gets = sum(use.get_count for use in uses) / count
    held_per_s = 0.0
    if holding.kind == "redis":
        replicas = holding.replica_gb if bill == "held" else 0.0
        held_per_s = (holding.held_gb + replicas) * REDIS_USD_PER_GB_S
    elif is_ours and bill == "held":
        held_per_s = (holding.held_gb + holding.replica_gb) * price.usd_per_idle_gb_s
    stored_gb = holding.stored_gb if bill == "held" else 0.0
    compute = gb_s * price.usd_per_gb_s
    if bill == "server" and not is_ours:
        compute = SERVER_USD_PER_S * between_s
    return Cost(
        compute=1e3 * compute,
        requests=1e3 * (price.usd_per_request + gets * S3_USD_PER_GET),
        held=1e3 * held_per_s * between_s,
        stored=1e3 * stored_gb * S3_USD_PER_GB_S * between_s,
    )


def break_even(
    ours: tuple[Sequence[Use], Holding], other: tuple[Sequence[Use], Holding], bill: str
) -> float:
    """Return queries per hour from which on we cost less; 0: always, infinite: never."""
    costs = [
        (cost(uses, holding, bill, 1.0), cost(uses, holding, bill, 1e12))
        for uses, holding in (ours, other)
    ]
    (slow, busy), (other_slow, other_busy) = costs
    # Both are busy + hourly ÷ rate.
    gain = other_busy.total - busy.total
    hourly = (slow.total - busy.total) - (other_slow.total - other_busy.total)
    if hourly <= 0.0 and gain >= 0.0:
        return 0.0
    return hourly / gain if gain > 0.0 and hourly > 0.0 else float("inf")
