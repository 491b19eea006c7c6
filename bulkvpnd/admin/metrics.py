"""``bulkvpnctl metrics``: the metrics of running instances, as Prometheus reads them."""

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
    reports, code = status.asked(arguments.instance)
    sys.stdout.write(metrics.exposition(reports).decode())
    return code
