"""Loss and metrics on held-out data, by the exact forward."""

import torch

from rayllp.channel.base import Channel, MessageTag
from rayllp.engine.batch import ReplicaBatches
from rayllp.engine.exact_forward import ExactForward


class Evaluation:
    """Computes mean loss and the architecture's metrics on held-out batches, in parts of any size that are the same on all workers.

    Args:
        forward: the exact network.
        batches: this replica's batches.
        replicas: the channel to the workers of other replicas that own the same layers.
        wanted: how much data to evaluate on (`ReplicaBatches.held_out`).

    Attributes:
        done: number of batches evaluated so far.
        size: number of batches in all.
    """

    def __init__(self, forward: ExactForward, batches: ReplicaBatches, replicas: Channel, wanted: int) -> None:
        self._forward, self._replicas = forward, replicas
        self.done, self.size = 0, batches.held_out_size(wanted)
        self._ahead = batches.held_out(wanted)
        self._total = torch.zeros(2 + forward.group.block.architecture.metric.size, dtype=torch.float64)

    def advance(self, most: int) -> dict[str, float] | None:
        """Evaluate up to `most` more batches.

        Returns: once all batches are done, loss and metrics by name, the same on every worker; None until then.
        """
        group, stop = self._forward.group, min(self.size, self.done + most)
        architecture = group.block.architecture
        for index in range(self.done, stop):
            batch = next(self._ahead)
            outputs = self._forward(batch.inputs, MessageTag(index, "evaluation"))
            group.channel.finish()  # otherwise the sent states of all batches would be kept until the last one
            if outputs is not None:
                with torch.no_grad():
                    loss = architecture.loss(outputs, batch.targets).double().cpu().view(1)
                    count = torch.tensor([float(architecture.count(batch.targets))], dtype=torch.float64)
                    self._total += torch.cat([loss, count, architecture.metric.tally(outputs, batch.targets)])
        self.done = stop
        return self._figures() if stop == self.size else None

    def _figures(self) -> dict[str, float]:
        group = self._forward.group
        total = self._replicas.all_reduce(self._total.to(group.device), MessageTag(0, "evaluation", "sum over replicas"))
        total = group.channel.all_reduce(total, MessageTag(0, "evaluation", "sum over workers")).cpu()
        loss = float(total[0] / total[1].clamp(min=1))
        return {"loss": loss, **group.block.architecture.metric.read(total[2:], loss)}
