"""``bulkvpnctl disconnect``: ends the sessions of a client."""

import os

from bulkvpnd.admin import status


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("name", metavar="NAME", help="identity of the client, the name in its certificate"
                        ).completer = status.identities
    parser.add_argument("instance", nargs="?", metavar="INSTANCE",
                        help="name of the server's instance, or its runtime directory (default: the only one)"
                        ).completer = status.instances


def run(arguments):
    """Returns the exit status."""
    instance, answer = status.order(arguments.instance, "disconnect", identity=arguments.name)
    print(f"{instance}: {arguments.name}: {answer['ended']} session{'s' if answer['ended'] != 1 else ''} ended")
    return os.EX_OK
