"""Axis letters and tensor types used throughout. Layout is (B, H, S, D), as in PyTorch SDPA and transformers.

====== ==========================================================================
letter meaning
====== ==========================================================================
b      sequences in the batch
h      query heads (H)
kv     key/value heads (Hkv)
g      query heads that share a key head, G = H / Hkv
t      query rows of one forward (1 in decode)
s      cache slots (S); a *valid* slot holds a token, others are padding
k      tokens that are attended (K)
d      head dim (D)
r      dims of the low-rank keys (R)
====== ==========================================================================
"""

from jaxtyping import Float, Int, UInt8
from torch import Tensor

Queries = Float[Tensor, "b h t d"]
Keys = Float[Tensor, "b kv s d"]
Values = Float[Tensor, "b kv s d"]
PackedKeys = UInt8[Tensor, "b kv s bytes"]
Levels = Float[Tensor, "b kv s r"]
Indices = Int[Tensor, "b sets t k"]
"""Cache slots, ascending, -1 padded; ``sets`` is Hkv, or H where every query head selects for itself."""
PerHeadRow = Float[Tensor, "b h t"]
