"""Groups of settings of the solver, the controller, the optimizer and the run, with the rules that concern one group alone."""

import re
from typing import Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from rayllp.config.base import Settings

Relaxation = Literal["F", "FCF"]
RUNG = re.compile(r"(\d+)\+([1-9]\d*)(?: (FCF|F))?")
EVALUATED = 8
"""Held-out samples that eval.batches counts as one batch. It is fixed so that losses are comparable for every batch_size."""


class ByDirection(Settings):
    """A number for the forward solve and one for the backward (adjoint) solve."""

    forward: int = Field(2, ge=1, description="forward solve")
    backward: int = Field(2, ge=1, description="adjoint solve")


class Iterations(ByDirection):
    """Numbers of iterations of MGRIT, counted as XBraid counts them (docs/method.md), or of sweeps of windows."""

    forward: int = Field(2, ge=1, description="forward solve")
    backward: int = Field(1, ge=1, description="adjoint solve")


class RelaxationSettings(Settings):
    """Kind of relaxation on each level."""

    fine: Relaxation = Field("F", description="on the finest level")
    coarse: Relaxation = Field("FCF", description="on all others")


class MGRITSettings(Settings):
    """How `solver: mgrit` solves the layers (arXiv:2601.09026, section 3.2)."""

    coarsening: int | tuple[int, ...] = Field(4, description="c_f, one for all levels or a list, one a coarse level")
    levels: ByDirection = Field(ByDirection(), description="1 is the serial solve")
    iterations: Iterations = Field(Iterations(), description="fixed, or the cap where mgrit.tolerance is set")
    relaxation: RelaxationSettings = Field(RelaxationSettings(), description="F or FCF")
    cycle: Literal["V", "F"] = Field("V", description="V- or F-cycles")
    coarse_step_weight: float = Field(1.0, ge=0, description="ω: 1 rediscretises (the paper's), 0 is the identity")
    initial_guess: Literal["coarse", "constant"] = Field("coarse", description="coarse propagation, or every state as the first")
    tolerance: float | None = Field(None, gt=0, description="stop the solve once its residual norm is at or below this")
    batched: bool = Field(
        False, description="sweep a worker's intervals side by side, a layer of each in one call: for small layers on a GPU (docs/speed.md)"
    )

    @field_validator("coarsening")
    @classmethod
    def _at_least_two(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        factors = (value,) if isinstance(value, int) else value
        if not factors or any(factor < 2 for factor in factors):
            raise ValueError(f"coarsening {value}: every factor must be at least 2")
        return value


class WindowSettings(Settings):
    """How `solver: windows` solves the layers (docs/method.md)."""

    length: PositiveInt | tuple[PositiveInt, ...] | None = Field(
        None,
        description="layers that are solved at once, at most; or a list of the windows' lengths between buffers; default one a worker",
    )
    sweeps: Iterations = Field(Iterations(), description="of a window of fixed length, in mode parallel")
    rolling: bool = Field(
        True,
        description="in mode adaptive, a window rolls on over the layers as they converge, if length is no list, no ladder is given, and "
        "rule is bias; probes move its tolerance",
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="of a rolling window: largest relative change of a layer's input that its last sweep leaves unheeded (of an adjoint "
        "state four times as much); in mode parallel fixed, in mode adaptive at the start (default 0.1; from 1e-4 to 1)",
    )


class AdaptiveSettings(Settings):
    """The controller of mode=adaptive, the probes of every parallel mode, and the penalties."""

    rule: Literal["convergence", "bias", "both"] = Field(
        "bias", description="what a probe is judged by: the gradient's bias, ρ (convergence, the paper's rule), or both"
    )
    probe_every: int = Field(
        150,
        ge=0,
        description="steps between probes (doubled iterations, at least 3); of a rolling window at most, at least 10; 0: never",
    )
    threshold: float = Field(1.0, gt=0, description="a probe's ρ, forward or backward, beyond this is a fault")
    bias_limit: float = Field(0.1, gt=0, description="a relative bias of the gradient beyond this is a fault …")
    bias_to_noise: float | None = Field(
        None,
        ge=0,
        description="… unless it is below this share of the gradient's own noise; default 0.4, of windows 0.6, of a rolling one 0.3",
    )
    late_bias_to_noise: float = Field(0.25, ge=0, description="the same share, if it is smaller, from adaptive.late_from on")
    late_from: int | float = Field(
        0.8, ge=0, description="step (or share of the steps) from which less bias is tolerated, and no rung is gone down; 1.0: never"
    )
    exact_every: int = Field(
        0, ge=0, description="every so many probes the bias is taken against the exact gradient, by any rule; 0: never"
    )
    lipschitz_every: int = Field(
        0, ge=0, description="every so many probes each layer's Lipschitz constant is estimated, for `rayllp suggest-buffers`; 0: never"
    )
    ladder: tuple[str, ...] | None = Field(
        None,
        description='rungs from cheap to dear: "F+B" iterations or sweeps, for MGRIT also "F+B FCF" (0: serial forward); then serial',
    )
    return_below: float | None = Field(
        0.3, gt=0, description="a probe whose every ρ is below this is calm (of a rolling window any); none: no way back"
    )
    patience: int = Field(
        3, ge=1, description="calm probes in a row after which a rung is gone down, or exact steps are left for a rolling window"
    )
    max_flips: int = Field(6, ge=0, description="switches to serial and steps down, in all, after which there are no more steps down")
    consistency: float | None = Field(
        None,
        ge=0,
        description="weight μ of MGRIT's consistency penalty until a switch to serial; default 0.3 in mode adaptive with rule bias or both "
        "(where no worker has less than an interval), else 0",
    )
    smoothness: float = Field(0.0, ge=0, description="weight of Σ ‖θ_{n+1} − θ_n‖² / Δt over middle layers; none after a switch to serial")
    steer: bool | None = Field(
        None, description="probes move μ toward the least that holds adaptive.bias_target; default: where the rule sees bias"
    )
    bias_target: float = Field(0.2, gt=0, description="relative bias that steering aims at")
    switch_at: int | float | None = Field(
        None,
        ge=0,
        description="serial from this step (or share of the steps) on; default in mode adaptive 0.8 (windows of a ladder 0.95, a rolling "
        "one never); 1.0: never",
    )

    @field_validator("switch_at", "late_from")
    @classmethod
    def _step_or_share(cls, value: int | float | None, info: ValidationInfo) -> int | float | None:
        if isinstance(value, float) and value > 1:
            if not value.is_integer():
                raise ValueError(f"{info.field_name} {value}: give a step, or a share of the steps from 0 to 1")
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
    """The optimizer that updates the weights, and the schedule of its learning rate."""

    name: Literal["adamw", "muon", "sgd", "adafactor"] = Field(
        "adamw", description="muon: Muon for the weight matrices of the layers, AdamW for all else (embedding, head, norms, biases)"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate; Muon's updates are as large as AdamW's, so it serves both")
    muon_lr: float | None = Field(None, gt=0, description="peak learning rate of Muon's matrices; default lr")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's (Nesterov's) and SGD's; of SGD 0: none")
    schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "cosine", description="of the learning rate after warm-up; wsd (warm-up, stable, decay): the peak, and linear at the end"
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final over peak learning rate, but for schedule constant")
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    decay: float | None = Field(None, gt=0, le=1, description="share of the steps in which wsd's learning rate falls; default 0.2")
    weight_decay: float = Field(0.1, ge=0, description="on weight matrices, kernels and tables of embeddings; never on norms and biases")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's")
    eps: float = Field(1e-8, gt=0, description="AdamW's")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, to evaluate and export with, such as 0.999; none: no average"
    )
    clip: float = Field(1.0, ge=0, description="global gradient norm over all workers; 0: none")
    sharded: bool = Field(
        False,
        description="each of mesh.data replicas keeps the optimizer's state of its share of the parameters (ZeRO-1): less memory, the "
        "same results, and half as many bytes more between replicas",
    )

    @field_validator("betas")
    @classmethod
    def _shares(cls, value: tuple[float, float]) -> tuple[float, float]:
        if any(not 0 <= beta < 1 for beta in value):
            raise ValueError(f"betas {value}: each must be at least 0 and below 1, such as [0.9, 0.95]")
        return value

    @model_validator(mode="after")
    def _muons_own(self) -> "OptimizerSettings":
        if self.muon_lr is not None and self.name != "muon":
            raise ValueError(f"muon_lr={self.muon_lr:g} is Muon's, and name is {self.name}: set name: muon, or leave muon_lr out")
        return self

    @model_validator(mode="after")
    def _decay_of_wsd(self) -> "OptimizerSettings":
        if self.decay is not None and self.schedule != "wsd":
            raise ValueError(f"decay={self.decay:g} is of schedule wsd, and schedule is {self.schedule}: leave one of them out")
        return self

    @property
    def decay_share(self) -> float:
        """Share of the steps over which the learning rate of schedule wsd decays."""
        return 0.2 if self.decay is None else self.decay


