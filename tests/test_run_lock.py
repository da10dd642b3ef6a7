"""Locks of run directories: only one driver at a time, who that is, and whether it is still alive."""

import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from rayllp.checkpoint import locate
from rayllp.errors import LockedError, SettingsError
from rayllp.report import RunDirectory
from rayllp.report import run_lock as module
from rayllp.report.run_lock import LOCK_FILE, OWNER_FILE, LockOwner, is_alive, lock_directory, read_owner
from rayllp.training.driver import Driver, train_session
from rayllp.training.prepare import Prepared, open_run, prepare, validate
from rayllp.tuning.trial import apart
from tests.conftest import tiny
from tests.test_patience import Alone


def lock_in_a_process(folder):
    """Start a process that locks a directory until it is killed; return its id. It is forked, since imports would take seconds."""
    there, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with lock_directory(folder, print):
                os.write(tell, b"lock")
                signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(there, 4) == b"lock"
    os.close(there)
    return pid


def silent(text):
    raise AssertionError(f"nothing is to be waited for: {text}")


def wait_until(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def leave_behind(folder, owner):
    """Write the file that a driver leaves behind if it ends suddenly."""
    (folder / OWNER_FILE).write_text(json.dumps(asdict(owner)))


def ended():
    """Return the id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_second_driver_is_refused_and_changes_nothing(tmp_path):
    config = tiny(steps=4)
    run = RunDirectory.create(tmp_path / "run", config)
    first = Prepared(run, config, [], None)
    second = Prepared(run, tiny(steps=8), [], None, before=config)
    with open_run(first, None, None):
        before = (run.path / "config.yaml").read_text()
        with pytest.raises(LockedError, match=rf"run is in use by process {os.getpid()} on .*, since 20"), open_run(second, None, None):
            pass
        with pytest.raises(LockedError, match="run is in use by"):
            prepare(None, resume=run.path)
        assert (run.path / "config.yaml").read_text() == before
        assert not (run.path / "events.jsonl").exists()
    with open_run(second, None, None):
        assert (run.path / "config.yaml").read_text() != before
    assert not (run.path / OWNER_FILE).exists()


@pytest.mark.parametrize("url", [False, True])
def test_two_runs_do_not_write_checkpoints_to_one_place(tmp_path, url):
    place = f"memory://{tmp_path.name}" if url else str(tmp_path / "place")
    locate(place).mkdir()
    config = tiny(checkpoint={"path": place})
    prepared = Prepared(None, config, [], None)
    with open_run(prepared, tmp_path / "one", None) as (_, locks):
        assert [lock.directory for lock in locks] == [tmp_path / "one", locate(place)]
        in_use = rf"{tmp_path.name}.* is in use by process {os.getpid()} on "
        with pytest.raises(LockedError, match=in_use), open_run(prepared, tmp_path / "other", None):
            pass
        assert not (tmp_path / "other").exists()
    with open_run(prepared, tmp_path / "other", None):
        pass
    same = tiny(checkpoint={"path": str(tmp_path / "third")})
    with open_run(Prepared(None, same, [], None), tmp_path / "third", None) as (_, locks):
        assert len(locks) == 1


def test_trials_of_a_sweep_have_places_of_their_own():
    assert apart(tiny(), "a1").checkpoint.path is None
    for place in ("s3://bucket/sweep", "s3://bucket/sweep/"):
        assert apart(tiny(checkpoint={"path": place}), "a1").checkpoint.path == "s3://bucket/sweep/a1"


def test_an_owner_behind_a_url_lives_while_it_writes(tmp_path, monkeypatch):
    """The file is rewritten for each sign of life, for which another machine waits."""
    monkeypatch.setattr(module, "SILENT_S", 0.5)
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    place, said = locate(f"memory://{tmp_path.name}"), []
    place.mkdir()
    with lock_directory(place, silent) as lock:
        lock.me = replace(lock.me, machine="another boot", pid=1)
        wait_until(lambda: read_owner(place)[0].machine == "another boot")
        with pytest.raises(LockedError, match="process 1 on"), lock_directory(place, said.append):
            pass
        (place / OWNER_FILE).write_text(json.dumps(asdict(LockOwner())))  # of one that began in the same moment
        wait_until(lambda: lock._taken_by is not None)
        with pytest.raises(LockedError, match="was taken over"):
            lock.check()
    (place / OWNER_FILE).write_text(json.dumps(asdict(LockOwner(machine="another boot"))))
    with lock_directory(place, said.append):  # it gives no sign of life
        pass
    assert len(said) == 2
    assert not (place / OWNER_FILE).exists()


def test_a_run_that_never_began_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_run(Prepared(None, tiny(), [], None), tmp_path / "run", None):
        raise KeyboardInterrupt
    assert not (tmp_path / "run").exists()


def test_a_driver_that_was_killed_locks_nothing(tmp_path):
    pid = lock_in_a_process(tmp_path)
    try:
        with pytest.raises(LockedError, match=f"process {pid} "), lock_directory(tmp_path, silent):
            pass
        os.kill(pid, signal.SIGSTOP)  # a suspended laptop is not gone
        with pytest.raises(LockedError), lock_directory(tmp_path, silent):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert read_owner(tmp_path)[0].pid == pid
    with lock_directory(tmp_path, silent):
        assert read_owner(tmp_path)[0].pid == os.getpid()


@pytest.mark.parametrize("locked", [True, False])
def test_where_there_are_no_locks_the_process_counts(tmp_path, locked):
    for pid, there in ((ended(), False), (os.getpid(), not locked)):
        leave_behind(tmp_path, LockOwner(pid=pid))
        assert is_alive(tmp_path, read_owner(tmp_path), locked=locked, say=silent) is there


def test_an_owner_on_another_machine_lives_while_it_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SILENT_S", 0.5)
    other = LockOwner(host="elsewhere", machine="another boot", pid=1)
    leave_behind(tmp_path, other)
    said, over = [], threading.Event()

    def beat():
        while not over.wait(0.05):
            os.utime(tmp_path / OWNER_FILE)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(LockedError, match="process 1 on elsewhere"), lock_directory(tmp_path, said.append):
            pass
    finally:
        over.set()
        heart.join()
    assert "waiting up to 0.5 s for a sign of life" in said[0]
    started = time.monotonic()
    with lock_directory(tmp_path, said.append):  # it is silent now
        assert 0.3 < time.monotonic() - started < 5
    leave_behind(tmp_path, other)
    os.utime(tmp_path / OWNER_FILE, (0, 0))
    with lock_directory(tmp_path, silent):  # and has been for long
        pass


def test_who_was_taken_for_gone_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    with lock_directory(tmp_path, silent) as lock:
        lock.check()
        first = read_owner(tmp_path)[1]
        deadline = time.monotonic() + 5
        while read_owner(tmp_path)[1] == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert read_owner(tmp_path)[1] > first
        other = replace(LockOwner(), host="elsewhere", token="another")
        (tmp_path / "new").write_text(json.dumps(asdict(other)))
        os.replace(tmp_path / "new", tmp_path / OWNER_FILE)
        lock._heart.join(5)
        with pytest.raises(LockedError, match=r"was taken over by process .* on elsewhere"):
            lock.check()
    assert read_owner(tmp_path)[0].token == "another"  # which is the other's to remove


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    (tmp_path / OWNER_FILE).mkdir()
    with pytest.raises(SettingsError, match="cannot be written"), lock_directory(tmp_path, silent):
        pass


def test_a_run_that_was_taken_over_writes_nothing_more(tmp_path):
    config = tiny(steps=4, checkpoint={"every": 2})
    run = RunDirectory.create(tmp_path / "run", config)
    with lock_directory(run.path, silent) as lock:

        class TakenOver(Driver):
            def _next_chunk(self, step):
                (run.path / OWNER_FILE).write_text(json.dumps(asdict(LockOwner(token="another"))))
                lock._look()
                return super()._next_chunk(step)

        with pytest.raises(LockedError, match="was taken over by process"):
            train_session(config, run, Alone(config), validate(config), console=Console(quiet=True), locks=[lock], make_driver=TakenOver)
    assert not (run.path / "metrics.jsonl").exists()
    assert not list(run.checkpoints.glob("*"))
