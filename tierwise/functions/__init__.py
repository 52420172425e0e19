"""Functions that ship to workers by value: NumPy and the standard library, nothing of tierwise."""
