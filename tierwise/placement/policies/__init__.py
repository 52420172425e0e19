"""Every built-in policy, one file each. Importing this package registers them by name."""

from tierwise.domain.topology import Tier
from tierwise.placement.policies.cluster_like import KubernetesLike, NomadLike
from tierwise.placement.policies.defdrel import DefDrel
from tierwise.placement.policies.ect import SOFT_TEMPERATURE, EarliestCompletion
from tierwise.placement.policies.edge_first import EdgeFirst
from tierwise.placement.policies.hashing import BoundedHashing
from tierwise.placement.policies.learned import from_package
from tierwise.placement.policies.least_loaded import LeastLoaded
from tierwise.placement.policies.linucb import LinUCB
from tierwise.placement.policies.locality import Locality
from tierwise.placement.policies.power_of_two import PowerOfTwo
from tierwise.placement.policies.probabilistic import Probabilistic
from tierwise.placement.policies.pull_based import PullBased
from tierwise.placement.policies.rollout import Rollout
from tierwise.placement.policies.slowest_fit import SlowestFit
from tierwise.placement.policies.tier_only import TierOnly
from tierwise.placement.policy import register

register("ect", EarliestCompletion)
register("soft-ect", lambda: EarliestCompletion(temperature=SOFT_TEMPERATURE))
register("edge-first", EdgeFirst)
register("edge-only", lambda: TierOnly(Tier.EDGE))
register("cloud-only", lambda: TierOnly(Tier.CLOUD))
register("least-loaded", LeastLoaded)
register("power-of-two", PowerOfTwo)
register("bounded-hashing", BoundedHashing)
register("pull-based", PullBased)
register("locality", Locality)
register("slowest-fit", SlowestFit)
register("probabilistic", Probabilistic)
register("kubernetes-like", KubernetesLike)
register("nomad-like", NomadLike)
register("linucb", LinUCB)
register("defdrel", DefDrel)
register("rollout", Rollout)
register("learned", from_package)
