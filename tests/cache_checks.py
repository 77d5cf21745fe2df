"""What must hold of a cache of ours after any operation."""

import torch
from transformers import DynamicCache

from loki_attention.core.tail import TailSums, covered_tokens


def check_twins_and_sums(cache: DynamicCache, basis_layers: set[int], tolerance: float = 1e-9) -> None:
    """Twins equal a fresh encoding of the cached keys; sums equal fresh sums over the tokens they cover."""
    checked = 0
    for index in basis_layers:
        store = cache.layers[index].store
        twins, tail = store.twins, store.tail
        assert twins is not None
        assert tail is not None
        fresh = twins.encoder.encode_keys(store.keys[:, :, : twins.encoded])
        assert torch.equal(twins.packed[:, :, : twins.encoded], fresh)
        for b in range(store.keys.shape[0]):
            rank, covered = tail.rank[b], int(tail.covered[b])
            slots = ((rank >= 0) & (rank < covered)).nonzero().squeeze(-1)
            assert covered == int(covered_tokens((rank >= 0).sum()))
            for head in range(store.keys.shape[1]):
                keys, values = (tensor[b : b + 1, :, slots] for tensor in (store.keys, store.values))
                encoded = tail.encoder.project_keys(keys)[0, head, :, : tail.encoder.tail_rank]
                expected = TailSums.of(encoded, values[0, head])
                ours = [tail.sums.tokens[b, 0], *(part[b, head] for part in tail.sums[1:])]
                for mine, theirs in zip(ours, expected, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
                checked += 1
    assert checked
