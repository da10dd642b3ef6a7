"""One suite that every kind of channel has to pass: ordering, shapes, tuples, sums, time limits, lost peers."""

import os
import signal
import subprocess
import threading
import time

import pytest
import torch

from rayllp.channel import LocalChannel, MessageTag, StateSpec, run_workers
from rayllp.channel.interfaces import close_connections_to
from rayllp.errors import ChannelError
from tests.conftest import run_mpi_processes, run_processes

TAG = MessageTag(7, "forward", "relaxation", 1)


def over_threads(size, work):
    return run_workers(size, lambda channel: work(channel), timeout_s=1.0)


def _gloo(rank, size, work):
    from rayllp.channel.torch_dist import TorchChannel

    return work(TorchChannel(timeout_s=1.0))


def over_gloo(size, work):
    return run_processes(size, _gloo, work)


def _mpi(world, work):
    return work(world.channel(0, timeout_s=1.0))


def over_mpi(size, work):
    return run_mpi_processes(size, _mpi, work)


def of_odd_lengths(channel):
    """Send states whose number of bytes is no multiple of their first tensor's item size."""
    state = (torch.full((2, 2), channel.rank + 0.5, dtype=torch.float64), torch.full((3,), channel.rank, dtype=torch.uint8))
    found = [tuple(part.clone() for part in each) for each in channel.all_gather(state, StateSpec.of(state), TAG)]
    channel.finish()
    return found


def exchanging(channel):
    """Exchange with both neighbours at once, two tensors of two dtypes; and with nobody."""
    left, right = (channel.rank - 1) % channel.size, (channel.rank + 1) % channel.size
    mine = (torch.full((3,), channel.rank, dtype=torch.bfloat16), torch.full((2, 2), channel.rank + 0.5, dtype=torch.float64))
    spec = StateSpec.of(mine)
    found = channel.exchange([(mine, left), (mine, right)], [(spec, left), (spec, right)], TAG)
    assert channel.exchange([], [], TAG) == []
    channel.finish()
    return [float(part.sum()) for state in found for part in state]


def misunderstandings(channel):
    """Send a message of another phase, of another dtype and of another shape, each where a correct one is waited for."""
    said = []
    for sent, tag in ((torch.zeros(4), TAG.at("correction", 0)), (torch.zeros(4, dtype=torch.bfloat16), TAG), (torch.zeros(2, 2), TAG)):
        if channel.rank == 0:
            channel.send(sent, 1, tag)
            channel.finish()
        else:
            with pytest.raises(ChannelError) as caught:
                channel.receive(StateSpec.of(torch.zeros(4)), 0, TAG)
            said.append(str(caught.value))
    return said


@pytest.fixture(params=[over_threads, over_gloo, over_mpi], ids=["threads", "gloo", "mpi"])
def workers(request):
    return request.param


def ring(channel):
    """Each worker sends two states right and receives two from its left, in order."""
    right, left = (channel.rank + 1) % channel.size, (channel.rank - 1) % channel.size
    bare = torch.full((2, 3), float(channel.rank), dtype=torch.float64)
    pair = (torch.full((4,), channel.rank, dtype=torch.float32), torch.full((2, 2), channel.rank + 0.5, dtype=torch.float64))
    channel.send(bare, right, TAG)
    channel.send(pair, right, TAG)
    first = channel.receive(StateSpec.of(bare), left, TAG)
    second = channel.receive(StateSpec.of(pair), left, TAG)
    total = channel.all_reduce(torch.tensor([1.0, channel.rank]), TAG)
    channel.finish()
    return first.clone(), tuple(part.clone() for part in second), total.tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_states_arrive_whole_and_in_order(workers, size):
    for rank, (first, second, total) in enumerate(workers(size, ring)):
        left = (rank - 1) % size
        assert torch.equal(first, torch.full((2, 3), float(left), dtype=torch.float64))
        assert torch.equal(second[0], torch.full((4,), left, dtype=torch.float32))
        assert torch.equal(second[1], torch.full((2, 2), left + 0.5, dtype=torch.float64))
        assert total == [size, sum(range(size))]


def gathering(channel):
    """Gather states of one tensor and of two, then a row of each worker; a message sent in between must not be mixed up with them."""
    bare = torch.full((2, 3), float(channel.rank), dtype=torch.float64)
    pair = (torch.full((4,), channel.rank, dtype=torch.float32), torch.full((2, 2), channel.rank + 0.5, dtype=torch.float64))
    right, left = (channel.rank + 1) % channel.size, (channel.rank - 1) % channel.size
    states = [state.clone() for state in channel.all_gather(bare, StateSpec.of(bare), TAG)]
    channel.send(bare, right, TAG)
    pairs = [tuple(part.clone() for part in state) for state in channel.all_gather(pair, StateSpec.of(pair), TAG)]
    rows = channel.all_to_all([torch.tensor([float(channel.rank), float(to)]) for to in range(channel.size)], TAG)
    received = channel.receive(StateSpec.of(bare), left, TAG).clone()
    large = torch.full((5 * 2**18,), float(channel.rank))
    ends = [float(state[-1]) for state in channel.all_gather(large, StateSpec.of(large), TAG)]
    channel.finish()
    return states, pairs, [row.clone() for row in rows], received, ends


