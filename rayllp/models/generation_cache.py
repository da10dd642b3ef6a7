"""The cache of generation: keys and values that a worker's attention layers have computed for earlier tokens."""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache


class _Keys(DynamicCache):
    """The cache of one worker's layers. Its length is set from outside: transformers would take it from layer 0, which may be elsewhere."""

    known = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.known

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.known + query_length, 0


class GenerationCache:
    """The cache for several sequences. Between forwards, sequences may change places or continue from one another, as in beam search.

    Args:
        has_encoder: True if the layers belong to an encoder–decoder.

    Attributes:
        cache: the object that transformers' layers are called with.
    """

    cache: Cache

    def __init__(self, *, has_encoder: bool = False) -> None:
        self.has_encoder = has_encoder
        self.forget()

    @property
    def known(self) -> int:
        """Number of tokens per sequence that the cache holds."""
        return self._keys.known

    def forget(self) -> None:
        """Empty the cache: the next forward takes all tokens."""
        self._rows: Tensor | None = None
        self._keys = _Keys()
        self.cache = EncoderDecoderCache(self._keys, DynamicCache()) if self.has_encoder else self._keys

    def begin(self, rows: Tensor) -> None:
        """Prepare for the next forward, of these sequences: select the cached rows that they continue, or forget all if one continues none.

        Args:
            rows: shape (sequences, 1 + time): a number that says which input a sequence belongs to, then its tokens.
        """
        if self._rows is None:
            return
        length = self._rows.shape[1]
        same = (rows[:, None, :length] == self._rows).all(-1) if rows.shape[1] > length else torch.zeros(1, 1, dtype=torch.bool)
        if same.any(1).all():
            self._select(same.int().argmax(1))
        else:
            self.forget()

    def end(self, rows: Tensor) -> None:
        """Record that the layers have been evaluated on these sequences."""
        self._rows, self._keys.known = rows, rows.shape[1] - 1

    def _select(self, rows: Tensor) -> None:
        caches = (self.cache.self_attention_cache, self.cache.cross_attention_cache) if self.has_encoder else (self.cache,)  # type: ignore[attr-defined]
        for layer in (layer for cache in caches for layer in cache.layers if layer.is_initialized):
            layer.keys, layer.values = (part[rows.to(part.device)] for part in (layer.keys, layer.values))