class EvalSettings(Settings):
    """Evaluation on held-out data, always with the exact forward."""

    every: int = Field(100, ge=0, description="steps between evaluations; 0: only at the end")
    batches: int = Field(
        8, ge=0, description="so many times 8 held-out samples, the same ones each time and for every batch_size; 0: one pass through all"
    )
    patience: int | None = Field(
        None, ge=1, description="the run ends after so many evaluations in a row that are no better than the best; none: it does not"
    )
    final_batches: int = Field(0, ge=0, description="at the end; 0: one pass, of text as eval.batches says")
    sample: int = Field(160, ge=0, description="tokens generated at the end (gpt2, llama); 0: none")
    translate: int = Field(0, ge=0, description="held-out sentences translated each time for BLEU (mt); 0: none")
    final_translate: int = Field(200, ge=0, description="at the end (mt); 0: none")
    beams: int = Field(4, ge=1, description="of the beam search (mt)")

    @model_validator(mode="after")
    def _evaluations_to_wait_for(self) -> "EvalSettings":
        if self.patience is not None and not self.every:
            raise ValueError(f"patience={self.patience} counts evaluations, of which every=0 makes none on the way: set eval.every")
        return self


class ProfileSettings(Settings):
    """Profiling of single steps."""

    steps: tuple[int, ...] = Field((), description="steps, from 0, that torch.profiler traces on every worker, into RUN/profile/")


