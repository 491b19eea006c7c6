"""``bulkvpnctl top``: the sessions of running instances, live."""

import collections

import rich.console

from bulkvpnd.admin import screen, status

PERIOD = 1.0
"""Seconds between two looks; the daemon's rates are those of the last second."""


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("instance", nargs="?", metavar="INSTANCE",
                        help="name of the instance, or its runtime directory (default: all)"
                        ).completer = status.instances
    parser.add_argument("--once", action="store_true", help="show it once and end")


class History:
    """Rates of the last looks of each session: {(instance, identity, "in" or "out"): rates}."""

    def __init__(self, length=screen.SPARK_WIDTH):
        self._length = length
        self.rates = {}

    def add(self, reports):
        """Takes one look; who is not in it any more is forgotten."""
        now = {}
        for report in reports:
            for session in report["sessions"]:
                for way in ("in", "out"):
                    key = report["instance"], session["identity"], way
                    rates = self.rates.get(key, collections.deque(maxlen=self._length))
                    rates.append(session.get(f"rate_{way}", 0))
                    now[key] = rates
        self.rates = now


def run(arguments):
    """Returns the exit status."""
    console = screen.console()
    history = History()

    def shown(reports):
        history.add(reports)
        return rich.console.Group(screen.summaries(reports), screen.sessions(reports, history.rates, console.width))

    def look():
        reports, errors = status.ask_all(arguments.instance)
        return screen.over(errors, shown(reports))

    if not arguments.once:
        screen.show_again(console, look, PERIOD)
    reports, exit_status = status.asked(arguments.instance)
    console.print(shown(reports))
    return exit_status
