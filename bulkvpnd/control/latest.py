"""A file that holds the latest of many states, written so that nobody waits for the disk.

    save --> text made --> thread pool: write, fsync, rename, fsync of the directory --> the next, if one came meanwhile
"""

import logging
import os

import gevent

log = logging.getLogger(__name__)

FLUSH_TIME = 2.0
"""Seconds that a stop waits for a disk (choice)."""


class LatestFile:
    """path: of the file. what: its content, for the log.

    A disk that takes nothing costs what the file remembers, and is said at a limited rate; it is never an error.
    """

    def __init__(self, path, what):
        self._path = path
        self._what = what
        self._make_text = None  # of the state that is still to be written
        self._greenlet = None

    def save(self, make_text):
        """Has the text that make_text() then returns written soon. States that came in between are never written."""
        self._make_text = make_text
        if not self._greenlet:
            self._greenlet = gevent.spawn(self._write_all)

    def _write_all(self):
        while self._make_text:
            text, self._make_text = self._make_text(), None
            failure = gevent.get_hub().threadpool.apply(write_whole, (self._path, text))
            if failure:
                log.warning("%s: %s cannot be written: %s", self._path, self._what, failure.strerror)

    def flush(self, seconds=FLUSH_TIME):
        """Waits until all is written, at most so long."""
        gevent.joinall([self._greenlet] if self._greenlet else [], timeout=seconds)


def write_whole(path, text):
    """Writes a file so that a reader, or a power cut, finds the old one or the new one. Returns the OSError, if any.

    It runs in a thread, where nothing of gevent may be touched, the log included.
    """
    temporary = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with temporary.open("w", encoding="ascii") as stream:
            stream.write(text)
            stream.flush()
            # What is renamed must be there: rename(2) alone may leave an empty file after a power cut.
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        return error
    return None
