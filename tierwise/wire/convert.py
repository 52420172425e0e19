"""Domain ⇄ protobuf, the only translators: `X_to_pb` and `X_from_pb`, gathered from four modules.

Whatever comes in is checked before it becomes a domain value: every `X_from_pb` raises
InvalidArgument with the field, the value and what to do.
"""

from tierwise.wire.convert_billing import (
    prices_from_pb,
    prices_to_pb,
    spent_from_pb,
    spent_to_pb,
)
from tierwise.wire.convert_call import (
    REQUEST_ID_MAX,
    explanation_from_pb,
    explanation_to_pb,
    invocation_from_request,
    outcome_from_pb,
    outcome_to_pb,
    request_from_invocation,
)
from tierwise.wire.convert_cluster import (
    link_from_pb,
    link_to_pb,
    links_from_pb,
    links_to_pb,
    node_from_pb,
    node_to_pb,
    peer_from_pb,
    peer_to_pb,
    reading_from_pb,
    reading_to_pb,
    resources_from_pb,
    resources_to_pb,
    view_from_pb,
    view_to_pb,
)
from tierwise.wire.convert_function import (
    TIMEOUT_S_MAX,
    catalogue_from_pb,
    catalogue_to_pb,
    profile_from_pb,
    profile_to_pb,
    profiles_from_pb,
    spec_from_pb,
    spec_to_pb,
    tiers_from_pb,
    tiers_to_pb,
)

__all__ = [
    "REQUEST_ID_MAX",
    "TIMEOUT_S_MAX",
    "catalogue_from_pb",
    "catalogue_to_pb",
    "explanation_from_pb",
    "explanation_to_pb",
    "invocation_from_request",
    "link_from_pb",
    "link_to_pb",
    "links_from_pb",
    "links_to_pb",
    "node_from_pb",
    "node_to_pb",
    "outcome_from_pb",
    "outcome_to_pb",
    "peer_from_pb",
    "peer_to_pb",
    "prices_from_pb",
    "prices_to_pb",
    "profile_from_pb",
    "profile_to_pb",
    "profiles_from_pb",
    "reading_from_pb",
    "reading_to_pb",
    "request_from_invocation",
    "resources_from_pb",
    "resources_to_pb",
    "spec_from_pb",
    "spec_to_pb",
    "spent_from_pb",
    "spent_to_pb",
    "tiers_from_pb",
    "tiers_to_pb",
    "view_from_pb",
    "view_to_pb",
]
