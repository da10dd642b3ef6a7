"""Every error that rayllp raises on purpose. A message says what was given, which rule that broke, and what to change."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any


class RayllpError(Exception):
    """Base class: anything rayllp refuses or gives up on."""


class SettingsError(RayllpError, ValueError):
    """A setting, or a combination of settings, that cannot work. Raised before any actor starts."""


class DataError(RayllpError, ValueError):
    """A text, data set or tokenizer that cannot be read or does not fit the model. Raised before any actor starts."""


class ClusterError(RayllpError, RuntimeError):
    """The cluster cannot give what the run needs, or a worker was lost."""


class WorkerLostError(ClusterError):
    """Workers have died, or do not answer; `ranks` says which. The caller of a run sees this only once the run can no longer recover."""

    def __init__(self, message: str, ranks: frozenset[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class RendezvousError(ClusterError):
    """Workers that are alive could not be connected to each other. The cause is the network, so restarting them would not help."""


class ChannelError(RayllpError, RuntimeError):
    """A message between two workers failed. The text names step, phase, level, sender and receiver."""


class MessageTimeoutError(ChannelError):
    """A message did not come within its time limit: its sender hangs, or is cut off."""


class NonFiniteError(RayllpError, ArithmeticError):
    """The loss or a gradient is NaN or infinite. Raised before the optimizer step, so the weights are still good."""


class CheckpointError(RayllpError, RuntimeError):
    """A checkpoint is missing, incomplete, altered, or belongs to another model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is incomplete or altered; the one before it may be whole."""


class NotARunError(SettingsError, CheckpointError):
    """A directory was given that holds no run. It is the wrong argument, and there is nothing to resume."""


class LockedError(RayllpError, RuntimeError):
    """Another process writes to the directory of a run or sweep, or has taken it over."""


def nearest_name(name: str, known: Collection[str], cutoff: float = 0.6) -> str | None:
    """Return the known dotted name that was probably meant: one that is spelt alike, or that ends in the same part; None if there is none.

    Args:
        cutoff: how much alike the spelling must be, from 0 to 1 (the same).
    """
    alike = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    same_end = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    return next(iter(alike + same_end), None)


def fault_text(fault: Mapping[str, Any]) -> str:
    """Return pydantic's message for a validation error, without the prefix that it adds to messages of our own."""
    return str(fault["msg"]).removeprefix("Value error, ")
