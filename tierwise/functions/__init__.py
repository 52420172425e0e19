"""Code that ships to workers by value: they cannot import tierwise."""
