"""Randomness keyed by (seed, step, layer, sample), never by worker.

Two needs. Initialisation: a layer's weights depend on the seed and its index alone. Dropout: a layer's mask must be the same in every
sweep of one training step, or MGRIT does not converge (arXiv:2601.09026, appendix C), and the same however the batch is cut into
microbatches or replicas, so that any mesh trains the same network.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rayllp.keys import key

functional = nn.functional
_default_generator = threading.RLock()


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Run a block with torch's default CPU generator seeded by `parts`; the generator's state is restored."""
    # The default generator belongs to the process: workers that are threads must not seed it under each other.
    with _default_generator, torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(*parts))
        yield


class FrozenRandomness(TorchFunctionMode):
    """Makes every dropout inside depend on (key, call, sample) alone, without changing the module.

    Intercepts nn.Dropout and its kin, scaled_dot_product_attention's dropout, and draws of torch.rand, rand_like and bernoulli
    (drop-path). Dimension 0 must be the batch.

    Args:
        parts: what the masks depend on: seed, step, layer.
        samples: index of each sequence within the step's global batch.
    """

    def __init__(self, parts: tuple[object, ...], samples: tuple[int, ...]) -> None:
        super().__init__()
        self.parts, self.samples, self.calls = parts, samples, 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func)
        return func(*args, **(kwargs or {})) if handler is None else handler(self, *args, **(kwargs or {}))

    def uniform(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers: row i from the generator of sample i."""
        self.calls += 1
        if not shape or shape[0] != len(self.samples):
            raise RuntimeError(
                f"a random tensor of shape {tuple(shape)} was drawn in a layer, but the batch has {len(self.samples)} sequences: "
                "randomness can be frozen only where dimension 0 is the batch"
            )
        out = torch.empty(shape, dtype=dtype, device=device)
        generator = torch.Generator(device)
        for row, sample in zip(out, self.samples, strict=True):
            row.uniform_(generator=generator.manual_seed(key(*self.parts, self.calls, sample)))
        return out

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """nn.functional.dropout, with the mask of this layer and sample."""
        if not training or p == 0:
            return input
        keep = self.uniform(tuple(input.shape), input.device) >= p
        return input * keep.to(input.dtype).mul_(1 / (1 - p))

    def feature_dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Of whole channels."""
        if not training or p == 0:
            return input
        keep = self.uniform(tuple(input.shape[:2]), input.device) >= p
        return input * keep.to(input.dtype).div_(1 - p).reshape(*input.shape[:2], *[1] * (input.ndim - 2))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """scaled_dot_product_attention; with dropout, its definition written out so that the mask is ours."""
        if dropout_p == 0:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        weights = query @ key.transpose(-2, -1) * (scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
        if is_causal:
            allowed = torch.ones(weights.shape[-2:], dtype=torch.bool, device=query.device).tril()
            weights = weights.masked_fill(~allowed, -math.inf)
        if attn_mask is not None:
            weights = weights.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else weights + attn_mask
        return self.dropout(weights.softmax(-1), dropout_p) @ value

    def rand(self, *size: Any, **options: Any) -> Tensor:
        """torch.rand, by key."""
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        dtype, device = options.get("dtype") or torch.get_default_dtype(), options.get("device") or torch.device("cpu")
        return self.uniform(shape, torch.device(device), dtype)

    def rand_like(self, input: Tensor, **options: Any) -> Tensor:
        """torch.rand_like, by key."""
        return self.uniform(tuple(input.shape), input.device, options.get("dtype") or input.dtype)

    def bernoulli(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        """torch.bernoulli, by key."""
        return (self.uniform(tuple(input.shape), input.device) < input).to(input.dtype)

    def bernoulli_(self, input: Tensor, p: float | Tensor = 0.5, **_: Any) -> Tensor:
        """Tensor.bernoulli_, by key."""
        return input.copy_((self.uniform(tuple(input.shape), input.device) < p).to(input.dtype))


_HANDLERS: dict[Any, Callable[..., Any]] = {
    functional.dropout: FrozenRandomness.dropout,
    torch.dropout: FrozenRandomness.dropout,
    functional.dropout1d: FrozenRandomness.feature_dropout,
    functional.dropout2d: FrozenRandomness.feature_dropout,
    functional.scaled_dot_product_attention: FrozenRandomness.attention,
    torch.rand: FrozenRandomness.rand,
    torch.rand_like: FrozenRandomness.rand_like,
    torch.bernoulli: FrozenRandomness.bernoulli,
    torch.Tensor.bernoulli: FrozenRandomness.bernoulli,
    torch.Tensor.bernoulli_: FrozenRandomness.bernoulli_,
}
