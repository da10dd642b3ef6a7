"""Every error that rayllp raises on purpose. Each message says what was given, the rule it broke, and what to change."""


class RayllpError(Exception):
    """Base class: anything rayllp refuses or gives up on."""


class SettingsError(RayllpError, ValueError):
    """A setting, or a combination of settings, that cannot work. Raised before any actor starts."""


class DataError(RayllpError, ValueError):
    """A text, data set or tokenizer that cannot be read or does not fit the model. Raised before any actor starts."""


class ClusterError(RayllpError, RuntimeError):
    """The cluster cannot give what the run needs, or a worker was lost."""


class WorkerLostError(ClusterError):
    """Workers died, or did not answer: `ranks` says which. A run goes on without its caller seeing this, as long as it may."""

    def __init__(self, message: str, ranks: frozenset[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class RendezvousError(ClusterError):
    """Workers that live could not be connected to each other: a matter of the network, which starting them anew does not mend."""


class ChannelError(RayllpError, RuntimeError):
    """A message between two workers failed: names step, phase, level, sender and receiver."""


class MessageTimeoutError(ChannelError):
    """A message did not come within its time limit: whoever was to send it hangs, or is cut off."""


class NonFiniteError(RayllpError, ArithmeticError):
    """The loss or a gradient is NaN or infinite. Raised before the optimizer step, so the weights are still good."""


class CheckpointError(RayllpError, RuntimeError):
    """A checkpoint that is absent, incomplete, altered, or of another model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is incomplete or altered: the one before it may be whole."""


class NotARunError(SettingsError, CheckpointError):
    """A directory was given that holds no run: a wrong argument, and nothing to go on from."""


class HeldError(RayllpError, RuntimeError):
    """Another process writes to the directory of a run or sweep, or has taken it over."""
