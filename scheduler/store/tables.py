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
    UniqueConstraint,
)

SCHEMA_VERSION = 2
# What brings a database from one version to the next; new tables are made by themselves.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE usage ADD COLUMN gpu_s FLOAT NOT NULL DEFAULT 0",
        "UPDATE usage SET cpu_s = 0",  # it held run seconds
        "ALTER TABLE calls ADD COLUMN report_key VARCHAR(220)",
        "CREATE UNIQUE INDEX ix_calls_report_key ON calls (report_key)",
    ),
}
metadata = MetaData()
_AutoId = BigInteger().with_variant(Integer, "sqlite")

meta = Table("meta", metadata, Column("key", String(40), primary_key=True), Column("value", Text))

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

# What decisions need of a piece of work. Its arguments and its result may be large: they are apart.
work = Table(
    "work",
    metadata,
    Column("request_id", String(128), primary_key=True),
    Column("position", BigInteger, nullable=False),  # order of acceptance
    Column("submitted_by", String(200), nullable=False),
    Column("idempotency_key", String(256), nullable=False),
    Column("content_digest", String(64), nullable=False),
    Column("function_id", String(200), nullable=False),
    Column("header", LargeBinary, nullable=False),  # the invocation without arguments
    Column("item_count", Integer, nullable=False),
    Column("request_bytes", BigInteger, nullable=False),
    Column("state", Integer, nullable=False),
    Column("lease", Integer, nullable=False),
    Column("attempt_count", Integer, nullable=False),
    Column("node_id", String(63), nullable=False),
    Column("message", Text, nullable=False),
    Column("submitted_unix_s", Float, nullable=False),
    Column("ended_unix_s", Float, nullable=False),
    UniqueConstraint("submitted_by", "idempotency_key"),
    Index("work_by_state", "state", "position"),
    Index("work_by_end", "ended_unix_s"),
)

# The invocation's arguments alone; removed when the work has ended, kept while it is dead-lettered.
payloads = Table(
    "payloads",
    metadata,
    Column("request_id", String(128), primary_key=True),
    Column("arguments", LargeBinary, nullable=False),
)

results = Table(
    "results",
    metadata,
    Column("request_id", String(128), primary_key=True),
    Column("result", LargeBinary, nullable=False),
)

# Nodes that have joined and were not removed, connected or not.
nodes = Table(
    "nodes",
    metadata,
    Column("node_id", String(63), primary_key=True),
    Column("node", LargeBinary, nullable=False),
    Column("seen_unix_s", Float, nullable=False),
)

# Nodes that are drained; it outlives sessions and restarts.
drains = Table("drains", metadata, Column("node_id", String(63), primary_key=True))

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
    # Which report it came with: a report that comes twice is stored and billed once.
    Column("report_key", String(220), nullable=True),
    Index("ix_calls_report_key", "report_key", unique=True),
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
    Column("gpu_s", Float, nullable=False),
)

# What requests and responses took over each class of link.
usage_bytes = Table(
    "usage_bytes",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("function", String(63), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("link", String(20), primary_key=True),
    Column("moved_bytes", BigInteger, nullable=False),
)

# What warm instances held while nobody used them.
idle_usage = Table(
    "idle_usage",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("function", String(63), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("node_id", String(63), primary_key=True),
    Column("idle_gb_s", Float, nullable=False),
    Column("idle_usd", Float, nullable=False),
)

# What may be spent in a day; an empty function means the whole namespace.
budgets = Table(
    "budgets",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("function", String(63), primary_key=True),
    Column("usd_per_day", Float, nullable=False),
    Column("action", Integer, nullable=False),
    Column("set_by", String(200), nullable=False),
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

# Policies on trial, with the sums of what they did in the shadow. At most one of a kind goes on.
trials = Table(
    "trials",
    metadata,
    Column("trial_id", _AutoId, primary_key=True, autoincrement=True),
    Column("kind", String(10), nullable=False),
    Column("policy_id", String(130), nullable=False),
    Column("is_builtin", Boolean, nullable=False),
    Column("baseline_id", String(130), nullable=False),
    Column("share", Float, nullable=False),
    Column("block_s", Float, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("started_unix_s", Float, nullable=False),
    Column("ended_unix_s", Float, nullable=False),  # 0 while it goes on
    Column("decision_count", BigInteger, nullable=False),
    Column("error_count", BigInteger, nullable=False),
    Column("same_count", BigInteger, nullable=False),
    Column("gain_s", Float, nullable=False),  # summed
)

# What ended of the calls that were decided in each time block of a canary.
trial_blocks = Table(
    "trial_blocks",
    metadata,
    Column("trial_id", BigInteger, primary_key=True),
    Column("block", BigInteger, primary_key=True),
    Column("call_count", BigInteger, nullable=False),
    Column("missed_count", BigInteger, nullable=False),
    Column("cost_s", Float, nullable=False),  # summed
)

# Federated jobs, one of each name; how far they are is JSON, for people as much as for us.
federated_jobs = Table(
    "federated_jobs",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("job", String(63), primary_key=True),
    Column("uid", String(32), nullable=False, unique=True),
    Column("owner", String(200), nullable=False),
    Column("spec", LargeBinary, nullable=False),
    Column("state", Integer, nullable=False, index=True),
    Column("progress", Text, nullable=False),
    Column("created_unix_s", Float, nullable=False),
    Column("ended_unix_s", Float, nullable=False),  # 0 while it goes on
)

federated_rounds = Table(
    "federated_rounds",
    metadata,
    Column("uid", String(32), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("record", LargeBinary, nullable=False),
)
