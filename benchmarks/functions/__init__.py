"""Workloads whose memory follows their input, written for the memory benchmark."""
