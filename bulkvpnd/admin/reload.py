"""``bulkvpnctl reload``: a changed configuration comes into force, as far as that takes no restart.

The daemon has no access to its file under systemd, so the text of it is brought over the status socket. It is checked
here, where a mistake is told to whoever made it, and again by the daemon, which also has its flags.
"""

import os
import pathlib

from bulkvpnd import config
from bulkvpnd.admin import status


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("instance", metavar="INSTANCE", help="name of the instance, or its runtime directory"
                        ).completer = status.instances
    parser.add_argument("--config", metavar="FILE", help="its configuration (default: /etc/bulkvpn/INSTANCE.conf)")


def run(arguments):
    """Returns the exit status."""
    file = arguments.config or str(config.CONFIGURATION_DIRECTORY / f"{pathlib.Path(arguments.instance).name}.conf")
    # Not systemd's copy, which the environment of a unit's command may name.
    text = config.read_secret_file(pathlib.Path(file), original=True)
    config.load(["--config", file], text)
    name, answer = status.order(arguments.instance, "reload", text=text)
    for line in shown(name, answer):
        print(line)
    return os.EX_OK


def shown(name, answer):
    """What an instance did of a reload, as lines."""
    by_time = {}
    for option, when in answer["live"].items():
        by_time.setdefault(when, []).append(option)
    yield from (f"{name}: {', '.join(options)}: in force for {when}" if when != config.NOW
                else f"{name}: {', '.join(options)}: in force" for when, options in by_time.items())
    if answer["restart"]:
        yield f"{name}: {', '.join(answer['restart'])}: needs a restart: systemctl restart bulkvpnd@{name}"
    if not answer["live"] and not answer["restart"]:
        yield f"{name}: nothing has changed"
