"""Learning and judging placement policies. Needs the `train` extra."""
