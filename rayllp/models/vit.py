"""ViT: image classification."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from rayllp.channel.base import StateSpec
from rayllp.config import TrainConfig
from rayllp.data.base import Facts, Inputs
from rayllp.errors import SettingsError
from rayllp.models.metrics import Accuracy
from rayllp.models.pretrained import Piece, PretrainedArchitecture
from rayllp.state import State, tensors


class ViT(PretrainedArchitecture):
    """transformers' ViTForImageClassification."""

    model_class = ViTForImageClassification
    embed_paths = ("vit.embeddings",)
    layer_path = "vit.layers.{}"
    head_paths = ("vit.layernorm", "classifier")
    outputs = ("attention.o_proj", "mlp.fc2")
    inner = ("attention.v_proj", "mlp.fc1")
    metric = Accuracy()

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: Facts) -> ViTConfig:
        """ViT's configuration of these settings and images.

        Raises:
            SettingsError: patches do not divide the images.
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
            id2label=dict(enumerate(facts.classes)), label2id={name: i for i, name in enumerate(facts.classes)},
        )  # fmt: skip

    @classmethod
    def positions(cls, config: ViTConfig) -> float:
        """No limit."""
        return math.inf  # images have one size, and data.sequence_length says nothing of it

    def state_spec(self, inputs: Inputs, dtype: torch.dtype, device: torch.device) -> StateSpec:
        """(batch, patches and the class token, width)."""
        (images_BCHW,) = tensors(inputs)
        patches = images_BCHW.shape[2] * images_BCHW.shape[3] // self.config.patch_size**2
        return StateSpec((torch.Size((images_BCHW.shape[0], patches + 1, self.config.hidden_size)),), (dtype,), device)

    def enter(self, embed: Piece, inputs: Inputs, context: Any) -> Tensor:  # type: ignore[override]
        """Images (B, C, H, W) to states of patches."""
        assert isinstance(inputs, Tensor)
        embeddings = embed["vit.embeddings"]
        return embeddings(inputs.to(next(embeddings.parameters()).dtype))

    def leave(self, head: Piece, state: State, context: Any) -> Tensor:  # type: ignore[override]
        """Logits (B, classes), from the class token."""
        assert isinstance(state, Tensor)
        return head["classifier"](head["vit.layernorm"](state)[:, 0])
