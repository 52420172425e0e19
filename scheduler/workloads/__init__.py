"""Planners: what has happened so far in, what to run next out. Pure."""
