"""AdamW, or Muon and AdamW, on a worker's own parameters; one global gradient norm."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rayllp.config import OptimizerSettings
from rayllp.engine.block import Block
from rayllp.engine.muon import Muon

MOMENTS: dict[type, tuple[str, ...]] = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}
"""By optimizer, the averages that it keeps of each parameter, of the parameter's shape."""


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then cosine decay to `min_lr_ratio` of it at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - 1 - settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine)


class Optimizer:
    """What updates a worker's parameters: AdamW, or Muon for its layers' matrices and AdamW for all else.

    A parameter belongs to one worker (of each replica), and so does its state: nothing is sent.
    """

    def __init__(self, block: Block, settings: OptimizerSettings) -> None:
        matrices = block.matrices if settings.name == "muon" else []
        theirs = {id(p) for p in matrices}
        others = [p for p in block.parameters.values() if id(p) not in theirs]
        self._parts: list[tuple[torch.optim.Optimizer, float]] = []
        if others:
            self._parts.append((_build_adamw(others, settings), 1.0))
        if matrices:
            self._parts.append((_build_muon(matrices, block, settings), (settings.muon_lr or settings.lr) / settings.lr))
        self._of = {p: part for part, _ in self._parts for group in part.param_groups for p in group["params"]}

    def step(self, lr: float) -> None:
        """Update all parameters that have a gradient.

        Args:
            lr: AdamW's learning rate in this step; Muon's is in the ratio of the two peaks to it.
        """
        for part, ratio in self._parts:
            for group in part.param_groups:
                group["lr"] = lr * ratio
            part.step()

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for parameter in self._of:
            parameter.grad = None

    def moments_of(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Names of the averages, of the parameter's shape, that its state holds once a step is done."""
        return MOMENTS[type(self._of[parameter])]

    def counts_steps(self, parameter: nn.Parameter) -> bool:
        """Whether its state also has "step", the number of steps done."""
        return type(self._of[parameter]) is torch.optim.AdamW

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Its averages and, where they are counted, its "step"; nothing before the first one."""
        return self._of[parameter].state.get(parameter, {})

    def set_state(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Put a copy of what `state_of` gave back: averages on the parameter's device, the step on the host, where AdamW wants it."""
        kept = {part: value.clone() if part == "step" else value.to(parameter.device, copy=True) for part, value in state.items()}
        if kept:
            self._of[parameter].state[parameter] = kept
        else:
            self._of[parameter].state.pop(parameter, None)


def _build_adamw(parameters: Sequence[nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW; weight decay on tensors of two or more dimensions only.

    On CPUs as one operation a parameter, which takes a fifth of the time of torch's default there; on GPUs torch's default is fast.
    """
    decayed, others = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    on_cpu = all(p.device.type == "cpu" for p in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=on_cpu or None
    )


def _build_muon(matrices: Sequence[nn.Parameter], block: Block, settings: OptimizerSettings) -> Muon:
    """Muon in the precision that layers are computed in."""
    precision = torch.bfloat16 if block.config.dtype == "bfloat16" else block.dtype
    return Muon(matrices, precision=precision, momentum=settings.momentum, weight_decay=settings.weight_decay)


def squared_gradient_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Sum of squares of all gradients, a float64 scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
