"""Other programs, which do what the kernel does not."""

import os
import subprocess

TIMEOUT, UNDO_TIMEOUT = 10, 2
"""Seconds that one may take to do something and to take it back (choice: less than a stop has)."""
NO_ANSWER = "no answer"


def run(command, timeout, text=""):
    """Runs a program with `text` as its standard input. Returns None, or the first line of what it complained about.

    command: argument vector; no shell sees it. timeout: seconds.
    """
    # Not the whole environment: in English it can be told what was said, and resolvectl would tell $NOTIFY_SOCKET of
    # its failure, which systemd takes from the main process only. What is written for the machine everybody may read.
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, errors="replace", timeout=timeout,
                              umask=0o022, env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"})
    except subprocess.TimeoutExpired:
        return f"{NO_ANSWER} within {timeout} s"
    except OSError as error:
        return error.strerror
    if done.returncode == 0:
        return None
    said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0].rstrip(".")
    return said.encode("unicode_escape").decode("ascii")[:200]
