"""Pieces of a transformers model: groups of its modules, under their full names, each built and placed on its own.

The whole model exists only on the meta device, as a plan without weights. A piece is copied out of it, allocated, and initialised by the
model's own rules or from a checkpoint; nothing else is ever allocated.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from rayllp.config.network import ModelSettings
from rayllp.errors import SettingsError
from rayllp.models.lora import check_targets
from rayllp.models.meta_device import allocate_empty, initialiser
from rayllp.models.replay import UnsupportedModelError


class Piece(nn.Module):
    """Some modules of a model under their full names; `piece[path]` is one of them."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for path, module in modules.items():
            *parents, leaf = path.split(".")
            place: nn.Module = self
            for name in parents:
                if name not in dict(place.named_children()):
                    place.add_module(name, nn.Module())
                place = place.get_submodule(name)
            place.add_module(leaf, module)

    def __getitem__(self, path: str) -> nn.Module:
        return self.get_submodule(path)


def build_piece(model: PreTrainedModel, paths: Sequence[str], bare: frozenset[str], aliases: Iterable[Sequence[str]]) -> Piece:
    """Copy modules out of a model, allocate and initialise them by the model's rules.

    Args:
        model: the model, on the meta device.
        paths: full names of the modules.
        bare: modules whose submodules belong to other pieces and are left out.
        aliases: groups of full names that denote the same parameter.
    """
    modules = {path: copy.deepcopy(model.get_submodule(path)) for path in paths}
    for path in bare & modules.keys():
        modules[path]._modules.clear()
    piece = Piece(modules)
    _use_one_operation_gelu(piece)
    allocate_empty(piece)
    names = {id(module): name for name, module in piece.named_modules()}
    with torch.no_grad():
        piece.apply(lambda module: initialiser(model, names[id(module)])(module))
    inside = {name for name, _ in piece.named_parameters(remove_duplicate=False)}
    for group in aliases:
        _tie(piece, [name for name in group if name in inside])
    return piece


def find_aliases(model: nn.Module) -> list[list[str]]:
    """Return groups of names that denote the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def find_ties(aliases: Iterable[Sequence[str]], first: Iterable[str], last: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield, for each parameter that is in both of two pieces, its full name in the first and in the last."""
    for group in aliases:
        ends = [[name for name in group if is_within(name, paths)] for paths in (first, last)]
        if ends[0] and ends[1]:
            yield ends[0][0], ends[1][0]


def cover(model: nn.Module, names: Iterable[str], elsewhere: Collection[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the largest modules whose parameters are all among `names`, and those of them that are taken without their submodules.

    Args:
        model: the model.
        names: full names of parameters.
        elsewhere: modules of other pieces, which are not looked into.

    Raises:
        UnsupportedModelError: a parameter is in no module but the whole model.
    """
    wanted, covered, bare = set(names), list[str](), set[str]()

    def visit(path: str, module: nn.Module) -> None:
        inside = {f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(remove_duplicate=False)}
        if path in elsewhere or not inside & wanted:
            return
        if inside <= wanted and path:
            covered.append(path)
            return
        own = {f"{path}.{name}".lstrip(".") for name, p in module._parameters.items() if p is not None}
        if own & wanted:
            if not path:
                raise UnsupportedModelError(f"the parameters {sorted(own & wanted)} are in no module but the whole model")
            covered.append(path)
            bare.add(path)
        for name, child in module.named_children():
            visit(f"{path}.{name}".lstrip("."), child)

    visit("", model)
    return tuple(covered), frozenset(bare)


def refuse_shared(aliases: Iterable[Sequence[str]], layers: Sequence[str]) -> None:
    """Refuse parameters that a layer shares with another layer or with a piece around the layers."""
    for group in aliases:
        owners = {next((path for path in layers if is_within(name, (path,))), None) for name in group}
        if len(owners) > 1:
            raise UnsupportedModelError(f"its layers share a parameter: {group[0]} is {group[1]}")


def check_trained(model: nn.Module, pieces: Iterable[str], layers: Iterable[str], settings: ModelSettings) -> None:
    """Refuse patterns of model.train and targets of model.lora that match nothing.

    Args:
        model: the model.
        pieces: modules whose first parameters are shown as examples.
        layers: full names of the layers.
        settings: those of the model.
    """
    if settings.lora is not None:
        check_targets([model.get_submodule(path) for path in layers], settings.lora)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in settings.train or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            some = dict.fromkeys(next(name for name in names if is_within(name, (path,))) for path in pieces)
            raise SettingsError(f"model.train has {pattern!r}, which matches no parameter: there are {', '.join(some)}, …")


def _tie(piece: Piece, names: list[str]) -> None:
    """Make all these names of a piece denote the first one's parameter."""
    for name in names[1:]:
        parent, _, leaf = name.rpartition(".")
        setattr(piece.get_submodule(parent), leaf, piece.get_parameter(names[0]))


def _use_one_operation_gelu(piece: nn.Module) -> None:
    """Replace transformers' tanh GELU (GPT-2's), which takes eight operations, by torch's single one: a layer takes a fifth less time."""
    for parent in piece.modules():
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))


def is_within(name: str, paths: Iterable[str]) -> bool:
    """True if a full name denotes one of these modules or something inside one."""
    return any(name == path or name.startswith(path + ".") for path in paths)
