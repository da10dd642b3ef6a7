"""One training step of one worker: forward solve, loss, adjoint solve, gradients, clip, optimizer; and the exact mode.

No driver, no barrier inside a solve. The only collective of a step on the layer group is one small all-reduce at its end, which carries
the gradient norm, the loss and the residuals together.
"""

import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.channel.local import LocalChannel
from rayllp.config import TrainConfig
from rayllp.control import Accuracy, ProbePlan
from rayllp.data.base import Batches, Inputs
from rayllp.engine.all_reduce import PackedAllReduce
from rayllp.engine.block import Block
from rayllp.engine.consistency import Consistency, Interval
from rayllp.engine.diagnosis import diagnose
from rayllp.engine.gradients import add_shared_gradients, sum_over_replicas
from rayllp.engine.optimizer import build_optimizer, learning_rate, scale_gradients, squared_gradient_norm
from rayllp.engine.pipeline import Pipeline, PlainAutograd, exact_gradients, slices
from rayllp.engine.probe import Bias, Probing
from rayllp.engine.smoothness import add_smoothness_gradient
from rayllp.engine.torchbraid_solver import TorchBraidSolver
from rayllp.engine.trajectory import AdjointPropagator, ExactPropagator, ForwardPropagator, Trajectory
from rayllp.mgrit import Communicator, DeferredSweeps, Hierarchy, MGRITResult, MGRITSolver, Problem, SolverOptions
from rayllp.models.base import Architecture
from rayllp.state import State, combine, detach, like, tensors
from rayllp.timeline import TimedChannel, TimedPropagator, Timeline, span_on

