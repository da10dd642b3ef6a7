"""The texts that the driver of a run shows to the user."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rayllp.config import TrainConfig
from rayllp.config.nested import Stage
from rayllp.config.schedule import learning_rate
from rayllp.engine.batch import count_microbatches
from rayllp.mgrit.windows import lengths_in_words


def describe_run(config: TrainConfig, network: str, parameters: int, device: str, run: Path, left_out: Mapping[str, int]) -> str:
    """Return a run's first line: model, layers, parameters, workers and directory.

    Args:
        network: name of the model's family, or of the class of the user's own model.
        parameters: number of the model's parameters.
        left_out: how many samples of the data were skipped, by reason.
    """
    buffers = f"{config.buffers.open} + {config.middle_layers} + {config.buffers.close} layers"
    skipped = "; left out of the data: " + ", ".join(f"{n} {kind}" for kind, n in left_out.items()) if left_out else ""
    return f"{network}: {buffers}, {parameters / 1e6:.1f} M parameters, {describe_layout(config)} on {device}; run directory {run}{skipped}"


def describe_other_length(config: TrainConfig, before: int, step: int) -> str:
    """Return what a changed number of steps does to the learning rate of a resumed run.

    Args:
        before: number of steps that the run had.
        step: steps done.
    """
    was, now = (learning_rate(config.optimizer, n, steps) for n, steps in ((max(0, step - 1), before), (step, config.steps)))
    if was == now:
        return f"{config.steps} steps instead of {before}: the learning rate stays at {now:.3g}"
    return (
        f"{config.steps} steps instead of {before}: the learning rate follows the schedule of {config.steps}, and goes from {was:.3g} to "
        f"{now:.3g} at once (optimizer.lr scales it)"
    )


def describe_layout(config: TrainConfig) -> str:
    """Return which layers each worker has, in words."""
    replicas = f" × {config.mesh.data} replicas" if config.mesh.data > 1 else ""
    if config.placement == "cyclic":
        rolling, fixed = f"a rolling window of {config.longest_window}", f"windows of {lengths_in_words(config.window_lengths)}"
        return f"{config.layer_workers} workers take layers in turn, {rolling if config.rolls else fixed}{replicas}"
    return f"{config.layer_workers} blocks {listed(config.blocks, '/')}{replicas}"


def note_without_pipeline(config: TrainConfig) -> str | None:
    """Return a note if exact steps have too few microbatches to keep all workers of the pipeline busy; None if there are enough."""
    workers, sequences = config.layer_workers, config.replica_batch // config.accumulate
    if config.mode == "parallel" or config.placement == "cyclic":
        return None
    microbatches = config.accumulate * count_microbatches(sequences, workers, config.microbatches)
    if microbatches >= workers:
        return None
    cause = f"microbatches={config.microbatches}" if config.microbatches else f"a batch of {sequences} sequences"
    return (
        f"exact steps run without the pipeline, one worker after the other: {cause} makes {microbatches} microbatches for {workers} "
        f"workers; give at least {workers}, by microbatches or batch_size"
    )


def describe_stage(stage: Stage, run_config: TrainConfig) -> str:
    """Return a description of a stage of nested iteration.

    Args:
        run_config: settings of the whole run.
    """
    config, note = stage.config, f" ({stage.note})" if stage.note else ""
    depth = f"{config.middle_layers} middle layers with Δt = {config.middle_step:g}"
    return f"stage {stage.number} of {len(run_config.nested.factors) + 1}, to step {stage.end}: {depth}{note}"


def where_not_finite(faults: Iterable[tuple[int, int, str] | None]) -> str:
    """Return in words where values first stopped being finite.

    Args:
        faults: what each worker has found (see `engine.diagnosis.diagnose`): a tuple that sorts by place in the network and ends with a
            text, or None.
    """
    first = min((fault for fault in faults if fault is not None), default=None)
    if first is not None:
        return first[2]
    return "the approximate solve alone (exact forward and gradients are finite): raise its number of iterations, or set mode: serial"


def listed(numbers: Iterable[int], between: str = ", ") -> str:
    """Return the numbers as a text, with `between` between them."""
    return between.join(map(str, numbers))
