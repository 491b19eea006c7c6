"""``bulkvpnctl import``: a client's configuration, as `pki add` printed it, becomes /etc/bulkvpn/NAME.conf.

    file or standard input, as text or as one line --> checked as the daemon would --> written, mode 0600 --> systemctl

The mode of the file that it comes from does not matter, since what counts is the copy; what is refused is not written.
A configuration may come from anybody, so one that starts programs is refused unless that is wanted.
"""

import contextlib
import datetime
import os
import pathlib
import re
import subprocess
import sys

from bulkvpnd import config, pki
from bulkvpnd.admin import files, oneline
from bulkvpnd.admin.errors import CommandError
from bulkvpnd.admin.pki import DIRECTORY, argument

INLINE = ("ca", "certificate", "key")


def instance_name(raw):
    """What is both the name of a unit's instance and of a file that no pattern overlooks."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", raw):
        raise ValueError("1 to 64 letters, digits, dots, underscores and hyphens, beginning with a letter or a digit")
    return raw


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("file", metavar="FILE", type=pathlib.Path,
                        help="what bulkvpnctl pki add printed, as a file or as one line; - is standard input")
    parser.add_argument("--name", metavar="NAME", type=argument(instance_name), default="client",
                        help="name of the instance: bulkvpnd@NAME runs it (default client)")
    parser.add_argument("--start", action="store_true", help="start it, now and at every boot")
    parser.add_argument("--force", action="store_true", help="take the place of a configuration of that name")
    parser.add_argument("--allow-hooks", action="store_true", help="take it even if it has programs started")
    flag, settings = DIRECTORY
    parser.add_argument(flag, **{**settings, "help": f"where to write (default {config.CONFIGURATION_DIRECTORY})"})


def run(arguments):
    """Returns the exit status."""
    is_elsewhere = arguments.directory != config.CONFIGURATION_DIRECTORY
    if is_elsewhere and arguments.start:
        raise CommandError(f"--start: the unit reads {config.CONFIGURATION_DIRECTORY} only; leave out --directory, or "
                           "--start", os.EX_USAGE)
    text = checked(arguments.file, files.read_any(arguments.file), arguments.allow_hooks)
    file = arguments.directory / f"{arguments.name}.conf"
    with contextlib.ExitStack() as undo:
        files.make_directory(arguments.directory, 0o755, undo)
        is_new = not os.path.lexists(file)
        if is_new:
            files.create(file, text, 0o600)
        elif not arguments.force:
            raise CommandError(f"{file}: exists already; choose another --name, or replace it with --force")
        else:
            files.replace(file, text, 0o600)
        undo.pop_all()
    unit = f"bulkvpnd@{arguments.name}"
    # One that runs already would go on with what it has read.
    commands = [["enable", "--now", unit]] if is_new else [["enable", unit], ["restart", unit]]
    print(f"{file}: {'made' if is_new else 'replaced'}")
    if is_elsewhere:
        print(f"Start it with:\n    bulkvpnd --config {file}")
        return os.EX_OK
    if not arguments.start:
        print("Start it, now and at every boot, with:")
        print("".join(f"    systemctl {' '.join(command)}\n" for command in commands), end="")
        return os.EX_OK
    sys.stdout.flush()
    for command in commands:
        _systemctl(command)
    return os.EX_OK


def checked(file, text, allow_hooks=False):
    """The text of a client's configuration, from its one line if it is one, after the checks of the daemon's start.

    file: path, for messages. allow_hooks: whether it may have programs started. Raises ConfigurationError,
    CommandError.
    """
    if oneline.is_line(text):
        try:
            text = oneline.decode(text)
        except ValueError as error:
            raise CommandError(f"{file}: should be {error}") from None
    configuration, _ = config.load(["--config", str(file)], text)
    if configuration.mode != "client":
        raise CommandError(f"{file}: mode = {configuration.mode}: is not a client's; a server's configuration is "
                           "made where it runs, with: bulkvpnctl pki init")
    for name in INLINE:
        path, _ = getattr(configuration, name)
        if path:
            raise CommandError(f"{file}: {name} = {config.escaped(str(path))}: should be the PEM text itself, "
                               f"between <{name}> and </{name}>")
    if not allow_hooks:
        _check_hooks(file, text)
    now = datetime.datetime.now(datetime.timezone.utc)
    try:
        pki.check_own(*(config.pem_text(configuration, name) for name in INLINE), "client", now)
    except pki.PKIError as error:
        raise CommandError(f"{file}: {error}") from None
    return text


def _check_hooks(file, text):
    items, lines = config.read_items(file, text)
    for name, value in items.items():
        if config.BY_NAME[name].group == "Hooks":
            raise CommandError(f"{file}:{lines[name][0]}: {name} = {config.escaped(value)}: would start a "
                               "program here; take it out, or allow it with --allow-hooks")


def _systemctl(command):
    shown = f"systemctl {' '.join(command)}"
    try:
        status = subprocess.run(["systemctl", *command], stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        raise CommandError(f"{shown}: cannot be run: {error.strerror}; without systemd, run: bulkvpnd --config "
                           "FILE") from None
    if status:
        raise CommandError(f"{shown}: failed with status {status}; the reason is in: "
                           f"journalctl -u {command[-1]}")
