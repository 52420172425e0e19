"""What an operator asks of a cluster, as plain dicts that print and serialise."""

from collections.abc import Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from tierwise.sdk.cached import plain
from tierwise.sdk.client import Client
from tierwise.v1 import (
    advisor_pb2,
    budget_pb2,
    cache_pb2,
    call_pb2,
    cluster_pb2,
    federated_pb2,
    function_pb2,
    policy_pb2,
    work_pb2,
)

Record = dict[str, Any]
_PREFIXES = (
    "BUDGET_ACTION_",
    "FEDERATED_JOB_STATE_",
    "FEDERATED_ROUND_STATE_",
    "FEDERATED_UPDATE_STATE_",
    "NODE_STATE_",
    "OUTCOME_STATE_",
    "WORK_STATE_",
    "TIER_",
    "PRIORITY_",
    "REASON_",
    "ROLE_",
)


class Operator:
    """Synchronous questions and orders; methods raise TierwiseError as the cluster answers."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def nodes(self) -> list[Record]:
        """Return every node with state, reading, host and age."""
        return self._list("cluster", "ListNodes", cluster_pb2.ListNodesRequest(), "nodes")

    def links(self) -> Record:
        """Return the paths between tiers that policies reckon with."""
        found: Record = self._one("cluster", "GetView", cluster_pb2.GetViewRequest())["links"]
        return found

    def functions(self, namespace: str = "") -> list[Record]:
        """Return the newest version of every function."""
        request = function_pb2.ListFunctionsRequest(namespace=namespace)
        return self._list("functions", "ListFunctions", request, "functions")

    def function(self, name: str) -> Record:
        """Return one function with its profile and all its versions."""
        found = self._one(
            "functions", "GetFunction", function_pb2.GetFunctionRequest(function=name)
        )
        request = function_pb2.ListFunctionVersionsRequest(function=name)
        found["versions"] = self._list("functions", "ListFunctionVersions", request, "versions")
        return found

    def delete_function(self, name: str) -> int:
        """Delete a version, or all of a name; return how many."""
        request = function_pb2.DeleteFunctionRequest(function=name)
        return int(self._one("functions", "DeleteFunction", request)["deleted_count"])

    def calls(self, function: str = "", node: str = "", limit: int = 50) -> list[Record]:
        """Return finished calls, newest first."""
        request = call_pb2.ListCallsRequest(function=function, node_id=node, limit=limit)
        return self._list("calls", "ListCalls", request, "calls")

    def call(self, request_id: str) -> Record:
        """Return one call with its explanation and log; a unique prefix of its id is enough."""
        request = call_pb2.GetCallRequest(request_id=request_id)
        found: Record = self._one("calls", "GetCall", request)["call"]
        return found

    def recommend_memory(self, function: str) -> Record:
        """Return how a function's memory should be declared, and what its calls say for that."""
        request = advisor_pb2.RecommendMemoryRequest(function=function)
        return self._one("advisor", "RecommendMemory", request)

    def resize(self, function: str, *, memory_mib: int, is_memory_auto: bool) -> Record:
        """Deploy a function's newest version again with this memory; 0 keeps what it has."""
        request = advisor_pb2.ResizeFunctionRequest(
            function=function, memory_mib=memory_mib, is_memory_auto=is_memory_auto
        )
        return self._one("advisor", "ResizeFunction", request)

    def bill(
        self, namespace: str = "", by: Sequence[str] = (), since: str = "", until: str = ""
    ) -> Record:
        """Return what was used and what it cost.

        Args:
            namespace: This one only; empty means all.
            by: What to tell apart: namespace, function, day. None means namespace and function.
            since: First UTC day, ISO.
            until: Last UTC day.

        Returns:
            `usage`, one row per combination; `total`, the same over all rows; and `idle`, what
            warm instances held while nobody used them, per function and node.
        """
        request = call_pb2.GetUsageRequest(
            namespace=namespace,
            by=[call_pb2.UsageKey.Value(f"USAGE_KEY_{key.upper()}") for key in by],  # type: ignore[misc]
            since=since,
            until=until,
        )
        return self._one("calls", "GetUsage", request)

    def budgets(self, namespace: str = "") -> list[Record]:
        """Return budgets with what is spent today."""
        request = budget_pb2.ListBudgetsRequest(namespace=namespace)
        return self._list("budgets", "ListBudgets", request, "budgets")

    def set_budget(self, namespace: str, function: str, usd_per_day: float, action: str) -> Record:
        """Set a budget; an empty function means the whole namespace. `action`: warn, refuse."""
        value = budget_pb2.BudgetAction.Value(f"BUDGET_ACTION_{action.upper()}")
        request = budget_pb2.SetBudgetRequest(
            namespace=namespace,
            function=function,
            usd_per_day=usd_per_day,
            action=budget_pb2.BudgetAction.ValueType(value),
        )
        return dict(self._one("budgets", "SetBudget", request)["budget"])

    def remove_budget(self, namespace: str, function: str = "") -> None:
        """Remove a budget."""
        request = budget_pb2.RemoveBudgetRequest(namespace=namespace, function=function)
        self._one("budgets", "RemoveBudget", request)

    def usage(self, namespace: str = "") -> list[Record]:
        """Return what was used and what it cost, per function."""
        return self._list(
            "calls", "GetUsage", call_pb2.GetUsageRequest(namespace=namespace), "usage"
        )

    def namespace_usage(self, namespace: str = "") -> list[Record]:
        """Return what each namespace has used and what that cost, all its functions together."""
        sums: dict[str, Record] = {}
        for row in self.usage(namespace):
            total = sums.setdefault(
                row["namespace"], {"namespace": row["namespace"], "function_count": 0}
            )
            total["function_count"] += 1
            for key, value in row.items():
                if isinstance(value, int | float):
                    total[key] = total.get(key, 0) + value
        return list(sums.values())

    def work(self, state: str = "", limit: int = 100) -> list[Record]:
        """Return durable work, newest first; `state` is queued, leased, …, dead or empty."""
        value = work_pb2.WorkState.Value(f"WORK_STATE_{state.upper()}") if state else 0
        request = work_pb2.ListWorkRequest(state=work_pb2.WorkState.ValueType(value), limit=limit)
        return self._list("work", "ListWork", request, "work")

    def redrive(self, request_id: str) -> Record:
        """Queue dead-lettered work again."""
        request = work_pb2.RedriveRequest(request_id=request_id)
        found: Record = self._one("work", "Redrive", request)["work"]
        return found

    def objects(self, namespace: str = "", job: str = "") -> list[Record]:
        """Return the objects of federated jobs that the caller may read, on every node.

        Args:
            namespace: Of these jobs only; empty: all.
            job: This one only; empty: all.
        """
        request = cache_pb2.ListObjectsRequest(namespace=namespace, job=job, is_everywhere=True)

        async def ask() -> Any:
            return await self._client.connection().caches.ask("", "ListObjects", request)

        return [plain(info) for info in self._client.run(ask).objects]

    def policies(self) -> list[Record]:
        """Return built-in and published policies."""
        return self._list("policies", "ListPolicies", policy_pb2.ListPoliciesRequest(), "policies")

    def publish(self, weights: bytes, card: bytes) -> Record:
        """Publish a policy file; return what is known of it."""
        request = policy_pb2.PublishPolicyRequest(weights=weights, card=card)
        return dict(self._one("policies", "PublishPolicy", request)["policy"])

    def promote(self, policy_id: str) -> Record:
        """Make a policy the one that decides."""
        request = policy_pb2.PromotePolicyRequest(policy_id=policy_id)
        return dict(self._one("policies", "PromotePolicy", request)["policy"])

    def roll_back(self) -> Record:
        """End a canary, or else return to the policy before.

        Returns:
            What is known of the `policy` that decides now, and the id of the `ended_canary` if
            that was ended instead.
        """
        return self._one("policies", "RollBackPolicy", policy_pb2.RollBackPolicyRequest())

    def shadow(self, policy_id: str) -> Record:
        """Have a policy asked beside the one that decides; an empty id ends that."""
        request = policy_pb2.ShadowPolicyRequest(policy_id=policy_id)
        return dict(self._one("policies", "ShadowPolicy", request)["policy"])

    def canary(self, policy_id: str, share: float = 0.2, block_s: float = 30.0) -> Record:
        """Let a policy decide in a share of all time blocks; an empty id ends that."""
        request = policy_pb2.CanaryPolicyRequest(policy_id=policy_id, share=share, block_s=block_s)
        return dict(self._one("policies", "CanaryPolicy", request)["policy"])

    def federated_jobs(self, namespace: str = "", limit: int = 100) -> list[Record]:
        """Return federated jobs, newest first."""
        request = federated_pb2.ListJobsRequest(namespace=namespace, limit=limit)
        return self._list("federated", "ListJobs", request, "jobs")

    def federated_job(self, job: str, namespace: str = "default", limit: int = 100) -> Record:
        """Return a federated `job` and its newest `rounds`."""
        request = federated_pb2.GetJobRequest(namespace=namespace, job=job, round_limit=limit)
        return self._one("federated", "GetJob", request)

    def stop_federated(self, job: str, namespace: str = "default") -> Record:
        """Stop a federated job; return it."""
        request = federated_pb2.StopJobRequest(namespace=namespace, job=job)
        return dict(self._one("federated", "StopJob", request)["job"])

    def resume_federated(self, job: str, namespace: str = "default", rounds: int = 0) -> Record:
        """Have a federated job go on, to so many rounds in all; return it."""
        request = federated_pb2.ResumeJobRequest(namespace=namespace, job=job, round_count=rounds)
        return dict(self._one("federated", "ResumeJob", request)["job"])

    def drain(self, node: str, *, is_on: bool) -> Record:
        """Drain a node, or take it back."""
        request = cluster_pb2.DrainNodeRequest(node_id=node, is_on=is_on)
        return dict(self._one("cluster", "DrainNode", request)["node"])

    def remove(self, node: str) -> None:
        """Take a node out of the cluster and revoke its certificate."""
        self._one("cluster", "RemoveNode", cluster_pb2.RemoveNodeRequest(node_id=node))

    def create_token(self, role: str, name: str, ttl_s: float) -> Record:
        """Return a one-time join token for a node, user or admin."""
        value = cluster_pb2.Role.Value(f"ROLE_{role.upper()}")
        request = cluster_pb2.CreateTokenRequest(
            role=cluster_pb2.Role.ValueType(value), name=name, ttl_s=ttl_s
        )
        return self._one("cluster", "CreateToken", request)

    def tokens(self) -> list[Record]:
        """Return the tokens that are remembered, without their secrets."""
        return self._list("cluster", "ListTokens", cluster_pb2.ListTokensRequest(), "tokens")

    def identity(self) -> Record:
        """Return who the caller is, and which cluster this is."""
        return self._one("cluster", "GetIdentity", cluster_pb2.GetIdentityRequest())

    def _one(self, service: str, method: str, request: Message) -> Record:
        async def ask() -> Message:
            connection = self._client.connection()
            return await connection.ask(
                getattr(getattr(connection, service), method), request, 15.0
            )

        return record(self._client.run(ask))

    def _list(self, service: str, method: str, request: Message, key: str) -> list[Record]:
        found: list[Record] = self._one(service, method, request)[key]
        return found


def record(message: Message) -> Record:
    """Return a message as a dict; enum values by their short lower-case names."""
    plain: Record = _short(
        MessageToDict(
            message,
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
    )
    return plain


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    if isinstance(value, str):
        for prefix in _PREFIXES:
            if value.startswith(prefix):
                return value.removeprefix(prefix).lower().replace("_", " ")
        if value.lstrip("-").isdigit() and len(value) < 20:
            return int(value)  # protobuf's JSON writes 64-bit integers as text
    return value
