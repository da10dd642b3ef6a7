"""The model card (README.md) of an exported model: what was trained, on which data and how, how good it is, and how to load it."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from rayllp.checkpoint import checkpoints, step_of
from rayllp.config import TrainConfig, load_run_config, to_text
from rayllp.config.nested import stage_at
from rayllp.models.scaled import loader
from rayllp.report.run_directory import RunDirectory, changed_settings, read_lines

PLACES = ("data.path", "data.validation_path", "data.dataset", "data.tokenizer", "model.from_pretrained", "checkpoint.path")
"""Settings that may be local paths, of which a card shows only the last part."""
OWN = ("name", "log_to", "timeline_every", "profile.steps", "checkpoint.path")
"""Settings that do not describe the model."""


def write_card(run_path: Path, folder: Path, step: int | None = None) -> None:
    """Write README.md into an export.

    Args:
        run_path: the run directory.
        folder: the folder that `rayllp export` wrote.
        step: step of the exported checkpoint; None: the latest.
    """
    config = load_run_config(run_path)
    run = RunDirectory(run_path, config)
    step = step_of(checkpoints(run.checkpoints)[-1]) if step is None else step
    base, dataset = config.model.from_pretrained, config.data.dataset
    data = ModelCardData(
        library_name="transformers" if (folder / "config.json").is_file() else "peft",
        tags=["rayllp", "layer-parallel"],
        base_model=base if base and not Path(base).exists() else None,
        datasets=[dataset] if dataset and not Path(dataset).exists() else None,
    )
    body = "\n\n".join("\n".join(part) for part in _parts(config, run, folder, step))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(folder / "README.md")


def _parts(config: TrainConfig, run: RunDirectory, folder: Path, step: int) -> Iterator[list[str]]:
    now = stage_at(config, max(0, step - 1)).config
    sizes = f"of {now.buffers.open} + {now.middle_layers} + {now.buffers.close} layers with Δt = {now.middle_step:.4g} in the middle"
    kind, options = loader(folder)
    package, _, call = kind.rpartition(".")
    yield [f"# {config.name}"]
    yield [f"{_what(folder)} {sizes} and {_count(folder) / 1e6:.1f} M parameters, trained by rayllp."]
    load = f'model = {call}.from_pretrained("{folder.name}"{options})'
    yield ["## How to load it", "", "```python", f"from {package} import {call}", "", load, "```"]
    yield ["## What it was trained on", "", _data(config)]
    yield ["## How it was trained", "", *_training(config, run, step)]
    evaluations = [line for line in run.evaluations() if line["step"] <= step]
    if evaluations:
        last = evaluations[-1]
        rows = [f"| {name} | {value:.4f} |" for name, value in last.items() if name not in ("step", "split")]
        yield ["## How good it is", "", f"On held-out data after {last['step']} steps:", "", "| | |", "|---|---|", *rows]
    yield ["## Settings", "", "Those that are not at rayllp's defaults:", "", "```yaml", to_text(_changed(config)).rstrip(), "```"]


def _data(config: TrainConfig) -> str:
    data = config.data
    name = data.dataset or data.path
    source = "the embedded data set of rayllp" if name is None else f"`{_short(name)}`" + (f", {data.subset}" if data.subset else "")
    return f"{source[0].upper()}{source[1:]}; tokenizer `{_short(data.tokenizer)}`, sequences of {config.sequence_length}."


def _training(config: TrainConfig, run: RunDirectory, step: int) -> Iterator[str]:
    optimizer = config.optimizer
    metrics = [metric for metric in read_lines(run.path / "metrics.jsonl") if metric["step"] < step]
    modes = Counter(metric["mode"] for metric in metrics)
    shares = ", ".join(f"{count} {'layer-parallel' if mode == 'parallel' else 'exact'}" for mode, count in modes.items())
    yield f"- {step} steps{f' ({shares})' if shares else ''} of {config.batch_size} samples, seed {config.seed}, in {config.dtype}"
    yield f"- {optimizer.name}, learning rate {optimizer.lr:g}, schedule {optimizer.schedule}, weight decay {optimizer.weight_decay:g}"
    if optimizer.ema is not None:
        yield f"- these weights are an exponential moving average (decay {optimizer.ema:g}) of those that were trained"
    if config.model.from_pretrained is not None:
        yield f"- began with `{_short(config.model.from_pretrained)}`"
    if metrics:
        yield f"- training loss of the last step {metrics[-1]['loss']:.4f}; {sum(metric['tokens'] for metric in metrics):,} tokens"


def _changed(config: TrainConfig) -> dict[str, Any]:
    changed = {name: value for name, value in changed_settings(config).items() if name not in OWN}
    return {name: _short(value) if name in PLACES and value is not None else value for name, value in changed.items()}


def _short(name: str) -> str:
    """Return a name on the hub unchanged, and the last part of a local path."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() or name.startswith((".", "~")) else name


def _what(folder: Path) -> str:
    config, adapters = folder / "config.json", folder / "adapter_config.json"
    values = json.loads((config if config.is_file() else adapters).read_text(encoding="utf-8"))
    if not config.is_file():
        return f"LoRA adapters of rank {values['r']} for `{_short(values['base_model_name_or_path'])}`,"
    return f"A `{values.get('transformers_config', values)['architectures'][0]}`"


def _count(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 (no dict)
    return total
