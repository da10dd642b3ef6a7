"""One training step of one worker, from its batch to the optimizer's update.

MGRIT's solves have no barrier unless a tolerance is set; windows gather increments after each window and sweep. One small all-reduce at the
end of the step carries the gradient norm, the loss and the residuals together.
"""

import time
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch

from rayllp.channel.base import Channel
from rayllp.channel.local import LocalChannel
from rayllp.config import TrainConfig
from rayllp.control import Accuracy, ProbePlan
from rayllp.data.base import Batches, Inputs
from rayllp.engine.batch import EXACT, ReplicaBatches, StepBatch
from rayllp.engine.block import Block
from rayllp.engine.diagnosis import diagnose
from rayllp.engine.evaluation import Evaluation
from rayllp.engine.exact_forward import ExactForward
from rayllp.engine.gradients import Gradients
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.optimizer import Optimizer, scale_gradients
from rayllp.engine.probe import Probing
from rayllp.engine.reduce_gradients import add_shared_gradients
from rayllp.engine.replica_sums import ReplicaSums
from rayllp.engine.smoothness import add_smoothness_gradient
from rayllp.engine.statistics import StepStats, reduce_statistics
from rayllp.engine.step_gradients import StepGradients
from rayllp.engine.step_solves import kind_of
from rayllp.engine.utilisation import count_flops, peak_flops
from rayllp.models.base import Architecture
from rayllp.timeline import Timeline


