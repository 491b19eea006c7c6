"""``bulkvpnctl status``: what running instances say of themselves."""

import argparse
import contextlib
import json
import os
import pathlib
import socket
import sys

from bulkvpnd import config
from bulkvpnd.admin import screen
from bulkvpnd.admin.diagnosis import journal
from bulkvpnd.admin.errors import CommandError

RUNTIME_DIRECTORY = pathlib.Path("/run/bulkvpnd")
SOCKET_NAME = "status.sock"
TIMEOUT = 5.0
"""Seconds that an instance may take to answer."""


class StatusError(CommandError):
    """An instance that cannot be asked. what: one line, or its beginning. mend: what follows it. status: of exit."""

    def __init__(self, what, status=1, mend=None):
        super().__init__(f"{what}; {mend}" if mend else what, status)
        self.what = what


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("instance", nargs="?", metavar="INSTANCE",
                        help="name of the instance, as in bulkvpnd@INSTANCE, or its runtime directory (default: all)"
                        ).completer = instances
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON array with an object for each instance")
    how.add_argument("--watch", nargs="?", type=_seconds, const=2.0, metavar="SECONDS",
                     help="show it again every so many seconds (default 2) until Ctrl-C")


def instances(**_):
    """Names of the instances that run, for completion in a shell."""
    return sorted(path.parent.name for path in RUNTIME_DIRECTORY.glob(f"*/{SOCKET_NAME}"))


def identities(**_):
    """Names of the clients that are here, for completion in a shell."""
    try:
        reports, _errors = ask_all(None)
    except StatusError:
        return []
    return sorted({session["identity"] for report in reports for session in report["sessions"]})


def _seconds(raw):
    try:
        value = float(raw)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("a number of seconds from 0.1 to 3600")
    return value


def run(arguments):
    """Returns the exit status."""
    console = screen.console()
    if arguments.watch:
        return _watch(arguments, console)
    reports, status = asked(arguments.instance)
    if arguments.json:
        json.dump(reports, sys.stdout, indent=2)
        print()
    else:
        console.print(screen.instances(reports, console.width))
    return status


def _watch(arguments, console):
    """Until Ctrl-C, or until there is nobody to ask, which raises StatusError."""

    def look():
        reports, errors = ask_all(arguments.instance)
        return screen.over(errors, screen.instances(reports, console.width))

    screen.show_again(console, look, arguments.watch)


def asked(instance):
    """(reports as of ask_all, exit status); those that did not answer are said on standard error."""
    reports, errors = ask_all(instance)
    for error in errors:
        print(f"bulkvpnctl: {error}", file=sys.stderr)
    return reports, errors[-1].status if errors else os.EX_OK


def ask_all(instance):
    """The reports of one instance, or of all with None: (reports, StatusErrors of those that did not answer).

    Raises StatusError when there is none to ask.
    """
    reports, errors = [], []
    for path in _sockets(instance):
        try:
            reports.append(ask(path))
        except StatusError as error:
            # One instance that does not answer must not hide the others.
            errors.append(error)
    return reports, errors


def _sockets(instance):
    if instance is None:
        try:
            found = sorted(RUNTIME_DIRECTORY.glob(f"*/{SOCKET_NAME}"))
        except PermissionError:
            found = []
        if not found:
            raise StatusError("no instance is running; bulkvpnctl doctor says why one does not, systemctl start "
                              "bulkvpnd@NAME starts it")
        return found
    if "/" in instance:
        return [pathlib.Path(instance) / SOCKET_NAME]
    if not config.NAME.fullmatch(instance):
        raise StatusError(f"{instance!a}: not the name of an instance; server is the one of bulkvpnd@server",
                          os.EX_USAGE)
    return [RUNTIME_DIRECTORY / instance / SOCKET_NAME]


def ask(path, seconds=TIMEOUT):
    """The report of the instance whose status socket is `path`, an object. seconds: it may take. Raises StatusError."""
    report = exchange(path, {"command": "status"}, seconds)
    if "instance" not in report:
        raise StatusError(f"instance {path.parent.name} does not know the command; restart it after an upgrade")
    return report


def order(instance, command, **request):
    """Has an instance do something, that with this name or, with None, the only one.

    Returns (its name, what it answers). Raises StatusError.
    """
    path = _only_socket(instance)
    report = exchange(path, {"command": command, **request})
    if "error" in report:
        raise StatusError(f"{path.parent.name}: {report['error']}", report.get("status", 1))
    return path.parent.name, report


def _only_socket(instance):
    found = _sockets(instance)
    if len(found) > 1:
        names = ", ".join(path.parent.name for path in found)
        raise StatusError(f"several instances run here: {names}; name one of them", os.EX_USAGE)
    return found[0]


def exchange(path, request, seconds=TIMEOUT):
    """One request to a status socket, and the object that answers it. Raises StatusError."""
    name = path.parent.name
    try:
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as stream:
            sock.settimeout(seconds)
            sock.connect(str(path))
            # A socket without a place for it answers and hangs up at once.
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(json.dumps(request, ensure_ascii=False).encode() + b"\n")
            report = json.loads(stream.readline())
    except PermissionError:
        raise StatusError(f"{path}: permission denied; run it as root", os.EX_NOPERM) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise StatusError(f"instance {name} is not running",
                          mend=f"start it with: systemctl start bulkvpnd@{name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StatusError(f"instance {name} does not answer: {error or 'no reply'}",
                          mend=f"see: {journal(name)}") from None
    if not isinstance(report, dict):
        raise StatusError(f"instance {name} does not answer with an object; restart it after an upgrade")
    return report