@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_is_gathered_is_in_order_of_the_ranks(workers, size):
    for rank, (states, pairs, rows, received, ends) in enumerate(workers(size, gathering)):
        assert ends == list(range(size))
        for other in range(size):
            assert torch.equal(states[other], torch.full((2, 3), float(other), dtype=torch.float64))
            assert torch.equal(pairs[other][0], torch.full((4,), other, dtype=torch.float32))
            assert torch.equal(pairs[other][1], torch.full((2, 2), other + 0.5, dtype=torch.float64))
            assert rows[other].tolist() == [other, rank]
        assert torch.equal(received, torch.full((2, 3), float((rank - 1) % size), dtype=torch.float64))


def test_states_of_odd_lengths_are_gathered(workers):
    for found in workers(3, of_odd_lengths):
        for other, (wide, narrow) in enumerate(found):
            assert torch.equal(wide, torch.full((2, 2), other + 0.5, dtype=torch.float64))
            assert torch.equal(narrow, torch.full((3,), other, dtype=torch.uint8))


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_exchanged(workers, size):
    for rank, found in enumerate(workers(size, exchanging)):
        left, right = (rank - 1) % size, (rank + 1) % size
        assert found == [3 * left, 4 * left + 2, 3 * right, 4 * right + 2]


def broadcasting(channel):
    """Broadcast a state of two tensors from the last worker, then one from the first; what the others give is ignored."""
    pair = (torch.full((3,), channel.rank, dtype=torch.bfloat16), torch.full((2, 2), channel.rank + 0.5, dtype=torch.float64))
    first = channel.broadcast(pair if channel.rank == channel.size - 1 else None, StateSpec.of(pair), channel.size - 1, TAG)
    numbers = torch.tensor([channel.rank, 7])
    second = channel.broadcast(numbers, StateSpec.of(numbers), 0, TAG)
    empty = channel.broadcast(numbers[:0], StateSpec.of(numbers[:0]), 0, TAG)
    channel.finish()
    return [part.tolist() for part in first], second.tolist(), empty.tolist()


@pytest.mark.parametrize("size", [1, 3])
def test_a_broadcast_gives_all_what_its_source_has(workers, size):
    last = float(size - 1)
    assert workers(size, broadcasting) == [([[last] * 3, [[last + 0.5] * 2] * 2], [0, 7], [])] * size


def test_a_source_without_a_state_is_an_error():
    with pytest.raises(ChannelError, match="step 7, forward relaxation, level 1: worker 0 is to broadcast a state, and has none"):
        LocalChannel.alone().broadcast(None, StateSpec.of(torch.zeros(1)), 0, TAG)


def summing(channel):
    """Run several all-reduces at once, and one after them."""
    parts = [torch.full((3,), 10.0**n * (channel.rank + 1)) for n in range(3)]
    begun = [channel.begin_all_reduce(part, TAG.at(f"part {n}", 0)) for n, part in enumerate(parts)]
    sums = [end() for end in begun]
    assert all(found is part for found, part in zip(sums, parts, strict=True))
    return [float(part[-1]) for part in parts], channel.all_reduce(torch.ones(1), TAG).item()


@pytest.mark.parametrize("size", [1, 3])
def test_sums_that_are_begun_and_waited_for_later(workers, size):
    total = size * (size + 1) / 2
    assert workers(size, summing) == [([total, 10 * total, 100 * total], size)] * size


def test_a_message_that_was_not_waited_for_is_an_error_with_both_names():
    for over in (over_gloo, over_mpi):
        phase, dtype, shape = over(2, misunderstandings)[1]
        waits = "worker 1 waits for step 7, forward relaxation, level 1 from worker 0"
        assert phase == f"{waits}, which sent step 7, forward correction, level 0: the schedules differ"
        assert f"{waits}, of (4,) torch.float32 (16 bytes); what came is step 7, forward relaxation, level 1, of another" in dtype
        assert "of another shape or dtype (8 bytes)" in dtype
        assert "of another shape or dtype (16 bytes)" in shape


