"""The driver: validates, starts the workers, runs chunks of steps, owns the controller, writes the run directory."""

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import ray
from rich.console import Console

from rayllp.checkpoint import Prolongation, checkpoints, commit, count_layers, read_manifest, staging, step_of
from rayllp.checkpoint.export import read_model_json, write_model_json, write_tokenizer_json
from rayllp.cluster.group import WorkerGroup, choose_device
from rayllp.cluster.recovery import RAREST, FailureBudget, choose_interval
from rayllp.config import TrainConfig, load_config
from rayllp.control import Accuracy, Controller, Decision, Probe, ProbePlan
from rayllp.data import Batches, TextBatches, load_data
from rayllp.errors import ChannelError, CheckpointError, DataError, NonFiniteError, RayllpError, SettingsError, WorkerLostError
from rayllp.models import Architecture, LayerStack, build_architecture, check_family
from rayllp.nested import stage_at
from rayllp.report import ProgressDisplay, RunDirectory
from rayllp.sizes import with_layers

CHUNK_S = 1.0
MAX_CHUNK = 50
WARM_STEPS = 3
"""Steps before the cost of keeping states is looked at."""
SCALARS = "loss grad_norm lr rho_forward rho_backward bias cosine noise consistency consistency_weight".split()
"""What TensorBoard gets of each step, where it was measured."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        directory: the run directory.
        steps: optimizer steps done, over all sittings of the run.
        validation_loss: mean held-out loss per token (or image, or sentence), exact forward; None if stopped early.
        metrics: what else the last evaluation found: perplexity, accuracy, bleu, by the family.
        sample: generated text; empty unless the family writes text, and for a stopped run.
        stopped: whether Ctrl-C (or SIGTERM) ended it.
    """

    directory: Path
    steps: int
    validation_loss: float | None
    sample: str
    stopped: bool
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    config: TrainConfig | None = None,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    model: Architecture | None = None,
    batches: Batches | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train layer-parallel on Ray: on the cluster that this process belongs to (RAY_ADDRESS, or an earlier ray.init), else on this machine.

    Args:
        config: settings; None is the embedded default.
        output: run directory; default runs/<date>_<name>.
        resume: a run directory to go on with; `config` and `output` are then its own.
        model: a LayerStack of your own instead of config.model; needs `batches`.
        batches: where inputs and targets come from, instead of config.data.

    Raises:
        SettingsError, DataError, ClusterError: before any step was done; nothing is left behind.
        NonFiniteError: the loss or a gradient is not finite; the last good state is saved first.
        CheckpointError: nothing to resume.
    """
    if resume is not None:
        config, run, start = _open_run(Path(resume))
    else:
        config, run, start = config or TrainConfig(), None, None
    loaded = _validate(config, model, batches, run)
    with _cluster(config):
        device = choose_device(config)
        run = run or RunDirectory.create(output, config)
        return Driver(config, run, device, model, batches, loaded, console).train(start)


class Loaded(NamedTuple):
    """What the settings name: the data set, the architecture (a plan without weights), and its configuration where a run goes on."""

    data: Any
    plan: Architecture | None
    kept: dict[str, Any] | None


class Driver:
    """One sitting of one run.

    Attributes:
        whole: the run's settings.
        config: those of the stage in hand; without `nested` the same.
    """

    def __init__(
        self, config: TrainConfig, run: RunDirectory, device: str, model: Architecture | None, batches: Batches | None,
        loaded: Loaded | None, console: Console | None = None,
    ) -> None:  # fmt: skip
        self.whole, self.config, self.run = config, config, run
        self.stage = stage_at(config, 0)
        self.data, self.plan, self.kept = loaded or Loaded(None, None, None)
        self.model, self.batches = model, batches
        self.controller = Controller(config)
        self.workers = WorkerGroup(config, device)
        self.console = console or Console(stderr=True)
        self.stop = False
        self.best = run.read_best()
        self.budget = FailureBudget(config.max_failures)
        self._saved = -1
        self._step_s = CHUNK_S
        self._step = self._first_step = 0  # steps done, as far as the driver was told
        self._settled = 0  # the last step after which everything due was done
        self._chunk: list[tuple[int, Accuracy, ProbePlan | None]] = []
        self._marks: dict[int, Any] = {}  # where the controller was before chunks
        self._keep_every = 1 if config.snapshot_every is None else config.snapshot_every
        self._keep_chosen = config.snapshot_every is not None
        if config.world == 1:  # who would hold it when the worker is gone?
            self._keep_every, self._keep_chosen = 0, True

    def train(self, start: Path | None) -> TrainResult:
        """Run to the last step, or to Ctrl-C."""
        step, sample = 0, ""
        final: dict[str, float] = {}
        try:
            self._enter_stage(step_of(start) if start else 0)
            shares = self._start_workers()
            self._keep_what_export_needs()
            step = self._restore(start) if start else 0
            with _stopping(self), _tensorboard(self.run.path) as board, ProgressDisplay(self.config.steps, step, self.console) as display:
                display.say(self._describe(shares))
                step, final, sample = self._train_through_faults(step, display, board)
        finally:
            self.workers.shutdown()
        if self.stop:
            self.console.print(
                f"stopped after step {step}; go on with: rayllp train --resume {self.run.path}", highlight=False, soft_wrap=True
            )
        loss = final.pop("loss", None)
        return TrainResult(
            directory=self.run.path, steps=step, validation_loss=loss, metrics=final, sample=sample, stopped=self.stop
        )  # fmt: skip

    def _start_workers(self) -> list[dict[str, Any]]:
        try:
            architecture, kept = self._plans()
            return self.workers.start(architecture, self.batches or self.data, kept)
        except BaseException:
            self.run.discard_if_unused()
            raise

    def _keep_what_export_needs(self) -> None:
        if self.plan is not None:
            write_model_json(self.run.path, self.plan)
            write_tokenizer_json(self.run.path, self.data)

    # Faults ---------------------------------------------------------------------------------------------------------------------

    def _train_through_faults(self, step: int, display: ProgressDisplay, board: Any) -> tuple[int, dict[str, float], str]:
        try:
            self._keep_in_memory(step)
        except (WorkerLostError, ChannelError) as error:
            step = self._recover(error, display, board)
        while True:
            try:
                step = self._train_stages(step, display, board)
                self._save(step)  # first of all: what follows can take long, and be interrupted
                final, sample = ({}, "") if self.stop else self._finish(step)
            except (WorkerLostError, ChannelError) as error:
                step = self._recover(error, display, board)
            else:
                return step, final, sample

    def _recover(self, error: RayllpError, display: ProgressDisplay, board: Any) -> int:
        """Replace lost workers and take all blocks back to a common step; that step."""
        began, lost, reached = time.monotonic(), _ranks_of(error), self._step
        while True:
            self.run.event(reached, "fault", reason=str(error), ranks=sorted(lost))
            display.say(f"step {reached}: {error}")
            time.sleep(self.budget.spend(self._step, time.monotonic(), str(error)))
            try:
                self.workers.replace(lost)
                reached = max(reached, self.workers.reached(lost))
                step, source = self._take_back(lost, display, board)
                if self._keep_every:
                    self.workers.call("keep", step)
                break
            except (WorkerLostError, ChannelError) as another:
                # Those that were replaced have no state yet, as far as is known.
                error, lost = another, lost | _ranks_of(another)
        seconds = time.monotonic() - began
        self.run.event(step, "restore", source=source, ranks=sorted(lost), seconds=round(seconds, 3), steps_lost=reached - step)
        board.add_scalar("recovery/seconds", seconds, step)
        display.say(f"step {step}: going on from {source} after {seconds:.1f} s; {reached - step} steps are done again")
        return step

    def _take_back(self, lost: frozenset[int], display: ProgressDisplay, board: Any) -> tuple[int, str]:
        """Blocks and controller as they were after some step: held in memory, else of the last checkpoint, else of none; its source."""
        step = self.workers.roll_back(lost)
        if step is not None:
            if step > self._step:  # their statistics were lost with the call
                self._take_in(self.workers.call_some(self.workers.survivors(lost), "report", self._step, step), display, board)
            elif step < self._step:
                self._rewind(step)
            return step, "memory"
        found = checkpoints(self.run.checkpoints)
        if found:
            self._rebuild(step_of(found[-1]))
            return self._restore(found[-1]), "checkpoint"
        self._rebuild(0)
        self.run.truncate(0)
        self._step = self._settled = 0
        return 0, "the start"

    def _rewind(self, step: int) -> None:
        """Forget what was recorded after `step` steps, which will be done again."""
        self.run.truncate(step)
        self.controller.rewind(self._marks[max(known for known in self._marks if known <= step)])
        self._step, self._settled = step, min(step, self._settled)

    def _keep_in_memory(self, step: int) -> None:
        """A state to come back to before the next step is done."""
        self._step = self._settled = self._first_step = step
        self._remember(step)
        if self._keep_every:
            self.workers.call("keep", step)

    def _remember(self, step: int) -> None:
        """Where the controller is before `step`, for as long as states of earlier steps may be come back to."""
        self._marks = {known: mark for known, mark in self._marks.items() if known >= step - 2 * RAREST - MAX_CHUNK}
        self._marks[step] = self.controller.mark()

    def _choose_keep_every(self) -> None:
        """After the first steps: how often states are kept, by what that costs, where the settings leave it open."""
        if self._keep_chosen or self._step < self._first_step + WARM_STEPS:
            return
        costs = self.workers.call("cost_of_copies")
        take_s, exchange_s = (max(cost[part] for cost in costs) for part in (0, 1))
        self._keep_every = choose_interval(self._step_s, take_s, exchange_s, on_cpu=self.workers.device == "cpu")
        self._keep_chosen = True

    # Stages of nested iteration: one without it ---------------------------------------------------------------------------------

    def _train_stages(self, step: int, display: ProgressDisplay, board: Any) -> int:
        while True:
            if self.whole.nested.factors:
                board.add_scalar("train/layers", self.config.model.layers, step)
            step = self._loop(step, display, board)
            if self.stop or step >= self.whole.steps:
                return step
            self._deepen(step, display)

    def _enter_stage(self, step: int) -> None:
        """From `step` on: the settings of the stage that does it, and a controller that starts anew, since its network is another."""
        self.stage = stage_at(self.whole, step)
        self.config = self.workers.config = self.stage.config
        self.controller = Controller(self.config)

    def _rebuild(self, step: int) -> None:
        """Give the same workers new layers, those of the stage that does `step`."""
        self._enter_stage(step)
        self.workers.rebuild(self.config, *self._plans())

    def _deepen(self, step: int, display: ProgressDisplay) -> None:
        """Go on with the next stage's network on the same workers, made of this one's checkpoint."""
        folder = self._save(step)
        self._rebuild(step)
        self._load(step, folder)
        self._keep_in_memory(step)
        display.say(f"step {step}: {self._describe_stage()}")

    def _plans(self) -> tuple[Architecture | None, dict[str, Any] | None]:
        """The user's own network and the kept configuration of a run that goes on, at this stage's depth."""
        if not self.whole.nested.factors:
            return self.model, self.kept
        config = self.config
        kept = None if self.kept is None else with_layers(self.kept, config.model.layers)
        if not isinstance(self.model, LayerStack):
            return self.model, kept
        return self.model.thinned(config.buffers.open, config.buffers.close, self.whole.middle_layers // config.middle_layers), kept

    def _load(self, step: int, folder: Path) -> dict[str, Any]:
        """Take over a checkpoint, of this stage's network or of a shallower one's; its manifest."""
        manifest, config = read_manifest(folder), self.config
        layers = count_layers(manifest)
        prolongation = Prolongation.between(layers, config, folder) if self.whole.nested.factors else None
        self.workers.call("load", str(folder.absolute()), prolongation)
        if prolongation is None:
            self.controller.restore(manifest["controller"])
        else:
            sizes = {"middle_layers": config.middle_layers, "step_size": config.middle_step}
            self.run.event(step, "deepen", layers_before=layers, layers=config.model.layers, **sizes)
        return manifest

    def _describe_stage(self) -> str:
        stage, config = self.stage, self.config
        note = f" ({stage.note})" if stage.note else ""
        depth = f"{config.middle_layers} middle layers with Δt = {config.middle_step:g}"
        return f"stage {stage.number} of {len(self.whole.nested.factors) + 1}, to step {stage.end}: {depth}{note}"

    # The loop -----------------------------------------------------------------------------------------------------------------

    def _loop(self, step: int, display: ProgressDisplay, board: Any) -> int:
        while True:
            if step > self._settled:
                self._between_chunks(step, display, board)
                self._settled = step
            if step >= self.stage.end or self.stop:
                return step
            self._remember(step)
            self._announce(self.controller.begin(step), display)
            self._chunk = self._next_chunk(step)
            started = time.perf_counter()
            answers = self.workers.call("run", self._chunk, self._keep_every)
            self._step_s = (time.perf_counter() - started) / len(self._chunk)
            step = self._take_in(answers, display, board)
            self._choose_keep_every()

    def _take_in(self, answers: list[list[dict[str, Any]]], display: ProgressDisplay, board: Any) -> int:
        """What the chunk's steps did, as each worker tells it; the step after them."""
        step = self._step
        for stats, (_, accuracy, plan) in zip(answers[0], self._chunk, strict=False):
            metric = self._metric(stats, accuracy, plan)
            if plan is not None and plan.lipschitz:  # a probe ends its chunk
                found = _in_layer_order([answer[-1]["lipschitz"] for answer in answers])
                metric["lipschitz"] = found if len(found) == self.config.model.layers else None  # some were lost with their worker
            if not math.isfinite(stats["loss"]) or not math.isfinite(stats["grad_norm"]):
                self._not_finite(step, [answer[-1]["fault"] for answer in answers])
            self._record(metric, display, board)
            step += 1
        self._step = step
        if len(answers[0]) == len(self._chunk) and self._chunk[-1][2] is not None:
            self._observe(answers[0][-1], display)
        return step

    def _next_chunk(self, step: int) -> list[tuple[int, Accuracy, ProbePlan | None]]:
        """Steps up to the next probe, evaluation or checkpoint, at most about a second's worth."""
        config, chunk = self.config, []
        for n in range(step, min(self.stage.end, step + max(1, min(MAX_CHUNK, int(CHUNK_S / self._step_s))))):
            probe = self.controller.probe(n)
            chunk.append((n, self.controller.accuracy, probe))
            due = [every for every in (config.eval.every, config.checkpoint.every) if every and (n + 1) % every == 0]
            if probe or due or n + 1 == config.adaptive.switch_at:
                break
        return chunk

    def _observe(self, stats: dict[str, Any], display: ProgressDisplay) -> None:
        bias = stats["bias"] or {}
        found = {"rho_forward": stats["rho_forward"], "rho_backward": stats["rho_backward"]}
        probe = Probe(**found, bias=bias.get("relative"), noise=bias.get("noise"), coarse_weights=stats["coarse_weights"])
        advice = {"forward": stats["advice_forward"], "backward": stats["advice_backward"]}
        self._announce(self.controller.observe(stats["step"], probe), display, advice=advice, **found, bias=probe.bias, noise=probe.noise)

    def _announce(self, decision: Decision | None, display: ProgressDisplay, **details: Any) -> None:
        if decision:
            self.run.event(decision.step, "switch", to=decision.mode, rung=decision.rung, reason=decision.reason, **details)
            display.say(f"step {decision.step + 1}: now {decision.rung}: {decision.reason}")

    def _between_chunks(self, step: int, display: ProgressDisplay, board: Any) -> None:
        every = self.config.eval.every
        if every and step % every == 0 and step < self.config.steps:
            found = self._evaluate(step, self.config.eval.batches, self.config.eval.translate, board)
            display.say(f"step {step}: {_shown(found)}")
        every = self.config.checkpoint.every
        if every and step % every == 0 and step < self.config.steps:
            self._save(step)

    def _metric(self, stats: dict[str, Any], accuracy: Accuracy, plan: ProbePlan | None) -> dict[str, Any]:
        if plan is not None and not accuracy.serial:
            accuracy = accuracy.probing()
        bias = stats["bias"] or {}
        return {
            "step": stats["step"], "loss": stats["loss"], "mode": accuracy.mode,
            "iterations_forward": None if accuracy.serial else accuracy.iterations_forward,
            "iterations_backward": None if accuracy.serial else accuracy.iterations_backward,
            "rho_forward": stats["rho_forward"], "rho_backward": stats["rho_backward"],
            "bias": bias.get("relative"), "cosine": bias.get("cosine"), "noise": bias.get("noise"), "bias_by_block": bias.get("by_block"),
            "bias_against": ("exact" if plan.exact or accuracy.serial else "doubled") if plan is not None and bias else None,
            "consistency": stats["consistency"], "consistency_weight": accuracy.consistency or None,
            "coarse_weights": stats["coarse_weights"], "lipschitz": None, "grad_norm": stats["grad_norm"],
            "lr": stats["lr"], "step_time_s": stats["time_s"], "tokens": stats["tokens"], "workers": self.config.world,
        }  # fmt: skip

    def _record(self, metric: dict[str, Any], display: ProgressDisplay, board: Any) -> None:
        self.run.metric(metric)
        display.update(metric)
        step = metric["step"]
        for name in SCALARS:
            if metric[name] is not None:
                board.add_scalar(f"train/{name}", metric[name], step)
        board.add_scalar("train/tokens_per_s", metric["tokens"] / max(metric["step_time_s"], 1e-9), step)
        board.add_scalar("train/serial", float(metric["mode"] == "serial"), step)
        for n, constant in enumerate(metric["lipschitz"] or ()):
            board.add_scalar(f"lipschitz/layer_{n:05d}", constant, step)

    # Between ------------------------------------------------------------------------------------------------------------------

    def _evaluate(self, step: int, batches: int, translations: int, board: Any = None) -> dict[str, float]:
        found: dict[str, float] = self.workers.call("evaluate", batches)[0]
        self._keep_if_best(step, found["loss"], batches)
        if translations and hasattr(self.data, "references"):
            found["bleu"] = self._bleu(translations)
        self.run.evaluation(step, "validation", **found)
        if board is not None:
            for name, value in found.items():
                board.add_scalar(f"validation/{name}", value, step)
        return found

    def _keep_if_best(self, step: int, loss: float, batches: int) -> None:
        """Losses are compared that were measured on the same batches; the last evaluation, over more of them, stands alone."""
        best = self.best
        if not self.config.checkpoint.best or (best is not None and (best["batches"] != batches or best["loss"] <= loss)):
            return
        self.best = {"step": step, "loss": loss, "batches": batches}
        self._save(step)
        self.run.write_best(self.best)

    def _bleu(self, sentences: int) -> float:
        from sacrebleu import corpus_bleu

        translations = self.workers.call("translate", sentences, self.config.eval.beams)[0]
        references = self.data.references("validation")[: len(translations)]
        (self.run.path / "translations.txt").write_text("".join(line + "\n" for line in translations))
        return float(corpus_bleu(translations, [references]).score)

    def _finish(self, step: int) -> tuple[dict[str, float], str]:
        config, sample = self.config.eval, ""
        finite = hasattr(self.batches or self.data, "batches")
        batches = config.final_batches or (0 if finite else config.batches)
        found = self._evaluate(step, batches, config.final_translate)
        if isinstance(self.data, TextBatches) and config.sample:
            prompt = [int(token) for token in self.data.tokens["validation"][:16]]
            tokens = self.workers.call("generate", prompt, config.sample)[0]
            sample = self.data.tokenizer.decode([*prompt, *tokens])
            (self.run.path / "sample.txt").write_text(sample)
        return found, sample

    def _save(self, step: int) -> Path:
        if self._saved == step:
            return self.run.checkpoints / f"step_{step}"
        folder = staging(self.run.checkpoints, step)
        files: dict[str, Any] = {}
        for written in self.workers.call("save", str(folder.absolute())):
            files |= written
        extra = {"controller": self.controller.state(), "model": self.config.model.model_dump(mode="json")}
        best = int(self.best["step"]) if self.best else None
        final = commit(folder, step, files, extra, self.config.checkpoint.keep, best)
        self.run.event(step, "checkpoint", path=str(final))
        self._saved = step
        return final

    def _restore(self, folder: Path) -> int:
        step = self._saved = self._step = self._settled = int(self._load(step_of(folder), folder)["step"])
        self.run.truncate(step)
        if self.best is not None and (self.best["step"] > step or not (self.run.checkpoints / f"step_{self.best['step']}").is_dir()):
            self.best = None
            self.run.forget_best()
        self.run.event(step, "restore", path=str(folder))
        return step

    def _not_finite(self, step: int, faults: list[tuple[int, int, str] | None]) -> None:
        found = [fault for fault in faults if fault is not None]
        where = (
            min(found)[2]
            if found
            else "the approximate solve alone (exact forward and gradients are finite): raise mgrit.iterations or use mode=serial"
        )
        path = self._save(step)
        self.run.event(step, "fault", reason="not finite", where=where)
        raise NonFiniteError(
            f"step {step}: the loss or the gradient is not finite; first at fault: {where}. The optimizer step was not taken; the state "
            f"before it is in {path}. Look at the batch of this step, lower optimizer.lr, or lengthen optimizer.warmup"
        )

    def _describe(self, shares: list[dict[str, Any]]) -> str:
        config, parameters = self.config, sum(share["parameters"] for share in shares) // self.config.mesh.data
        buffers = f"{config.buffers.open} + {config.middle_layers} + {config.buffers.close} layers"
        mesh = f"{config.layer_workers} blocks {'/'.join(map(str, config.blocks))}" + (
            f" × {config.mesh.data} replicas" if config.mesh.data > 1 else ""
        )
        what = config.model.family if self.model is None else type(self.model).__name__
        skipped = getattr(self.data, "skipped", {})
        left_out = "; left out of the data: " + ", ".join(f"{n} {kind}" for kind, n in skipped.items()) if skipped else ""
        where = f"{mesh} on {self.workers.device}; run directory {self.run.path}"
        stage = f"; {self._describe_stage()}" if self.whole.nested.factors else ""
        return f"{what}: {buffers}, {parameters / 1e6:.1f} M parameters, {where}{left_out}{stage}"


