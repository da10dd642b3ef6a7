"""Nested iteration: train a shallow network, replace each middle layer by several, and continue at the new depth (arXiv:1912.08974).

Layers are time steps of an ODE over a fixed interval, so a shallow network is a coarse discretisation of the deep one. The deep one starts
from its weights: all layers that replace a layer start as copies of it. This module computes what the stages of the schedule `nested` are.
A stage has complete settings of its own, so that it is trained like any other run; `rayllp.checkpoint.depth_prolongation` carries weights
and optimizer state from stage to stage.
"""

from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from rayllp.config.run import RunSettings
from rayllp.errors import CheckpointError, SettingsError, fault_text

S = TypeVar("S", bound=RunSettings)


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[S]):
    """A stretch of steps at one depth.

    Attributes:
        number: number of the stage, from 1.
        begin, end: the stage does the optimizer steps from begin to end - 1, counted over the whole run.
        config: settings at this depth. `steps` is still the whole run's, since the learning rate schedule depends on it.
        note: in words, which settings of the solver the stage is too shallow for and what it does instead; empty if none.
    """

    number: int
    begin: int
    end: int
    config: S
    note: str = ""


def stages(config: S) -> tuple[Stage[S], ...]:
    """Return the stages of a run, shallow first. Without `nested` there is one, with the run's own settings.

    Stage i has the number of middle layers divided by all later factors, and Δt multiplied by them, so that N·Δt is the same at every
    depth.

    Raises:
        SettingsError: a stage is impossible: layers or blocks do not divide, or there are fewer layers than workers.
    """
    factors, at = config.nested.factors, config.nested.at
    if not factors:
        return (Stage(number=1, begin=0, end=config.steps, config=config),)
    _check(config)
    planned = []
    for i, (begin, end) in enumerate(zip((0, *at), (*at, config.steps), strict=True)):
        settings, note = _shallow(config, prod(factors[i:]), f"stage {i + 1} of {len(at) + 1}")
        planned.append(Stage(number=i + 1, begin=begin, end=end, config=settings, note=note))
    return tuple(planned)


def stage_at(config: S, step: int) -> Stage[S]:
    """Return the stage that does optimizer step `step`; the last stage for steps beyond the end."""
    planned = stages(config)
    return next((stage for stage in planned if step < stage.end), planned[-1])


def stage_of_depth(config: S, layers: int) -> Stage[S]:
    """Return the stage whose network has this number of layers, buffers included.

    Raises:
        CheckpointError: no stage has.
    """
    planned = stages(config)
    for stage in planned:
        if stage.config.model.layers == layers:
            return stage
    depths = ", ".join(str(stage.config.model.layers) for stage in planned)
    raise CheckpointError(
        f"the checkpoint has {layers} layers, but the run's settings make networks of {depths}: put back model.layers, buffers and "
        "nested of the config.yaml that it was made with"
    )


def _check(config: S) -> None:
    """Check the rules that concern all stages."""
    factors, at, N, steps = config.nested.factors, config.nested.at, config.middle_layers, config.steps
    divisor = prod(factors)
    shown = " × ".join(map(str, factors)) + (f" = {divisor}" if len(factors) > 1 else "")
    if at[-1] >= steps:
        raise SettingsError(f"nested.at {list(at)}: the last deepening must come before the end, step {steps}: lower it or raise steps")
    if config.model.task == "translation":
        raise SettingsError(
            f"nested with model.family={config.model.family}: an encoder–decoder's middle layers are of two kinds that must deepen in "
            "step, which is not implemented; leave nested out"
        )
    if config.model.from_pretrained is not None:
        raise SettingsError(
            "nested with model.from_pretrained: nested iteration starts from a shallow network with new weights, and a pretrained model "
            "has its depth; leave one of them out"
        )
    if N % divisor:
        nearest = [size for size in (N // divisor * divisor, -(-N // divisor) * divisor) if size]
        better = " or ".join(str(size + config.model.layers - N) for size in nearest)
        raise SettingsError(
            f"{N} middle layers do not divide by nested.factors {shown}: use model.layers={better}, other buffers, or other factors"
        )
    if config.mesh.blocks and any(block % divisor for block in config.mesh.blocks):
        raise SettingsError(
            f"mesh.blocks {config.mesh.blocks} with nested.factors {shown}: every block must be a multiple of {divisor}, so that it can be "
            "divided in the shallow stages; change them or leave mesh.blocks out"
        )


def _shallow(config: S, divisor: int, name: str) -> tuple[S, str]:
    """Return settings with the middle layers divided by `divisor`, and what had to change.

    A stage may be too shallow for the levels that are set. It then has as many as it allows, and trains serially if that is one.
    """
    values: dict[str, Any] = config.model_dump() | {"nested": {}}
    N, levels = config.middle_layers // divisor, config.mgrit.levels
    values["model"]["layers"] -= config.middle_layers - N
    if not isinstance(config.step.middle, str):  # "T/N" adapts to N by itself
        values["step"]["middle"] *= divisor
    if config.mesh.blocks:
        values["mesh"]["blocks"] = [block // divisor for block in config.mesh.blocks]
    if divisor == 1 or config.solver == "windows":
        return _validated(config, values, name, N), ""
    # The consistency penalty needs a coarse grid, which a stage of few layers does not have.
    gridless = {"adaptive": {"consistency": 0.0, "steer": False}}
    serial = _merged(values, {**gridless, "mode": "serial"})
    serial["mgrit"]["levels"] = {"forward": 1, "backward": 1}
    bare = _validated(config, serial, name, N)
    forward, backward = _fitting(bare, levels.forward), _fitting(bare, levels.backward)
    if max(forward, backward) == 1 < max(levels.forward, levels.backward):
        return bare, "" if config.mode == "serial" else f"{N} middle layers are too few for mgrit.coarsening, so it is trained serially"
    values["mgrit"]["levels"] = {"forward": forward, "backward": backward}
    fewer = (forward, backward) != (levels.forward, levels.backward)
    note = f"{N} middle layers allow {forward} levels forward and {backward} backward" if fewer else ""
    return _validated(config, values, name, N), note


def _fitting(config: S, levels: int) -> int:
    """Return the largest number of levels, up to `levels`, that the middle layers allow."""
    for count in range(levels, 1, -1):
        with suppress(SettingsError):
            config.hierarchy(count)
            return count
    return 1


def _validated(config: S, values: dict[str, Any], name: str, layers: int) -> S:
    """Return a stage's settings, checked; errors name the stage."""
    try:
        return type(config).model_validate(values)
    except ValidationError as error:
        message = fault_text(error.errors()[0])
        raise SettingsError(f"nested, {name}, with {layers} middle layers: {message}; or lower nested.factors") from None


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return values | {name: values[name] | change if isinstance(change, dict) else change for name, change in changes.items()}
