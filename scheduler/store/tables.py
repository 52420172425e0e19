"""The tables. Messages are kept as protobuf blobs; what is searched or fenced has a column."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

SCHEMA_VERSION = 1
metadata = MetaData()
_AutoId = BigInteger().with_variant(Integer, "sqlite")

meta = Table(
    "meta", metadata, Column("key", String(40), primary_key=True), Column("value", Text)
)

code = Table(
    "code",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("content", LargeBinary, nullable=False),
)

functions = Table(
    "functions",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("spec", LargeBinary, nullable=False),
    Column("created_unix_s", Float, nullable=False),
)

# A deleted version's number is never given out again.
function_names = Table(
    "function_names",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("last_version", Integer, nullable=False),
)

work = Table(
    "work",
    metadata,
    Column("request_id", String(128), primary_key=True),
    Column("idempotency_key", String(256), nullable=False, unique=True),
    Column("content_digest", String(64), nullable=False),
    Column("function_id", String(200), nullable=False),
    Column("invocation", LargeBinary, nullable=False),
    Column("state", Integer, nullable=False),
    Column("lease", Integer, nullable=False, default=0),
    Column("attempt_count", Integer, nullable=False, default=0),
    Column("node_id", String(63), nullable=False, default=""),
    Column("message", Text, nullable=False, default=""),
    Column("submitted_unix_s", Float, nullable=False),
    Column("ended_unix_s", Float, nullable=False, default=0.0),
    Column("submitted_by", String(200), nullable=False, default=""),
    Column("result", LargeBinary),
    Index("work_by_state", "state", "submitted_unix_s"),
)

calls = Table(
    "calls",
    metadata,
    Column("sequence", _AutoId, primary_key=True, autoincrement=True),
    Column("request_id", String(128), nullable=False, index=True),
    Column("function_id", String(200), nullable=False, index=True),
    Column("node_id", String(63), nullable=False),
    Column("outcome", LargeBinary, nullable=False),
    Column("log", Text, nullable=False),
    Column("caller", String(200), nullable=False),
    Column("ended_unix_s", Float, nullable=False),
)

usage = Table(
    "usage",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("function", String(63), primary_key=True),
    Column("day", String(10), primary_key=True),  # UTC, ISO
    Column("call_count", BigInteger, nullable=False),
    Column("item_count", BigInteger, nullable=False),
    Column("gb_s", Float, nullable=False),
    Column("cpu_s", Float, nullable=False),
    Column("money_usd", Float, nullable=False),
    Column("missed_count", BigInteger, nullable=False),
    Column("failed_count", BigInteger, nullable=False),
    Column("cold_count", BigInteger, nullable=False),
)

profiles = Table(
    "profiles",
    metadata,
    Column("function_id", String(200), primary_key=True),
    Column("profile", LargeBinary, nullable=False),
)

policies = Table(
    "policies",
    metadata,
    Column("policy_id", String(130), primary_key=True),
    Column("weights", LargeBinary, nullable=False),
    Column("card", LargeBinary, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("published_unix_s", Float, nullable=False),
    Column("published_by", String(200), nullable=False),
)

# The last row is the policy in use; rolling back removes it.
promotions = Table(
    "promotions",
    metadata,
    Column("sequence", _AutoId, primary_key=True, autoincrement=True),
    Column("policy_id", String(130), nullable=False),
    Column("promoted_unix_s", Float, nullable=False),
    Column("promoted_by", String(200), nullable=False),
    Column("is_builtin", Boolean, nullable=False),
)
