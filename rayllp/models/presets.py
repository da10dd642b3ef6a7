"""Presets: configurations of a few transformers models from our settings, and the weights that each initialisation scales.

How they are cut into pieces and called is the same as for any other model (`transformer.py`).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedConfig,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
    RobertaPreLayerNormForSequenceClassification,
    RobertaPreLayerNormForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)

from rayllp.config import TrainConfig
from rayllp.data.base import DatasetFacts
from rayllp.errors import CheckpointError, SettingsError
from rayllp.models.model_types import at_depth, check_model_type, is_table_of, labels_of
from rayllp.models.transformer import Transformer

OURS = frozenset(
    "vocab_size id2label label2id pad_token_id bos_token_id eos_token_id decoder_start_token_id forced_eos_token_id use_cache".split()
)
"""Configuration fields that come from this run rather than from the checkpoint that it starts from."""


class Preset(Transformer):
    """Base of the presets. A subclass sets `model_class` and overrides `config_of`."""

    @classmethod
    def configuration(
        cls, settings: TrainConfig, facts: DatasetFacts, resumed: Mapping[str, Any] | None, pretrained: Mapping[str, Any] | None
    ) -> PreTrainedConfig:
        """Return a stored configuration with vocabulary, class names, token ids and dropout of this run; a new one if none is stored."""
        config = cls.config_of(settings, facts)
        if pretrained is not None:
            check_model_type(str(pretrained.get("model_type", "")), config.model_type, str(settings.model.from_pretrained))
        stored = resumed if pretrained is None else at_depth(pretrained, settings)
        return config if stored is None else _with_ours(type(config).from_dict(dict(stored)), config)

    @classmethod
    def check_sizes(cls, config: PreTrainedConfig, settings: TrainConfig) -> None:
        """Refuse settings that contradict the checkpoint's configuration."""
        has = {"layers": cls.count_layers(config), "width": config.hidden_size, "heads": config.num_attention_heads}
        for name, stored in has.items():
            wanted = getattr(settings.model, name)
            if wanted != stored:
                raise CheckpointError(
                    f"the checkpoint has {name} {stored}, but model.{name} is {wanted}: leave the setting out, or match it"
                )
        super().check_sizes(config, settings)

    @classmethod
    def count_layers(cls, config: PreTrainedConfig) -> int:
        """Return the number of layers, an encoder's and a decoder's together."""
        return int(config.num_hidden_layers)

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: DatasetFacts) -> PreTrainedConfig:
        """Return transformers' configuration for these settings and data."""
        raise NotImplementedError


