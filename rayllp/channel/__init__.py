"""Messages between workers: one small interface (`Channel`) and several implementations, which one test suite checks."""

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.channel.local import LocalChannel, run_workers

__all__ = ["Channel", "LocalChannel", "MessageTag", "StateSpec", "run_workers"]