def _in_layer_order(found: list[dict[int, float]]) -> list[float]:
    """What each worker found of its own layers, as one list of all layers."""
    merged = {layer: value for mine in found for layer, value in mine.items()}
    return [merged[layer] for layer in sorted(merged)]


def _shown(found: dict[str, float]) -> str:
    return "validation " + ", ".join(f"{name} {value:.4f}" for name, value in found.items())


# Around the loop ----------------------------------------------------------------------------------------------------------------


def _validate(config: TrainConfig, model: Architecture | None, batches: Batches | None, run: RunDirectory | None = None) -> Loaded | None:
    """Refuse what can be refused without a cluster; the data set and the architecture, where the settings name them."""
    if (model is None) != (batches is None):
        raise SettingsError("model and batches belong together: give both, or neither")
    if model is not None:
        if model.layers != config.model.layers:
            raise SettingsError(f"the model has {model.layers} layers but model.layers is {config.model.layers}: make them equal")
        if config.nested.factors and not isinstance(model, LayerStack):
            raise SettingsError(f"nested needs a LayerStack, to make shallower ones of it; got a {type(model).__name__}: leave nested out")
        return None
    check_family(config)
    if config.model.family == "mt" and (config.eval.translate or config.eval.final_translate) and find_spec("sacrebleu") is None:
        raise DataError("BLEU needs sacrebleu: pip install 'rayllp[translation]', or set eval.translate and eval.final_translate to 0")
    data = load_data(config)
    kept = read_model_json(run.path) if run is not None else None
    if kept is not None and config.nested.factors:  # the run may have been made shallower than the settings now say
        kept = with_layers(kept, config.model.layers)
    return Loaded(data, build_architecture(config, data.facts, kept), kept)  # refuses sizes and checkpoints that do not fit


