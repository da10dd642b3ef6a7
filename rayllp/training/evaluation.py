"""Evaluations of a run: validation loss and metrics, BLEU, and a sample of generated text.

They are done in parts of about a second, so that progress is shown and the run can be stopped between two parts.
"""

import time
from collections.abc import Callable

from rayllp.config import EvalSettings
from rayllp.data import PairBatches, TextBatches
from rayllp.report import Journal, RunDirectory
from rayllp.training.checkpointing import Checkpointer
from rayllp.training.inputs import TrainingInputs
from rayllp.training.worker_group import WorkerGroup

PART_S = 1.0
SENTENCES = {"cpu": 10, "cuda": 50}
"""Sentences translated per call. On CPUs a few take seconds; on a GPU many take no longer than a few."""


class Evaluator:
    """Evaluates the network with the exact forward, whatever the training mode.

    Args:
        checkpointer: is told every loss, since the best one decides which checkpoint is kept.
        inputs: the network and the data.
        stopped: returns True if the run is to end; an evaluation in progress is then given up.

    Attributes:
        last: the step of the last evaluation; -1 if there was none.
    """

    def __init__(
        self, run: RunDirectory, workers: WorkerGroup, checkpointer: Checkpointer, journal: Journal, settings: EvalSettings,
        inputs: TrainingInputs, stopped: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.run, self.workers, self.checkpointer, self.settings = run, workers, checkpointer, settings
        self._journal, self._inputs, self._stopped = journal, inputs, stopped
        self.last = -1

    def is_due(self, step: int) -> bool:
        """True if the settings ask for an evaluation after this step."""
        return bool(self.settings.every) and step % self.settings.every == 0

    def evaluate(self, step: int) -> None:
        """Evaluate during training, over `eval.batches` batches, and show the user the result."""
        metrics = self._measure(step, self.settings.batches, self.settings.translate)
        if metrics:
            self._journal.say(f"step {step}: validation " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def finish(self, step: int) -> tuple[dict[str, float], str]:
        """Evaluate at the end, over more batches if the settings say so, and generate a sample of text.

        Returns: the metrics by name, and the sample; both are empty if the run is stopped.
        """
        settings, data, sample = self.settings, self._inputs.data_set, ""
        # A stream of text may be very long, so by default it is not evaluated to its end.
        batches = self._inputs.batches
        finite = batches.count("validation") is not None and not batches.is_stream
        wanted = settings.final_batches or (0 if finite else settings.batches)
        metrics = self._measure(step, wanted, settings.final_translate)
        if metrics and isinstance(data, TextBatches) and settings.sample:
            prompt = [int(token) for token in data.tokens["validation"][:16]]
            self._journal.progress("sample", 0, settings.sample)
            tokens = self.workers.call("generate", prompt, settings.sample)[0]
            sample = data.tokenizer.decode([*prompt, *tokens])
            self.run.write_text("sample.txt", sample)
        return metrics, sample

    def _measure(self, step: int, batches: int, translations: int) -> dict[str, float]:
        """Evaluate and record the result. Returns the metrics by name; empty if the run was stopped meanwhile."""
        metrics = self._losses(batches)
        if metrics is None:
            return {}
        data = self._inputs.data_set
        bleu = self._bleu(data, translations) if translations and isinstance(data, PairBatches) else None
        if self._stopped():
            return {}
        if bleu is not None:
            metrics["bleu"] = bleu
        self.checkpointer.note_loss(step, metrics["loss"], batches)
        self._journal.evaluation(step, metrics)
        self.last = step
        return metrics

    def _losses(self, batches: int) -> dict[str, float] | None:
        metrics: dict[str, float] | None = None
        done, batches_per_call = 0, 1
        fewest_batches = 2 * self.workers.config.layer_workers  # with fewer batches the pipeline of workers would mostly be idle
        while metrics is None and not self._stopped():
            began = time.perf_counter()
            before, (done, size, metrics) = done, self.workers.call("evaluate", batches, done, batches_per_call)[0]
            batches_per_call = max(fewest_batches, int(PART_S * (done - before) / (time.perf_counter() - began)))
            self._journal.progress("evaluation", done, size)
        return metrics

    def _bleu(self, data: PairBatches, sentences: int) -> float | None:
        from sacrebleu import corpus_bleu

        references = data.references("validation")[:sentences]
        translations: list[str] = []
        while len(translations) < len(references):
            if self._stopped():
                return None
            self._journal.progress("translation", len(translations), len(references))
            stop = min(len(references), len(translations) + SENTENCES[self.workers.device])
            translations += self.workers.call("translate", len(translations), stop, self.settings.beams)[0]
        self._journal.progress("translation", len(translations), len(references))
        self.run.write_text("translations.txt", "".join(line + "\n" for line in translations))
        return float(corpus_bleu(translations, [references]).score)