class CheckpointSettings(Settings):
    """Checkpoints of a run."""

    path: str | None = Field(
        None, description="folder or URL (s3://…, gs://…; through fsspec), this run's own and seen by all nodes; default RUN/checkpoints"
    )
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: by `minutes`, at the end and when stopped")
    minutes: float = Field(10.0, ge=0, description="the longest time between checkpoints; 0: any")
    keep: int = Field(2, ge=1, description="the last so many stay")
    best: bool = Field(True, description="also keep that of the lowest validation loss; written after an evaluation that finds one")


class MeshSettings(Settings):
    """The mesh of workers: data-parallel replicas times layer-parallel workers."""

    data: int = Field(1, ge=1, description="replicas; each takes batch_size / data sequences")
    layer: int | None = Field(None, ge=1, description="blocks of layers; default workers / data")
    blocks: tuple[int, ...] | None = Field(
        None, description="middle layers of each worker; default even, cut at C-points where that is free"
    )


class WorkerRange(Settings):
    """A range of numbers of workers; a run uses as many as the cluster has room for."""

    min: int = Field(1, ge=1, description="with fewer a run waits, or ends")
    max: int = Field(ge=1, description="more are not asked for")

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerRange":
        if self.max < self.min:
            raise ValueError(f"min {self.min} is above max {self.max}: swap them")
        return self
