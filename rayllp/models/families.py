"""Families: model types of transformers under names of their own, with what the types' configurations do not say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from rayllp.config.network import Task


@dataclass(frozen=True)
class Family:
    """A model type of transformers, and how a new model of it differs from the type's defaults.

    Attributes:
        model_type: transformers' name of the type; None: what model.architecture or the checkpoint says.
        residual_outputs: names, within a layer, of the projections that write into the residual stream. model.initialisation=scaled divides
            them, `deep` multiplies them.
        inner: names of the MLP and value projections, which `deep` multiplies as well.
        joint: those of `inner` that make queries, keys and values in one; only their columns for the values are multiplied.
        scaled: True if transformers' own initialisation divides the residual outputs by √(2L) already.
        heads: what model.head may choose besides the family's own task.
        feed_forward: the inner size of an MLP, over the width, where model.feed_forward is not set.
        positions_after_pad: True if positions are counted from the padding id on, as RoBERTa counts them.
        undropped: dropout rates of the configuration that model.dropout does not set; they are 0.
        fields: further fields of a new model's configuration.
    """

    model_type: str | None = None
    residual_outputs: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    joint: tuple[str, ...] = ()
    scaled: bool = False
    heads: tuple[Task, ...] = ()
    feed_forward: Fraction = Fraction(4)
    positions_after_pad: bool = False
    undropped: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    def unused_positions(self, pad: int | None) -> int:
        """Return how many rows of the position table no token uses, given the padding id."""
        return (pad or 0) + 1 if self.positions_after_pad else 0


def _roberta(*heads: Task) -> Family:
    return Family(
        "roberta-prelayernorm", ("attention.output.dense", "output.dense"), ("attention.self.value", "intermediate.dense"),
        heads=heads, positions_after_pad=True, fields={"type_vocab_size": 1},
    )  # fmt: skip


FAMILIES: dict[str, Family | str] = {
    "gpt2": Family(
        "gpt2", ("attn.c_proj", "mlp.c_proj"), ("attn.c_attn", "mlp.c_fc"), joint=("attn.c_attn",), scaled=True,
    ),
    "llama": Family(
        "llama", ("self_attn.o_proj", "mlp.down_proj"), ("self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj"), feed_forward=Fraction(8, 3),
    ),
    "bert": _roberta("sentences"),
    "mc": _roberta(),
    "vit": Family("vit", ("attention.o_proj", "mlp.fc2"), ("attention.v_proj", "mlp.fc1")),
    "mt": Family(
        "mbart", ("self_attn.out_proj", "fc2"), ("self_attn.v_proj", "fc1"), undropped=("activation_dropout",),
        fields={"scale_embedding": True},
    ),
}  # fmt: skip
"""What model.family may name: a family, or the "module:NAME" of a `Family`, or of an `Architecture` class with `from_settings`."""
