"""Machine translation: mBART's pre-LN encoder–decoder as one sequence of layers (arXiv:2601.09026, section 3.1).

The state stacks both, Z = [X, Y]: the first N_enc layers move only X, the others only Y, which reads X by cross-attention. X stays at
X_{N_enc}; the encoder's final norm, which transformers applies once, is applied by every decoder layer to the X it reads, so that
the layers stay residual blocks. It is the one parameter that several layers share.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MBartConfig, MBartForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask

from rayllp.channel.base import StateSpec
from rayllp.config import TrainConfig
from rayllp.data.base import Facts, Inputs
from rayllp.models.metrics import Perplexity
from rayllp.models.pretrained import Piece, PretrainedArchitecture, positions_like
from rayllp.state import State, tensors


class Masks(NamedTuple):
    """Attention masks of the encoder and of the cross-attention; the decoder's own attention is causal."""

    encoder: Tensor | None
    cross: Tensor | None


class MT(PretrainedArchitecture):
    """transformers' MBartForConditionalGeneration."""

    model_class = MBartForConditionalGeneration
    embed_paths = (
        "model.encoder.embed_tokens", "model.encoder.embed_positions", "model.encoder.layernorm_embedding",
        "model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.layernorm_embedding",
    )  # fmt: skip
    head_paths = ("model.decoder.layer_norm", "lm_head")
    layer_path = ""  # see layer_paths
    common_paths = ("model.encoder.layer_norm",)
    outputs = ("self_attn.out_proj", "fc2")
    inner = ("self_attn.v_proj", "fc1")
    metric = Perplexity()

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: Facts) -> MBartConfig:
        """mBART's configuration of these settings."""
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
        """Encoder and decoder together."""
        return int(config.encoder_layers + config.decoder_layers)

    @classmethod
    def layer_paths(cls, config: Any, layers: int) -> list[str]:
        """The encoder's layers, then the decoder's."""
        encoder = [f"model.encoder.layers.{n}" for n in range(config.encoder_layers)]
        return encoder + [f"model.decoder.layers.{n}" for n in range(config.decoder_layers)]

    def kind(self, index: int) -> str:
        """An encoder's layer or a decoder's."""
        return "encoder" if index < self.config.encoder_layers else "decoder"

    def state_spec(self, inputs: Inputs, dtype: torch.dtype, device: torch.device) -> StateSpec:
        """Z = [X, Y]: source states (B, S, D) and target states (B, T, D)."""
        shapes = tuple(torch.Size((*tokens_BT.shape, self.config.d_model)) for tokens_BT in tensors(inputs))
        return StateSpec(shapes, (dtype, dtype), device, bare=False)

    def context(self, inputs: Inputs, dtype: torch.dtype) -> Masks:
        """Masks of the encoder, the decoder and its cross-attention."""
        source_BS, target_BT = tensors(inputs)
        seen = source_BS != self.config.pad_token_id
        source = positions_like(source_BS, dtype)
        return Masks(
            encoder=create_bidirectional_mask(config=self.config, inputs_embeds=source, attention_mask=seen),
            cross=create_bidirectional_mask(
                config=self.config, inputs_embeds=positions_like(target_BT, dtype), attention_mask=seen, encoder_hidden_states=source
            ),
        )

    def enter(self, embed: Piece, inputs: Inputs, context: Any) -> State:  # type: ignore[override]
        """Source and target ids to Z."""
        return tuple(self._embed(embed, f"model.{side}", ids) for side, ids in zip(("encoder", "decoder"), tensors(inputs), strict=True))

    def _embed(self, embed: Piece, side: str, tokens_BT: Tensor) -> Tensor:
        x_BTD = embed[f"{side}.embed_tokens"](tokens_BT) + embed[f"{side}.embed_positions"](tokens_BT)
        training = embed.training
        return nn.functional.dropout(embed[f"{side}.layernorm_embedding"](x_BTD), p=self.config.dropout, training=training)

    def advance(self, index: int, layer: nn.Module, state: State, context: Masks, common: nn.Module | None) -> State:
        """An encoder's layer moves X; a decoder's moves Y and reads X under the encoder's last norm."""
        x_BSD, y_BTD = tensors(state)
        if index < self.config.encoder_layers:
            return layer(x_BSD, context.encoder), y_BTD
        assert isinstance(common, Piece)
        read_BSD = common["model.encoder.layer_norm"](x_BSD)
        y_BTD = layer(y_BTD, None, read_BSD, encoder_attention_mask=context.cross, use_cache=False)
        return x_BSD, y_BTD

    def leave(self, head: Piece, state: State, context: Any) -> Tensor:  # type: ignore[override]
        """Logits of the target (B, T, vocabulary), from Y."""
        return head["lm_head"](head["model.decoder.layer_norm"](tensors(state)[1]))
