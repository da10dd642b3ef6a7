"""The exact forward pass of the network, whatever the training mode, for evaluation, generation and diagnosis."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rayllp.channel.base import MessageTag, StateSpec
from rayllp.data.base import Inputs
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.propagators import ExactPropagator
from rayllp.mgrit import Communicator, MGRITSolver, Problem
from rayllp.mgrit.relay import solve_in_order
from rayllp.state import State


class ExactForward:
    """One worker's end of the exact forward: layer after layer, worker after worker. All workers of the group call it together.

    Attributes:
        group: this worker's layers, and the channel to the other workers.
        remembers: True if this worker's layers can use a cache of past tokens in generation; None until that is tested.
    """

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        self.remembers: bool | None = None
        self._hierarchy, self._options = group.config.hierarchy(1), group.config.solver_options(1)
        self._placement = group.config.cyclic_placement if group.config.placement == "cyclic" else None

    def __call__(self, inputs: Inputs, tag: MessageTag, *, last_only: bool = False, past: Any = None) -> Tensor | None:
        """Return the network's outputs, without dropout, on the last worker; None on all others.

        Args:
            inputs: the network's inputs.
            tag: names the forward in errors.
            last_only: return the output at the last position only.
            past: in generation, the architecture's cache of the inputs' first tokens. The forward then takes only the other tokens.
        """
        block = self.group.block
        with torch.no_grad():
            bound = block.bind_for_evaluation(inputs, past=past)
            entered = bound.enter(inputs) if block.first else None
            spec = self.group.spec(inputs)
            if past is not None:
                *others, shape = spec.shapes
                spec = replace(spec, shapes=(*others, torch.Size((shape[0], shape[1] - past.known, *shape[2:]))))
            output = self.propagate(ExactPropagator(bound), entered, spec, tag)
            return bound.leave(output, last_only=last_only) if output is not None else None

    def propagate(self, propagator: ExactPropagator, entered: State | None, spec: StateSpec, tag: MessageTag) -> State | None:
        """Take a state through all layers of the solve.

        Args:
            propagator: the steps of this worker's layers.
            entered: the state before the first of them, on the first worker.
            spec: shapes and dtypes of a state.
            tag: names the forward in errors.

        Returns: the state after the last of them, on the last worker; None on all others.
        """
        communicator = Communicator(self.group.channel, tag)
        if self._placement is not None:
            return solve_in_order(self._placement.owners, propagator, communicator, entered, spec)
        return MGRITSolver(Problem(self._hierarchy, propagator, spec), self._options, communicator).solve(entered).output
