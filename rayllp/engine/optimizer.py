"""AdamW, or Muon and AdamW, on a worker's own parameters; one global gradient norm."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rayllp.channel.base import Channel
from rayllp.config import OptimizerSettings
from rayllp.engine.block import Block
from rayllp.engine.muon import Muon
from rayllp.engine.sharding import gather_parameters, share_out

MOMENTS: dict[type, tuple[str, ...]] = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}
"""By optimizer, the averages that it keeps of each parameter, of the parameter's shape."""


class Optimizer:
    """What updates a worker's parameters: AdamW, or Muon for its layers' matrices and AdamW for all else.

    Without replicas a parameter belongs to one worker, and so does its state: nothing is sent. With them each replica's worker keeps all
    of the state; or, sharded, that of its share, which alone it updates: `gather` then brings the others' shares.

    Args:
        replica, replicas: which of how many workers this one is among whom the state is sharded.

    Attributes:
        replica: as given.
        shares: of each of them, what it keeps the state of.
    """

    def __init__(self, block: Block, settings: OptimizerSettings, replica: int = 0, replicas: int = 1) -> None:
        self._parameters = trained = block.trained
        self._names = {p: name for name, p in block.parameters.items()}
        matrices = {self._names[p] for p in (block.matrices if settings.name == "muon" else [])}
        self.shares = share_out(trained, matrices, replicas)
        if self.is_sharded:  # parts are cut from the numbers as they lie in memory
            for parameter in trained.values():
                parameter.data = parameter.data.contiguous()
        self.replica, self._own = replica, self.shares[replica]
        # What torch's optimizers see: a parameter of which all is kept here, or a view of the part that is.
        self._leaves = {name: self._leaf(name) for name, part in self._own.items() if len(part)}
        self._parts: list[tuple[torch.optim.Optimizer, float]] = []
        others = [name for name in self._leaves if name not in matrices]
        if others:
            decayed = block.decayed
            first, second = ([self._leaves[name] for name in others if (name in decayed) is decay] for decay in (True, False))
            self._parts.append((_build_adamw(first, second, settings), 1.0))
        whole = [self._leaves[name] for name in self._leaves if name in matrices]
        if whole:
            self._parts.append((_build_muon(whole, block, settings), (settings.muon_lr or settings.lr) / settings.lr))
        self._of = {leaf: part for part, _ in self._parts for group in part.param_groups for leaf in group["params"]}
        self._kinds = {name: Muon if name in matrices else torch.optim.AdamW for name in trained}

    @property
    def is_sharded(self) -> bool:
        """Whether this worker keeps the state of a share only."""
        return len(self.shares) > 1

    def step(self, lr: float) -> None:
        """Update all parameters that have a gradient; sharded, this worker's share of them.

        Args:
            lr: AdamW's learning rate in this step; Muon's is in the ratio of the two peaks to it.
        """
        views = self._aim_views()
        for part, ratio in self._parts:
            for group in part.param_groups:
                group["lr"] = lr * ratio
            part.step()
        for view in views:
            view.grad = None

    def _leaf(self, name: str) -> nn.Parameter:
        parameter, part = self._parameters[name], self._own[name]
        return parameter if len(part) == parameter.numel() else nn.Parameter(parameter.data.view(-1)[part.start : part.stop])

    def _aim_views(self) -> list[nn.Parameter]:
        """Have views of parameters see them as they are now, and their gradients; `Stack` may have given a parameter other memory."""
        views = []
        for name, leaf in self._leaves.items():
            parameter, part = self._parameters[name], self._own[name]
            if leaf is not parameter:
                leaf.data = parameter.data.view(-1)[part.start : part.stop]
                leaf.grad = None if parameter.grad is None else parameter.grad.reshape(-1)[part.start : part.stop]
                views.append(leaf)
        return views

    def gather(self, replicas: Channel, step: int) -> None:
        """Have what other replicas have updated, where the state is sharded among them.

        Raises:
            ChannelError: one of them was lost, or too slow.
        """
        if self.is_sharded:
            gather_parameters(self._parameters, self.shares, replicas, step)

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    # Its state ----------------------------------------------------------------------------------------------------------------

    def moments_of(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Names of the averages, of the parameter's shape, that are kept of it once a step is done; none of one that is frozen."""
        kind = self._kinds.get(self._names[parameter])
        return () if kind is None else MOMENTS[kind]

    def counts_steps(self, parameter: nn.Parameter) -> bool:
        """Whether its state also has "step", the number of steps done."""
        return self._kinds.get(self._names[parameter]) is torch.optim.AdamW

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Its averages and, where they are counted, its "step"; nothing before the first one.

        Of a parameter of which this worker keeps a part only the averages are that part's, flat; nothing where it keeps none.
        """
        leaf = self._leaves.get(self._names[parameter])
        return {} if leaf is None else self._of[leaf].state.get(leaf, {})

    def set_state(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Put a copy of what `state_of` gave back: averages on the parameter's device, the step on the host, where AdamW wants it.

        Args:
            state: of the whole parameter, or of the part that this worker keeps.
        """
        name = self._names[parameter]
        leaf, part = self._leaves.get(name), self._own.get(name, range(0))
        if leaf is None:
            return
        if not state:
            self._of[leaf].state.pop(leaf, None)
            return
        kept = {}
        for key, value in state.items():
            if key == "step":
                kept[key] = value.clone()
                continue
            mine = value if value.numel() == len(part) else value.reshape(-1)[part.start : part.stop]
            kept[key] = mine.reshape(leaf.shape).to(parameter.device, copy=True)
        self._of[leaf].state[leaf] = kept


def _build_adamw(decayed: Sequence[nn.Parameter], others: Sequence[nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW; weight decay on the first alone, which are (parts of) weights and embeddings.

    On CPUs as one operation a parameter, which takes a fifth of the time of torch's default there; on GPUs torch's default is fast.
    """
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    on_cpu = all(p.device.type == "cpu" for p in (*decayed, *others))
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
