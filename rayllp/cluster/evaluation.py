"""Evaluations of a run: held-out loss and metrics, BLEU, a sample; and which step was the best."""

from typing import Any

from rayllp.cluster.group import WorkerGroup
from rayllp.cluster.saving import Saver
from rayllp.config import EvalSettings
from rayllp.data import Batches, StreamBatches, TextBatches
from rayllp.report import Journal, RunDirectory


class Evaluator:
    """Evaluates through the exact forward, whatever the mode.

    Attributes:
        last: the step of the last evaluation; -1: none yet.

    Args:
        saver: is told of every loss.
        data: the data set that the settings name; None for batches of the user's own.
        batches: the latter.
    """

    def __init__(
        self, run: RunDirectory, workers: WorkerGroup, saver: Saver, settings: EvalSettings, data: Any, batches: Batches | None
    ) -> None:
        self.run, self.workers, self.saver, self.settings = run, workers, saver, settings
        self.data, self.batches = data, batches
        self.last = -1

    def is_due(self, step: int) -> bool:
        """Whether the settings ask for an evaluation after so many steps."""
        return bool(self.settings.every) and step % self.settings.every == 0

    def evaluate(self, step: int, journal: Journal) -> None:
        """An evaluation on the way."""
        found = self._measure(step, journal, self.settings.batches, self.settings.translate)
        journal.say(f"step {step}: validation " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))

    def finish(self, step: int, journal: Journal) -> tuple[dict[str, float], str]:
        """The last evaluation, over more batches where the settings say so; and a sample of the text."""
        settings, sample = self.settings, ""
        finite = hasattr(self.batches or self.data, "batches") and not isinstance(self.data, StreamBatches)  # a text may be long
        batches = settings.final_batches or (0 if finite else settings.batches)
        found = self._measure(step, journal, batches, settings.final_translate)
        if isinstance(self.data, TextBatches) and settings.sample:
            prompt = [int(token) for token in self.data.tokens["validation"][:16]]
            tokens = self.workers.call("generate", prompt, settings.sample)[0]
            sample = self.data.tokenizer.decode([*prompt, *tokens])
            self.run.write_text("sample.txt", sample)
        return found, sample

    def _measure(self, step: int, journal: Journal, batches: int, translations: int) -> dict[str, float]:
        found: dict[str, float] = self.workers.call("evaluate", batches)[0]
        self.saver.note_loss(step, found["loss"], batches)
        if translations and hasattr(self.data, "references"):
            found["bleu"] = self._bleu(translations)
        journal.evaluation(step, found)
        self.last = step
        return found

    def _bleu(self, sentences: int) -> float:
        from sacrebleu import corpus_bleu

        translations = self.workers.call("translate", sentences, self.settings.beams)[0]
        references = self.data.references("validation")[: len(translations)]
        self.run.write_text("translations.txt", "".join(line + "\n" for line in translations))
        return float(corpus_bleu(translations, [references]).score)
