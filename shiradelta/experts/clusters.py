"""Clusters of features (BIRCH, of scikit-learn)."""

from __future__ import annotations

import numpy as np

from shiradelta.errors import ArgumentError
from shiradelta.format.arithmetic import Array, Float32
from shiradelta.util.optional import importing
from shiradelta.util.text import count

#: Radius of BIRCH's subclusters to begin with: features of length 1 that have nothing in common are at 1.41.
_THRESHOLD = 0.5
#: The radius is halved until there are so many subclusters for each cluster, or as many as examples.
_SUBCLUSTERS = 8
_HALVINGS = 12


def check_clustering() -> None:
    """Raises MissingDependencyError, before long work, if scikit-learn is not installed."""
    with importing("clusters of examples"):
        import sklearn.cluster  # noqa: F401


def birch(features: Float32, clusters: int) -> Array:
    """Groups features.

    Args:
        features: float32 [examples, dims], of length 1.
        clusters: number of clusters.

    Returns:
        int64 [examples]: the cluster of each, numbered by size, the largest first.

    Raises:
        ArgumentError: the features do not fall into so many clusters.
        MissingDependencyError: scikit-learn is not installed.
    """
    with importing("clusters of examples"):
        from sklearn.cluster import Birch

    wanted = min(len(features), _SUBCLUSTERS * clusters)
    for halving in range(_HALVINGS):
        tree = Birch(threshold=_THRESHOLD / 2**halving, n_clusters=None).fit(features)
        if len(tree.subcluster_centers_) >= wanted:
            break
    if len(tree.subcluster_centers_) < clusters:
        found = count(len(tree.subcluster_centers_), "cluster")
        raise ArgumentError(
            f"{count(len(features), 'example')} fall into {found}, not {clusters}; ask for fewer experts, or give more"
            " examples"
        )
    tree.set_params(n_clusters=clusters).partial_fit()
    return by_size(tree.predict(features))


def by_size(labels: Array) -> Array:
    """Renumbers clusters, the largest first; of equal ones, the one with the first example."""
    _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    numbers = np.empty_like(order)
    numbers[order] = np.arange(len(order))
    result: Array = numbers[inverse]
    return result
