"""Prices. A call is billed for memory × time, for the request, and for bytes that leave a tier."""

import math
from dataclasses import dataclass, field

from tierwise.domain.topology import Tier

# AWS Lambda's public price list (x86, us-east-1): per GB-second and per million requests.
LAMBDA_USD_PER_GB_S = 1.66667e-5
LAMBDA_USD_PER_REQUEST = 0.20e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPrice:
    """What one tier charges, in USD."""

    usd_per_gb_s: float
    usd_per_request: float
    usd_per_gb_in: float  # bytes that enter from another node
    usd_per_gpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CallPrice:
    """The price of a call as a function of its run time: fixed + per second."""

    usd_fixed: float
    usd_per_s: float

    def usd(self, billed_s: float) -> float:
        """Return the price of a run; time is rounded up to whole milliseconds, as Lambda does."""
        return self.usd_fixed + self.usd_per_s * math.ceil(billed_s * 1000.0 - 1e-9) / 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTable:
    """Prices of the three tiers.

    The cloud is AWS Lambda's list price. Edge and fog are an *assumption* (owned machines,
    written off over their life): 20 % and 50 % of the cloud's price per GB-second and no price
    per request. Operators put their own in the scheduler's TOML.
    """

    by_tier: dict[Tier, TierPrice] = field(
        default_factory=lambda: {
            Tier.EDGE: TierPrice(
                usd_per_gb_s=0.2 * LAMBDA_USD_PER_GB_S, usd_per_request=0.0, usd_per_gb_in=0.0
            ),
            Tier.FOG: TierPrice(
                usd_per_gb_s=0.5 * LAMBDA_USD_PER_GB_S, usd_per_request=0.0, usd_per_gb_in=0.001
            ),
            Tier.CLOUD: TierPrice(
                usd_per_gb_s=LAMBDA_USD_PER_GB_S,
                usd_per_request=LAMBDA_USD_PER_REQUEST,
                usd_per_gb_in=0.01,
                usd_per_gpu_s=5.0e-4,
            ),
        }
    )

    def of_call(
        self,
        tier: Tier,
        *,
        memory_mib: int,
        moved_bytes: int,
        gpu_slots: int = 0,
        item_count: int = 1,
    ) -> CallPrice:
        """Return the price of one call on a tier.

        `moved_bytes` counts request and response if they crossed between nodes.
        """
        price = self.by_tier[tier]
        return CallPrice(
            price.usd_per_request * item_count + moved_bytes / 1e9 * price.usd_per_gb_in,
            memory_mib / 1024.0 * price.usd_per_gb_s + gpu_slots * price.usd_per_gpu_s,
        )

    def call_usd(
        self,
        tier: Tier,
        *,
        memory_mib: int,
        billed_s: float,
        moved_bytes: int,
        gpu_slots: int = 0,
        item_count: int = 1,
    ) -> float:
        """Return the price of one call that ran for `billed_s`; see `of_call`."""
        price = self.of_call(
            tier,
            memory_mib=memory_mib,
            moved_bytes=moved_bytes,
            gpu_slots=gpu_slots,
            item_count=item_count,
        )
        return price.usd(billed_s)