class Engine:
    """One worker's trainer.

    Args:
        architecture: the network.
        config: the settings of the run.
        batches: the global batches.
        layer_channel: the channel to the workers of the same replica, in order of the layers.
        data_channel: the channel to the workers of other replicas that own the same layers.
        device: where this worker's layers are.

    Attributes:
        block: this worker's layers.
        layer_channel, replicas: the two channels.
        group: this worker's end of its layer group.
        gradients: forms a step's gradients from a `StepBatch`.
        exact_forward: computes the exact network's outputs from inputs and a tag.
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
        self.block = Block(architecture, config, layer_channel.rank, device)
        self._counted = list(self.block.counted())
        shards = (data_channel.rank, data_channel.size) if config.shards_optimizer else (0, 1)
        self.optimizer = Optimizer(self.block, config.optimizer, *shards)
        self._is_checked = False
        self._work: tuple[float, float] | None = None
        self._responses: dict[int, torch.Tensor] = {}  # what `LayerResponses` has found, also in earlier groups
        self._join(layer_channel, data_channel)

    def _join(self, layer_channel: Channel, data_channel: Channel) -> None:
        """Create all objects that communicate with other workers."""
        self.layer_channel, self.replicas = layer_channel, data_channel
        self._sums = ReplicaSums(self.block, data_channel)
        self.group = LayerGroup(self.block, layer_channel, self._responses)
        self.gradients = Gradients(self.group)
        self.exact_forward = ExactForward(self.group)
        self._shares = ReplicaBatches(self.batches, self.block.architecture, self.config, data_channel.rank, self.device)

    def disconnect(self) -> None:
        """Leave the other workers; the layers stay here."""
        alone = LocalChannel.alone()
        self._sums.close()
        self._join(alone, alone)

    def reconnect(self, layer_channel: Channel, data_channel: Channel) -> None:
        """Continue among other workers, with the same block. Gradients of a step that was cut short are dropped."""
        self._sums.close()
        self._join(layer_channel, data_channel)
        self.optimizer.zero_grad()

    @property
    def timeline(self) -> Timeline | None:
        """The timeline on which steps record their spans; None if they record none."""
        return self.group.timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self.group.timeline = timeline

    # The training step --------------------------------------------------------------------------------------------------------

    def train_step(self, step: int, accuracy: Accuracy, plan: ProbePlan | None = None) -> StepStats:
        """Do one optimizer step. The weights stay as they are if the loss or the gradient is not finite.

        Args:
            step: number of the step.
            accuracy: how accurately forward and adjoint are solved.
            plan: what to measure, if the step is a probe.

        Raises:
            ChannelError: another worker was lost, or too slow.
        """
        started = time.perf_counter()
        batch = self.step_batch(step, accuracy)
        self.check_first_batch(batch)
        probing = Probing(self.gradients, plan) if plan else None
        self._sums.begin(step, None if probing else self._kind(batch))
        # Forward solve, loss, adjoint solve; read `WindowGradients.form` or `MGRITGradients.form` for all three.
        with self._learning(batch, plan):
            formed = probing.form(batch) if probing else self.gradients(batch)
        with self.group.span("gradients", "wait"):
            self._sums.finish(formed.loss)
            if probing:
                probing.compare(self.replicas, step)
            add_shared_gradients(self.block, self.layer_channel, step)
            if accuracy.smoothness:
                add_smoothness_gradient(self.block, self.layer_channel, accuracy.smoothness, step)
        with self.group.span("statistics", "wait"):
            stats = self.reduce_statistics(batch, formed, probing)
        fault = None if stats.is_finite else diagnose(self.exact_forward, batch)
        if stats.is_finite:
            with self.group.span("update"):
                self.update(step, stats.grad_norm, stats.lr)
        self.optimizer.zero_grad()
        self.layer_channel.finish()
        self.replicas.finish()
        return replace(stats, time_s=time.perf_counter() - started, fault=fault, work=self._work)

    def _learning(self, batch: StepBatch, plan: ProbePlan | None) -> AbstractContextManager[None]:
        """Return a context in which a probe of a rolling window, and now and then a step by it, learns how layers respond to changes."""
        responses, spec = self.group.responses, self.group.spec(batch.inputs)
        rolls = (plan.candidate if plan else batch.accuracy).tolerance is not None
        if responses is None or not rolls or not (plan or responses.is_due(spec, batch.step)):
            return nullcontext()
        return responses.learned(spec, batch.step)

    def _kind(self, batch: StepBatch) -> Hashable:
        """Return a key that is equal for steps which form their gradients in the same way."""
        accuracy = batch.accuracy
        return kind_of(accuracy), bool(accuracy.consistency), self.group.spec(batch.inputs)

    def step_batch(self, step: int, accuracy: Accuracy = EXACT, *, split: str = "train") -> StepBatch:
        """Return this replica's batch of a training step, to be solved with this accuracy; or the batch of another split."""
        return self._shares.step_batch(step, accuracy, split=split)

    def check_first_batch(self, batch: StepBatch) -> None:
        """Check what random numbers the layers draw, and count their operations: once, with the first batch to be trained on.

        Raises:
            SettingsError: layers draw random numbers that cannot be frozen within a step.
        """
        if not self._is_checked:
            self.block.check_draws(batch.inputs)
            self._work = self._measure_work(batch.inputs)
            self._is_checked = True

    def _measure_work(self, inputs: Inputs) -> tuple[float, float] | None:
        peak = peak_flops(self.device, self.config.dtype)
        return None if peak is None else (self.config.replica_batch * count_flops(self.group, inputs), peak)

    def reduce_statistics(self, batch: StepBatch, formed: StepGradients, probing: Probing | None = None) -> StepStats:
        """Return the step's numbers over the whole layer group, by one all-reduce."""
        return reduce_statistics(self.group, batch, formed, self._counted, probing)

    def update(self, step: int, norm: float, lr: float) -> None:
        """Clip the gradients, and take the optimizer's step.

        If the optimizer's state is sharded over replicas, each updates its share of the parameters and then receives the others' shares.

        Args:
            step: number of the step.
            norm: norm of the whole network's gradient.
            lr: learning rate of the step.
        """
        clip = self.config.optimizer.clip
        if clip and norm > clip:
            scale_gradients(self.block.parameters.values(), clip / (norm + 1e-6))
        self.optimizer.step(lr, step)
        self.optimizer.gather(self.replicas, step)

    # Outside of training steps ------------------------------------------------------------------------------------------------

    def evaluate(self, batches: int) -> dict[str, float]:
        """Return the mean loss and the architecture's metrics on held-out batches, through the exact forward whatever the mode.

        Args:
            batches: the amount of data, in units of EVALUATED samples, at most one pass; 0: one pass. Does not depend on the batch size.
        """
        evaluation = self.evaluation(batches)
        with self.averaged():
            found = evaluation.advance(evaluation.size)
        assert found is not None
        return found

    def evaluation(self, batches: int) -> Evaluation:
        """Return the evaluation that `evaluate` does, to be done in parts. Each part belongs inside `averaged`."""
        return Evaluation(self.exact_forward, self._shares, self.replicas, batches)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the weights are their average (optimizer.ema), if there is one. All workers enter it together."""
        if self.config.optimizer.ema is None:
            yield
            return
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def _swap_average(self) -> None:
        self.optimizer.swap_average()
        self.optimizer.gather(self.replicas, 0)
        self.replicas.finish()
