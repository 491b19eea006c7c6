"""control.latest with real files: the latest state wins, nobody waits, and no reader sees half a file."""

import logging
import os
import stat
import threading

import gevent
import pytest
from doubles import until

from bulkvpnd.control import latest
from bulkvpnd.control.latest import LatestFile, write_whole


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "file.json"


@pytest.fixture
def slow(monkeypatch):
    """A disk that writes only when it is let. Returns (event that lets one write go, texts that were written)."""
    go, written = threading.Semaphore(0), []

    def write(path, text):
        go.acquire()
        written.append((text, threading.get_ident()))

    monkeypatch.setattr(latest, "write_whole", write)
    return go, written


def test_what_is_saved_is_in_the_file(path):
    file = LatestFile(path, "things")
    file.flush()
    assert not path.exists()
    file.save(lambda: "one")
    file.flush()
    assert path.read_text() == "one"
    file.save(lambda: "two")
    file.flush()
    assert path.read_text() == "two"
    assert [one.name for one in path.parent.iterdir()] == ["file.json"]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_states_in_between_are_not_written_and_the_loop_goes_on(path, slow):
    go, written = slow
    file = LatestFile(path, "things")
    state = []
    for number in range(100):
        state.append(number)
        file.save(lambda: str(len(state)))
        if number == 49:
            gevent.sleep(0.01)  # the first write begins, and waits for the disk
    ticks = []
    ticker = gevent.spawn(lambda: [ticks.append(gevent.sleep(0.001)) for _ in range(5)])
    ticker.join(5)
    assert len(ticks) == 5 and not written
    go.release()
    go.release()
    file.flush(5)
    assert [text for text, _ in written] == ["50", "100"]
    assert threading.get_ident() not in {thread for _, thread in written}


def test_a_stop_does_not_wait_for_ever(path, slow):
    go, written = slow
    file = LatestFile(path, "things")
    file.save(lambda: "one")
    with gevent.Timeout(5):
        file.flush(0.05)
    assert not written
    go.release()
    until(lambda: written)


def test_a_disk_that_takes_nothing_is_said_and_tried_again(path, caplog):
    path.parent.write_text("no directory")
    file = LatestFile(path, "things")
    file.save(lambda: "one")
    file.flush()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{path}: things cannot be written: ")
    path.parent.unlink()
    file.save(lambda: "two")
    file.flush()
    assert path.read_text() == "two"


def test_a_full_disk_leaves_the_old_file_whole(path):
    assert write_whole(path, "old") is None
    os.symlink("/dev/full", path.with_suffix(".new"))
    assert write_whole(path, "new").strerror == "No space left on device"
    assert path.read_text() == "old"
