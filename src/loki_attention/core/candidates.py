"""The three bases that one set of moments offers: PCA of keys before or after RoPE, and the balanced basis.

Everything is float64 until the result, which is float32. Derivations are in ``docs/concepts.md``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loki_attention.core.moments import LayerMoments
from loki_attention.errors import ArgumentError, unknown_name

CANDIDATES = ("pca-pre", "pca-post", "balanced")
_SMALLEST_EIGENVALUE = 1e-6
_SMALLEST_LARGEST_EIGENVALUE = 1e-30


@dataclass(frozen=True, slots=True)
class LayerBasis:
    """One layer's basis per KV head, at full D, and the second moments seen through it; float32.

    ``encode_keys(k) = (k - mean) A_k`` and ``encode_query(q) = q A_q`` with A_q A_k^T = I; leading dims matter most.
    ``key_moment`` is A_k^T Cov(k) A_k, ``query_moment`` A_q^T C_q A_q with C_q summed over the group's query heads.
    """

    candidates: tuple[str, ...]
    mean: Float[Tensor, "kv d"]
    query_map: Float[Tensor, "kv d d"]
    key_map: Float[Tensor, "kv d d"]
    key_moment: Float[Tensor, "kv d d"]
    query_moment: Float[Tensor, "kv d d"]

    @property
    def kv_heads(self) -> int:
        """Key/value heads, Hkv."""
        return self.mean.shape[0]

    @property
    def head_dim(self) -> int:
        """Head dim, D."""
        return self.mean.shape[1]

    def pick(self, others: dict[str, "LayerBasis"], names: tuple[str, ...]) -> "LayerBasis":
        """A basis whose head i is head i of ``others[names[i]]``."""
        rows = [others[name] for name in names]

        def stack(field: str) -> Tensor:
            return torch.stack([getattr(row, field)[head] for head, row in enumerate(rows)])

        return LayerBasis(names, *(stack(field) for field in TENSOR_FIELDS))


TENSOR_FIELDS = ("mean", "query_map", "key_map", "key_moment", "query_moment")


def build(candidate: str, moments: LayerMoments) -> LayerBasis:
    """The layer's ``candidate`` basis from its moments.

    ``pca-pre`` and ``pca-post`` are the eigenvectors of the centred covariance of keys before and after RoPE (Loki,
    section 3), the largest eigenvalue first. ``balanced`` minimises E[(q . k - score)^2] for every rank: with
    C_q^(1/2) C_k^(1/2) = U diag(s) V^T, A_q = C_q^(-1/2) U diag(s^(1/2)) and A_k = C_k^(-1/2) V diag(s^(1/2)), so
    that encoded queries and keys both have second moment diag(s) (KQ-SVD, arXiv:2512.05916).
    Means and moments always come from the keys after RoPE, which is what the cache holds.
    """
    if candidate not in CANDIDATES:
        raise unknown_name("candidate", candidate, CANDIDATES)
    if moments.post_keys.count < 2:
        raise ArgumentError(f"a basis needs the moments of at least 2 keys, got {moments.post_keys.count}")
    key_covariance, query_moment = moments.post_keys.covariance, moments.group_query_moment
    if candidate == "balanced":
        query_map, key_map = _balanced_maps(query_moment, key_covariance)
    else:
        keys = moments.pre_keys if candidate == "pca-pre" else moments.post_keys
        query_map = key_map = principal_axes(keys.covariance)
    return LayerBasis(
        (candidate,) * key_map.shape[0],
        *(
            tensor.float()
            for tensor in (
                moments.post_keys.mean,
                query_map,
                key_map,
                key_map.mT @ key_covariance @ key_map,
                query_map.mT @ query_moment @ query_map,
            )
        ),
    )


def channels(basis: LayerBasis) -> LayerBasis:
    """The basis whose axes are the channels themselves, by falling E[q_i^2] Var(k_i), from the moments in ``basis``.

    Not among the candidates: Double Sparsity's (arXiv:2408.07092), for comparison.
    """
    # A_q A_k^T = I, so that what is seen through one map is undone by the other.
    key_map, query_map = basis.key_map.double(), basis.query_map.double()
    key_covariance = query_map @ basis.key_moment.double() @ query_map.mT
    query_moment = key_map @ basis.query_moment.double() @ key_map.mT
    spread, size = (matrix.diagonal(dim1=-2, dim2=-1) for matrix in (key_covariance, query_moment))
    order = (spread * size).argsort(dim=-1, descending=True, stable=True)
    axes = torch.nn.functional.one_hot(order, basis.head_dim).mT.double()
    seen = (axes, axes, axes.mT @ key_covariance @ axes, axes.mT @ query_moment @ axes)
    return LayerBasis(("channels",) * basis.kv_heads, basis.mean, *(tensor.float() for tensor in seen))


def principal_axes(symmetric: Float[Tensor, "*heads d d"]) -> Float[Tensor, "*heads d d"]:
    """Eigenvectors in columns, the largest eigenvalue first, the sign fixed by each column's largest entry."""
    vectors = torch.linalg.eigh(symmetric).eigenvectors.flip(-1)
    return vectors * _column_signs(vectors)


def explained_variance(symmetric: Float[Tensor, "*heads d d"]) -> Float[Tensor, "*heads d"]:
    """Eigenvalues over their sum, the largest first; negative rounding noise counts as 0."""
    values = torch.linalg.eigvalsh(symmetric).flip(-1).clamp(min=0)
    return values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)


def rank_at(variance: float, symmetric: Float[Tensor, "*heads d d"]) -> Tensor:
    """The smallest r whose first r normalised eigenvalues sum to at least ``variance`` (Loki, equation 2).

    >>> rank_at(0.9, torch.diag(torch.tensor([8.0, 1.5, 0.5])))
    tensor(2)
    """
    reached = explained_variance(symmetric).cumsum(-1) >= variance - 1e-12
    return torch.where(reached.any(-1), reached.int().argmax(-1) + 1, symmetric.shape[-1])


def _balanced_maps(query_moment: Tensor, key_covariance: Tensor) -> tuple[Tensor, Tensor]:
    query_root, query_inverse = _root_and_inverse(query_moment)
    key_root, key_inverse = _root_and_inverse(key_covariance)
    left, values, right = torch.linalg.svd(query_root @ key_root)
    signs = _column_signs(left)
    spread = values.sqrt()[:, None, :] * signs
    return query_inverse @ left * spread, key_inverse @ right.mT * spread


def _root_and_inverse(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """The square root and its inverse of one and the same clamped matrix: their product is the identity."""
    values, vectors = torch.linalg.eigh(symmetric)
    # Keys that never vary still need roots whose product with others is finite in float32.
    largest = values[:, -1:].clamp(min=_SMALLEST_LARGEST_EIGENVALUE)
    root = values.clamp(min=_SMALLEST_EIGENVALUE * largest).sqrt()[:, None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def _column_signs(vectors: Tensor) -> Tensor:
    largest = vectors.abs().argmax(-2, keepdim=True)
    return torch.where(vectors.gather(-2, largest) < 0, -1.0, 1.0).to(vectors.dtype)
