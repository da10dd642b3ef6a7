"""Settings of the network: the model, its buffer layers, its step sizes, and its depth during training."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rayllp.config.base import Settings

Task = Literal["causal", "masked", "words", "sentences", "images", "translation"]
TASKS: dict[str, Task] = {"bert": "masked", "mc": "words", "vit": "images", "mt": "translation"}
"""The task of each family; all other families do causal language modelling."""
ADAPTERS = ("*.lora_A.*", "*.lora_B.*")
"""Patterns of the full names of adapters' parameters."""
ANY_ARCHITECTURE = "transformers"
"""Value of model.family where `model.architecture` or a checkpoint chooses the model type."""


class LoRASettings(Settings):
    """Low-rank adapters on the layers' linear maps (arXiv:2106.09685), by peft."""

    rank: int = Field(8, ge=1, description="of the adapters")
    alpha: float = Field(16.0, gt=0, description="the adapters' output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the adapters")
    targets: tuple[str, ...] | None = Field(None, description="names of linear maps, such as [q_proj, v_proj]; default all of a layer")
    from_pretrained: str | None = Field(None, description="folder of adapters as peft stores them, to start from")


class ModelSettings(Settings):
    """The model that is trained."""

    family: str = Field("gpt2", description="a preset; `rayllp.models.families()` lists them")
    architecture: str | None = Field(
        None, description="instead of a family: any model type of transformers, such as qwen3; default with from_pretrained: its own"
    )
    config_overrides: dict[str, Any] = Field({}, description="of an architecture: further fields of transformers' configuration")
    layers: int = Field(20, ge=1, description="all layers, buffers included")
    width: int = Field(64, ge=1, description="size of the residual stream")
    heads: int = Field(4, ge=1, description="attention heads; must divide the width")
    dropout: float = Field(0.0, ge=0, lt=1, description="embedding, attention and residual dropout")
    tie_embeddings: bool = Field(True, description="the head shares the token embedding's weight")
    feed_forward: int | None = Field(None, ge=1, description="inner size of the MLPs; default 4 × width (llama: 8/3 × width)")
    kv_heads: int | None = Field(None, ge=1, description="key and value heads of llama's grouped-query attention; default heads")
    patch_size: int = Field(4, ge=1, description="of vit, in pixels")
    encoder_layers: int | None = Field(None, ge=1, description="of mt, out of model.layers; default half")
    head: Literal["auto", "causal", "masked", "words", "sentences", "images", "translation"] = Field(
        "auto", description="what is learnt; auto: the family's own, an architecture's checkpoint's, or causal language modelling"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the loss, where targets are classes or tokens")
    initialisation: Literal["default", "deep", "scaled"] = Field(
        "default", description="default: transformers'; deep: MLP, value, output weights times √(log 2L); scaled: outputs over √(2L)"
    )
    from_pretrained: str | None = Field(None, description="folder or name of a transformers checkpoint to start from")

    lora: LoRASettings | None = Field(None, description="train adapters alone, all else frozen; `{}` for the defaults")
    train: tuple[str, ...] | None = Field(
        None, description="patterns of parameters' full names, such as ['*.norm*', 'lm_head.*']: all others are frozen (lora: beside it)"
    )

    def trains(self, name: str) -> bool:
        """True if the parameter of this full name is trained rather than frozen."""
        if self.lora is None and self.train is None:
            return True
        return any(fnmatchcase(name, pattern) for pattern in (*(self.train or ()), *(ADAPTERS if self.lora is not None else ())))

    @model_validator(mode="before")
    @classmethod
    def _architecture_is_no_family(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("architecture") is None:
            return values
        family = values.get("family")
        if family not in (None, ANY_ARCHITECTURE):
            raise ValueError(f"architecture {values['architecture']!r} and family {family!r} are both set: choose one")
        return {**values, "family": ANY_ARCHITECTURE}

    @property
    def task(self) -> Task:
        """What is learnt; it decides which kind of data is read."""
        return TASKS.get(self.family, "causal") if self.head == "auto" else self.head

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelSettings":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by {self.heads} heads: use model.heads that divides model.width")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide among kv_heads={self.kv_heads}: use a divisor of model.heads")
        if self.family == "llama" and self.width // self.heads % 2:
            raise ValueError(
                f"heads of size {self.width // self.heads} (width / heads) are odd, and rotary positions turn pairs: make it even"
            )
        return self


class BufferSettings(Settings):
    """Buffer layers: layers at both ends with their own Δt, solved exactly (arXiv:2601.09026, appendix B).

    By MGRIT they are outside the parallel solve, on the first and the last worker. By windows they are part of it, as windows of one layer.
    """

    open: int = Field(2, ge=0, description="layers before the middle; by MGRIT on the first worker, outside the solve")
    close: int = Field(2, ge=0, description="layers after it; by MGRIT on the last worker")


class StepSettings(Settings):
    """Step sizes Δt of the layers: x + Δt·(layer(x) − x)."""

    middle: float | str = Field("1/N", description='a number, or "T/N" with N the middle layers, such as "1/N"')
    buffer: float = Field(1.0, gt=0, description="of buffer layers")

    @field_validator("middle")
    @classmethod
    def _number_or_fraction(cls, value: float | str) -> float | str:
        if isinstance(value, str):
            head, _, tail = value.partition("/")
            try:
                time = float(head)
            except ValueError:
                time = -1.0
            if tail.strip() != "N" or not 0 < time < math.inf:
                raise ValueError(f'step.middle {value!r}: give a positive number, or "T/N" such as "1/N"')
        elif value <= 0:
            raise ValueError(f"step.middle {value}: must be positive")
        return value


class NestedSettings(Settings):
    """Depth by nested iteration: train a shallow network, prolong it, and continue at the new depth (arXiv:1912.08974)."""

    factors: tuple[int, ...] = Field((), description="layers that a middle layer becomes at each deepening; none: deep from the start")
    at: tuple[int, ...] = Field((), description="steps before which the deepenings come, one a factor")

    @model_validator(mode="after")
    def _one_step_a_factor(self) -> "NestedSettings":
        factors, at = list(self.factors), list(self.at)
        if len(factors) != len(at):
            raise ValueError(f"{len(factors)} factors {factors} at {len(at)} steps {at}: give as many of nested.factors as of nested.at")
        if any(factor < 2 for factor in factors):
            raise ValueError(f"factors {factors}: every factor must be at least 2")
        if any(late <= early for early, late in zip([0, *at], at, strict=False)):
            raise ValueError(f"at {at}: steps must be positive and increase, such as [300, 600]")
        return self
