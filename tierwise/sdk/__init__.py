"""What users write against: functions, calls, durable work, local clusters."""

import os

# gRPC's core would write every lost connection to the user's standard error; ours are errors that
# say what to do. It reads this once, when it is first imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
