"""T5's relative position bias: the first layer of a list holds the table, and passes the bias it computes to all other layers."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rayllp.models.replay import Call, ExtraOutput

TABLE = "relative_attention_bias"
BIAS = 1
"""Position of the bias among the values that a layer returns. The next is the cross-attention's, which is zero: T5 has no table there."""


@dataclass(frozen=True)
class SharedBias:
    """The bias that the layers of one list share.

    Attributes:
        attention: full name of the module that holds the table.
        argument: position or name of the bias among a layer's arguments.
    """

    attention: str
    argument: str | int

    @classmethod
    def find(cls, model: nn.Module, paths: Sequence[str], calls: Sequence[Call]) -> "SharedBias | None":
        """Find the bias that the layers `paths` share, from how they are called; None if they share nothing, or something else."""
        places = {place for call in calls for place, value in call.values() if isinstance(value, ExtraOutput) and value.place == BIAS}
        tables = [name for name, _ in model.get_submodule(paths[0]).named_modules() if name.rpartition(".")[2] == TABLE]
        if len(places) != 1 or len(tables) != 1:
            return None
        attention = f"{paths[0]}.{tables[0]}".rpartition(".")[0]
        compute = getattr(model.get_submodule(attention), "compute_bias", None)
        # LongT5's attention within blocks has a bias of a block's length, which is not what is meant here.
        of_lengths = compute is not None and {"query_length", "key_length", "device"} <= inspect.signature(compute).parameters.keys()
        return cls(attention, places.pop()) if of_lengths else None

    @property
    def table(self) -> str:
        """Full name of the table."""
        return f"{self.attention}.{TABLE}"

    def of(self, model: nn.Module, table: nn.Module, state: Tensor, known: int = 0) -> Tensor:
        """Return the bias, shape (1, heads, time, known + time), for a state (batch, time, width) that follows `known` cached tokens."""
        attention: Any = copy.copy(model.get_submodule(self.attention))
        attention._modules = {TABLE: table}
        length = known + state.shape[1]
        return attention.compute_bias(length, length, device=state.device)[:, :, known:]

    def put(self, call: Call, bias: Tensor) -> Call:
        """Return a layer's call with this bias, and without anything else that layers pass on."""
        return call.replaced(lambda place, value: bias if place == self.argument else None if isinstance(value, ExtraOutput) else value)
