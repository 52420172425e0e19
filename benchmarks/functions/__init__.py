"""What benchmarks run: workloads whose memory follows their input, and federated clients."""