def lateness(channel):
    """Return whether a state was said to be there before it was sent and after, and what was received; in a new and a known sequence."""
    found, state = [], torch.full((3, 5), 7.0)
    for _ in range(2):
        with channel.prepost_receives("late"):
            if channel.rank == 0:
                before = channel.arrived(StateSpec.of(state), 1)
                channel.send(torch.zeros(1), 1, TAG)
                deadline = time.monotonic() + 20
                while not (after := channel.arrived(StateSpec.of(state), 1)) and time.monotonic() < deadline:
                    time.sleep(0.001)
                found.append((before, after, channel.receive(StateSpec.of(state), 1, TAG).clone(), channel.arrived(StateSpec.of(state), 1)))
                channel.send(torch.zeros(1), 1, TAG)
                channel.receive(StateSpec.of(state), 1, TAG)
            else:
                for _ in range(2):
                    channel.receive(StateSpec.of(torch.zeros(1)), 0, TAG)
                    channel.send(state, 0, TAG)
    channel.finish()
    return found


def test_a_channel_says_what_has_arrived(workers):
    found, _ = workers(2, lateness)
    assert [(before, after, again) for before, after, _, again in found] == [(False, True, False)] * 2
    assert all(torch.equal(state, torch.full((3, 5), 7.0)) for _, _, state, _ in found)


def sequences(channel):
    """Alternate two sequences of other shapes and neighbours; return what each worker received, and how many receives were posted early."""
    received, posted = [], 0
    right, left = (channel.rank + 1) % channel.size, (channel.rank - 1) % channel.size
    for step in range(4):
        for key, sources, size in (("a", (left, left, right), 3), ("b", (right, left), 5)):
            with channel.prepost_receives((key, size)):
                for n, source in enumerate(sources):  # everybody does the same: who sends to me is whom I send to, the other way round
                    destination = right if source == left else left
                    channel.send(torch.full((size,), float(100 * step + 10 * n + channel.rank)), destination, TAG)
                posted += len(getattr(channel, "_posted", ()))
                received += [float(channel.receive(StateSpec.of(torch.zeros(size)), source, TAG)[-1]) for source in sources]
        with channel.prepost_receives(None):  # nothing is known of this one
            channel.send(torch.zeros(step + 1), right, TAG)
            received.append(float(len(channel.receive(StateSpec.of(torch.zeros(step + 1)), left, TAG))))
    channel.finish()
    return received, posted


@pytest.mark.parametrize("size", [2, 3, 4])
def test_preposted_receives_change_no_message(workers, size):
    for rank, (received, posted) in enumerate(workers(size, sequences)):
        right, left = (rank + 1) % size, (rank - 1) % size
        sources = (left, left, right, right, left)
        places = (0, 1, 2, 0, 1)
        expected = []
        for step in range(4):
            expected += [100.0 * step + 10 * n + source for n, source in zip(places, sources, strict=True)] + [step + 1.0]
        assert received == expected
        # From the second time on, in both sequences, the next message of each sender.
        assert posted == (0 if workers is over_threads else 3 * 2 * len({left, right}))


def one_waits_in_vain(channel):
    if channel.rank == 1:
        started = time.monotonic()
        with pytest.raises(ChannelError) as caught:
            channel.receive(StateSpec.of(torch.zeros(2)), 0, TAG)
        return str(caught.value), time.monotonic() - started
    time.sleep(2.5)
    return None


def test_a_receive_has_a_time_limit_and_names_everything(workers):
    message, waited = workers(2, one_waits_in_vain)[1]
    assert "step 7, forward relaxation, level 1: worker 1 received nothing from worker 0: time limit of 1 s passed" in message
    assert 0.9 < waited < 2.4


def one_fails(channel):
    if channel.rank == 0:
        raise KeyError("broken layer")
    channel.receive(StateSpec.of(torch.zeros(2)), 0, TAG)


def test_of_several_failures_the_cause_is_raised():
    with pytest.raises(KeyError, match="broken layer"):
        run_workers(3, one_fails, timeout_s=0.5)


def test_schedules_that_differ_are_noticed():
    def work(channel):
        if channel.rank == 0:
            channel.send(torch.zeros(2), 1, TAG)
        else:
            channel.receive(StateSpec.of(torch.zeros(2)), 0, TAG.at("correction", 0))

    with pytest.raises(ChannelError, match="the schedules differ"):
        run_workers(2, work, timeout_s=1.0)


def one_falls_silent(channel):
    """Stop one process, which makes it as silent as a host that is cut off."""
    if channel.rank == 1:
        subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    threading.Timer(0.5, close_connections_to, [["127.0.0.1"]]).start()
    began = time.monotonic()
    with pytest.raises(ChannelError) as caught:
        channel.receive(StateSpec.of(torch.zeros(2)), 1, TAG)
    return str(caught.value), time.monotonic() - began


def _patient(rank, size, work):
    from rayllp.channel.torch_dist import TorchChannel

    return work(TorchChannel(timeout_s=30.0))


def test_nobody_waits_for_a_host_that_is_known_to_be_gone():
    message, waited = run_processes(2, _patient, one_falls_silent)[0]
    assert "worker 0 received nothing from worker 1: the connection was lost" in message
    assert waited < 5
