"""What layers have made of tokens that generation has been through: the keys and values of transformers' attention."""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache


class _Keys(DynamicCache):
    """Of one worker's layers. How many tokens they are of is told, as the first layer may be another worker's."""

    known = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.known

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.known + query_length, 0


class Past:
    """The past of several sequences, which may change places or take each other's from one forward to the next, as in a beam search.

    Args:
        encoder: whether the layers are an encoder–decoder's.

    Attributes:
        cache: what transformers' layers are called with.
    """

    cache: Cache

    def __init__(self, *, encoder: bool = False) -> None:
        self.encoder = encoder
        self.forget()

    @property
    def known(self) -> int:
        """Tokens of each sequence that the layers have been through."""
        return self._keys.known

    def forget(self) -> None:
        """Begin anew: the next forward takes all tokens."""
        self._rows: Tensor | None = None
        self._keys = _Keys()
        self.cache = EncoderDecoderCache(self._keys, DynamicCache()) if self.encoder else self._keys

    def begin(self, rows: Tensor) -> None:
        """These sequences are next: go on from those that they begin with, or forget all where one begins with none.

        Args:
            rows: (sequences, 1 + time): what a sequence belongs to, and its tokens.
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
        """The layers have been through these."""
        self._rows, self._keys.known = rows, rows.shape[1] - 1

    def _select(self, rows: Tensor) -> None:
        caches = (self.cache.self_attention_cache, self.cache.cross_attention_cache) if self.encoder else (self.cache,)  # type: ignore[attr-defined]
        for layer in (layer for cache in caches for layer in cache.layers if layer.is_initialized):
            layer.keys, layer.values = (part[rows.to(part.device)] for part in (layer.keys, layer.values))
