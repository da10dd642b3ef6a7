"""Messages between workers: one small interface (`Channel`), implemented for threads, torch.distributed and MPI."""

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.channel.local import LocalChannel, run_workers

__all__ = ["Channel", "LocalChannel", "MessageTag", "StateSpec", "run_workers"]
