"""How a run ends when it is asked to: by Ctrl-C, SIGTERM or a closed terminal."""

import os
import pty
import signal

import pytest
import typer

from rayllp.cli import FAILED, REFUSED, _stoppable, exit_code
from rayllp.errors import CheckpointError, ClusterError, DataError, LockedError, NonFiniteError, NotARunError, SettingsError
from rayllp.training import interrupt
from rayllp.training.interrupt import ASKING, Stopped, interrupting, stopping


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = [signal.getsignal(number) for number in ASKING]
    yield
    assert [signal.getsignal(number) for number in ASKING] == before


@pytest.mark.parametrize("number", ASKING)
def test_the_first_signal_asks_and_a_later_one_ends(monkeypatch, number):
    asked = []
    with pytest.raises(Stopped) as raised, stopping(lambda: asked.append(number)) as state:  # noqa: PT012
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # of a job manager that sends several: the same wish
        assert (asked, state.number) == ([number], number)
        monkeypatch.setattr(interrupt, "AGAIN_S", 0.0)
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.exit_code == 128 + signal.SIGTERM
    assert asked == [number]


@pytest.mark.parametrize("number", ASKING)
def test_what_can_be_given_up_is_given_up_at_once(number):
    with pytest.raises(Stopped) as raised, stopping():
        signal.raise_signal(number)
    assert raised.value.exit_code == 128 + number
    asked = []
    with stopping(lambda: asked.append(1)) as state:
        with pytest.raises(Stopped), state.at_once():
            signal.raise_signal(number)
        with pytest.raises(Stopped), state.at_once():  # asked before
            raise AssertionError("not to be begun")
    assert not asked


def test_a_plain_interrupt_of_rays_keeps_the_signals_number():
    with pytest.raises(Stopped) as raised, stopping(), stopping() as inner:  # noqa: PT012  # a driver's, within that of its start
        inner.number = signal.SIGTERM
        raise KeyboardInterrupt
    assert raised.value.number == signal.SIGTERM


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_is_left_so_that_writing_does_not_fail():
    ours, theirs = pty.openpty()
    kept = os.dup(2)
    os.dup2(theirs, 2)
    os.close(theirs)
    try:
        with stopping(lambda: None):
            os.close(ours)
            with pytest.raises(OSError, match="Input/output"):
                os.write(2, b"to nobody")
            signal.raise_signal(signal.SIGHUP)
            assert os.write(2, b"to nobody") == 9
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@pytest.mark.parametrize("number", ASKING)
def test_a_sweep_is_interrupted_by_any_of_them(number):
    def tune(heed):
        """Do as Ray Tune does: install a handler of SIGINT, restore the old one at the first signal, and return."""
        original = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, lambda number, frame: signal.signal(signal.SIGINT, original))
        if heed:
            signal.raise_signal(number)

    for heed in (False, True):
        with interrupting() as found:
            tune(heed)
            assert found() == (number if heed else None)
    with pytest.raises(Stopped) as raised, interrupting():
        signal.raise_signal(number)
    assert raised.value.number == number


def test_exit_codes_say_what_happened(capsys):
    refused = (SettingsError("x"), DataError("x"), LockedError("x"), NotARunError("x"))
    failed = (ClusterError("x"), NonFiniteError("x"), CheckpointError("x"))
    assert [exit_code(error) for error in (*refused, *failed)] == [REFUSED] * 4 + [FAILED] * 3
    with pytest.raises(typer.Exit) as raised, _stoppable("nothing was done"):
        raise Stopped(signal.SIGHUP)
    assert raised.value.exit_code == 129
    assert "stopped by SIGHUP: nothing was done" in capsys.readouterr().err
