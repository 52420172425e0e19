"""Federated averaging on scikit-learn's digits, written for Flower and nothing else."""