def _open_run(path: Path) -> tuple[TrainConfig, RunDirectory, Path]:
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"{path} is not a run directory (no config.yaml): give the directory that a run printed")
    found = checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(f"{path} has no complete checkpoint to resume from; start it anew, with checkpoint.every set")
    return load_config(path / "config.yaml"), RunDirectory(path), found[-1]


def _ranks_of(error: RayllpError) -> frozenset[int]:
    return error.ranks if isinstance(error, WorkerLostError) else frozenset()


@contextlib.contextmanager
def _cluster(config: TrainConfig) -> Iterator[None]:
    """The cluster this process belongs to, else one on this machine for as long as the run lasts."""
    if ray.is_initialized():
        yield
        return
    local = "RAY_ADDRESS" not in os.environ
    if local:
        cpus = max(os.cpu_count() or 1, config.world)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING, configure_logging=True)
    else:
        ray.init(logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _stopping(driver: Driver) -> Iterator[None]:
    """Ctrl-C or SIGTERM ends the run after the chunk in hand, with a checkpoint; a second one ends it at once."""

    def stop(number: int, frame: Any) -> None:
        if driver.stop:
            raise KeyboardInterrupt
        driver.stop = True
        driver.console.print(
            "stopping after this chunk of steps, with a checkpoint; again to stop at once", highlight=False, soft_wrap=True
        )

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller has its own way to stop
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _tensorboard(path: Path) -> Iterator[Any]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(path / "tensorboard")) as board:
        yield board
