"""The metadata cache of one node: rounds in shared memory, on disk and in an object store."""
