"""GPT-2: decoder-only, pre-LN, learned positions."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from rayllp.config import TrainConfig
from rayllp.data.base import Facts, Inputs
from rayllp.models.metrics import Perplexity
from rayllp.models.pretrained import Piece, PretrainedArchitecture, ids_and_positions, packed_mask
from rayllp.state import State

# Shape suffixes: B batch, T time (tokens), D width, V vocabulary.


class GPT2(PretrainedArchitecture):
    """transformers' GPT2LMHeadModel."""

    model_class = GPT2LMHeadModel
    embed_paths = ("transformer.wte", "transformer.wpe", "transformer.drop")
    layer_path = "transformer.h.{}"
    head_paths = ("transformer.ln_f", "lm_head")
    outputs = ("attn.c_proj", "mlp.c_proj")
    inner = ("attn.c_attn", "mlp.c_fc")
    metric = Perplexity()

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: Facts) -> GPT2Config:
        """GPT-2's configuration of these settings."""
        model = settings.model
        return GPT2Config(
            vocab_size=facts.vocabulary, n_positions=settings.sequence_length, n_embd=model.width, n_layer=model.layers,
            n_head=model.heads, n_inner=model.feed_forward, embd_pdrop=model.dropout, attn_pdrop=model.dropout, resid_pdrop=model.dropout,
            tie_word_embeddings=model.tie_embeddings, bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip

    def context(self, inputs: Inputs, dtype: torch.dtype) -> Tensor | None:
        """The mask of packed texts."""
        return packed_mask(self.config, inputs, dtype)

    def enter(self, embed: Piece, inputs: Inputs, context: Any) -> Tensor:  # type: ignore[override]
        """Token ids (B, T) to states (B, T, D), positions added."""
        ids_BT, positions = ids_and_positions(inputs)
        x_BTD = embed["transformer.wte"](ids_BT) + embed["transformer.wpe"](positions)
        return embed["transformer.drop"](x_BTD)

    def advance(self, index: int, layer: nn.Module, state: State, context: Any, common: nn.Module | None) -> State:
        """One layer, under the mask of packed texts."""
        return layer(state) if context is None else layer(state, attention_mask=context)

    def leave(self, head: Piece, state: State, context: Any) -> Tensor:  # type: ignore[override]
        """Logits (B, T, vocabulary)."""
        return head["lm_head"](head["transformer.ln_f"](state))

    def rescale(self, layer: nn.Module) -> None:
        """Where "scaled" is set, transformers has done it."""
        if self.settings.model.initialisation != "scaled":
            super().rescale(layer)

    def weight_of(self, layer: nn.Module, name: str) -> Tensor:
        """Of query, key and value in one, the value's part."""
        weight = super().weight_of(layer, name)
        return weight[:, -self.settings.model.width :] if name == "attn.c_attn" else weight
