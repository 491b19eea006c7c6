"""``bulkvpnctl status``: what running instances say of themselves."""

import json
import os
import pathlib
import socket
import sys
import time

import rich.box
import rich.console
import rich.markup
import rich.table

from bulkvpnd import config

RUNTIME_DIRECTORY = pathlib.Path("/run/bulkvpnd")
SOCKET_NAME = "status.sock"
TIMEOUT = 5.0
"""Seconds that an instance may take to answer."""


class StatusError(Exception):
    """An instance that cannot be asked. message: one line. status: of exit."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("instance", nargs="?", metavar="INSTANCE",
                        help="name of the instance, as in bulkvpnd@INSTANCE, or its runtime directory (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON array with an object for each instance")


def run(arguments):
    """Returns the exit status."""
    reports, status = [], os.EX_OK
    try:
        for path in sockets(arguments.instance):
            try:
                reports.append(ask(path))
            except StatusError as error:
                # One instance that does not answer must not hide the others.
                print(f"bulkvpnctl: {error}", file=sys.stderr)
                status = error.status
    except StatusError as error:
        print(f"bulkvpnctl: {error}", file=sys.stderr)
        return error.status
    if arguments.json:
        json.dump(reports, sys.stdout, indent=2)
        print()
    else:
        # Without a terminal nothing is to be wrapped or cut at 80 columns.
        show(reports, rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 200))
    return status


def sockets(instance):
    if instance is None:
        try:
            found = sorted(RUNTIME_DIRECTORY.glob(f"*/{SOCKET_NAME}"))
        except PermissionError:
            found = []
        if not found:
            raise StatusError("no instance is running; start one with: systemctl start bulkvpnd@NAME")
        return found
    if "/" in instance:
        return [pathlib.Path(instance) / SOCKET_NAME]
    if not config.NAME.fullmatch(instance):
        raise StatusError(f"{instance!a}: not the name of an instance", os.EX_USAGE)
    return [RUNTIME_DIRECTORY / instance / SOCKET_NAME]


def ask(path):
    """The report of the instance whose status socket is `path`, an object. Raises StatusError."""
    name = path.parent.name
    try:
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as stream:
            sock.settimeout(TIMEOUT)
            sock.connect(str(path))
            sock.sendall(b'{"command": "status"}\n')
            report = json.loads(stream.readline())
    except PermissionError:
        raise StatusError(f"{path}: permission denied; run it as root", os.EX_NOPERM) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise StatusError(f"instance {name} is not running; start it with: systemctl start bulkvpnd@{name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StatusError(f"instance {name} does not answer: {error or 'no reply'}") from None
    if not isinstance(report, dict) or "instance" not in report:
        raise StatusError(f"instance {name} does not know the command; restart it after an upgrade")
    return report


def show(reports, console):
    """Prints reports on a rich Console."""
    for number, report in enumerate(reports):
        if number:
            console.print()
        _show_instance(report, console)


def _show_instance(report, console):
    escape = rich.markup.escape
    sessions = report["sessions"]
    workers = report["workers"]
    alive = sum(worker["alive"] for worker in workers)
    console.print(f"[bold]{escape(report['instance'])}[/bold]  {report['mode']}, "
                  f"up {_span(time.time() - report['since'])}, process {report['pid']}")
    console.print(f"  device   {escape(report['device'])} {' '.join(report['addresses']) or 'no address yet'}")
    console.print(f"  offload  {' '.join(report['offload']) or '[yellow]none[/yellow]'}")
    style = "" if alive == len(workers) else "[red]"
    console.print(f"  workers  {style}{alive} of {len(workers)} alive, "
                  f"{sum(worker['restarts'] for worker in workers)} restarts")
    console.print("  drops    " + (", ".join(f"{cause} {count}" for cause, count in report["drops"].items() if count)
                                   or "none"))
    if "listener" in report:
        counts = dict(report["listener"])
        console.print(f"  accept   {counts.pop('handshakes')} now, "
                      + ", ".join(f"{cause.replace('_', ' ')} {count}" for cause, count in counts.items()))
    if not sessions:
        console.print("  [yellow]no session[/yellow]" if report["mode"] == "client" else "  no session")
    for session in sessions:
        console.print(f"\n  [bold]{session['identity']}[/bold]  {' '.join(session['addresses'])}  {session['cipher']}"
                      f"{'' if session['offload'] else '  [yellow]peer without offload[/yellow]'}")
        console.print(_connections(session["connections"]))


_COLUMNS = (
    # heading, how a connection shows it
    ("connection", lambda one: str(one["index"])),
    ("worker", lambda one: str(one["worker"])),
    ("peer", lambda one: one["peer"]),
    ("age", lambda one: _span(one.get("age", 0))),
    ("rtt", lambda one: f"{one['rtt_ms']:.1f} ms" if one.get("rtt_ms") is not None else "-"),
    ("out", lambda one: _bytes(one.get("bytes_out", 0))),
    ("in", lambda one: _bytes(one.get("bytes_in", 0))),
    ("packets out", lambda one: f"{one.get('segments_out', 0):,}"),
    ("packets in", lambda one: f"{one.get('segments_in', 0):,}"),
    ("frames out", lambda one: f"{one.get('frames_out', 0):,}"),
    ("frames in", lambda one: f"{one.get('frames_in', 0):,}"),
    ("queue", lambda one: _bytes(one.get("queued", 0))),
)


def _connections(connections):
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading, _ in _COLUMNS:
        table.add_column(heading, justify="left" if heading == "peer" else "right", no_wrap=True)
    for connection in connections:
        table.add_row(*(rich.markup.escape(show_one(connection)) for _, show_one in _COLUMNS))
    return table


def _span(seconds):
    """Seconds as the two largest units: 3d 4h, 5m 6s."""
    seconds = int(seconds)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if seconds >= size or (unit == "s" and not parts):
            parts.append(f"{seconds // size}{unit}")
            seconds %= size
    return " ".join(parts[:2])


def _bytes(count):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
