"""Settings: frozen, checked where they are made. Every rule that needs no data and no cluster is checked here.

`TrainConfig` is what `rayllp train` reads from YAML and what `rayllp.train` takes. Names are fixed (docs/design.md): other tools set
them by `--set key=value`.
"""

import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from rayllp.errors import NotARunError, SettingsError
from rayllp.mgrit import Hierarchy, Method, build_hierarchy, split_evenly
from rayllp.nested import stages
from rayllp.sizes import with_pretrained_sizes

Relaxation = Literal["F", "FCF"]
CONSISTENCY = 0.3
"""Weight of the consistency penalty in mode adaptive; what examples/fidelity.py found to be enough to begin with."""
EXACT_FROM = 0.8
"""Share of the steps after which mode adaptive trains exactly: what bias there was is trained away."""
RUNG = re.compile(r"(\d+)\+([1-9]\d*)(?: (FCF|F))?")


class Settings(BaseModel):
    """Base of every group of settings: immutable, no unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSettings(Settings):
    """What is trained."""

    family: str = Field("gpt2", description="architecture; `rayllp.models.families()` lists them")
    layers: int = Field(20, ge=1, description="all layers, buffers included")
    width: int = Field(64, ge=1, description="size of the residual stream")
    heads: int = Field(4, ge=1, description="attention heads; must divide the width")
    dropout: float = Field(0.0, ge=0, lt=1, description="embedding, attention and residual dropout")
    tie_embeddings: bool = Field(True, description="the head shares the token embedding's weight")
    feed_forward: int | None = Field(None, ge=1, description="inner size of the MLPs; default 4 × width (llama: 8/3 × width)")
    kv_heads: int | None = Field(None, ge=1, description="key and value heads of llama's grouped-query attention; default heads")
    patch_size: int = Field(4, ge=1, description="of vit, in pixels")
    encoder_layers: int | None = Field(None, ge=1, description="of mt, out of model.layers; default half")
    head: Literal["auto", "sentences"] = Field("auto", description="auto: the family's own task; sentences: classify sentences (bert)")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the loss, where targets are classes or tokens")
    initialisation: Literal["default", "deep", "scaled"] = Field(
        "default", description="default: transformers'; deep: MLP, value, output weights times √(log 2L); scaled: outputs over √(2L)"
    )
    from_pretrained: str | None = Field(None, description="folder or name of a transformers checkpoint to start from")

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelSettings":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by {self.heads} heads: use model.heads that divides model.width")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide among kv_heads={self.kv_heads}: use a divisor of model.heads")
        if self.family == "llama" and self.width // self.heads % 2:
            raise ValueError(
                f"heads of size {self.width // self.heads} (width / heads) are odd, and rotary positions turn pairs: make it even"
            )
        return self


class DataSettings(Settings):
    """What it is trained on. Which kind of data is read follows from model.family and model.head (docs/families.md)."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    path: str | None = Field(None, description="file or folder (.gz allowed); none: an embedded set where the family has one")
    validation_path: str | None = Field(None, description="held-out file; none: a part of data.path, or the set's own split")
    dataset: str | None = Field(None, description="a Hugging Face `datasets` name or a folder written by save_to_disk")
    subset: str | None = Field(None, description="the data set's configuration name")
    streaming: bool = Field(False, description="read a `datasets` name as a stream, up to data.max_bytes, instead of downloading it whole")
    max_bytes: int | None = Field(None, ge=1, description="text, pairs or lines beyond this size are not read")
    text_field: str = Field("text", description="column that holds the text (a number for a file without column names)")
    pair_field: str | None = Field(None, description="column of the second sentence of a pair")
    label_field: str = Field("label", description="column of the label (a number without column names); for words upos, xpos or feats")
    source: str = Field("de", description="language translated from: a file's ending or a data set's key")
    target: str = Field("en", description="language translated to")
    tokenizer: str = Field(
        "bytes", description="bytes, characters, bpe:SIZE (trained on the text), a tokenizers JSON, a transformers name or folder"
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="the text's end held out for evaluation")
    mask_fraction: float = Field(0.2, gt=0, lt=1, description="of the tokens that bert is to guess")
    min_count: int = Field(1, ge=1, description="occurrences that give a word its own entry in the vocabulary (words)")
    on_error: Literal["refuse", "skip"] = Field("refuse", description="a broken line or unseen label: stop, or leave it out and say so")

    @model_validator(mode="after")
    def _one_source(self) -> "DataSettings":
        if self.path and self.dataset:
            raise ValueError("data.path and data.dataset are both set: choose one")
        return self


