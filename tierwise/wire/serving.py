"""Health and reflection, the same on every server."""

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

# The protobuf modules must be imported for reflection to find their descriptors.
from tierwise.v1 import (  # noqa: F401 - imported for their descriptors
    call_pb2,
    cluster_pb2,
    function_pb2,
    invocation_pb2,
    join_pb2,
    node_pb2,
    policy_pb2,
    work_pb2,
)


def add_health_and_reflection(server: grpc.aio.Server, *services: str) -> None:
    """Serve grpc.health.v1 (SERVING at once) and reflection for the named services."""
    servicer = health.aio.HealthServicer()
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ("", *services):
        # The public setter is a coroutine, and no server is running yet that could be asked.
        servicer._server_status[name] = serving  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
