"""Counts of a step's floating-point operations, which depend on the model alone, and the utilisation computed from them."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from rayllp.channel import LocalChannel, run_workers
from rayllp.control import Controller
from rayllp.engine import utilisation
from rayllp.engine.utilisation import count_flops, peak_flops
from rayllp.report.progress import ProgressDisplay
from rayllp.training.step_log import StepLog
from tests.conftest import make_engine, tiny, train_engine
from tests.test_progress import STEP


def counted(config):
    """Return each worker's count. Workers run one after the other, since the choice of attention kernel applies to the whole process."""
    engines = [make_engine(config, channel) for channel in LocalChannel.group(config.layer_workers)]
    return [count_flops(engine.group, engine.step_batch(0).inputs) for engine in engines]


def test_operations_are_those_of_the_formula():
    config = tiny()
    width, length, layers, vocabulary = config.model.width, config.sequence_length, config.model.layers, 256
    products = layers * 12 * width**2 * length + vocabulary * width * length  # QKV, output, MLP; and the head
    attention = layers * 2 * length**2 * width
    (found,) = counted(config)
    assert found == pytest.approx(3 * 2 * (products + attention), rel=0.01)
    for changes in ({"workers": 3}, {"workers": 2, "solver": "windows"}):
        assert sum(counted(tiny(**changes))) == found


def test_peaks(monkeypatch):
    cuda = torch.device("cuda")
    for name, dtype, peak in (
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12), ("NVIDIA H100 PCIe", "bfloat16", 756e12), ("NVIDIA H200", "float32", 67e12),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12), ("Some other", "bfloat16", None), ("NVIDIA L40", "bfloat16", None),
        ("NVIDIA RTX A1000", "float32", None), ("NVIDIA GH200 480GB", "float32", 67e12), ("NVIDIA H100 NVL", "bfloat16", 835e12),
        ("NVIDIA H100", "float64", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, dtype) == peak
    assert peak_flops(torch.device("cpu"), "bfloat16") is None


def test_utilisation_is_of_all_workers_devices(monkeypatch):
    assert train_engine(make_engine(tiny()), 1)[0].work is None  # on CPUs
    monkeypatch.setattr("rayllp.engine.engine.peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr("rayllp.engine.engine.count_flops", lambda group, inputs: 1e3 * len(group.block.layers))
    config = tiny(workers=2)
    of_workers = run_workers(2, lambda channel: train_engine(make_engine(config, channel), 1)[0])
    step_log = object.__new__(StepLog)
    step_log.config = config
    stats = [replace(each, time_s=0.5) for each in of_workers]
    whole = config.batch_size * 1e3 * config.model.layers
    assert step_log._utilisation(stats) == pytest.approx(whole / (0.5 * 2e9))
    assert step_log._utilisation(stats[:1]) is None  # the other was lost with its worker
    line = step_log._metric(replace(stats[0], time_s=2.0), Controller(config).accuracy, None)
    assert line["tokens_per_s"] == line["tokens"] / 2


def test_it_is_shown_where_it_is_known():
    out = io.StringIO()
    with ProgressDisplay(1, console=Console(file=out)) as display:
        display.update(STEP | {"mfu": 0.4321})
    assert "80 tokens/s  MFU 43.2%  ρ" in out.getvalue()
    assert utilisation.PEAKS["H100"] != utilisation.PEAKS["H100 PCIe"]
