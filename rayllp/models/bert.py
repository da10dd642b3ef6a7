"""Encoders: BERT as RoBERTa-PreLayerNorm, for masked language modelling, words (MC) and sentences."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
    RobertaPreLayerNormForSequenceClassification,
    RobertaPreLayerNormForTokenClassification,
)
from transformers.masking_utils import create_bidirectional_mask

from rayllp.config import TrainConfig
from rayllp.data.base import Facts, Inputs
from rayllp.models.metrics import Accuracy, Confusion
from rayllp.models.pretrained import Piece, PretrainedArchitecture, positions_like
from rayllp.state import State

BASE = "roberta_prelayernorm"


class Encoder(PretrainedArchitecture):
    """What the three have in common."""

    embed_paths = (f"{BASE}.embeddings",)
    layer_path = BASE + ".encoder.layer.{}"
    outputs = ("attention.output.dense", "output.dense")
    inner = ("attention.self.value", "intermediate.dense")

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: Facts) -> RobertaPreLayerNormConfig:
        """RoBERTa-PreLayerNorm's configuration of these settings."""
        model, pad = settings.model, facts.pad or 0
        return RobertaPreLayerNormConfig(
            vocab_size=facts.vocabulary, hidden_size=model.width, num_hidden_layers=model.layers, num_attention_heads=model.heads,
            intermediate_size=model.feed_forward or 4 * model.width, hidden_dropout_prob=model.dropout,
            attention_probs_dropout_prob=model.dropout, max_position_embeddings=settings.sequence_length + pad + 1, type_vocab_size=1,
            pad_token_id=pad, bos_token_id=facts.bos, eos_token_id=facts.eos, tie_word_embeddings=model.tie_embeddings,
            id2label=dict(enumerate(facts.classes)) or None, label2id={name: i for i, name in enumerate(facts.classes)} or None,
        )  # fmt: skip

    @classmethod
    def positions(cls, config: RobertaPreLayerNormConfig) -> float:
        """Longest sequence; positions begin behind the padding's."""
        return config.max_position_embeddings - config.pad_token_id - 1

    def context(self, inputs: Inputs, dtype: torch.dtype) -> Tensor | None:
        """The mask that keeps attention off the padding."""
        assert isinstance(inputs, Tensor)
        return create_bidirectional_mask(
            config=self.config, inputs_embeds=positions_like(inputs, dtype), attention_mask=inputs != self.config.pad_token_id
        )

    def enter(self, embed: Piece, inputs: Inputs, context: Any) -> Tensor:  # type: ignore[override]
        """Token ids (B, T) to states (B, T, D)."""
        return embed[f"{BASE}.embeddings"](input_ids=inputs)

    def advance(self, index: int, layer: nn.Module, state: State, context: Any, common: nn.Module | None) -> State:
        """One layer, under the mask of padding."""
        return layer(state, attention_mask=context)


class BERT(Encoder):
    """transformers' RobertaPreLayerNormForMaskedLM."""

    model_class = RobertaPreLayerNormForMaskedLM
    head_paths = (f"{BASE}.LayerNorm", "lm_head")
    metric = Accuracy("masked_accuracy")

    def leave(self, head: Piece, state: State, context: Any) -> Tensor:  # type: ignore[override]
        """Logits of all positions (B, T, vocabulary)."""
        return head["lm_head"](head[f"{BASE}.LayerNorm"](state))


class Words(Encoder):
    """transformers' RobertaPreLayerNormForTokenClassification: one label a word."""

    model_class = RobertaPreLayerNormForTokenClassification
    head_paths = (f"{BASE}.LayerNorm", "dropout", "classifier")
    metric = Accuracy("word_accuracy")

    def leave(self, head: Piece, state: State, context: Any) -> Tensor:  # type: ignore[override]
        """Logits of all words (B, T, classes)."""
        return head["classifier"](head["dropout"](head[f"{BASE}.LayerNorm"](state)))


class Sentences(Encoder):
    """transformers' RobertaPreLayerNormForSequenceClassification."""

    model_class = RobertaPreLayerNormForSequenceClassification
    head_paths = (f"{BASE}.LayerNorm", "classifier")

    def __init__(self, config: Any, layers: int, settings: TrainConfig, facts: Facts, pretrained: str | None = None) -> None:
        super().__init__(config, layers, settings, facts, pretrained)
        self.metric = Confusion(len(facts.classes))

    def leave(self, head: Piece, state: State, context: Any) -> Tensor:  # type: ignore[override]
        """Logits of the sentences (B, classes), from their first position."""
        return head["classifier"](head[f"{BASE}.LayerNorm"](state))
