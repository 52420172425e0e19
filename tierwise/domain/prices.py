"""What calls cost, and how their use is measured out: GB-seconds, GPU-seconds, requests, bytes."""

import math
from dataclasses import dataclass, field

from tierwise.domain.topology import Tier

# AWS Lambda's public price list (x86, us-east-1): per GB-second, per million requests, and per
# GB-second that provisioned concurrency keeps warm.
LAMBDA_USD_PER_GB_S = 1.66667e-5
LAMBDA_USD_PER_REQUEST = 0.20e-6
LAMBDA_USD_PER_IDLE_GB_S = 4.1667e-6

LOCAL = "local"  # the call ran where it arrived: nothing crossed a link between nodes
FROM_SCHEDULER = "scheduler"  # durable work, which the scheduler hands out
LINK_CLASSES = (
    LOCAL,
    FROM_SCHEDULER,
    *(f"{a.label}-{b.label}" for a in Tier for b in Tier if a <= b),
)


def link_class(one: Tier, other: Tier) -> str:
    """Return what a link between nodes of two tiers is called, the nearer one first: edge-cloud."""
    return f"{min(one, other).label}-{max(one, other).label}"


def billed_s(duration_s: float) -> float:
    """Return a duration rounded up to whole milliseconds, as AWS Lambda bills it."""
    return math.ceil(max(0.0, duration_s) * 1000.0 - 1e-9) / 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPrice:
    """What one tier charges, in USD.

    Bytes that go from a node of tier a to one of tier b cost `a.usd_per_gb_out + b.usd_per_gb_in`.
    `usd_per_idle_gb_s` is what memory costs that warm instances hold while nobody uses them; it is
    shown, and billed to nobody.
    """

    usd_per_gb_s: float = 0.0
    usd_per_request: float = 0.0
    usd_per_gb_in: float = 0.0
    usd_per_gb_out: float = 0.0
    usd_per_gpu_s: float = 0.0
    usd_per_idle_gb_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CallPrice:
    """The price of a call as a function of its run time: fixed + per second."""

    usd_fixed: float
    usd_per_s: float

    def usd(self, duration_s: float) -> float:
        """Return the price of a run; time is rounded up to whole milliseconds, as Lambda does."""
        return self.usd_fixed + self.usd_per_s * math.ceil(duration_s * 1000.0 - 1e-9) / 1000.0


def _default_tiers() -> dict[Tier, TierPrice]:
    return {
        Tier.EDGE: TierPrice(
            usd_per_gb_s=0.2 * LAMBDA_USD_PER_GB_S,
            usd_per_idle_gb_s=0.2 * LAMBDA_USD_PER_IDLE_GB_S,
        ),
        Tier.FOG: TierPrice(
            usd_per_gb_s=0.5 * LAMBDA_USD_PER_GB_S,
            usd_per_idle_gb_s=0.5 * LAMBDA_USD_PER_IDLE_GB_S,
            usd_per_gb_in=0.001,
            usd_per_gb_out=0.001,
        ),
        Tier.CLOUD: TierPrice(
            usd_per_gb_s=LAMBDA_USD_PER_GB_S,
            usd_per_request=LAMBDA_USD_PER_REQUEST,
            usd_per_idle_gb_s=LAMBDA_USD_PER_IDLE_GB_S,
            usd_per_gb_in=0.01,
            usd_per_gb_out=0.01,
            usd_per_gpu_s=5.0e-4,
        ),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTable:
    """Prices of the three tiers.

    The cloud's GB-seconds, requests and idle GB-seconds are AWS Lambda's list prices; its bytes
    and GPU-seconds are assumptions. Edge and fog are an *assumption* too (owned machines, written
    off over their life): 20 % and 50 % of the cloud's price per GB-second and no price per
    request. Operators put their own in the scheduler's price file.
    """

    by_tier: dict[Tier, TierPrice] = field(default_factory=_default_tiers)
    is_startup_billed: bool = False  # does the start that a cold call waited for count as its run?

    def billed_s(self, run_s: float, cold_start_s: float) -> float:
        """Return the seconds that a call is billed for, in whole milliseconds."""
        return billed_s(run_s + cold_start_s if self.is_startup_billed else run_s)

    def of_call(
        self,
        tier: Tier,
        *,
        memory_mib: int,
        moved_usd: float = 0.0,
        gpu_slots: int = 0,
        item_count: int = 1,
    ) -> CallPrice:
        """Return the price of one call on a tier; `moved_usd` is that of its bytes."""
        price = self.by_tier[tier]
        return CallPrice(
            price.usd_per_request * item_count + moved_usd,
            memory_mib / 1024.0 * price.usd_per_gb_s + gpu_slots * price.usd_per_gpu_s,
        )

    def call_usd(
        self,
        tier: Tier,
        *,
        memory_mib: int,
        billed_s: float,
        moved_usd: float = 0.0,
        gpu_slots: int = 0,
        item_count: int = 1,
    ) -> float:
        """Return the price of one call that ran for `billed_s`; see `of_call`."""
        price = self.of_call(
            tier,
            memory_mib=memory_mib,
            moved_usd=moved_usd,
            gpu_slots=gpu_slots,
            item_count=item_count,
        )
        return price.usd(billed_s)

    def moved_usd(self, source: Tier, target: Tier, moved_bytes: float) -> float:
        """Return the price of bytes that go from one node to another."""
        gate = self.by_tier[source].usd_per_gb_out + self.by_tier[target].usd_per_gb_in
        return moved_bytes / 1e9 * gate

    def round_trip_usd(
        self, origin: Tier, target: Tier, request_bytes: float, response_bytes: float
    ) -> float:
        """Return the price of a request that goes to another node, and of the response."""
        return self.moved_usd(origin, target, request_bytes) + self.moved_usd(
            target, origin, response_bytes
        )


DEFAULT_PRICES = PriceTable()
