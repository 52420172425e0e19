"""Graphs grown by preferential attachment, and three questions about them."""


def _grown(nodes, degree):
    """Return a Barabási–Albert graph as adjacency lists."""
    import random

    rng = random.Random(nodes)
    adjacent = [[] for _ in range(nodes)]
    ends = list(range(degree))
    for node in range(degree, nodes):
        for other in {ends[rng.randrange(len(ends))] for _ in range(degree)}:
            adjacent[node].append(other)
            adjacent[other].append(node)
            ends += (node, other)
    return adjacent


def mst(nodes, degree):
    """Return the weight of a minimum spanning tree (Kruskal)."""
    import random

    rng = random.Random(degree)
    adjacent = _grown(nodes, degree)
    edges = [(rng.random(), a, b) for a in range(nodes) for b in adjacent[a] if a < b]
    edges.sort()
    root = list(range(nodes))

    def find(a):
        while root[a] != a:
            root[a] = root[root[a]]
            a = root[a]
        return a

    total = 0.0
    for weight, a, b in edges:
        a, b = find(a), find(b)
        if a != b:
            root[a] = b
            total += weight
    return total


def bfs(nodes, degree):
    """Return how many nodes are reached, and in how many steps at most."""
    adjacent = _grown(nodes, degree)
    depth = {nodes - 1: 0}
    front = [nodes - 1]
    while front:
        following = []
        for a in front:
            for b in adjacent[a]:
                if b not in depth:
                    depth[b] = depth[a] + 1
                    following.append(b)
        front = following
    return len(depth), max(depth.values())


def edge_list(nodes, degree):
    """Return the edges of a grown graph as an array of shape (edges, 2)."""
    import numpy as np

    adjacent = _grown(nodes, degree)
    return np.array([(a, b) for a in range(nodes) for b in adjacent[a] if a < b], dtype=np.int32)


def pagerank(edges):
    """Return the largest rank after 10 rounds of the power method over an array of edges."""
    nodes = int(edges.max()) + 1
    adjacent = [[] for _ in range(nodes)]
    for a, b in edges.tolist():
        adjacent[a].append(b)
        adjacent[b].append(a)
    rank = [1.0 / nodes] * nodes
    for _ in range(10):
        share = [0.85 * r / max(1, len(a)) for r, a in zip(rank, adjacent, strict=True)]
        rank = [0.15 / nodes + sum(share[b] for b in a) for a in adjacent]
    return max(rank)
