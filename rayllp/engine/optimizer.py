"""Updates of a worker's own parameters by AdamW, SGD, Adafactor, or Muon with AdamW, and the moving average of the parameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rayllp.channel.base import Channel
from rayllp.config import OptimizerSettings
from rayllp.engine.block import Block
from rayllp.engine.muon import Muon
from rayllp.engine.sharding import gather_parameters, share_out

KINDS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "muon": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}
"""The optimizer for all parameters but Muon's matrices, by optimizer.name."""
MOMENTS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    Muon: ("momentum_buffer",),
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adafactor: ("variance",),
}
"""The averages that each optimizer keeps for a parameter, in the parameter's shape. For matrices Adafactor keeps factors instead."""
EMA = "ema"
"""The name under which the moving average of a parameter's values is stored, next to the averages of its gradients."""


def averages_per_weight(settings: OptimizerSettings) -> int:
    """Return how many values are kept for each weight of a layer's matrices, besides the weight; Adafactor's factors do not count."""
    matrix = (2, 2)
    kept = _averages_of(Muon if settings.name == "muon" else KINDS[settings.name], matrix, settings)
    return sum(shape == matrix for shape in kept.values())


def _averages_of(kind: type, shape: tuple[int, ...], settings: OptimizerSettings) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the averages that an optimizer of this kind keeps for a parameter of this shape."""
    found = dict.fromkeys(MOMENTS[kind], shape)
    if kind is torch.optim.SGD and not settings.momentum:
        found = {}
    if kind is torch.optim.Adafactor and len(shape) > 1:
        found = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}
    return found if settings.ema is None else {**found, EMA: shape}


class Optimizer:
    """Updates a worker's parameters, by one optimizer for all or by Muon for its layers' matrices and AdamW for the rest.

    Without replicas a parameter and its state belong to one worker, and nothing is sent. With replicas, each replica's worker keeps the
    whole state; or, if the state is sharded, only that of its share of the parameters. It then updates only this share, and `gather` brings
    the shares of the others.

    Args:
        block: this worker's layers.
        settings: the optimizer's settings.
        replica, replicas: this worker's number, and the number of workers, among those that shard the state.

    Attributes:
        replica: this worker's number among those that shard the state.
        shares: for each of these workers, the parts of parameters whose state it keeps.
    """

    def __init__(self, block: Block, settings: OptimizerSettings, replica: int = 0, replicas: int = 1) -> None:
        self._settings, self._parameters = settings, block.trained
        trained = self._parameters
        self._names = {p: name for name, p in block.parameters.items()}
        matrices = {self._names[p] for p in (block.matrices if settings.name == "muon" else [])}
        kind = KINDS[settings.name]
        uncut = set(trained) if kind is torch.optim.Adafactor else matrices
        self.shares = share_out(trained, uncut, replicas)
        if self.is_sharded:  # a part is a range of the parameter's numbers as they lie in memory
            for parameter in trained.values():
                parameter.data = parameter.data.contiguous()
        self.replica, self._own = replica, self.shares[replica]
        # What torch's optimizers see: the parameter itself if its whole state is kept here, otherwise a view of the part that is.
        self._leaves = {name: self._leaf(name) for name, part in self._own.items() if len(part)}
        self._parts: list[tuple[torch.optim.Optimizer, float]] = []
        others = [name for name in self._leaves if name not in matrices]
        if others:
            decayed = block.decayed
            first, second = ([self._leaves[name] for name in others if (name in decayed) is decay] for decay in (True, False))
            self._parts.append((_build(kind, first, second, settings), 1.0))
        whole = [self._leaves[name] for name in self._leaves if name in matrices]
        if whole:
            self._parts.append((_build_muon(whole, block, settings), (settings.muon_lr or settings.lr) / settings.lr))
        self._of = {leaf: part for part, _ in self._parts for group in part.param_groups for leaf in group["params"]}
        self._kinds = {name: Muon if name in matrices else kind for name in trained}
        self._averages: dict[nn.Parameter, Tensor] = {}

    @property
    def is_sharded(self) -> bool:
        """True if this worker keeps the state of a share of the parameters only."""
        return len(self.shares) > 1

    def step(self, lr: float, done: int = 0) -> None:
        """Update all parameters that have a gradient, and their moving average. If the state is sharded, only this worker's share of them.

        Args:
            lr: the learning rate in this step; with Muon, that of AdamW. Muon's follows from it by the ratio of the peak learning rates.
            done: number of steps before this one.
        """
        views = self._aim_views()
        for part, ratio in self._parts:
            for group in part.param_groups:
                group["lr"] = lr * ratio
            part.step()
        if self._settings.ema is not None:
            self._average(min(self._settings.ema, (1 + done) / (10 + done)))
        for view in views:
            view.grad = None

    def _average(self, decay: float) -> None:
        """Move the average towards the parameters that this step has changed. It begins with their first value."""
        changed = [leaf for leaf in self._of if leaf.grad is not None]
        known = [leaf for leaf in changed if leaf in self._averages]
        if known:
            torch._foreach_lerp_([self._averages[leaf] for leaf in known], [leaf.data for leaf in known], 1 - decay)
        for leaf in changed:
            if leaf not in self._averages:
                self._averages[leaf] = leaf.detach().clone()

    def swap_average(self) -> None:
        """Exchange the parameters' values with their moving average. If the state is sharded, only those of this worker's share."""
        self._aim_views()
        for leaf, average in self._averages.items():
            kept = leaf.detach().clone()
            leaf.data.copy_(average)
            average.copy_(kept)

    def _leaf(self, name: str) -> nn.Parameter:
        """Return the parameter itself if its whole state is kept here, otherwise a view of the part whose state is."""
        parameter, part = self._parameters[name], self._own[name]
        return parameter if len(part) == parameter.numel() else nn.Parameter(parameter.data.view(-1)[part.start : part.stop])

    def _aim_views(self) -> list[nn.Parameter]:
        """Point the views at the parameters' current memory and gradients, and return them.

        This is needed in every step, since gradients are new tensors, and `Stack` may have moved a parameter in memory.
        """
        views = []
        for name, leaf in self._leaves.items():
            parameter, part = self._parameters[name], self._own[name]
            if leaf is not parameter:
                leaf.data = parameter.data.view(-1)[part.start : part.stop]
                leaf.grad = None if parameter.grad is None else parameter.grad.reshape(-1)[part.start : part.stop]
                views.append(leaf)
        return views

    def gather(self, replicas: Channel, step: int) -> None:
        """Receive the parameters that other replicas have updated, if the state is sharded among them.

        Raises:
            ChannelError: one of them was lost, or too slow.
        """
        if self.is_sharded:
            gather_parameters(self._parameters, self.shares, replicas, step)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    # The state of single parameters -------------------------------------------------------------------------------------------

    def moments_of(self, parameter: nn.Parameter) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the averages that are kept for a parameter once a step is done; none for a frozen one."""
        kind = self._kinds.get(self._names[parameter])
        return {} if kind is None else _averages_of(kind, tuple(parameter.shape), self._settings)

    def counts_steps(self, parameter: nn.Parameter) -> bool:
        """Return True if the parameter's state also has "step", the number of steps done."""
        return self._kinds.get(self._names[parameter]) in (torch.optim.AdamW, torch.optim.Adafactor)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a parameter's averages and, where steps are counted, its "step". Empty before the first step.

        If this worker keeps the state of a part of the parameter, the averages are that part's, flat. Empty if it keeps none of it.
        """
        leaf = self._leaves.get(self._names[parameter])
        if leaf is None:
            return {}
        state = self._of[leaf].state.get(leaf, {})
        return {**state, EMA: self._averages[leaf]} if leaf in self._averages else state

    def set_state(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Set a parameter's state to a copy of what `state_of` has returned.

        Averages go to the parameter's device. "step" stays on the CPU, where AdamW wants it.

        Args:
            parameter: one of this worker's parameters.
            state: the state of the whole parameter, or of the part that this worker keeps. If the settings ask for an average of the
                parameter's values and the state has none, the average begins with the current value.
        """
        name = self._names[parameter]
        leaf, part = self._leaves.get(name), self._own.get(name, range(0))
        if leaf is None:
            return
        self._of[leaf].state.pop(leaf, None)
        self._averages.pop(leaf, None)
        if not state:
            return
        kept, whole = {}, tuple(parameter.shape)
        for key, shape in self.moments_of(parameter).items():
            value = state.get(key, parameter.detach()) if key == EMA else state[key]
            if shape == whole and value.numel() != len(part):
                value = value.reshape(-1)[part.start : part.stop]
            kept[key] = value.reshape(leaf.shape if shape == whole else shape).to(parameter.device, copy=True)
        if EMA in kept:
            self._averages[leaf] = kept.pop(EMA)
        if self.counts_steps(parameter):
            kept["step"] = state["step"].clone()
        if kept:
            self._of[leaf].state[leaf] = kept


def _build(
    kind: type, decayed: Sequence[nn.Parameter], others: Sequence[nn.Parameter], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Return one of torch's optimizers. Weight decay applies only to `decayed`, which are (parts of) weights and embeddings.

    On CPUs it is the fused variant where there is one, which takes a fifth of the time of torch's default; on GPUs the default is fast.
    """
    decays = ((decayed, settings.weight_decay), (others, 0.0))
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]
    fused = all(p.device.type == "cpu" for p in (*decayed, *others)) or None
    if kind is torch.optim.SGD:
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)
    if kind is torch.optim.Adafactor:
        return torch.optim.Adafactor(groups, lr=settings.lr)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)


def _build_muon(matrices: Sequence[nn.Parameter], block: Block, settings: OptimizerSettings) -> Muon:
    """Return Muon, in the precision in which layers are computed."""
    precision = torch.bfloat16 if block.config.dtype == "bfloat16" else block.dtype
    return Muon(matrices, precision=precision, momentum=settings.momentum, weight_decay=settings.weight_decay)


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients by `factor`, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
