"""The result of `train`."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of `train`.

    Attributes:
        directory: the run directory.
        steps: optimizer steps done, over all sessions of the run.
        validation_loss: mean validation loss per token (or image, or sentence), with the exact forward; None if the run was stopped.
        metrics: the other metrics of the last evaluation, which depend on the family: perplexity, accuracy, bleu.
        sample: generated text; empty if the run was stopped, or the family does not generate text.
        stopped: True if Ctrl-C, SIGTERM or a closed terminal ended the run.
        signal: the number of the signal that ended it.
        stopped_early: True if the last `eval.patience` evaluations were no better than the best before them.
    """

    directory: Path
    steps: int
    validation_loss: float | None
    sample: str
    stopped: bool
    signal: int | None = None
    stopped_early: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
