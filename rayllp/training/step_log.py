"""The log of a run's steps: it records their statistics, passes probes' findings to the controller, and can go back to an earlier step."""

import time
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from rayllp.config import TrainConfig
from rayllp.control import Accuracy, Controller, Decision, ProbePlan
from rayllp.control.records import PROBES, ROLLING
from rayllp.engine import StepStats
from rayllp.mgrit import Convergence
from rayllp.report import Journal, RunDirectory
from rayllp.timeline import sum_kinds
from rayllp.training.failure_budget import LONGEST_COPY_INTERVAL
from rayllp.training.gain import StepTimes
from rayllp.training.worker_group import StepReport

CHUNK_S = 1.0
"""Intended duration of a chunk in seconds."""
MAX_CHUNK_STEPS = 50
"""The largest number of steps in a chunk."""
STEPS_WITH_SPANS = 3
"""Number of timed steps of each kind (mode, solve, workers) whose spans are stored. It is above 1, since the first may be slow."""
HANG_FACTOR = 20.0
"""A chunk is taken to hang after this many times its expected duration, plus the time limits of the settings."""
FIRST_CHUNK_EXTRA_S = 1800.0
"""Extra time for the first chunk of new workers, whose speed is not known, and which may have to compile."""

Chunk = list[tuple[int, Accuracy, ProbePlan | None]]
"""Steps that the workers do in one call. Each has a number, its accuracy, and what is probed (measured) in it, if anything."""


