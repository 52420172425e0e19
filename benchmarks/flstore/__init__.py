"""The parts of `bench_flstore`: trace, rivals, emulated links, prices and reports."""
