"""Sums of gradients over replicas, in buckets that are sent as soon as they are final, while the adjoint forms the others.

The first step of each kind tells when a gradient is final: autograd reports each contribution to a parameter's gradient, and steps
of one kind (accuracy, shape of the batch) make the same contributions. All replicas follow what the first one has seen, so that they
sum the same buckets in the same order. If a gradient gets more contributions than expected, the rest is summed at the end.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rayllp.channel.base import Channel, MessageTag, Pending
from rayllp.engine.all_reduce import flatten, sum_together
from rayllp.engine.block import Block

BUCKET_BYTES = 4 * 2**20
"""Bytes of gradients summed in one message, which is enough for its latency not to matter. A single gradient may be larger."""


@dataclass(frozen=True)
class _Plan:
    """How the gradients of one kind of step are summed.

    Attributes:
        buckets: parameters whose gradients are sent together, in the order in which they become final.
        expected: number of contributions after which a parameter's gradient is final. A parameter that is missing here is final at the end.
    """

    buckets: Sequence[Sequence[nn.Parameter]]
    expected: Mapping[nn.Parameter, int] = field(default_factory=dict)


@dataclass
class _Begun:
    """A bucket that is being summed."""

    parameters: list[nn.Parameter]
    shapes: list[torch.Size]
    sums: Pending[Tensor]


class ReplicaSums:
    """Sums of one worker's gradients over replicas. A step calls `begin`, forms its gradients, and calls `finish`.

    Args:
        block: this worker's layers.
        replicas: the channel to the workers of other replicas that own the same layers. Nothing else may use it between `begin` and
            `finish`.
    """

    def __init__(self, block: Block, replicas: Channel) -> None:
        self.replicas, self._parameters = replicas, list(block.trained.values())
        self._unknown = _Plan(_buckets(reversed(self._parameters)))
        self._plans: dict[Hashable, _Plan] = {}
        self._is_open = False
        self._hooks = [p.register_post_accumulate_grad_hook(self._contributed) for p in self._parameters if replicas.size > 1]

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, step: int, kind: Hashable | None) -> None:
        """Begin a step, whose gradients are formed from now on.

        Args:
            step: number of the step.
            kind: key of the kind of step. Steps of one kind form their gradients in the same way. None: a step of no kind, such as a probe.
        """
        self._step, self._kind, self._is_open = step, kind, True
        self._plan = self._plans.get(kind, self._unknown)
        self._counts: Counter[nn.Parameter] = Counter()
        # By parameter: the gradient after its last contribution so far, and the version counter that it had then.
        self._seen: dict[nn.Parameter, tuple[Tensor, int]] = {}
        self._begun: list[_Begun] = []
        self._next = 0

    def _contributed(self, parameter: nn.Parameter) -> None:
        """Count a contribution that autograd has added to this parameter's gradient, and send buckets that are final."""
        if not self._is_open or self._kind is None:
            return
        self._counts[parameter] += 1
        if self._plan is self._unknown:
            assert parameter.grad is not None
            self._seen.pop(parameter, None)  # so that the order is that of the last contributions
            self._seen[parameter] = parameter.grad, parameter.grad._version
            return
        # The last bucket is sent by `finish`, which adds the loss to it.
        while self._next < len(self._plan.buckets) - 1 and all(map(self._is_final, self._plan.buckets[self._next])):
            self._begin_bucket()

    def _is_final(self, parameter: nn.Parameter) -> bool:
        return self._counts[parameter] >= self._plan.expected.get(parameter, torch.inf)

    def _begin_bucket(self, extra: Sequence[Tensor] = ()) -> None:
        """Begin to sum the next bucket. Its gradients are taken out of `.grad`; what is added there from now on is late."""
        found = [(p, p.grad) for p in self._plan.buckets[self._next] if p.grad is not None]
        parts = [*(gradient for _, gradient in found), *extra]
        self._next += 1
        if not parts:
            return
        flat = flatten(parts)
        for parameter, _ in found:
            parameter.grad = None
        shapes = [gradient.shape for _, gradient in found]
        self._begun.append(_Begun([p for p, _ in found], shapes, self.replicas.begin_all_reduce(flat, self._tag("sum over replicas"))))

    def finish(self, loss: Tensor) -> None:
        """Finish the sums of all gradients, now that they are formed, and sum the loss.

        Each of them was divided by the global number of loss terms, so the sums are means.

        Raises:
            ChannelError: a replica was lost, or too slow.
        """
        self._is_open = False
        if self.replicas.size == 1:
            return
        seen = self._order_seen() if self._plan is self._unknown and self._kind is not None else None
        while self._next < len(self._plan.buckets) - 1:
            self._begin_bucket()
        late = any(p.grad is not None for bucket in self._plan.buckets[: self._next] for p in bucket)
        self._begin_bucket([loss.view(1), loss.new_full((1,), float(late))])
        loss_and_late = self._put_back()
        loss.copy_(loss_and_late[0])
        if loss_and_late[1]:
            self._add_late_ones()
            self._plans[self._kind] = _Plan(self._unknown.buckets)
        elif seen is not None:
            self._plans[self._kind] = self._agree(seen)
        self._seen.clear()

    def _put_back(self) -> Tensor:
        """Wait for all buckets, and set `.grad` to their sums. Late gradients are kept in `_late`.

        Returns: the numbers that follow the last bucket's gradients.
        """
        rest = torch.empty(0)
        self._late = {}
        for begun in self._begun:
            rest = begun.sums()
            for parameter, shape in zip(begun.parameters, begun.shapes, strict=True):
                size = shape.numel()
                if parameter.grad is not None:
                    self._late[parameter] = parameter.grad
                parameter.grad, rest = rest[:size].view(shape).to(parameter.dtype), rest[size:]
        return rest

    def _add_late_ones(self) -> None:
        """Sum over replicas what was added to gradients after they had been sent, on any replica, and add the sums to `.grad`."""
        summed = [p for p in self._parameters if p.grad is not None]
        late = [self._late.get(p, torch.zeros_like(p)) for p in summed]
        for parameter, more in zip(summed, sum_together(late, self.replicas, self._tag("late gradients")), strict=True):
            assert parameter.grad is not None
            parameter.grad += more

    # The order in which gradients become final --------------------------------------------------------------------------------

    def _order_seen(self) -> Tensor:
        """Return, for each parameter, the place in the order in which gradients became final (from 1), and its number of contributions.

        Both are 0 if this is not known, or if something other than autograd has written to the gradient since. Such a gradient is final
        only at the end of the step.
        """
        places = {p: n for n, p in enumerate(self._seen, 1)}
        table = torch.zeros((len(self._parameters), 2), dtype=torch.float64)
        for row, parameter in zip(table, self._parameters, strict=True):
            gradient, version = self._seen.get(parameter, (None, 0))
            if gradient is not None and parameter.grad is gradient and gradient._version == version:
                row[0], row[1] = places[parameter], self._counts[parameter]
        return table

    def _agree(self, seen: Tensor) -> _Plan:
        """Return the plan that follows from what the first replica has seen."""
        if not self._parameters:
            return self._unknown
        table = (seen if self.replicas.rank == 0 else torch.zeros_like(seen)).to(self._parameters[0].device)
        table = self.replicas.all_reduce(table, self._tag("order of gradients")).cpu()
        found = {p: (int(place), int(count)) for p, (place, count) in zip(self._parameters, table.tolist(), strict=True) if place}
        first = sorted(found, key=lambda p: found[p][0])
        last = [p for p in reversed(self._parameters) if p not in found]
        return _Plan(_buckets([*first, *last]), {p: count for p, (_, count) in found.items()})

    def _tag(self, phase: str) -> MessageTag:
        return MessageTag(self._step, "gradients", phase)


def _buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters in buckets, in this order, each of at most BUCKET_BYTES unless it holds a single larger one.

    If there are no parameters, one empty bucket is returned.
    """
    buckets: list[list[nn.Parameter]] = [[]]
    room = BUCKET_BYTES
    for parameter in parameters:
        if buckets[-1] and parameter.nbytes > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(parameter)
        room -= parameter.nbytes
    return buckets
