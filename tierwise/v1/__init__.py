"""Generated from protos/tierwise/v1; run `make protos`."""
