"""``bulkvpnctl drain``: a server accepts no new sessions, so that it can be stopped when the last has gone."""

import os
import time

from bulkvpnd.admin import status

PERIOD = 1.0
"""Seconds between two looks (choice)."""


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("instance", nargs="?", metavar="INSTANCE",
                        help="name of the server's instance, or its runtime directory (default: the only one)"
                        ).completer = status.instances
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--wait", action="store_true", help="wait until no session is left")
    how.add_argument("--off", action="store_true", help="accept new sessions again")


def run(arguments):
    """Returns the exit status."""
    before = None
    while True:
        name, answer = status.order(arguments.instance, "drain", off=arguments.off)
        if answer["sessions"] != before:
            before = answer["sessions"]
            how = "accepts no new sessions" if answer["draining"] else "accepts new sessions"
            what = "left" if answer["draining"] else "there"
            print(f"{name}: {how}; {before} {'is' if before == 1 else 'are'} {what}", flush=True)
        if not arguments.wait or not before:
            return os.EX_OK
        time.sleep(PERIOD)
