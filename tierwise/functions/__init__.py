"""Function code that ships to workers, and the questions that rounds can be asked."""
