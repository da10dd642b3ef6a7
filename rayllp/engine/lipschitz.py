"""An estimate of each layer's Lipschitz constant at the state that the layer gets in a probing step.

A layer is x -> x + Δt·f(x) with f(x) = block(x) − x. The constant is the largest singular value σ of f's Jacobian J = ∂f/∂x for one
sequence. A coarse step uses f at its C-point for a whole interval of c_f layers. Meanwhile the state moves by up to c_f·Δt·‖f‖, and f
changes by up to σ times that. So MGRIT's error grows with c_f·Δt·σ, which must be small for its iterations to contract. Δt is left out of
the estimate: even for a buffer layer, whose Δt is 1, σ then tells what the layer would do as a middle layer.

The method is power iteration on JᵀJ. Jᵀu is the layer's vector-Jacobian product. Jv is a central difference of two forwards, since
PyTorch's fused attention has neither a forward-mode nor a second derivative, and a user's layer may use any kernel that has a first one.
The estimate is ‖Jᵀu‖ for the last unit vector u, so the error of the difference enters only through u's direction, and thus squared. The
estimate never exceeds σ; more iterations bring it closer.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from rayllp.engine.batch import StepBatch
from rayllp.engine.block import Block
from rayllp.keys import key
from rayllp.state import State, combine, like, squared_norm, subtract, tensors

POWER_ITERATIONS = 8
"""Number of power iterations."""
DIFFERENCE_ARM = 1e-3
"""Half the distance between the two points of the central difference, relative to the state's norm."""


def lipschitz_constant(f: Callable[[State], State], state: State, seed: int, iterations: int = POWER_ITERATIONS) -> float:
    """Return a lower estimate of the largest singular value of f's Jacobian at `state`.

    Args:
        f: state -> state of the same shapes; differentiable once.
        state: the point at which the Jacobian is taken.
        seed: seed of the start vector. It is drawn on the CPU, so that it is the same on every device.
        iterations: each costs two evaluations of f and one vector-Jacobian product.
    """
    inputs = tuple(part.detach().clone().requires_grad_() for part in tensors(state))
    with torch.enable_grad():
        outputs = tensors(f(like(state, inputs)))
    moving = [n for n, part in enumerate(outputs) if part.requires_grad]
    if not moving:
        return 0.0
    at = combine(Tensor.detach, like(state, inputs))
    arm = DIFFERENCE_ARM * (_norm(at) or 1.0)

    def transposed(u: State) -> State:
        seeds = [tensors(u)[n] for n in moving]
        found = torch.autograd.grad([outputs[n] for n in moving], inputs, seeds, retain_graph=True, materialize_grads=True)
        return like(state, found)

    def forward(v: State) -> State:
        with torch.no_grad():
            after, before = (f(combine(partial(torch.add, alpha=way * arm), at, v)) for way in (1, -1))
        return subtract(after, before)

    generator = torch.Generator().manual_seed(seed)
    v = combine(lambda part: torch.randn(part.shape, generator=generator).to(part), at)
    estimate = 0.0
    for _ in range(iterations):
        u = forward(_unit(v))
        size = _norm(u)
        if size == 0:
            return estimate
        v = transposed(_unit(u))
        estimate = _norm(v)
        if estimate == 0:
            return estimate
    return estimate


def estimate_layers(block: Block, batch: StepBatch, states: Mapping[int, State]) -> dict[int, float]:
    """Return the constants of this worker's layers, by index in the whole network.

    Args:
        block: this worker's layers.
        batch: the step's batch. The layers run with the dropout of its first sample, as in the step itself.
        states: inputs of the layers for that sample (`Block.recorded_inputs`); none where another replica has the sample.
    """
    if not states:
        return {}
    bound = block.bind(batch.part(slice(0, 1)))
    seeds = {n: key(block.config.seed, "lipschitz", n) for n in states}
    return {n: lipschitz_constant(partial(bound.increment, n), state, seeds[n]) for n, state in sorted(states.items())}


def _norm(state: State) -> float:
    return float(squared_norm(state).sqrt())


def _unit(state: State) -> State:
    size = squared_norm(state).sqrt()
    return combine(lambda part: part / size.to(part.dtype), state)
