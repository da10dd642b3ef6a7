"""GPT-2: decoder-only, pre-LN, learned positions."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from rayllp.config import TrainConfig
from rayllp.data.base import Facts, Inputs
from rayllp.models.metrics import Perplexity
from rayllp.models.pretrained import Piece, PretrainedArchitecture
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

    def enter(self, embed: Piece, inputs: Inputs, context: Any) -> Tensor:  # type: ignore[override]
        """Token ids (B, T) to states (B, T, D), positions added."""
        assert isinstance(inputs, Tensor)
        positions_T = torch.arange(inputs.shape[1], device=inputs.device)
        x_BTD = embed["transformer.wte"](inputs) + embed["transformer.wpe"](positions_T)
        return embed["transformer.drop"](x_BTD)

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
