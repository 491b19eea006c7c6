"""Locks between processes, which the kernel gives up with the process that has them: flock(2)."""

import fcntl


def take(descriptor):
    """Takes the exclusive lock of an open file if it is free. Returns whether it did."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
