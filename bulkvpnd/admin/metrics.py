"""``bulkvpnctl metrics``: the metrics of running instances, as Prometheus reads them."""

import os
import sys

from bulkvpnd import metrics
from bulkvpnd.admin import status


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("instance", nargs="?", metavar="INSTANCE",
                        help="name of the instance, or its runtime directory (default: all)"
                        ).completer = status.instances


def run(arguments):
    """Returns the exit status."""
    try:
        reports, errors = status.ask_all(arguments.instance)
    except status.StatusError as error:
        print(f"bulkvpnctl: {error}", file=sys.stderr)
        return error.status
    for error in errors:
        print(f"bulkvpnctl: {error}", file=sys.stderr)
    sys.stdout.write(metrics.exposition(reports).decode())
    return errors[-1].status if errors else os.EX_OK
