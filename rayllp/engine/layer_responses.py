"""The responses of all layers to changes of their inputs (`rayllp/mgrit/responses.py`), as this worker knows them.

In a probe, and in every tenth step at least, each worker fits those of its own layers, from all sweeps of the step's solves, and then they
are exchanged. Until the next time every rolling window uses them, on all workers the same. The last few are kept, so that a step that is
repeated after a fault uses those that it used before; a worker that joins gets them from the others. They are not in checkpoints: a run
that is resumed sweeps with secants once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.mgrit.placement import Placement
from rayllp.mgrit.responses import Response, ResponseFit, factor_shapes
from rayllp.state import State, tensors

SOLVES = "forward", "adjoint"
LEARN_EVERY = 10
"""Most steps until responses are found anew. As old as 100 steps, they may need more sweeps than secants while layers change quickly."""
KEPT = 8
"""Number of steps whose findings are kept."""
Observer = Callable[[int, State, State], None]


class LayerResponses:
    """What this worker knows of the layers of a network, and learns of its own.

    Args:
        placement: which worker has which layer of the solve.
        channel: the channel to the other workers.
        found: by the step: all factors, float32, shape (layers, solves, numbers); zeros where nothing was found. May be what
            the worker knows from an earlier group, and is kept up to date.
    """

    def __init__(self, placement: Placement, channel: Channel, found: dict[int, Tensor]) -> None:
        self._placement, self._channel, self.found = placement, channel, found
        self._agrees = channel.size == 1
        self._known: tuple[Tensor, dict[str, dict[int, Response]]] | None = None
        self._fits: dict[tuple[str, int], ResponseFit] | None = None

    def known(self, solve: str, spec: StateSpec, step: int) -> Mapping[int, Response]:
        """Return the responses that a solve of this step is to use, by layer, counted within the solve. All workers call it.

        Args:
            solve: "forward" or "adjoint".
            spec: shapes and dtypes of a state.
            step: number of the step.

        Raises:
            ChannelError: another worker was lost, or too slow.
        """
        newest = self._newest_before(spec, step)
        if newest is None:
            return {}
        numbers = self.found[newest]
        if self._known is None or self._known[0] is not numbers:
            self._known = numbers, {name: self._responses(numbers[:, place], spec) for place, name in enumerate(SOLVES)}
        return self._known[1][solve]

    def is_due(self, spec: StateSpec, step: int) -> bool:
        """Return True if a step is to learn though it is no probe. All workers call it. Arguments and errors are those of `known`."""
        newest = self._newest_before(spec, step)
        return newest is None or step - newest >= LEARN_EVERY

    def _newest_before(self, spec: StateSpec, step: int) -> int | None:
        """Return the latest step before this one in which responses were found; the same on all workers."""
        if not self._agrees:
            self._agree(spec, step)
        return max((at for at in self.found if at < step), default=None)

    @contextmanager
    def learned(self, spec: StateSpec, step: int) -> Iterator[None]:
        """Within this context learn from all solves, and then exchange what was learned. All workers enter and leave it together.

        Args: those of `known`.

        Raises:
            ChannelError: another worker was lost, or too slow.
        """
        self._fits = {(solve, layer): ResponseFit() for layer in self._placement.owned(self._channel.rank) for solve in SOLVES}
        try:
            yield
            numbers = self._exchange(self._fits, spec, step)
        finally:
            self._fits = None
        for at in [at for at in self.found if at > step]:  # of a course of training that was given up
            del self.found[at]
        self.found[step] = numbers
        for at in sorted(self.found)[:-KEPT]:
            del self.found[at]

    def observer(self, solve: str) -> Observer | None:
        """Return what a solve that begins is to call with each evaluation of a layer; None where nothing is to be learned."""
        fits = self._fits
        if fits is None:
            return None
        for fit in fits.values():
            fit.begin_solve()
        return lambda layer, state, increment: fits[solve, layer].observe(state, increment)

    def _exchange(self, fits: dict[tuple[str, int], ResponseFit], spec: StateSpec, step: int) -> Tensor:
        """Return the factors that all workers have fitted."""
        size, device = self._size(spec), spec.device
        flat = [torch.cat([factor.flatten() for factor in fit.factors() or [torch.zeros(size, device=device)]]) for fit in fits.values()]
        layers = len(self._placement.owners)
        most = self._placement.sharing(range(layers))[1]
        mine = torch.zeros(most, len(SOLVES), size, device=device)
        mine.view(-1, size)[: len(flat)] = torch.stack(flat)
        given = self._channel.all_gather(mine, StateSpec.of(mine), MessageTag(step, "responses"))
        numbers = torch.zeros(layers, len(SOLVES), size, device=device)
        for rank, theirs in enumerate(part for each in given for part in tensors(each)):
            owned = self._placement.owned(rank)
            numbers[list(owned)] = theirs[: len(owned)]
        return torch.where(numbers.isfinite().all(-1, keepdim=True), numbers, 0.0)

    def _agree(self, spec: StateSpec, step: int) -> None:
        """Once after workers have come together: all take what one of those has found that know the latest."""
        tag, device = MessageTag(step, "responses", "agree"), spec.device
        mine = torch.tensor([max(self.found, default=-1), len(self.found)], device=device)
        given = [part.tolist() for each in self._channel.all_gather(mine, StateSpec.of(mine), tag) for part in tensors(each)]
        latest = max(given)
        if any(each != latest for each in given):
            count, source = latest[1], given.index(latest)
            shapes = torch.Size([count]), torch.Size([count, len(self._placement.owners), len(SOLVES), self._size(spec)])
            theirs = StateSpec(shapes, (torch.int64, torch.float32), device, bare=False)
            is_source = self._channel.rank == source
            known = (torch.tensor([*self.found], device=device), torch.stack([*self.found.values()])) if is_source else None
            steps, numbers = tensors(self._channel.broadcast(known, theirs, source, tag))
            self.found.clear()
            self.found.update(zip(steps.tolist(), numbers, strict=True))
        self._agrees = True

    @staticmethod
    def _size(spec: StateSpec) -> int:
        return sum(shape.numel() for shape in factor_shapes(spec.shapes))

    @staticmethod
    def _responses(numbers: Tensor, spec: StateSpec) -> dict[int, Response]:
        """Return the responses with these factors, shape (layers, numbers), of layers of which something was found."""
        shapes = factor_shapes(spec.shapes)
        found = {}
        for layer in numbers.any(-1).nonzero().flatten().tolist():
            parts = numbers[layer].split([shape.numel() for shape in shapes])
            factors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            pairs = zip(factors[::2], factors[1::2], spec.dtypes, strict=True)
            found[layer] = Response(tuple((down.to(dtype), up.to(dtype)) for down, up, dtype in pairs))
        return found
