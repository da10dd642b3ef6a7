"""The output of `rayllp suggest-buffers`."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from rayllp.config import TrainConfig, load_run_config
from rayllp.config.nested import stage_of_depth
from rayllp.errors import SettingsError
from rayllp.plan.buffers import LAST, BufferSuggestion, suggest_buffers
from rayllp.report.progress import tell
from rayllp.report.run_directory import RunDirectory

BAR_WIDTH = 32


def show_suggestion(run: Path, factor: float, out: Console) -> BufferSuggestion:
    """Print each layer's Lipschitz constant, its part of the network now and as suggested, the reasons, and the settings to use.

    Args:
        factor: as for `suggest_buffers`.

    Raises:
        SettingsError: `run` is not a run directory, or has no estimates.
    """
    config, estimates = load_run_config(run), RunDirectory(run).read_lipschitz()
    if not estimates:
        raise SettingsError(
            f"{run} has no Lipschitz estimates (adaptive.lipschitz_every={config.adaptive.lipschitz_every}, adaptive.probe_every="
            f"{config.adaptive.probe_every}, mode={config.mode}): probes make them, and mode=serial has no probes. Train with "
            "--set adaptive.lipschitz_every=1, probe_every above 0, and mode parallel or adaptive"
        )
    if config.nested.factors:  # only estimates at the current depth are used
        config = stage_of_depth(config, len(estimates[-1])).config
        estimates = [constants for constants in estimates if len(constants) == config.model.layers]
    suggestion = suggest_buffers(estimates, config, factor=factor)
    out.print(suggestion_table(suggestion, config))
    for reason in suggestion.reasons:
        tell(out, f"- {reason}")
    now = f"{config.buffers.open} + {config.middle_layers} + {config.buffers.close}"
    seen = f"the last {min(LAST, len(estimates))} of {len(estimates)} estimates"
    if (suggestion.open, suggestion.close) == (config.buffers.open, config.buffers.close):
        tell(out, f"From {seen}: {now} layers, as the run has them.")
        return suggestion
    tell(out, f"From {seen}: {suggestion.open} + {suggestion.middle} + {suggestion.close} layers; the run has {now}. For a new run:")
    blocks = " --set mesh.blocks=null" if config.mesh.blocks else ""
    tell(out, f"  --set buffers.open={suggestion.open} --set buffers.close={suggestion.close}{blocks}")
    return suggestion


def suggestion_table(suggestion: BufferSuggestion, config: TrainConfig) -> Table:
    """Return a table with one row per layer; layers whose constant is above the threshold are marked red."""
    table = Table("layer", "now", "constant", "", "suggested", box=None)
    table.columns[0].justify = table.columns[2].justify = "right"
    tallest = max(constant for constant in suggestion.constants if constant < float("inf")) or 1.0
    for n, constant in enumerate(suggestion.constants):
        bar = "█" * max(1, round(BAR_WIDTH * min(1.0, constant / tallest)))
        style = "red" if constant > suggestion.threshold else "green"
        parts = [_part(n, open_, len(suggestion.constants) - close) for open_, close in (
            (config.buffers.open, config.buffers.close), (suggestion.open, suggestion.close),
        )]  # fmt: skip
        table.add_row(str(n), parts[0], f"{constant:.3g}", f"[{style}]{bar}[/]", parts[1])
    return table


def _part(layer: int, begin: int, end: int) -> str:
    return "open" if layer < begin else "close" if layer >= end else "middle"
