"""How neighbours talk: one small interface, several implementations, one test suite over all of them."""

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.channel.local import LocalChannel, run_workers

__all__ = ["Channel", "LocalChannel", "MessageTag", "StateSpec", "run_workers"]