class GPT2(Preset):
    """transformers' GPT2LMHeadModel: decoder-only, pre-LN, learned positions."""

    model_class = GPT2LMHeadModel
    outputs = ("attn.c_proj", "mlp.c_proj")
    inner = ("attn.c_attn", "mlp.c_fc")

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: DatasetFacts) -> GPT2Config:
        """Return GPT-2's configuration for these settings."""
        model = settings.model
        return GPT2Config(
            vocab_size=facts.vocabulary, n_positions=settings.sequence_length, n_embd=model.width, n_layer=model.layers,
            n_head=model.heads, n_inner=model.feed_forward, embd_pdrop=model.dropout, attn_pdrop=model.dropout, resid_pdrop=model.dropout,
            tie_word_embeddings=model.tie_embeddings, bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip

    def rescale(self, layer: nn.Module) -> None:
        """Scale the output projections, unless model.initialisation is "scaled", which transformers has applied already."""
        if self.settings.model.initialisation != "scaled":
            super().rescale(layer)

    def weight_of(self, layer: nn.Module, name: str) -> Tensor:
        """Return a module's weight; of the joint query, key and value projection, only the value's part."""
        weight = super().weight_of(layer, name)
        return weight[:, -self.settings.model.width :] if name == "attn.c_attn" else weight


class Llama(Preset):
    """transformers' LlamaForCausalLM: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

    model_class = LlamaForCausalLM
    outputs = ("self_attn.o_proj", "mlp.down_proj")
    inner = ("self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj")

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: DatasetFacts) -> LlamaConfig:
        """Return Llama's configuration for these settings."""
        model = settings.model
        return LlamaConfig(
            vocab_size=facts.vocabulary, max_position_embeddings=settings.sequence_length, hidden_size=model.width,
            intermediate_size=model.feed_forward or 8 * model.width // 3, num_hidden_layers=model.layers,
            num_attention_heads=model.heads, num_key_value_heads=model.kv_heads or model.heads, attention_dropout=model.dropout,
            tie_word_embeddings=model.tie_embeddings, bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip


class Encoder(Preset):
    """Base of the three BERT-like presets, whose layers are those of RoBERTa-PreLayerNorm."""

    outputs = ("attention.output.dense", "output.dense")
    inner = ("attention.self.value", "intermediate.dense")

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: DatasetFacts) -> RobertaPreLayerNormConfig:
        """Return RoBERTa-PreLayerNorm's configuration for these settings."""
        model, pad = settings.model, facts.pad or 0
        return RobertaPreLayerNormConfig(
            vocab_size=facts.vocabulary, hidden_size=model.width, num_hidden_layers=model.layers, num_attention_heads=model.heads,
            intermediate_size=model.feed_forward or 4 * model.width, hidden_dropout_prob=model.dropout,
            attention_probs_dropout_prob=model.dropout, max_position_embeddings=settings.sequence_length + pad + 1, type_vocab_size=1,
            pad_token_id=pad, bos_token_id=facts.bos, eos_token_id=facts.eos, tie_word_embeddings=model.tie_embeddings,
            **labels_of(facts),
        )  # fmt: skip

    @classmethod
    def positions(cls, config: RobertaPreLayerNormConfig) -> float:
        """Return the longest sequence's length; positions are counted from the padding id on."""
        return config.max_position_embeddings - config.pad_token_id - 1


class BERT(Encoder):
    """transformers' RobertaPreLayerNormForMaskedLM."""

    model_class = RobertaPreLayerNormForMaskedLM


class Words(Encoder):
    """transformers' RobertaPreLayerNormForTokenClassification: one label per word."""

    model_class = RobertaPreLayerNormForTokenClassification


class Sentences(Encoder):
    """transformers' RobertaPreLayerNormForSequenceClassification."""

    model_class = RobertaPreLayerNormForSequenceClassification


class ViT(Preset):
    """transformers' ViTForImageClassification."""

    model_class = ViTForImageClassification
    outputs = ("attention.o_proj", "mlp.fc2")
    inner = ("attention.v_proj", "mlp.fc1")

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: DatasetFacts) -> ViTConfig:
        """Return ViT's configuration for these settings and images.

        Raises:
            SettingsError: the patch size does not divide the images.
        """
        model = settings.model
        assert facts.image is not None
        channels, height, width = facts.image
        if height % model.patch_size or width % model.patch_size:
            raise SettingsError(
                f"images of {height} × {width} pixels do not divide into patches of {model.patch_size}: set model.patch_size to a divisor"
            )
        return ViTConfig(
            image_size=(height, width), patch_size=model.patch_size, num_channels=channels, hidden_size=model.width,
            num_hidden_layers=model.layers, num_attention_heads=model.heads, intermediate_size=model.feed_forward or 4 * model.width,
            hidden_dropout_prob=model.dropout, attention_probs_dropout_prob=model.dropout,
            **labels_of(facts),
        )  # fmt: skip


class MT(Preset):
    """mBART's pre-LN encoder–decoder as one sequence of layers (arXiv:2601.09026, section 3.1).

    The state holds both halves, Z = [X, Y]: the encoder's N_enc layers change only X, the decoder's only Y, reading the final X by
    cross-attention. transformers applies the encoder's final norm once; here every decoder layer applies it to the X that it reads, so that
    all layers stay residual. That norm is the only parameter which several layers share.
    """

    model_class = MBartForConditionalGeneration
    outputs = ("self_attn.out_proj", "fc2")
    inner = ("self_attn.v_proj", "fc1")

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: DatasetFacts) -> MBartConfig:
        """Return mBART's configuration for these settings."""
        model = settings.model
        encoder = model.encoder_layers or model.layers // 2
        inner = model.feed_forward or 4 * model.width
        return MBartConfig(
            vocab_size=facts.vocabulary, max_position_embeddings=settings.sequence_length, d_model=model.width,
            encoder_layers=encoder, decoder_layers=model.layers - encoder, encoder_attention_heads=model.heads,
            decoder_attention_heads=model.heads, encoder_ffn_dim=inner, decoder_ffn_dim=inner, dropout=model.dropout,
            attention_dropout=model.dropout, activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0, scale_embedding=True,
            pad_token_id=facts.pad, bos_token_id=facts.bos, eos_token_id=facts.eos, decoder_start_token_id=facts.bos,
            forced_eos_token_id=facts.eos, tie_word_embeddings=model.tie_embeddings,
        )  # fmt: skip

    @classmethod
    def count_layers(cls, config: Any) -> int:
        """Return the number of encoder and decoder layers."""
        return int(config.encoder_layers + config.decoder_layers)


def _with_ours(merged: PreTrainedConfig, config: PreTrainedConfig) -> PreTrainedConfig:
    """Overwrite in `merged` what the run decides (vocabulary, class names, token ids, dropout) by the values of `config`.

    An embedding somewhat larger than the tokenizer keeps its size: many checkpoints pad theirs to a multiple that suits the hardware.
    """
    rows, tokens = getattr(merged, "vocab_size", 0), getattr(config, "vocab_size", 0)
    for name in vars(config):
        if "drop" in name or name in OURS:
            setattr(merged, name, getattr(config, name))
    if is_table_of(rows, tokens):
        merged.vocab_size = rows
    return merged
