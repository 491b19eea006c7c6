"""``bulkvpnctl doctor``: looks for what usually goes wrong, and says what mends it. Changes nothing."""

import json
import os
import queue
import sys
import threading

import rich.markup

from bulkvpnd import config
from bulkvpnd.admin import checks, files, machine, screen
from bulkvpnd.admin.diagnosis import NOT_CHECKED, PROBLEM, Verdict
from bulkvpnd.admin.errors import CommandError


BEGIN = ("to make a server: bulkvpnctl pki init; a client: bulkvpnctl import FILE, which pki add has made on the "
         "server; or name the configuration with --config")
"""The mend where there is no instance."""


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("instance", nargs="?", metavar="INSTANCE",
                       help="name of the instance, as in bulkvpnd@INSTANCE (default: all in /etc/bulkvpn)"
                       ).completer = instances
    which.add_argument("--config", metavar="FILE", help="configuration of the instance, if it is elsewhere")
    parser.add_argument("--runtime-directory", metavar="DIRECTORY",
                        help="where the running instance has its status socket, if it is elsewhere")
    parser.add_argument("--json", action="store_true", help="print a JSON array with an object for each verdict")


def instances(**_):
    """Names of the instances that have a configuration, running or not, for completion in a shell."""
    return [file.name.removesuffix(".conf") for file in _configurations()]


def _configurations():
    return sorted(config.CONFIGURATION_DIRECTORY.glob("*.conf"))


def run(arguments):
    """Returns the exit status: 0 when there is no problem, 1 when there is one."""
    console = screen.console()
    rows = []
    for file in _files(arguments):
        name = os.path.basename(file).removesuffix(".conf")
        if not arguments.json:
            console.print(f"[bold]{rich.markup.escape(name)}[/bold]")
        flags = ["--runtime-directory", arguments.runtime_directory] if arguments.runtime_directory else []
        for check, verdict in examine(["--config", str(file), *flags], console if not arguments.json else None):
            rows.append({"instance": name, "check": check, "state": verdict.state, "text": verdict.text,
                         "mend": verdict.mend})
            if not arguments.json:
                _show(console, check, verdict)
    problems = sum(row["state"] == PROBLEM for row in rows)
    if arguments.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        console.print(f"{problems or 'no'} problem{'s' if problems != 1 else ''}",
                      style="red" if problems else "green")
    return 1 if problems else os.EX_OK


def _files(arguments):
    if arguments.config:
        return [_readable(arguments.config, "name a file that is there")]
    if arguments.instance:
        if not config.NAME.fullmatch(arguments.instance):
            raise CommandError(f"{arguments.instance}: not the name of an instance; server is the one of "
                               "bulkvpnd@server", os.EX_USAGE)
        there = f"; there is: {', '.join(instances())}" if instances() else ""
        return [_readable(config.CONFIGURATION_DIRECTORY / f"{arguments.instance}.conf", BEGIN + there)]
    with files.about(config.CONFIGURATION_DIRECTORY, "cannot be read", BEGIN):
        os.listdir(config.CONFIGURATION_DIRECTORY)  # the pattern finds nothing in what cannot be read
    found = _configurations()
    if not found:
        raise CommandError(f"{config.CONFIGURATION_DIRECTORY}: has no *.conf; {BEGIN}", os.EX_USAGE)
    return [_readable(file) for file in found]


def _readable(file, missing=""):
    with files.about(file, "cannot be read", missing):
        open(file).close()
    return file


def examine(flags, console=None, make=machine.Machine, table=checks.CHECKS):
    """Yields (name of the check, Verdict), as they come.

    flags: of bulkvpnd, --config FILE. console: for a display of what is looked at, or None. make: configuration ->
    machine. table: of checks.
    """
    try:
        configuration, _ = config.load(flags)
    except config.ConfigurationError as error:
        yield "configuration", Verdict(PROBLEM, str(error), "correct it; man bulkvpn.conf")
        return
    subject = checks.examined(configuration, make(configuration))
    for check in table:
        if check.role not in (None, configuration.mode):
            continue
        if console is not None and console.is_terminal:
            with console.status(f"{check.name} …"):
                verdicts = bounded(check, subject)
        else:
            verdicts = bounded(check, subject)
        for verdict in verdicts:
            yield check.name, verdict


def bounded(check, subject):
    """The Verdicts of a check, within its time and whatever happens in it."""
    answers = queue.SimpleQueue()

    def look():
        try:
            answers.put(list(check.look(subject)))
        except Exception as error:  # one check must not hide the others
            answers.put([Verdict(NOT_CHECKED, f"{type(error).__name__}: {error}")])

    # A look-up of a name cannot be interrupted; such a thread ends with the process.
    threading.Thread(target=look, daemon=True).start()
    try:
        return answers.get(timeout=check.seconds)
    except queue.Empty:
        return [Verdict(NOT_CHECKED, f"no answer within {check.seconds:.0f} s")]


def _show(console, check, verdict):
    colour = screen.COLOURS[verdict.state]
    console.print(screen.Row(f"  [{colour}]{verdict.state:11}[/{colour}] {check:13} ",
                             rich.markup.escape(_line(verdict.text))))
    if verdict.mend:
        # As one line, however long, so that it can be copied.
        console.print(f"{'':14}[bold]{rich.markup.escape(_line(verdict.mend))}[/bold]", soft_wrap=True)


def _line(text):
    """Certificates and servers say part of it."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
