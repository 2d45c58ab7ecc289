"""Factors of low rank of a matrix, by its singular values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shiradelta.format.arithmetic import Float32
from shiradelta.format.delta import TensorDelta

#: Matrices with a smaller side than this are decomposed whole, which takes little time and is exact.
_SMALL = 512
#: Elements that are widened to float64 at a time.
_BLOCK = 1 << 22
#: Bytes that Lanczos' method takes for each row and column and each unit of the rank.
_VECTORS = 24

#: Chooses a rank, given all squared singular values, largest first.
Choose = Callable[[np.ndarray], int]


def factors_of(delta: TensorDelta, rank: int | None, energy: float | None) -> tuple[Float32, Float32, float]:
    """The best approximation of a delta as a product of two matrices.

    Args:
        delta: of a matrix, [rows, columns].
        rank: the largest rank, at least 1; or None.
        energy: the share of the squared norm to keep at least, with the smallest rank that does; or None.

    Returns:
        (B, float32 [rows, r]; A, float32 [r, columns]; the squared norm of the product).

    Raises:
        LimitError: this takes more memory than the limit of the open file.
    """
    if rank is not None and rank < min(delta.shape) // 4 and min(delta.shape) > _SMALL and delta.nnz:
        delta.check_memory(sum(delta.shape) * rank * _VECTORS)
        return _leading(delta, rank)
    delta.check_memory(4 * delta.numel + 24 * min(delta.shape) ** 2)
    if energy is None:
        return _whole(delta.to_dense(), lambda squares: rank or 1)
    share = float(energy)
    return _whole(delta.to_dense(), lambda squares: _enough(squares, share))


def _enough(squares: np.ndarray, energy: float) -> int:
    """The smallest number of squared singular values whose sum is a share of all."""
    sums = np.cumsum(squares)
    return int(np.searchsorted(sums, energy * sums[-1])) + 1


def _leading(delta: TensorDelta, rank: int) -> tuple[Float32, Float32, float]:
    """By Lanczos' method on the nonzeros, without the dense matrix."""
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import svds

    rows, columns = np.divmod(delta.positions(), delta.shape[1])
    matrix = csr_array((delta.values(), (rows, columns)), shape=delta.shape)
    start = np.random.default_rng(0).standard_normal(min(delta.shape)).astype(np.float32)
    left, values, right = svds(matrix, k=rank, v0=start)
    order = np.argsort(-values)
    left, values, right = left[:, order], values[order], right[order]
    root = np.sqrt(values)
    return _float32(left * root), _float32(root[:, None] * right), float(np.square(values.astype(np.float64)).sum())


def _whole(matrix: Float32, choose: Choose) -> tuple[Float32, Float32, float]:
    """By the eigenvectors of the product of the matrix and its transpose, in float64."""
    if matrix.shape[0] > matrix.shape[1]:
        right, left, kept = _whole(matrix.T, choose)
        return _float32(left.T), _float32(right.T), kept
    side, columns = matrix.shape
    product = np.zeros((side, side))
    step = max(1, _BLOCK // side)
    for start in range(0, columns, step):
        block = matrix[:, start : start + step].astype(np.float64)
        product += block @ block.T
    squares, vectors = np.linalg.eigh(product)
    squares, vectors = np.maximum(squares[::-1], 0), vectors[:, ::-1]
    count = min(choose(squares), side)
    squares, vectors = squares[:count], vectors[:, :count]
    root = np.where(squares > 0, squares, 1.0) ** 0.25
    other = (vectors / root).T.astype(np.float32) @ matrix
    return _float32(vectors * root), _float32(other), float(squares.sum())


def _float32(values: np.ndarray) -> Float32:
    return np.ascontiguousarray(values, np.float32)
