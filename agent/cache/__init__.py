"""The metadata cache of one node: objects of federated rounds, kept where they are used."""
