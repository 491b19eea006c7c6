"""Locks between processes, which the kernel gives up with the process that has them: flock(2)."""

import fcntl
import os
import pathlib

LOCKS = pathlib.Path("/proc/locks")
"""proc(5): a line for each lock, with its kind, the process and DEVICE:INODE."""


def take(descriptor):
    """Takes the exclusive lock of an open file if it is free. Returns whether it did."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(descriptor):
    """The id of the process that took the lock of an open file, None if that is not known."""
    status = os.fstat(descriptor)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = [line.split() for line in LOCKS.read_text().splitlines()]
    except OSError:
        return None
    # Behind "->" stand those that wait. Of a process of another pid namespace the kernel gives 0.
    found = [int(pid) for _, kind, _, _, pid, where, *_ in lines if (kind, where) == ("FLOCK", place)]
    return found[0] or None if found else None
