"""Prices and budgets ⇄ protobuf."""

from tierwise.domain.budget import SpentBudget
from tierwise.domain.prices import PriceTable, TierPrice
from tierwise.domain.topology import Tier
from tierwise.errors import InvalidArgument
from tierwise.v1 import node_pb2, types_pb2
from tierwise.wire import checks

SPENT_MAX = 10_000
USD_MAX = 1e9
UNIX_S_MAX = 1e11
_PRICES = (
    "usd_per_gb_s",
    "usd_per_request",
    "usd_per_gb_in",
    "usd_per_gb_out",
    "usd_per_gpu_s",
    "usd_per_idle_gb_s",
)


def prices_to_pb(table: PriceTable) -> types_pb2.PriceTable:
    """Return the message of a price table."""
    pb = types_pb2.PriceTable(is_startup_billed=table.is_startup_billed)
    for tier, price in table.by_tier.items():
        row = pb.tiers.add(tier=types_pb2.Tier.ValueType(tier))
        for key in _PRICES:
            setattr(row, key, getattr(price, key))
    return pb


def prices_from_pb(pb: types_pb2.PriceTable) -> PriceTable:
    """Return the price table of a message.

    Raises:
        InvalidArgument: A price is negative or beyond all bounds, or a tier has none.
    """
    checks.at_most(pb.tiers, "prices.tiers", len(Tier))
    by_tier = {
        checks.member(Tier, row.tier, "prices.tier"): TierPrice(
            **{
                key: checks.number(getattr(row, key), f"prices.{key}", 0.0, USD_MAX)
                for key in _PRICES
            }
        )
        for row in pb.tiers
    }
    if len(by_tier) < len(Tier):
        raise InvalidArgument("prices.tiers: send one row for each of edge, fog and cloud")
    return PriceTable(by_tier=by_tier, is_startup_billed=pb.is_startup_billed)


def spent_to_pb(spent: SpentBudget) -> node_pb2.SpentBudget:
    """Return the message of a budget that is spent."""
    return node_pb2.SpentBudget(
        namespace=spent.namespace,
        function=spent.function,
        usd_per_day=spent.usd_per_day,
        spent_usd=spent.spent_usd,
        ends_unix_s=spent.ends_unix_s,
    )


def spent_from_pb(pb: node_pb2.SpentBudget) -> SpentBudget:
    """Return the spent budget of a message.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    return SpentBudget(
        namespace=checks.name(pb.namespace, "spent.namespace"),
        function=checks.name(pb.function, "spent.function") if pb.function else "",
        usd_per_day=checks.number(pb.usd_per_day, "spent.usd_per_day", 0.0, USD_MAX),
        spent_usd=checks.number(pb.spent_usd, "spent.spent_usd", 0.0, USD_MAX),
        ends_unix_s=checks.number(pb.ends_unix_s, "spent.ends_unix_s", 0.0, UNIX_S_MAX),
    )