class ByDirection(Settings):
    """A number for the forward solve and one for the backward solve."""

    forward: int = Field(2, ge=1, description="forward solve")
    backward: int = Field(2, ge=1, description="adjoint solve")


class Iterations(ByDirection):
    """Iterations, as XBraid counts them (docs/method.md)."""

    forward: int = Field(2, ge=1, description="forward solve")
    backward: int = Field(1, ge=1, description="adjoint solve")


class RelaxationSettings(Settings):
    """Relaxation by level."""

    fine: Relaxation = Field("F", description="on the finest level")
    coarse: Relaxation = Field("FCF", description="on all others")
    weight: float = Field(1.0, gt=0, le=2, description="of the new value in C-relaxation, the rest is the old one's (FCF only)")


class MGRITSettings(Settings):
    """How the layers are solved in parallel mode (arXiv:2601.09026, section 3.2)."""

    coarsening: int | tuple[int, ...] = Field(4, description="c_f, one for all levels or a list, one a coarse level")
    levels: ByDirection = Field(ByDirection(), description="1 is the serial solve")
    iterations: Iterations = Field(Iterations(), description="fixed, or the cap where mgrit.tolerance is set")
    relaxation: RelaxationSettings = Field(RelaxationSettings(), description="F or FCF")
    cycle: Literal["V", "F"] = Field("V", description="V- or F-cycles")
    coarse_step_weight: float | Literal["fit"] = Field(
        1.0, description="ω: 1 rediscretises (the paper's), 0 is the identity; fit: one a coarse step, at probes, by least squares"
    )
    initial_guess: Literal["coarse", "constant"] = Field("coarse", description="coarse propagation, or every state as the first")
    anderson: int = Field(0, ge=0, le=3, description="window of Anderson acceleration of the C-points; acts from 3 iterations on; 0: none")
    tolerance: float | None = Field(None, gt=0, description="stop the solve once its residual norm is at or below this")
    recompute: bool = Field(False, description="keep C-point states only and recompute an interval's graph in its adjoint")

    @field_validator("coarsening")
    @classmethod
    def _at_least_two(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        factors = (value,) if isinstance(value, int) else value
        if not factors or any(factor < 2 for factor in factors):
            raise ValueError(f"coarsening {value}: every factor must be at least 2")
        return value

    @field_validator("coarse_step_weight")
    @classmethod
    def _not_negative(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and value < 0:
            raise ValueError(f"coarse_step_weight {value}: must be 0 or more, or fit")
        return value


class BufferSettings(Settings):
    """Layers outside the parallel solve, run serially with their own Δt (appendix B)."""

    open: int = Field(2, ge=0, description="layers before the middle, on the first worker")
    close: int = Field(2, ge=0, description="layers after it, on the last")


class StepSettings(Settings):
    """Δt of the layers: x + Δt·(block(x) − x)."""

    middle: float | str = Field("1/N", description='a number, or "T/N" with N the middle layers, such as "1/N"')
    buffer: float = Field(1.0, gt=0, description="of buffer layers")

    @field_validator("middle")
    @classmethod
    def _number_or_fraction(cls, value: float | str) -> float | str:
        if isinstance(value, str):
            head, _, tail = value.partition("/")
            try:
                time = float(head)
            except ValueError:
                time = -1.0
            if tail.strip() != "N" or time <= 0:
                raise ValueError(f'step.middle {value!r}: give a positive number, or "T/N" such as "1/N"')
        elif value <= 0:
            raise ValueError(f"step.middle {value}: must be positive")
        return value


class AdaptiveSettings(Settings):
    """The controller of mode=adaptive, the probes of every parallel mode, and the consistency penalty."""

    rule: Literal["convergence", "bias", "both"] = Field(
        "bias", description="what a probe is judged by: the gradient's bias, ρ (convergence, the paper's rule), or both"
    )
    probe_every: int = Field(100, ge=0, description="steps between probes (doubled iterations, at least 3); 0: never")
    threshold: float = Field(1.0, gt=0, description="a probe's ρ, forward or backward, beyond this is a fault")
    bias_limit: float = Field(0.1, gt=0, description="a relative bias of the gradient beyond this is a fault …")
    bias_to_noise: float = Field(0.4, ge=0, description="… unless it is below this share of the gradient's own noise")
    exact_every: int = Field(
        0, ge=0, description="every so many probes the bias is taken against the exact gradient, by any rule; 0: never"
    )
    lipschitz_every: int = Field(
        0, ge=0, description="every so many probes each layer's Lipschitz constant is estimated, for `rayllp suggest-buffers`; 0: never"
    )
    ladder: tuple[str, ...] | None = Field(
        None, description='rungs from cheap to dear, "F+B" iterations or "F+B FCF" (0: serial forward); serial follows; default from mgrit'
    )
    return_below: float | None = Field(0.3, gt=0, description="a probe whose every ρ is below this is calm; none: no way back")
    patience: int = Field(3, ge=1, description="calm probes in a row after which a rung is gone down")
    max_flips: int = Field(6, ge=0, description="switches to serial and steps down, in all, after which there are no more steps down")
    consistency: float | None = Field(
        None,
        ge=0,
        description="weight μ of the consistency penalty until a switch to serial; default 0.3 in mode adaptive with rule bias or both "
        "(where no worker has less than an interval), else 0",
    )
    consistency_noise: float = Field(0.0, ge=0, description="noise on C-points in the last sweep, in standard deviations of the state")
    smoothness: float = Field(0.0, ge=0, description="weight of Σ ‖θ_{n+1} − θ_n‖² / Δt over middle layers; none after a switch to serial")
    steer: bool | None = Field(
        None, description="probes move μ toward the least that holds adaptive.bias_target; default: where the rule sees bias"
    )
    bias_target: float = Field(0.2, gt=0, description="relative bias that steering aims at")
    switch_at: int | float | None = Field(
        None, ge=0, description="serial from this step (or share of the steps) on; default 0.8 in mode adaptive, where 1.0 is never"
    )

    @field_validator("switch_at")
    @classmethod
    def _step_or_share(cls, value: int | float | None) -> int | float | None:
        if isinstance(value, float) and value > 1:
            if not value.is_integer():
                raise ValueError(f"switch_at {value}: give a step, or a share of the steps from 0 to 1")
            return int(value)
        return value

    @field_validator("ladder")
    @classmethod
    def _rungs(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for rung in value or ():
            if not RUNG.fullmatch(rung):
                raise ValueError(
                    f'adaptive.ladder has {rung!r}: a rung is "F+B", F forward (0: serial) and B ≥ 1 backward iterations, and then, if it '
                    'is not mgrit.relaxation.fine\'s, the relaxation: "2+1 FCF"'
                )
        if value == ():
            raise ValueError("adaptive.ladder is empty: give at least one rung, or leave it out")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "AdaptiveSettings":
        if self.return_below is not None and self.return_below >= self.threshold:
            raise ValueError(f"return_below {self.return_below} is not below threshold {self.threshold}: the rung would swing; lower it")
        if self.lipschitz_every and not self.probe_every:
            raise ValueError(f"lipschitz_every {self.lipschitz_every} counts probes, of which probe_every=0 makes none: set probe_every")
        if self.steer and (self.rule == "convergence" or self.consistency == 0):
            raise ValueError("steer needs adaptive.consistency > 0 to start from, and adaptive.rule bias or both to see the bias")
        return self


class OptimizerSettings(Settings):
    """AdamW, linear warm-up, cosine decay."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final over peak learning rate")
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.1, ge=0, description="on tensors of two or more dimensions")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's")
    eps: float = Field(1e-8, gt=0, description="AdamW's")
    clip: float = Field(1.0, ge=0, description="global gradient norm over all workers; 0: none")


class EvalSettings(Settings):
    """Evaluation on the held-out text: always with the exact forward."""

    every: int = Field(100, ge=0, description="steps between evaluations; 0: only at the end")
    batches: int = Field(8, ge=0, description="batches each time, the same ones; 0: one pass through a finite held-out set")
    final_batches: int = Field(0, ge=0, description="at the end; 0: one pass, or eval.batches where the held-out set has no end")
    sample: int = Field(160, ge=0, description="tokens generated at the end (gpt2, llama); 0: none")
    translate: int = Field(0, ge=0, description="held-out sentences translated each time for BLEU (mt); 0: none")
    final_translate: int = Field(200, ge=0, description="at the end (mt); 0: none")
    beams: int = Field(4, ge=1, description="of the beam search (mt)")


class CheckpointSettings(Settings):
    """Checkpoints of a run."""

    path: str | None = Field(
        None, description="folder or URL (s3://…, gs://…; through fsspec), this run's own and seen by all nodes; default RUN/checkpoints"
    )
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end or when stopped")
    keep: int = Field(2, ge=1, description="the last so many stay")
    best: bool = Field(True, description="also keep that of the lowest validation loss; written after an evaluation that finds one")


class MeshSettings(Settings):
    """Data-parallel replicas times layer blocks."""

    data: int = Field(1, ge=1, description="replicas; each takes batch_size / data sequences")
    layer: int | None = Field(None, ge=1, description="blocks of layers; default workers / data")
    blocks: tuple[int, ...] | None = Field(
        None, description="middle layers of each worker; default even, cut at C-points where that is free"
    )


class NestedSettings(Settings):
    """Depth by nested iteration: train shallow, prolong, go on deep (arXiv:1912.08974)."""

    factors: tuple[int, ...] = Field((), description="layers that a middle layer becomes at each deepening; none: deep from the start")
    at: tuple[int, ...] = Field((), description="steps before which the deepenings come, one a factor")

    @model_validator(mode="after")
    def _one_step_a_factor(self) -> "NestedSettings":
        factors, at = list(self.factors), list(self.at)
        if len(factors) != len(at):
            raise ValueError(f"{len(factors)} factors {factors} at {len(at)} steps {at}: give as many of nested.factors as of nested.at")
        if any(factor < 2 for factor in factors):
            raise ValueError(f"factors {factors}: every factor must be at least 2")
        if any(late <= early for early, late in zip([0, *at], at, strict=False)):
            raise ValueError(f"at {at}: steps must be positive and increase, such as [300, 600]")
        return self


class WorkerRange(Settings):
    """As many workers as the cluster has room for, between two numbers."""

    min: int = Field(1, ge=1, description="with fewer a run waits, or ends")
    max: int = Field(ge=1, description="more are not asked for")

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerRange":
        if self.max < self.min:
            raise ValueError(f"min {self.min} is above max {self.max}: swap them")
        return self


class TrainConfig(Settings):
    """One run. `TrainConfig()` is the embedded default."""

    name: str = Field("gpt2", description="part of the run directory's name")
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    sequence_length: int = Field(128, ge=2, description="tokens a sequence")
    batch_size: int = Field(8, ge=1, description="sequences a step, over all replicas")
    accumulate: int = Field(1, ge=1, description="gradient accumulation: parts in which a step's batch is solved")
    microbatches: int | None = Field(
        None, ge=1, description="of serial mode's pipeline; default as many as divide the batch, up to 4 a worker"
    )
    steps: int = Field(250, ge=1, description="optimizer steps")
    seed: int = Field(0, ge=0, description="keys initialisation, batches and dropout")
    dtype: Literal["float32", "bfloat16", "float64"] = Field("float32", description="bfloat16: autocast over float32 weights")
    workers: PositiveInt | WorkerRange | None = Field(
        None, description="mesh.data × mesh.layer; default 2. {min: 2, max: 8}: as many as the cluster has room for, at any time"
    )
    resize_check_s: float = Field(10.0, gt=0, description="seconds between looks for room for more workers, below workers.max")
    mesh: MeshSettings = MeshSettings()
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where the cluster has enough of them")
    channel: Literal["auto", "gloo", "nccl"] = Field("auto", description="auto: nccl on GPUs, gloo on CPUs")
    receive_timeout_s: float = Field(120.0, gt=0, description="longest wait for a neighbour's message")
    hang_timeout_s: float = Field(30.0, gt=0, description="a worker that is silent for so long after another failed is killed and replaced")
    snapshot_every: int | None = Field(
        None,
        ge=0,
        description="steps between states kept in memory, here and at the neighbour; default: as 3 % of the time allows; 0: never",
    )
    spare_workers: bool = Field(
        True, description="keep a started process in reserve on each node with workers (CPUs only, 0.4 GB): losses cost 2 s instead of 10"
    )
    max_failures: int = Field(10, ge=0, description="lost workers that a run survives within an hour")
    mode: Literal["parallel", "serial", "adaptive"] = Field(
        "adaptive", description="adaptive: as parallel as the gradient's bias allows, exact at the end"
    )
    mgrit: MGRITSettings = MGRITSettings()
    buffers: BufferSettings = BufferSettings()
    step: StepSettings = StepSettings()
    nested: NestedSettings = NestedSettings()
    adaptive: AdaptiveSettings = AdaptiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    # Derived ------------------------------------------------------------------------------------------------------------------

    @property
    def layer_workers(self) -> int:
        """Blocks of layers, P."""
        workers = self.workers.max if isinstance(self.workers, WorkerRange) else self.workers
        return self.mesh.layer or max(1, (workers or 2 * self.mesh.data) // self.mesh.data)

    @property
    def world(self) -> int:
        """Workers in all."""
        return self.mesh.data * self.layer_workers

    @property
    def fewest_workers(self) -> int:
        """With fewer the run waits: `world`, or where `workers` is a range its lower end."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.world

    def with_workers(self, count: int) -> "TrainConfig":
        """These settings for a number of workers within the range: the largest that they allow up to `count`, so that blocks fit.

        Raises:
            SettingsError: none of the range up to `count` does.
        """
        if not isinstance(self.workers, WorkerRange):
            return self
        values, failure = self.model_dump(), "the range ends above that"
        values["adaptive"]["consistency"] = self.consistency  # the number of workers is to change nothing but the time
        for size in range(min(count, self.workers.max), self.workers.min - 1, -1):
            try:
                return type(self).model_validate(values | {"workers": size})
            except ValidationError as error:
                failure = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SettingsError(f"workers {self.workers.min} to {min(count, self.workers.max)} do not serve: {failure}; change workers.min")

    @property
    def middle_layers(self) -> int:
        """Layers in the parallel solve, N."""
        return self.model.layers - self.buffers.open - self.buffers.close

    @property
    def middle_step(self) -> float:
        """Δt of a middle layer."""
        value = self.step.middle
        return float(value.partition("/")[0]) / self.middle_layers if isinstance(value, str) else value

    @property
    def step_sizes(self) -> tuple[float, ...]:
        """Δt of every layer, buffers included."""
        buffers, middle = self.buffers, (self.middle_step,) * self.middle_layers
        return (self.step.buffer,) * buffers.open + middle + (self.step.buffer,) * buffers.close

    @property
    def replica_batch(self) -> int:
        """Sequences a replica takes in a step."""
        return self.batch_size // self.mesh.data

    @property
    def blocks(self) -> tuple[int, ...]:
        """Middle layers of each worker."""
        if self.mesh.blocks:
            return self.mesh.blocks
        whole = self.needs_whole_intervals
        return default_blocks(self.middle_layers, self.layer_workers, self.first_coarsening, whole_intervals=whole)

    @property
    def first_coarsening(self) -> int:
        """c_f between the finest level and the next."""
        return self.mgrit.coarsening if isinstance(self.mgrit.coarsening, int) else self.mgrit.coarsening[0]

    @property
    def ladder(self) -> tuple[tuple[int, int, Relaxation | None], ...]:
        """Forward (0: serial) and backward iterations and relaxation of the controller's rungs, cheap ones first; serial follows."""
        if self.adaptive.ladder is not None:
            return tuple(_read_rung(rung) for rung in self.adaptive.ladder)
        forward, backward = self.mgrit.iterations.forward, self.mgrit.iterations.backward
        if self.mgrit.levels.forward == 1:
            return (0, backward, None), (0, backward + 1, None)
        # Most of a gradient's bias comes from the states it is taken at: an iteration more of the forward helps first.
        return (forward, backward, None), (forward + 1, backward, None), (forward + 1, backward + 1, None)

    @property
    def consistency(self) -> float:
        """Weight of the consistency penalty that training begins with."""
        if self.adaptive.consistency is not None:
            return self.adaptive.consistency
        watched = self.mode == "adaptive" and self.adaptive.rule != "convergence"
        if not watched or self.layer_workers > len(self.coarse_lengths) or (self.mesh.blocks and not self.has_whole_intervals):
            return 0.0
        return CONSISTENCY

    @property
    def steers(self) -> bool:
        """Whether probes move that weight."""
        if self.adaptive.steer is not None:
            return self.adaptive.steer
        return self.consistency > 0 and self.adaptive.rule != "convergence"

    @property
    def switch_at(self) -> int | float | None:
        """The step, or the share of the steps, from which on training is serial, whatever probes say; None: none."""
        at = self.adaptive.switch_at
        return EXACT_FROM if at is None and self.mode == "adaptive" else at

    @property
    def switch_step(self) -> int | None:
        """The same as a step."""
        return round(self.switch_at * self.steps) if isinstance(self.switch_at, float) else self.switch_at

    @property
    def needs_whole_intervals(self) -> bool:
        """Whether something that is on asks for every coarse interval on one worker."""
        return self.consistency > 0 or self.fits_coarse_steps

    @property
    def has_whole_intervals(self) -> bool:
        """Whether every coarse interval is on one worker."""
        return not any(begin % self.first_coarsening for begin in [0, *accumulate(self.blocks)][:-1])

    @property
    def fits_coarse_steps(self) -> bool:
        """Whether probes choose the coarse steps' weights."""
        return self.mgrit.coarse_step_weight == "fit"

    @property
    def coarse_step_weight(self) -> float:
        """ω that all coarse steps begin with."""
        weight = self.mgrit.coarse_step_weight
        return 1.0 if isinstance(weight, str) else weight

    @property
    def coarse_lengths(self) -> tuple[int, ...]:
        """Layers of each coarse interval of the finest level."""
        c, N = self.first_coarsening, self.middle_layers
        return tuple(min(start + c, N) - start for start in range(0, N, c))

    def hierarchy(self, levels: int) -> Hierarchy:
        """The forward hierarchy over the middle layers."""
        return build_hierarchy(blocks=self.blocks, levels=levels, coarsening=self.mgrit.coarsening)

    def method(self, iterations: int, relaxation: Relaxation | None = None) -> Method:
        """The solver's method with so many iterations, and with this relaxation of the finest level instead of the settings'."""
        settings = self.mgrit
        return Method(
            iterations=iterations,
            relaxation=(relaxation or settings.relaxation.fine, settings.relaxation.coarse),
            cycle=settings.cycle,
            coarse_step_weight=self.coarse_step_weight,
            c_relaxation_weight=settings.relaxation.weight,
            anderson=settings.anderson,
            initial_guess=settings.initial_guess,
            tolerance=settings.tolerance,
            keep_states=False,
        )

    # Rules over several settings ----------------------------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_the_pretrained(cls, values: Any) -> Any:
        return with_pretrained_sizes(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        self._check_mesh()
        self._check_batch()
        self._check_consistency()
        try:
            for levels in {self.mgrit.levels.forward, self.mgrit.levels.backward}:
                self.hierarchy(levels)
            stages(self)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self

    def _check_mesh(self) -> None:
        mesh, N, P = self.mesh, self.middle_layers, self.layer_workers
        if N < 1:
            raise ValueError(
                f"{self.buffers.open} + {self.buffers.close} buffer layers leave {N} of {self.model.layers} layers for the middle: "
                "raise model.layers or lower buffers.open and buffers.close"
            )
        if isinstance(self.workers, WorkerRange):
            if mesh.data > 1 or mesh.layer or mesh.blocks:
                raise ValueError(
                    "workers as a range decides how layers are shared out: leave out mesh.layer and mesh.blocks, and mesh.data at 1"
                )
        elif self.workers is not None and self.workers != self.world:
            raise ValueError(
                f"workers={self.workers} is not mesh.data × mesh.layer = {mesh.data} × {P}: leave one of them out"
                if mesh.layer
                else f"workers={self.workers} does not divide by mesh.data={mesh.data}"
            )
        if P > N:
            raise ValueError(f"{P} layer-parallel workers for {N} middle layers: use at most {N} (workers or mesh.layer), or more layers")
        if mesh.blocks and (len(mesh.blocks) != P or sum(mesh.blocks) != N or min(mesh.blocks) < 1):
            raise ValueError(f"mesh.blocks {mesh.blocks} must be {P} positive numbers that add up to the {N} middle layers")

    def _check_consistency(self) -> None:
        if self.needs_whole_intervals and not self.has_whole_intervals:
            name, c = "adaptive.consistency" if self.consistency else "mgrit.coarse_step_weight=fit", self.first_coarsening
            raise ValueError(
                f"{name} needs every coarse interval on one worker, but blocks {self.blocks} cut intervals of {c}: "
                f"set mesh.blocks to multiples of {c} (the last may be any), or workers, buffers or mgrit.coarsening so that they are"
            )

    def _check_batch(self) -> None:
        encoder = self.model.encoder_layers
        if encoder is not None and encoder >= self.model.layers:
            raise ValueError(f"model.encoder_layers={encoder} leaves no decoder layer of model.layers={self.model.layers}: lower it")
        if self.batch_size % self.mesh.data:
            raise ValueError(f"batch_size {self.batch_size} does not divide by mesh.data={self.mesh.data}")
        if self.replica_batch % self.accumulate:
            raise ValueError(f"a replica's {self.replica_batch} sequences do not divide into accumulate={self.accumulate} parts")
        if self.microbatches and self.replica_batch // self.accumulate % self.microbatches:
            raise ValueError(f"{self.replica_batch // self.accumulate} sequences do not divide into microbatches={self.microbatches}")


def _read_rung(rung: str) -> tuple[int, int, Relaxation | None]:
    match = RUNG.fullmatch(rung)
    assert match is not None
    forward, backward, relaxation = match.groups()
    return int(forward), int(backward), relaxation  # type: ignore[return-value]


def default_blocks(layers: int, workers: int, coarsening: int, *, whole_intervals: bool = False) -> tuple[int, ...]:
    """Blocks of layers: cut at C-points where the largest block does not grow by that, else as even as can be.

    A block that begins at a C-point starts its sweep without waiting for a neighbour.

    Args:
        whole_intervals: cut at C-points even so, where there is an interval for every worker.
    """
    even = split_evenly(layers, workers)
    intervals = -(-layers // coarsening)
    if intervals < workers:
        return even
    ends, done = [], 0
    for share in split_evenly(intervals, workers):
        done += share
        ends.append(min(done * coarsening, layers))
    aligned = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    return aligned if whole_intervals or max(aligned) <= max(even) else even


# Reading and changing ---------------------------------------------------------------------------------------------------------


def make_config(values: Mapping[str, Any], *, source: str = "settings") -> TrainConfig:
    """A checked config from nested values.

    Raises:
        SettingsError: every fault found, one a line, each with the setting's name.
    """
    try:
        return TrainConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(fault, values) for fault in error.errors()]
        raise SettingsError(f"{source}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])) from None


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read YAML (nothing: the embedded default), apply `key=value` overrides, check.

    Raises:
        SettingsError: unreadable file, malformed override, or a setting that breaks a rule.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise SettingsError(f"cannot read {path}: {error.strerror or error}; give the path of a YAML file") from None
        except yaml.YAMLError as error:
            raise SettingsError(f"{path} is not YAML: {error}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise SettingsError(f"{path} holds a {type(loaded).__name__}; it must be a mapping of settings")
        values = loaded or {}
    for override in overrides:
        set_value(values, override)
    return make_config(values, source=str(path) if path else "settings")


def check_run(run: Path) -> None:
    """Refuse a directory that holds no run.

    Raises:
        NotARunError: it has no config.yaml.
    """
    if not (run / "config.yaml").is_file():
        raise NotARunError(f"{run} is not a run directory (no config.yaml): give the directory that a run printed")


def load_run_config(run: Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """The settings of a run, by its directory; else as `load_config`.

    Raises:
        NotARunError: the directory holds no run.
    """
    check_run(run)
    return load_config(run / "config.yaml", overrides)


def set_value(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` in place; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"--set {override!r}: write key=value, such as mgrit.coarsening=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *path, last = key.strip().split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise SettingsError(f"--set {override!r}: {part} is not a group of settings")
    values[last] = float(value) if isinstance(value, str) and _is_number(value) else value


def _is_number(text: str) -> bool:
    # YAML 1.1 reads 1e-3 as a string; users of --set mean the number.
    try:
        float(text)
    except ValueError:
        return False
    return True


def setting_names(model: type[BaseModel] = TrainConfig, prefix: str = "") -> list[str]:
    """Every setting's dotted name."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += setting_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _explain(fault: Any, values: Mapping[str, Any]) -> str:
    import difflib

    name = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("tuple", "literal", "function", "constrained")))
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, setting_names(), n=1, cutoff=0.6)
        tail = [known for known in setting_names() if known.split(".")[-1] == name.split(".")[-1]]
        hint = close or tail
        return f"unknown setting {name}" + (f"; did you mean {hint[0]}?" if hint else "; `rayllp settings` lists them all")
    message = fault["msg"].removeprefix("Value error, ")
    given = f" (given: {fault['input']!r})" if name and not isinstance(fault["input"], dict | BaseModel) else ""
    return f"{name}: {message}{given}" if name else message


def to_yaml(config: TrainConfig) -> str:
    """Everything resolved, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
