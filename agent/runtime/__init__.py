"""Workers: how code of users starts, runs, is bounded and ends on a node."""
