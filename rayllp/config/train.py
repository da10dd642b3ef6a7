"""`TrainConfig`, which `rayllp train` reads from YAML and `rayllp.train` takes, with the rules over several settings.

Every rule that needs neither data nor a cluster is checked here. Names of settings are fixed: other tools set them by `--set key=value`.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from pydantic import model_validator

from rayllp.config.base import Settings
from rayllp.config.groups import WorkerRange
from rayllp.config.nested import stages
from rayllp.config.run import RunSettings
from rayllp.errors import SettingsError
from rayllp.hf_config import with_pretrained_sizes


def _changed(group: str, settings: Settings) -> str | None:
    """Return the name of the first setting of a group that is not its default; None if there is none."""
    for name, value in settings:
        default = type(settings).model_fields[name].default
        if value != default:
            return _changed(f"{group}.{name}", value) if isinstance(value, Settings) else f"{group}.{name}"
    return None


class TrainConfig(RunSettings):
    """The settings of one run, checked. `TrainConfig()` is the embedded default."""

    # Rules over several settings ----------------------------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_the_pretrained(cls, values: Any) -> Any:
        """Fill in sizes, Δt and buffers from the checkpoint of model.from_pretrained where the settings leave them out."""
        return with_pretrained_sizes(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        self._check_mesh()
        self._check_batch()
        if any(not 0 <= step < self.steps for step in self.profile.steps):
            raise ValueError(f"profile.steps {list(self.profile.steps)}: a run of {self.steps} steps has steps 0 to {self.steps - 1}")
        self._check_torchbraid()
        self._check_solver()
        self._check_consistency()
        try:
            climbs = any(forward for forward, _, _ in self.ladder)
            solved = {self.mgrit.levels.forward, self.mgrit.levels.backward, *([self.rung_levels] if climbs else [])}
            for levels in () if self.solver == "windows" or self.mode == "serial" else solved:
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
            if mesh.data == 1 and (mesh.layer or mesh.blocks):
                raise ValueError(
                    "workers as a range decides how layers are shared out: leave out mesh.layer and mesh.blocks, or set mesh.data to the "
                    "most replicas, whose number is then what changes"
                )
            if mesh.data > 1 and (self.workers.max != self.world or self.workers.min % P):
                raise ValueError(
                    f"replicas of {P} workers come and go as a whole: make workers.max mesh.data × mesh.layer = {mesh.data} × {P}, and "
                    f"workers.min a multiple of {P}; they are {self.workers.max} and {self.workers.min}"
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
            c = self.fine_coarsening
            raise ValueError(
                f"adaptive.consistency needs every coarse interval on one worker, but blocks {self.blocks} cut intervals of {c}: "
                f"set mesh.blocks to multiples of {c} (the last may be any), or workers, buffers or mgrit.coarsening so that they are"
            )

    def _check_solver(self) -> None:
        """Refuse settings of another solver, and what windows cannot do."""
        if self.recompute and self.mgrit.batched:
            raise ValueError("mgrit.batched keeps the graphs of all intervals at once, recompute of one: choose one")
        windows = self.solver == "windows"
        foreign = _changed("mgrit", self.mgrit) if windows else _changed("windows", self.windows)
        if foreign:
            other = foreign.partition(".")[0]
            raise ValueError(f"{foreign} is of solver: {other}, and solver is {self.solver}: set solver: {other}, or leave {foreign} out")
        if not windows:
            return
        self._check_windows()
        adaptive = self.adaptive
        refused = {
            "mesh.blocks shares out neighbouring layers, and windows take layers in turn": self.mode != "serial" and bool(self.mesh.blocks),
            "adaptive.consistency is for coarse steps by an interval's first layer, which windows do not take": bool(adaptive.consistency),
            "adaptive.smoothness wants neighbouring layers on one worker, and windows take layers in turn": adaptive.smoothness > 0,
            "a rung with a serial forward or FCF-relaxation is MGRIT's; windows take sweeps, such as 2+1": (
                any(forward == 0 or relaxation is not None for forward, _, relaxation in self.ladder)
            ),
        }  # fmt: skip
        for reason, holds in refused.items():
            if holds:
                raise ValueError(f"{reason}: leave it out, or set solver: mgrit")

    def _check_windows(self) -> None:
        """Refuse lengths of windows that do not make up the network, and a tolerance of windows that do not roll."""
        lengths, N = self.windows.length, self.middle_layers
        if self.windows.tolerance is not None and self.mode != "serial" and (isinstance(lengths, tuple) or not self.rolls):
            raise ValueError(
                f"windows.tolerance {self.windows.tolerance:g} is of a rolling window, and here windows have fixed lengths: leave it out, "
                "or leave out adaptive.ladder and a list as windows.length, with windows.rolling: true and adaptive.rule: bias"
            )
        if isinstance(lengths, tuple) and sum(lengths) != N:
            kept = [length for length, total in zip(lengths, accumulate(lengths), strict=True) if total < N]
            nearest = ", ".join(map(str, [*kept, N - sum(kept)]))
            raise ValueError(
                f"windows.length {list(lengths)} has {sum(lengths)} layers, and there are {N} middle layers: [{nearest}] would do"
            )

    def _check_torchbraid(self) -> None:
        """Refuse what TorchBraid cannot do; it would go on with wrong numbers, or wait for ever."""
        if self.solver != "torchbraid":
            return
        mgrit, N, P = self.mgrit, self.middle_layers, self.layer_workers
        factors = (mgrit.coarsening,) if isinstance(mgrit.coarsening, int) else mgrit.coarsening
        refused = {
            "talks by MPI alone: set channel: mpi": self.channel != "mpi",
            "has no controller: set mode: parallel (or serial), or solver: mgrit": self.mode == "adaptive",
            f"wants middle layers in equal blocks of at least 2, and {N} on {P} workers are not: change model.layers, buffers or workers": (
                N % P > 0 or N == P > 1
            ),
            "decides itself which worker has which layers: leave mesh.blocks out, and workers a number": (
                bool(self.mesh.blocks) or isinstance(self.workers, WorkerRange)
            ),
            "solves states of one tensor, and an encoder–decoder has two: set solver: mgrit": self.model.task == "translation",
            "sends float32 alone: set dtype: float32": self.dtype != "float32",
            "has V-cycles alone: set mgrit.cycle: V": mgrit.cycle != "V",
            "has one coarse operator: set mgrit.coarse_step_weight: 1": mgrit.coarse_step_weight != 1,
            f"keeps layers by one coarsening factor, not {factors}: set mgrit.coarsening to a number": len(set(factors)) > 1,
            "has no tolerance here: leave mgrit.tolerance out": mgrit.tolerance is not None,
            "keeps every graph, and sweeps interval after interval: leave recompute and mgrit.batched out": self.recompute or mgrit.batched,
            "measures no convergence factor for probes: set adaptive.probe_every: 0": self.adaptive.probe_every > 0,
            "knows no consistency penalty: leave adaptive.consistency out": self.consistency > 0,
        }
        for reason, holds in refused.items():
            if holds:
                raise ValueError(f"solver: torchbraid {reason}")

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
