"""Model FLOPs utilisation (MFU): the floating-point operations of a step, relative to what the device could do.

Only the model's own forward and backward pass count. Sweeps over the coarse grid, probes and recomputation count as time, not as work.
"""

import re
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rayllp.data.base import Inputs
from rayllp.engine.layer_group import LayerGroup
from rayllp.state import combine

PEAKS = {
    "B200": (2250e12, 80e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
}
"""Operations per second in the maker's data sheet, without sparsity, by words of the GPU's name: (bfloat16, float32 without TF32)."""


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Return the operations per second that the device can do at most in this dtype of the settings; None if not known, as on CPUs."""
    if device.type != "cuda" or dtype not in ("bfloat16", "float32"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[dtype == "float32"] for words, peaks in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)


def count_flops(group: LayerGroup, inputs: Inputs) -> float:
    """Return the operations of forward and backward pass of this worker's pieces for one sample: three times those of the forward pass.

    Args:
        group: this worker's end of the layer group.
        inputs: inputs of some samples; the first one is used.
    """
    block = group.block
    one = combine(lambda part: part[:1], inputs)
    spec = group.spec(one)
    bound = block.bind_for_evaluation(one)
    # torch does not count the CPU's fused attention.
    attention = sdpa_kernel(SDPBackend.MATH) if group.device.type == "cpu" else nullcontext()
    with torch.no_grad(), attention, FlopCounterMode(display=False) as counter:
        state = bound.enter(one) if block.first else spec.zeros()
        for index in block.indices:
            state = bound.layer(index, state, block.layers[index])
        if block.last:
            bound.leave(state)
    return 3.0 * counter.get_total_flops()
