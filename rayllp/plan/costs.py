"""What the parts of a step cost."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds.

    Attributes:
        forward: a layer's forward without a graph.
        record: a layer's forward with its graph.
        input_gradient: a layer's vector-Jacobian product.
        full_gradient: that, and the gradients of its parameters.
        enter, enter_gradient: embedding (without opening buffers).
        leave: head and loss, forward and gradient (without closing buffers).
        update: gradient norm, clipping and optimizer, a layer.
        message: a state's way to the neighbour.
    """

    forward: float
    record: float
    input_gradient: float
    full_gradient: float
    enter: float = 0.0
    enter_gradient: float = 0.0
    leave: float = 0.0
    update: float = 0.0
    message: float = 0.0

    @property
    def kinds(self) -> dict[str, float]:
        """By kind of a layer's work, as schedules name it."""
        names = ("forward", "record", "input_gradient", "full_gradient")
        return {name: getattr(self, name) for name in names}
