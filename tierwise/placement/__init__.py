"""Where a request runs: who may take it, how candidates are scored, who decides, and why."""
