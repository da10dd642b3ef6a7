"""Held-out loss and metrics, by the exact forward."""

import torch

from rayllp.channel.base import Channel, MessageTag
from rayllp.engine.batch import ReplicaBatches
from rayllp.engine.exact_forward import ExactForward


def evaluate(forward: ExactForward, batches: ReplicaBatches, replicas: Channel, wanted: int) -> dict[str, float]:
    """Mean loss, and the architecture's metrics, on held-out batches; the same on every worker, and all of them call it.

    Args:
        replicas: to the workers of other replicas that own the same layers.
        wanted: how much to evaluate on (`ReplicaBatches.held_out`).
    """
    group = forward.group
    architecture = group.block.architecture
    total = torch.zeros(2 + architecture.metric.size, dtype=torch.float64)
    for index, (inputs, targets) in enumerate(batches.held_out(wanted)):
        outputs = forward(inputs, MessageTag(index, "evaluation"))
        if outputs is not None:
            with torch.no_grad():
                loss = architecture.loss(outputs, targets).double().cpu().view(1)
                count = torch.tensor([float(architecture.count(targets))], dtype=torch.float64)
                total += torch.cat([loss, count, architecture.metric.tally(outputs, targets)])
    total = replicas.all_reduce(total.to(group.device), MessageTag(0, "evaluation", "sum over replicas"))
    total = group.channel.all_reduce(total, MessageTag(0, "evaluation", "sum over workers")).cpu()
    group.channel.finish()
    loss_value = float(total[0] / total[1].clamp(min=1))
    return {"loss": loss_value, **architecture.metric.read(total[2:], loss_value)}
