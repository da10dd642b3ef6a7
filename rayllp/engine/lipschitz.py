"""How steep each layer is: an estimate of its Lipschitz constant at the state that it has in a probing step.

A layer is x -> x + Δt·f(x), f(x) = block(x) − x. What is estimated is the largest singular value σ of f's Jacobian J = ∂f/∂x, for one
sequence. A coarse step holds f at its C-point's value while c_f layers go by; the state moves by up to c_f·Δt·‖f‖ meanwhile, and f by up
to σ times that. So c_f·Δt·σ is what MGRIT's error grows with, and what must stay small for its iterations to contract. Δt is left
out: a layer's σ then says what the layer would do in the middle, where all have the middle's Δt, also while it is a buffer with Δt = 1.

Power iteration on JᵀJ. Jᵀu is the layer's vector-Jacobian product. Jv is a central difference of two forwards: PyTorch's fused attention
has no forward-mode derivative and no second one, and an adapter's layer may hold any kernel that has a first one. The estimate is ‖Jᵀu‖ of
the last unit vector u, so the difference's error enters only through u's direction, hence squared. It is never above σ: what is missing
is iterations.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rayllp.data.base import Inputs
from rayllp.engine.block import Block
from rayllp.keys import key
from rayllp.state import State, combine, like, squared_norm, subtract, tensors

ITERATIONS = 8
DIFFERENCE = 1e-3
"""Length of the central difference's arm over the state's norm."""


def lipschitz_constant(f: Callable[[State], State], state: State, seed: int, iterations: int = ITERATIONS) -> float:
    """The largest singular value of f's Jacobian at `state`, from below.

    Args:
        f: state -> state of the same shapes; differentiable once.
        seed: of the start vector, which is drawn on the CPU and so is the same on every device.
        iterations: each costs two evaluations of f and one vector-Jacobian product.
    """
    inputs = tuple(part.detach().clone().requires_grad_() for part in tensors(state))
    with torch.enable_grad():
        outputs = tensors(f(like(state, inputs)))
    moving = [n for n, part in enumerate(outputs) if part.requires_grad]
    if not moving:
        return 0.0
    at = combine(Tensor.detach, like(state, inputs))
    arm = DIFFERENCE * (_norm(at) or 1.0)

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


def estimate_layers(block: Block, step: int, inputs: Inputs) -> dict[int, float]:
    """Constants of this worker's layers, by index in the whole network, at the states that `block.watched` holds.

    Args:
        inputs: of the step's batch, of which the first sequence counts. Its dropout masks are the step's own.
    """
    if not block.watched:  # another replica has the sequence
        return {}
    block.begin(step, (0,), combine(lambda part: part[:1], inputs), training=True)
    seeds = {n: key(block.config.seed, "lipschitz", n) for n in block.watched}
    return {n: lipschitz_constant(partial(block.increment, n), state, seeds[n]) for n, state in sorted(block.watched.items())}


def _norm(state: State) -> float:
    return float(squared_norm(state).sqrt())


def _unit(state: State) -> State:
    size = squared_norm(state).sqrt()
    return combine(lambda part: part / size.to(part.dtype), state)
