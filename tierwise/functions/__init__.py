"""Function code that ships to workers by value: NumPy and the standard library only."""