class StepLog:
    """The record of one session's steps.

    Attributes:
        config: settings of the network that is being trained now, with the current number of workers.
        controller: chooses the accuracy of each step; it is replaced when the network changes.
        step: steps done, as far as the workers have reported.
        first_step: the step at which the current workers began.
        step_s: seconds per step in the last chunk.
        times: wall times of steps by solve.
        why_exact: why the controller has chosen exact steps; None if it has not, or if they are only those that the settings ask for at the
            end.
    """

    def __init__(self, run: RunDirectory, journal: Journal, config: TrainConfig) -> None:
        self._run, self._journal = run, journal
        self.step = self.first_step = 0
        self.step_s = CHUNK_S
        self._marks: dict[int, Any] = {}  # the controller's state before each chunk, by step
        self._chunk: Chunk = []
        self._drawn: Counter[Hashable] = Counter()
        self.times = StepTimes()
        self.begin_stage(config)

    def begin_stage(self, config: TrainConfig) -> None:
        """Train with other settings from now on; they get a new controller."""
        self.config, self.controller = config, Controller(config)
        self.why_exact: str | None = None

    def resize(self, config: TrainConfig) -> None:
        """Train with another number of workers from now on; the controller stays."""
        self.config, self.first_step = config, self.step

    def start_at(self, step: int) -> None:
        """Go on after `step` steps with workers whose speed is not known."""
        self.step = self.first_step = step
        self.times.forget_speed()
        self.controller.time_anew(step)
        self.remember(step)

    # Steps ------------------------------------------------------------------------------------------------------------------------

    def next_chunk(self, step: int, end: int) -> Chunk:
        """Return the next steps: about a second's worth, ending at the next probe, evaluation, checkpoint, change of accuracy, or `end`."""
        config, chunk = self.config, []
        for n in range(step, min(end, step + max(1, min(MAX_CHUNK_STEPS, int(CHUNK_S / self.step_s))))):
            probe = self.controller.plan_probe(n)
            accuracy = self.controller.accuracy_at(n)
            chunk.append((n, accuracy, probe))
            due = [every for every in (config.eval.every, config.checkpoint.every) if every and (n + 1) % every == 0]
            if probe or due or n + 1 == config.switch_step or self.controller.accuracy_at(n + 1) != accuracy:
                break
        return chunk

    def begin(self, step: int) -> None:
        """Let the controller decide before the chunk that begins with `step`."""
        self.remember(step)
        before = self.controller.chosen.tolerance
        decision = self.controller.begin(step, self.times.step_s)
        self._heed_tolerance(before)
        self._announce(decision)

    def expect(self, chunk: Chunk) -> float:
        """Note that the workers are about to do this chunk; return the seconds after which a worker that has not answered must hang."""
        self._chunk, self._began = chunk, time.perf_counter()
        first = FIRST_CHUNK_EXTRA_S if self.step == self.first_step else 0.0
        return first + HANG_FACTOR * self.step_s * len(chunk) + self.config.receive_timeout_s + self.config.hang_timeout_s

    def note_time(self) -> None:
        """Measure the time per step of the chunk that all workers have just done."""
        self.step_s = (time.perf_counter() - self._began) / len(self._chunk)

    def record(self, reports: Sequence[list[StepReport]]) -> None:
        """Record the chunk's steps up to, but without, one whose loss or gradient is not finite: that one was not applied.

        Args:
            reports: for each worker (by rank), its reports of the steps that it has done.
        """
        for done, (first, (_, accuracy, plan)) in enumerate(zip(reports[0], self._chunk, strict=False)):
            if not first.is_finite:
                return
            stats, of_step = first.stats, [of_worker[done] for of_worker in reports]
            metric = self._metric(stats, accuracy, plan)
            if plan is not None and plan.lipschitz:
                constants = {layer: value for each in of_step for layer, value in (each.stats.lipschitz or {}).items()}
                # The values of lost workers are missing.
                metric["lipschitz"] = [constants[n] for n in sorted(constants)] if len(constants) == self.config.model.layers else None
            metric["mfu"] = self._utilisation([each.stats for each in of_step])
            self._journal.step(metric)
            self._record_timeline(metric, of_step)
            for rank, each in enumerate(of_step):
                if each.trace is not None:
                    self._run.trace(stats.step, rank, each.trace)
            self.times.take(PROBES if plan is not None else accuracy.name, stats.time_s, _computed(of_step, self.config.world))
            self.step += 1
        if len(reports[0]) == len(self._chunk) and self._chunk[-1][2] is not None:
            self._observe(reports[0][-1].stats)

    def _utilisation(self, stats: Sequence[StepStats]) -> float | None:
        """Return the step's model FLOPs utilisation: operations done, over what all devices can do in that time; None if unknown."""
        works = [each.work for each in stats if each.work is not None]
        if len(works) < self.config.world:
            return None
        done, possible = (sum(parts) for parts in zip(*works, strict=True))
        return done / (possible * max(stats[0].time_s, 1e-9))

    def _record_timeline(self, metric: dict[str, Any], reports: Sequence[StepReport]) -> None:
        """Record the timeline of a timed step: all spans for the first few of its kind, sums for later ones, since spans are many."""
        timed = [(each.timed, each.peak_memory) for each in reports if each.timed is not None and each.peak_memory is not None]
        if not timed or len(timed) < self.config.world:  # timelines of lost workers are missing
            return
        kind = {name: metric[name] for name in ("mode", "solve", "iterations_forward", "iterations_backward")}
        if kind["solve"] == ROLLING:  # whose sweeps differ from step to step
            kind |= {"iterations_forward": None, "iterations_backward": None}
        key = (*kind.values(), self.config.world, self.config.model.layers)
        self._drawn[key] += 1
        self._run.timeline(metric["step"], kind, timed, spans=self._drawn[key] <= STEPS_WITH_SPANS)

    # Going back -------------------------------------------------------------------------------------------------------------------

    def remember(self, step: int) -> None:
        """Remember the controller's state before `step`. States too old for a run to go back to are dropped."""
        oldest = step - 2 * LONGEST_COPY_INTERVAL - MAX_CHUNK_STEPS
        self._marks = {known: mark for known, mark in self._marks.items() if known >= oldest}
        self._marks[step] = self.controller.mark()

    def rewind_with_controller(self, step: int) -> None:
        """Go back to `step`: forget later records, and take the controller back to its state before that step."""
        self._forget(step)
        self.controller.rewind(self._marks[max(known for known in self._marks if known <= step)])
        self.step = step

    def rewind_records(self, step: int) -> None:
        """Go back to `step`, with a controller that has been restored from a checkpoint or is new."""
        self._forget(step)
        self.step = step

    def _forget(self, step: int) -> None:
        self._marks = {known: mark for known, mark in self._marks.items() if known <= step}
        self._journal.rewind(step)
        self._drawn.clear()

    # The controller -----------------------------------------------------------------------------------------------------------------

    def _observe(self, stats: StepStats) -> None:
        found, before = stats.findings, self.controller.chosen.tolerance
        decision = self.controller.observe(stats.step, found)
        self._heed_tolerance(before)
        advice = {way: solve.status.value if solve else "" for way, solve in _solves(stats).items()}
        measured = {name: getattr(found, name) for name in ("rho_forward", "rho_backward", "bias", "noise", "loss_gap")}
        self._announce(decision, advice=advice, **measured)

    def _heed_tolerance(self, before: float | None) -> None:
        """Time a rolling window's steps anew if its tolerance is no longer `before`. While steps are exact, its times are kept."""
        after = self.controller.chosen.tolerance
        if after is not None and after != before:
            self.times.forget_speed(but=("serial", PROBES))

    def _announce(self, decision: Decision | None, **details: Any) -> None:
        if decision:
            if self.config.switch_step is None or decision.step < self.config.switch_step:
                self.why_exact = decision.reason if decision.mode == "serial" else None
            details["tolerance"] = self.controller.chosen.tolerance
            self._journal.event(
                decision.step, "switch", to=decision.mode, rung=decision.rung, trying=decision.trying, reason=decision.reason, **details
            )
            self._journal.say(f"step {decision.step + 1}: now {decision.trained}: {decision.reason}")

    def _metric(self, stats: StepStats, accuracy: Accuracy, plan: ProbePlan | None) -> dict[str, Any]:
        probed = None if plan is None else plan.candidate.name
        if plan is not None and not accuracy.serial:
            accuracy = accuracy.doubled()
        found, compared = stats.findings, stats.comparison
        watched = plan is not None or accuracy.tolerance is None  # a rolling window yields ρ in every step, which is of interest in probes
        return {
            "step": stats.step, "loss": stats.loss, "mode": accuracy.mode, "solve": accuracy.name,
            "probed": probed,
            "iterations_forward": _iterations(accuracy, accuracy.iterations_forward, stats.forward),
            "iterations_backward": _iterations(accuracy, accuracy.iterations_backward, stats.adjoint),
            "rho_forward": found.rho_forward if watched else None, "rho_backward": found.rho_backward if watched else None,
            "rho_by_point": None if plan is None else _rho_by_point(stats),
            "bias": found.bias, "cosine": compared.cosine if compared else None, "noise": found.noise,
            "loss_gap": found.loss_gap,
            "tolerance": accuracy.tolerance if plan is None else plan.candidate.tolerance,
            "bias_by_layer": compared.by_layer if compared else None,
            "bias_against": ("exact" if plan.exact or accuracy.serial else "doubled") if plan is not None and compared else None,
            "consistency": stats.consistency, "consistency_weight": accuracy.consistency or None,
            "lipschitz": None, "grad_norm": stats.grad_norm,
            "lr": stats.lr, "step_time_s": stats.time_s, "tokens": stats.tokens,
            "tokens_per_s": stats.tokens / max(stats.time_s, 1e-9), "mfu": None, "workers": self.config.world,
        }  # fmt: skip


def _iterations(accuracy: Accuracy, count: int, solve: Convergence | None) -> int | None:
    """Return the number of iterations in one direction, of a rolling window that of its sweeps; None for an exact step."""
    if accuracy.serial:
        return None
    return count if solve is None or solve.sweeps is None else solve.sweeps


def _rho_by_point(stats: StepStats) -> dict[str, list[list[float | None]]] | None:
    """Return convergence factors by direction, level and boundary between coarse intervals; None where they were not measured."""
    rounded = {
        way: [[None if factor is None else float(f"{factor:.4g}") for factor in level] for level in solve.factors]
        for way, solve in _solves(stats).items()
        if solve and solve.factors
    }
    return rounded or None


def _solves(stats: StepStats) -> dict[str, Convergence | None]:
    """Return how the two solves went, by the direction as files name it."""
    return {"forward": stats.forward, "backward": stats.adjoint}


def _computed(reports: Sequence[StepReport], workers: int) -> float | None:
    """Return the seconds that all workers together computed in a step; None if its timeline was not recorded, or one was lost in it."""
    timelines = [each.timed for each in reports if each.timed is not None]
    return sum(sum_kinds(timeline)["compute"] for timeline in timelines) if len(timelines) == workers else None
