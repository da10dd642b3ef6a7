"""The learning rate of each step, as a pure function of the step, so that a resumed run needs only the step's number."""

import math

from rayllp.config import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Return the learning rate of step `step` of `steps`.

    It warms up linearly to the peak. From there it follows the schedule, which reaches `min_lr_ratio` of the peak at the last step.

    transformers has the same shapes, but each with a warm-up and an end of its own, and within an object that counts steps.
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    last, begin = steps - 1, settings.warmup
    if settings.schedule == "wsd":
        begin = max(begin, last - round(settings.decay_share * steps))
    done = min(1.0, max(0.0, (step - begin) / max(1, last - begin)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * left)
