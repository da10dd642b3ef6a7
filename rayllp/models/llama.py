"""Llama and its family: decoder-only, RMSNorm, rotary positions, grouped-query attention, gated MLP."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rayllp.config import TrainConfig
from rayllp.data.base import Facts, Inputs
from rayllp.models.metrics import Perplexity
from rayllp.models.pretrained import Piece, PretrainedArchitecture, ids_and_positions, packed_mask
from rayllp.state import State


class Llama(PretrainedArchitecture):
    """transformers' LlamaForCausalLM."""

    model_class = LlamaForCausalLM
    embed_paths = ("model.embed_tokens",)
    layer_path = "model.layers.{}"
    head_paths = ("model.norm", "lm_head")
    outputs = ("self_attn.o_proj", "mlp.down_proj")
    inner = ("self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj")
    metric = Perplexity()
    _rotary: nn.Module | None = None

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: Facts) -> LlamaConfig:
        """Llama's configuration of these settings."""
        model = settings.model
        return LlamaConfig(
            vocab_size=facts.vocabulary, max_position_embeddings=settings.sequence_length, hidden_size=model.width,
            intermediate_size=model.feed_forward or 8 * model.width // 3, num_hidden_layers=model.layers,
            num_attention_heads=model.heads, num_key_value_heads=model.kv_heads or model.heads, attention_dropout=model.dropout,
            tie_word_embeddings=model.tie_embeddings, bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip

    def context(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """The mask of packed texts; cosines and sines of the rotary positions."""
        ids_BT, positions = ids_and_positions(inputs)
        if self._rotary is None:
            self._rotary = self.make(("model.rotary_emb",))["model.rotary_emb"].to(ids_BT.device)
        rotary = self._rotary(torch.empty(0, dtype=dtype, device=ids_BT.device), position_ids=positions)
        return packed_mask(self.config, inputs, dtype), rotary

    def enter(self, embed: Piece, inputs: Inputs, context: Any) -> Tensor:  # type: ignore[override]
        """Token ids (B, T) to states (B, T, D); positions are rotary, in the layers."""
        return embed["model.embed_tokens"](ids_and_positions(inputs)[0])

    def advance(self, index: int, layer: nn.Module, state: State, context: Any, common: nn.Module | None) -> State:
        """One layer, with the mask and the rotary positions of the context."""
        mask, rotary = context
        return layer(state, attention_mask=mask, position_embeddings=rotary)

    def leave(self, head: Piece, state: State, context: Any) -> Tensor:  # type: ignore[override]
        """Logits (B, T, vocabulary)."""
        return head["lm_head"](head["model.norm"](state))