Factors = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What a step did; equal on all workers of a layer group, but for the time, the fault and what is said to be its own.

    Attributes:
        fault: None, or the first layer at fault as this worker sees it: (stage, order, text); the smallest over all workers is it.
        rho_forward, rho_backward: convergence factors, None unless two residuals were measured.
        factors_forward, factors_backward: the same by level and boundary between coarse intervals, in order of the layers; no levels unless
            measured.
        bias: of the gradient in use, where a probe measured it.
        consistency: the consistency penalty R over this replica's samples, without its weight; None where it is off.
        lipschitz: constants of this worker's own layers, by index, where a probe estimated them.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    time_s: float
    tokens: int
    rho_forward: float | None
    rho_backward: float | None
    factors_forward: Factors
    factors_backward: Factors
    consistency: float | None
    bias: Bias | None
    advice_forward: str
    advice_backward: str
    fault: tuple[int, int, str] | None = None
    lipschitz: dict[int, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """By name, for a line of `metrics.jsonl`."""
        return asdict(self)


class Engine:
    """A worker's trainer.

    Args:
        layer_channel: to the workers of the same replica, in order of the layers.
        data_channel: to the workers of other replicas that own the same layers.

    Attributes:
        timeline: None, or what is told of the spans of steps.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: TrainConfig,
        batches: Batches,
        layer_channel: Channel,
        data_channel: Channel,
        device: torch.device,
    ) -> None:
        self.config, self.batches, self.device = config, batches, device
        self.layers, self.replicas = layer_channel, data_channel
        self.block = Block(architecture, config, layer_channel.rank, device)
        self._counted = [p for name, p in self.block.parameters.items() if not self.block.is_counted_elsewhere(name)]
        self.optimizer = build_optimizer(self.block.parameters, config.optimizer)
        self.penalty: Consistency | None = None
        self.timeline: Timeline | None = None
        self._exact: PlainAutograd | Pipeline | None = None
        self._peer: TorchBraidSolver | None = None
        self._hierarchies: dict[int, tuple[Hierarchy, Hierarchy]] = {}
        self._specs: dict[tuple[torch.Size, ...], StateSpec] = {}

    def disconnect(self) -> None:
        """Let go of the other workers; the layers stay."""
        alone = LocalChannel.alone()
        self.layers, self.replicas = alone, alone
        self._exact = self._peer = None

    def reconnect(self, layer_channel: Channel, data_channel: Channel) -> None:
        """Go on among other workers, with the same block; a step that was cut short has left nothing."""
        self.disconnect()
        self.layers, self.replicas = layer_channel, data_channel
        self.optimizer.zero_grad(set_to_none=True)

    # Pieces -------------------------------------------------------------------------------------------------------------------

    def hierarchies(self, levels: int) -> tuple[Hierarchy, Hierarchy]:
        """Forward and adjoint hierarchy with so many levels."""
        if levels not in self._hierarchies:
            forward = self.config.hierarchy(levels)
            self._hierarchies[levels] = forward, forward.adjoint()
        return self._hierarchies[levels]

    def spec(self, inputs: Inputs) -> StateSpec:
        """Shape of the state for these inputs."""
        shapes = tuple(part.shape for part in tensors(inputs))
        if shapes not in self._specs:
            self._specs[shapes] = self.block.architecture.state_spec(inputs, self.block.dtype, self.device)
        return self._specs[shapes]

    def my_batch(self, split: str, step: int) -> tuple[Inputs, Tensor, tuple[int, ...], int]:
        """This replica's inputs and targets, their places in the global batch, and the global number of loss terms."""
        inputs, targets = self.batches.batch(split, step, self.config.batch_size)
        terms = self.block.architecture.count(targets)
        size = self.config.replica_batch
        mine = slice(self.replicas.rank * size, (self.replicas.rank + 1) * size)
        inputs = combine(lambda part: part[mine].to(self.device), inputs)
        return inputs, targets[mine].to(self.device), tuple(range(mine.start, mine.stop)), terms

    # The training step --------------------------------------------------------------------------------------------------------

    def train_step(self, step: int, accuracy: Accuracy, plan: ProbePlan | None = None) -> StepStats:
        """One optimizer step; the weights stay as they are if the loss or the gradient is not finite.

        Args:
            plan: what to measure, where the step is a probe.
        """
        started = time.perf_counter()
        inputs, targets, samples, terms = self.my_batch("train", step)
        probing = Probing(self, plan) if plan else None
        form = probing.gradients if probing else self.gradients
        loss, forward, backward = form(step, accuracy, inputs, targets, samples, 1 / max(1, terms))
        with self.span("gradients", "wait"):
            sum_over_replicas(self.block, self.replicas, loss)
            add_shared_gradients(self.block, self.layers, step)
            if accuracy.smoothness:
                add_smoothness_gradient(self.block, self.layers, accuracy.smoothness, step)
        with self.span("statistics", "wait"):
            norm, loss_value, gap, forward, backward, bias = self.reduce_statistics(step, loss, forward, backward, probing)
        lr = learning_rate(self.config.optimizer, step, self.config.steps)
        finite = torch.isfinite(torch.tensor([norm, loss_value])).all().item()
        fault = None if finite else diagnose(self, step)
        if finite:
            with self.span("update"):
                self.update(norm, lr)
        self.optimizer.zero_grad(set_to_none=True)
        self.layers.finish()
        return StepStats(
            step=step,
            loss=loss_value,
            grad_norm=norm,
            lr=lr,
            time_s=time.perf_counter() - started,
            tokens=self.config.batch_size * _positions(self.spec(inputs)),
            rho_forward=forward.convergence_factor if forward else None,
            rho_backward=backward.convergence_factor if backward else None,
            consistency=gap,
            factors_forward=forward.factors if forward else (),
            factors_backward=tuple(level[::-1] for level in backward.factors) if backward else (),
            bias=bias,
            advice_forward=forward.status.value if forward else "",
            advice_backward=backward.status.value if backward else "",
            fault=fault,
            lipschitz=probing.lipschitz if probing else None,
        )

    def gradients(
        self, step: int, accuracy: Accuracy, inputs: Inputs, targets: Tensor, samples: tuple[int, ...], scale: float
    ) -> tuple[Tensor, MGRITResult | None, MGRITResult | None]:
        """Gradients of scale × summed loss into `.grad`; the loss (on the last worker), and the last part's solves."""
        self.penalty = self.make_penalty(accuracy)
        if accuracy.serial:
            self._exact = self._exact or exact_gradients(self.block, self.layers, inputs, len(samples))
            if self._exact is not None:
                self._exact.timeline = self.timeline
                return self._exact.step(step, inputs, targets, samples, scale, self.penalty), None, None
        loss = torch.zeros((), device=self.device, dtype=self.block.dtype)
        forward = backward = None
        for part in slices(len(samples), self.config.accumulate):
            arguments = (step, combine(lambda whole, part=part: whole[part], inputs), targets[part], samples[part], scale)
            part_loss, forward, backward = self.parallel_gradients(accuracy, *arguments)
            loss += part_loss
        return loss, *((None, None) if accuracy.serial else (forward, backward))

    def make_penalty(self, accuracy: Accuracy) -> Consistency | None:
        """The consistency penalty of one gradient computation; None where its weight is 0."""
        if not accuracy.consistency:
            return None
        config, start = self.config, self.block.middle.start - self.config.buffers.open
        stop, c = start + len(self.block.middle), config.first_coarsening
        intervals = {n: Interval(n, min(n + c, stop), config.mgrit.coarse_step_weight) for n in range(start, stop, c)}
        value = torch.zeros((), dtype=torch.float64, device=self.device)
        return Consistency(accuracy.consistency / config.batch_size, intervals, value)

    def parallel_gradients(
        self, accuracy: Accuracy, step: int, inputs: Inputs, targets: Tensor, samples: tuple[int, ...], scale: float
    ) -> tuple[Tensor, MGRITResult | None, MGRITResult | None]:
        """MGRIT forward and adjoint; with one level each this is exact, layer after layer."""
        block, config = self.block, self.config
        if config.solver == "torchbraid" and not accuracy.serial:
            return self.peer_gradients(accuracy, step, inputs, targets, samples, scale), None, None
        levels = (1, 1) if accuracy.serial else (accuracy.levels_forward, accuracy.levels_backward)
        block.begin(step, samples, inputs, training=True)
        spec = self.spec(inputs)
        methods = accuracy.methods(config)
        # How many messages come depends on residuals, where iterations do.
        program = None if config.mgrit.tolerance is not None else (levels, methods, spec)
        with self.layers.program(program):
            with self.span("enter"):
                entered = block.enter(inputs) if block.first else None
            c_points = frozenset(range(0, config.middle_layers, config.first_coarsening))
            trajectory = Trajectory(block, c_points, config.mgrit.recompute)
            problem = Problem(self.hierarchies(levels[0])[0], ForwardPropagator(trajectory), spec)
            u0 = None if entered is None else detach(entered)
            forward = self._solve(problem, methods[0], MessageTag(step, "forward"), u0, defer_to=trajectory.deferred)
            with self.span("loss"):
                none = torch.zeros((), device=self.device)
                loss, seed = self.loss_and_seed(forward.output, targets, scale) if block.last else (none, None)
            problem = Problem(self.hierarchies(levels[1])[1], AdjointPropagator(trajectory, self.penalty), spec)
            backward = self._solve(problem, methods[1], MessageTag(step, "adjoint"), seed, while_waiting=trajectory.deferred)
        self._embedding_gradients(entered, backward.output)
        return loss, forward, backward

    def _embedding_gradients(self, entered: State | None, adjoint: State | None) -> None:
        """Gradients of embedding and opening buffers, on the first worker, from λ_0."""
        if entered is None or adjoint is None:
            return
        # An embedding without parameters has no graph.
        seeds = [(state, lam) for state, lam in zip(tensors(entered), tensors(adjoint), strict=True) if state.requires_grad]
        if seeds:
            with self.span("enter"):
                torch.autograd.backward([state for state, _ in seeds], [lam for _, lam in seeds])

    def peer_gradients(
        self, accuracy: Accuracy, step: int, inputs: Inputs, targets: Tensor, samples: tuple[int, ...], scale: float
    ) -> Tensor:
        """The same by TorchBraid; the loss, on the last worker."""
        self.block.begin(step, samples, inputs, training=True)
        if self._peer is None:
            self._peer = TorchBraidSolver(self.block, self.layers, self.config)
        spec = self.spec(inputs)
        entered = self.block.enter(inputs) if self.block.first else None
        like = torch.empty(spec.shapes[0], dtype=spec.dtypes[0], device=self.device)
        output = self._peer.forward(None if entered is None else detach(entered), like, accuracy)
        loss, seed = torch.zeros((), device=self.device), None
        if self.block.last:
            loss, seed = self.loss_and_seed(output, targets, scale)
        self._embedding_gradients(entered, self._peer.adjoint(seed))
        return loss

    def _solve(
        self,
        problem: Problem,
        options: SolverOptions,
        tag: MessageTag,
        u0: State | None,
        *,
        defer_to: DeferredSweeps | None = None,
        while_waiting: DeferredSweeps | None = None,
    ) -> MGRITResult:
        channel, on_phase = self.layers, None
        if self.timeline is not None:
            channel = TimedChannel(channel, self.timeline)
            problem = replace(problem, propagator=TimedPropagator(problem.propagator, self.timeline, tag.solve))
            on_phase = self.timeline.begin_solve(tag.solve)
        solver = MGRITSolver(problem, options, Communicator(channel, tag, while_waiting), on_phase)
        return solver.solve(u0, defer_to=defer_to, reduce_residuals=False)

    def span(self, solve: str, kind: str = "compute") -> AbstractContextManager[None]:
        """What happens inside, on the timeline, if there is one."""
        return span_on(self.timeline, solve, kind)

    def loss_and_seed(self, output: State | None, targets: Tensor, scale: float) -> tuple[Tensor, State]:
        """Loss, gradients of closing buffers and head, and λ_N."""
        assert output is not None
        leaves = tuple(part.detach().requires_grad_() for part in tensors(output))
        loss = self.block.architecture.training_loss(self.block.leave(like(output, leaves)), targets) * scale
        loss.backward()
        seed = tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
        return loss.detach(), like(output, seed)

    def reduce_statistics(
        self, step: int, loss: Tensor, forward: MGRITResult | None, backward: MGRITResult | None, probing: Probing | None = None
    ) -> tuple[float, float, float | None, MGRITResult | None, MGRITResult | None, Bias | None]:
        """Global gradient norm, loss, penalty, residuals and bias in one all-reduce over the layer group."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = PackedAllReduce(self.device)
        sums.add("norm", squared_gradient_norm(self._counted, self.device))
        sums.add("loss", loss if self.block.last else zero)
        if self.penalty is not None:
            sums.add("consistency", self.penalty.value)
        solves = {"forward": forward, "backward": backward}
        for name, result in solves.items():
            if result is not None:
                sums.add(name, result.shares)
        if probing is not None:
            sums.add("probe", probing.table())
        sums.reduce(self.layers, MessageTag(step, "gradients", "norm, loss and residuals"))
        gap = float(sums["consistency"]) / self.config.replica_batch if self.penalty is not None else None
        measured = [None if result is None else result.measured(sums[name]) for name, result in solves.items()]
        bias = probing.read(sums["probe"]) if probing is not None else None
        return float(sums["norm"]) ** 0.5, float(sums["loss"]), gap, measured[0], measured[1], bias

    def update(self, norm: float, lr: float) -> None:
        """Clip and step."""
        clip = self.config.optimizer.clip
        if clip and norm > clip:
            scale_gradients(self.block.parameters.values(), clip / (norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    # Exact forward ------------------------------------------------------------------------------------------------------------

    def exact_forward(self, inputs: Inputs, tag: MessageTag, *, last_only: bool = False) -> Tensor | None:
        """Outputs of the exact network, of all positions or of the last one only, on the last worker."""
        with torch.no_grad():
            self.block.begin(tag.step, range(tensors(inputs)[0].shape[0]), inputs, training=False)
            c_points = frozenset((0,))
            entered = self.block.enter(inputs) if self.block.first else None
            problem = Problem(self.hierarchies(1)[0], ExactPropagator(Trajectory(self.block, c_points, True)), self.spec(inputs))
            solver = MGRITSolver(problem, self.config.method(1), Communicator(self.layers, tag))
            result = solver.solve(entered, reduce_residuals=False)
            return self.block.leave(result.output, last_only=last_only) if result.output is not None else None

    def evaluate(self, batches: int) -> dict[str, float]:
        """Mean loss, and the architecture's metrics, on held-out batches through the exact forward, whatever the mode.

        Args:
            batches: how many; 0 or more than one pass: one pass, where the held-out set is finite.
        """
        architecture = self.block.architecture
        total = torch.zeros(2 + architecture.metric.size, dtype=torch.float64)
        for index in range(self.passes("validation", batches)):
            inputs, targets, _, _ = self.my_batch("validation", index)
            outputs = self.exact_forward(inputs, MessageTag(index, "evaluation"))
            if outputs is not None:
                with torch.no_grad():
                    loss = architecture.loss(outputs, targets).double().cpu().view(1)
                    count = torch.tensor([float(architecture.count(targets))], dtype=torch.float64)
                    total += torch.cat([loss, count, architecture.metric.tally(outputs, targets)])
        total = self.replicas.all_reduce(total.to(self.device), MessageTag(0, "evaluation", "sum over replicas"))
        total = self.layers.all_reduce(total, MessageTag(0, "evaluation", "sum over workers")).cpu()
        self.layers.finish()
        loss_value = float(total[0] / total[1].clamp(min=1))
        return {"loss": loss_value, **architecture.metric.read(total[2:], loss_value)}

    def passes(self, split: str, wanted: int) -> int:
        """Batches to evaluate on: as wanted, at most one pass where the set is finite."""
        finite = getattr(self.batches, "batches", None)
        if finite is None:
            return wanted or 1
        whole = int(finite(split, self.config.batch_size))
        return min(wanted, whole) if wanted else whole


def _positions(spec: StateSpec) -> int:
    """Tokens (or patches) of one sample: the time dimension of each (batch, time, width) tensor of a state; 1 for other states."""
    return sum(shape[1] if len(shape) == 3 else 1 for shape in spec.shapes)
