"""Every built-in policy, one file each. Importing this package registers them by name."""

from tierwise.domain.topology import Tier
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.policies.edge_first import EdgeFirst
from tierwise.placement.policies.learned import from_package
from tierwise.placement.policies.least_loaded import LeastLoaded
from tierwise.placement.policies.tier_only import TierOnly
from tierwise.placement.policy import register

register("ect", EarliestCompletion)
register("edge-first", EdgeFirst)
register("edge-only", lambda: TierOnly(Tier.EDGE))
register("cloud-only", lambda: TierOnly(Tier.CLOUD))
register("least-loaded", LeastLoaded)
register("learned", from_package)
