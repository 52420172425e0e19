"""What federated rounds run in workers: aggregation, and questions about rounds."""
