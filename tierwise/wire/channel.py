"""Channels and servers with the same limits, keepalive and mTLS everywhere."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

from tierwise.errors import PermissionDenied, TierwiseError, Unauthenticated
from tierwise.wire.diagnosis import diagnose as diagnose  # where callers have always found it
from tierwise.wire.errors import abort
from tierwise.wire.identity import Credentials, Identity, Role, peer_identity
from tierwise.wire.interception import Behaviour, Continuation, Handler, answer, wrapped

MESSAGE_BYTES_MAX = 128 << 20
CONCURRENT_RPCS_MAX = 10_000  # per server; calls that are multiplexed over a stream are not RPCs
_FAILED = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)
_OPEN_METHODS = ("/grpc.health.v1.", "/grpc.reflection.")
Options = list[tuple[str, Any]]


def channel_options(message_bytes_max: int = MESSAGE_BYTES_MAX) -> Options:
    """Return the options of every channel and server.

    A peer that stops answering is noticed by ping: keepalive alone needed 40–60 s, so the
    HTTP/2 ping timeout is set as well.
    """
    return [
        ("grpc.max_send_message_length", message_bytes_max),
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.keepalive_time_ms", 5_000),
        ("grpc.keepalive_timeout_ms", 3_000),
        ("grpc.http2.ping_timeout_ms", 3_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 2_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.so_reuseport", 0),
        # Each channel is its own connection, so that closing it really ends it.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def secure_channel(
    address: str, credentials: Credentials, expected_dns_name: str
) -> grpc.aio.Channel:
    """Return an mTLS channel that accepts only a server with `expected_dns_name`."""
    return grpc.aio.secure_channel(
        address,
        grpc.ssl_channel_credentials(
            root_certificates=credentials.authority,
            private_key=credentials.key,
            certificate_chain=credentials.certificate,
        ),
        [*channel_options(), ("grpc.ssl_target_name_override", expected_dns_name)],
    )


async def is_connected(channel: grpc.aio.Channel, timeout_s: float) -> bool:
    """Return whether a channel stands, connecting it if need be; a refusal is known at once."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                state = channel.get_state(try_to_connect=True)
                if state is grpc.ChannelConnectivity.READY:
                    return True
                if state in _FAILED:
                    return False
                await channel.wait_for_state_change(state)
    except TimeoutError:
        return False


def server_credentials(
    credentials: Credentials, *, require_client: bool = True
) -> grpc.ServerCredentials:
    """Return a server's side of mTLS; without `require_client` nobody is asked who they are."""
    return grpc.ssl_server_credentials(
        [(credentials.key, credentials.certificate)],
        root_certificates=credentials.authority if require_client else None,
        require_client_auth=require_client,
    )


def new_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor],
    *,
    message_bytes_max: int = MESSAGE_BYTES_MAX,
) -> grpc.aio.Server:
    """Return a server with the options of the house.

    Args:
        interceptors: The first is the outermost: the one for errors, then that for rights.
        message_bytes_max: Take no larger messages; a port that anybody may dial needs little.
    """
    return grpc.aio.server(
        interceptors=interceptors,
        options=channel_options(message_bytes_max),
        maximum_concurrent_rpcs=CONCURRENT_RPCS_MAX,
    )


class AuthorizationInterceptor(grpc.aio.ServerInterceptor):
    """Lets an RPC pass only if the caller's role may call it; what is not in the table may not."""

    def __init__(
        self, roles: Mapping[str, set[Role]], is_revoked: Callable[[Identity], bool]
    ) -> None:
        self._roles = roles
        self._is_revoked = is_revoked

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """Wrap the handler of one RPC with the check."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith(_OPEN_METHODS):
            return handler

        def check(behaviour: Behaviour) -> Behaviour:
            async def checked(request: Any, context: Any) -> Any:
                try:
                    self._check(method, peer_identity(context))
                except TierwiseError as error:
                    await abort(context, error)
                return await answer(behaviour, request, context)

            return checked

        return wrapped(handler, check)

    def _check(self, method: str, identity: Identity) -> None:
        if self._is_revoked(identity):
            raise Unauthenticated(f"{identity.uri} has been revoked; join again with a new token")
        allowed = self._roles.get(method, set())
        if identity.role not in allowed:
            needed = " or ".join(sorted(allowed)) or "no role"
            raise PermissionDenied(f"{method} needs {needed}; you are {identity.uri}")
