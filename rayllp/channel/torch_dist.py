"""A channel over torch.distributed: Gloo between CPUs, NCCL between GPUs."""

from collections.abc import Callable, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rayllp.channel.base import MessageTag, Receives, Sends
from rayllp.channel.packing import empty_message
from rayllp.channel.process_channel import Posted, ProcessChannel, failing_as
from rayllp.errors import ChannelError
from rayllp.state import State

COPIED_BYTES = 8 * 2**20
"""An all-gather copies a message for each worker if the copies have no more bytes together."""
UNWRITTEN = np.frombuffer(bytes.fromhex("9e3779b97f4a7c15"), dtype=np.uint8)
"""A receive buffer ends with these bytes until its message has arrived. Gloo writes from front to back, and offers no test without waiting.
A message that happens to end with these bytes is not noticed before `receive`.
"""


class TorchChannel(ProcessChannel):
    """A channel over the process group `group` (the default group if None).

    Gloo moves CPU memory, so states on a GPU are staged through the host. NCCL moves them directly. Its receives are not posted ahead of
    time, since they would hold up the stream that computes. `timeout_s`, in seconds, limits each wait on Gloo; NCCL has the group's limit.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout_s: float = 300.0) -> None:
        mine: dist.ProcessGroup = group if group is not None else dist.group.WORLD  # type: ignore[assignment]
        host = dist.get_backend(mine) != "nccl"
        super().__init__(dist.get_rank(mine), dist.get_world_size(mine), timeout_s, group=mine, on_host=host, preposts=host)
        self.synchronous_sends = not host
        self._mine = mine
        self._limit = timedelta(seconds=timeout_s)
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def _isend(self, buffer: Tensor, destination: int) -> None:
        if not self._on_host:  # Gloo does not tell whether a message has left; its messages are kept until `finish`
            self._sent = [(work, sent) for work, sent in self._sent if not work.is_completed()]
        # For Gloo, what dist.isend calls: its checks would take longer than the message.
        work = self._mine.send([buffer], destination, 0) if self._on_host else dist.isend(buffer, group=self._mine, group_dst=destination)
        if work is not None:
            self._sent.append((work, buffer))

    def _irecv(self, buffer: Tensor, source: int) -> dist.Work | None:
        if not self._on_host:
            return dist.irecv(buffer, group=self._mine, group_src=source)
        end = _end(buffer)
        end[:] = UNWRITTEN[: len(end)]
        return self._mine.recv([buffer], source, 0)

    def _has_arrived(self, posted: Posted) -> bool:
        end = _end(posted.buffer)
        return not np.array_equal(end, UNWRITTEN[: len(end)])

    def _wait(self, work: dist.Work | None) -> None:
        if work is not None:
            # NCCL's wait orders the stream and returns at once. Its watchdog enforces the time limit of the process group.
            work.wait(self._limit) if self._on_host else work.wait()

    def exchange(self, sends: Sends, receives: Receives, tag: MessageTag) -> list[State]:
        if self._on_host or not (sends or receives):
            return super().exchange(sends, receives, tag)
        buffers = [empty_message(spec, spec.device) for spec, _ in receives]
        isends = [dist.P2POp(dist.isend, self._message(state, tag), group=self._mine, group_peer=peer) for state, peer in sends]
        irecvs = [
            dist.P2POp(dist.irecv, buffer, group=self._mine, group_peer=peer) for buffer, (_, peer) in zip(buffers, receives, strict=True)
        ]
        with failing_as(f"{tag}: exchange with neighbours failed on worker {self.rank}"):
            for work in dist.batch_isend_irecv([*isends, *irecvs]):
                work.wait()
        return [self._open(buffer, spec, source, tag) for buffer, (spec, source) in zip(buffers, receives, strict=True)]

    def _begin_all_gather(self, buffer: Tensor) -> Callable[[], Sequence[Tensor]]:
        # Gloo's own all-gather takes one hop round a ring for each worker, and in each hop a process has to wake up. For large messages
        # that takes less time, and memory, than a copy for each worker.
        if self._on_host and self.size * len(buffer) <= COPIED_BYTES:
            end = self._begin_all_to_all(buffer.expand(self.size, -1).contiguous())
            return lambda: end().unbind()
        found = list(buffer.new_empty(self.size, len(buffer)).unbind())
        return self._ending(self._mine.allgather(found, buffer, timeout=self._limit), found)

    def _begin_all_to_all(self, parts: Tensor) -> Callable[[], Tensor]:
        # Gloo posts the messages of a collective from a thread of its own. From this one it would take several times as long: after some
        # milliseconds of computation, a thread that waits for a lock of Gloo's is not soon let run again.
        found = torch.empty_like(parts)
        return self._ending(self._mine.alltoall_base(found, parts, [], [], timeout=self._limit), found)

    def _begin_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        buffer = tensor if not self._on_host else tensor.cpu()
        work = dist.all_reduce(buffer, group=self._mine, async_op=True)

        def end() -> None:
            self._wait(work)
            if buffer is not tensor:
                tensor.copy_(buffer)

        return end

    def finish(self) -> None:
        for work, _ in self._sent:
            try:
                work.wait()
            except RuntimeError as error:
                raise ChannelError(f"worker {self.rank}: a message was not taken by its receiver: {error}") from error
        self._sent.clear()
        self._unchecked.check()

    def close(self) -> None:
        self._sent.clear()
        self._posted.clear()


def _end(buffer: Tensor) -> np.ndarray:
    """Return the last bytes of a flat buffer in main memory, as a view."""
    return buffer.view(torch.uint8).numpy()[-len(UNWRITTEN) :]
