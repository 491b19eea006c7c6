"""How reports of instances look on a terminal. Nothing here asks an instance; `status` and `top` do."""

import dataclasses
import ipaddress
import sys
import time
from collections.abc import Callable

import rich.box
import rich.console
import rich.live
import rich.markup
import rich.table
import rich.text

from bulkvpnd.admin.diagnosis import FINE, NOT_CHECKED, NOTE, PROBLEM, Verdict, verdicts

COLOURS = {FINE: "green", NOTE: "yellow", PROBLEM: "red", NOT_CHECKED: "dim"}
"""Of what is found about an instance."""
_SPARKS = " ▁▂▃▄▅▆▇█"


# Values


def span(seconds):
    """Seconds as the two largest units: 3d 4h, 5m 6s."""
    seconds = int(seconds)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if seconds >= size or (unit == "s" and not parts):
            parts.append(f"{seconds // size}{unit}")
            seconds %= size
    return " ".join(parts[:2])


def size(count):
    """Bytes in binary units: 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def rate(bits):
    """Bits per second in decimal units: 1.5 Mbit/s."""
    number, _, unit = decimal(bits).partition(" ")
    return f"{number} {unit}bit/s"


def decimal(count):
    """A number in decimal units, for where the heading says of what: 1.5 M."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.1f}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.1f} G"


def milliseconds(value):
    return "-" if value is None else f"{value:.1f} ms"


def part(some, all_):
    """`some` of `all_` as a percentage."""
    return f"{100 * some / all_:.1f} %" if all_ else "-"


def sparkline(values, width):
    """The last `width` values as bars, the highest of them full."""
    values = list(values)[-width:]
    top = max(values, default=0)
    bars = "".join(_SPARKS[0 if value <= 0 else max(1, round(8 * value / top))] for value in values)
    return bars.rjust(width)


# A terminal

NO_TERMINAL = 1000
"""Columns where there is no terminal, so that nothing is wrapped or cut in a pipe (choice)."""
TEXT_MIN = 20
"""Columns for a text, however narrow the terminal is (choice)."""


def console():
    """The rich Console of standard output."""
    return rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else NO_TERMINAL)


def show_again(console, look, period):
    """Shows what look() returns every `period` seconds, in one place on a terminal and one below the other elsewhere.

    Until something is raised: by look(), or by Control-C.
    """
    if not console.is_terminal:
        while True:
            console.print(look(), "")
            time.sleep(period)
    with rich.live.Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(look(), refresh=True)
            time.sleep(period)


def _markup(line):
    return rich.text.Text.from_markup(line, overflow="fold")


class Row:
    """A label and a text, both markup, for rich to print: what is wrapped goes on below the text's beginning."""

    def __init__(self, label, text):
        self._label = rich.text.Text.from_markup(label)
        self._text = rich.text.Text.from_markup(text)

    def __rich_console__(self, console, options):
        indent = self._label.cell_len
        lines = self._text.wrap(console, max(options.max_width - indent, TEXT_MIN), overflow="fold")
        for number, line in enumerate(lines):
            line.rstrip()
            yield rich.text.Text(" " * indent) + line if number else self._label + line


# An instance


def instances(reports, width):
    """Reports, each as status shows it, as something that rich prints. width: columns of the terminal."""
    parts = []
    for report in reports:
        parts += ["", *_instance(report, width)] if parts else _instance(report, width)
    return rich.console.Group(*(_markup(one) if isinstance(one, str) else one for one in parts))


def _instance(report, width):
    escape = rich.markup.escape
    found = verdicts(report)
    problems = sum(one.state == PROBLEM for one in found)
    colour = COLOURS[PROBLEM if problems else FINE]
    summary = f"{problems} problem{'s' if problems > 1 else ''}" if problems else "well"
    yield Row(f"[{colour}]●[/{colour}] [bold]{escape(report['instance'])}[/bold]  [{colour}]{summary}[/{colour}]  ",
              f"{report['mode']}, up {span(time.time() - report['since'])}, process {report['pid']}, "
              f"version {escape(report['version'])}")
    yield from _found(found)
    for name, text in _facts(report):
        yield Row(f"  {name:8} ", text)
    for session in report["sessions"]:
        yield ""
        yield from _session(session, report["mode"], width)


def _found(verdicts):
    for one in verdicts:
        colour = COLOURS[one.state]
        yield Row(f"  [{colour}]{one.state:8}[/{colour}] ", rich.markup.escape(one.text))
        if one.mend:
            yield Row(f"{'':11}", rich.markup.escape(one.mend))


def _facts(report):
    yield "device", f"{rich.markup.escape(report['device'])} {' '.join(report['addresses']) or 'no address yet'}"
    if report["mode"] == "client" and report["addresses"]:
        yield "server", " ".join(map(server_address, report["addresses"]))
    yield "offload", " ".join(report["offload"]) or "[yellow]none[/yellow]"
    yield "workers", _workers(report)
    yield "drops", ", ".join(f"{cause} {count}" for cause, count in report["drops"].items() if count) or "none"
    if "listener" in report:
        counts = dict(report["listener"])
        yield "accept", f"{counts.pop('handshakes')} now, " + ", ".join(
            f"{cause.replace('_', ' ')} {count}" for cause, count in counts.items()
        )
    if not report["sessions"]:
        yield "sessions", "[yellow]none[/yellow]" if report["mode"] == "client" else "none"


def server_address(interface):
    """The server's address in the tunnel, a text, by one of a client's: the first of the pool, see bulkvpn.conf(5).

    interface: ADDRESS/LENGTH.
    """
    return str(next(iter(ipaddress.ip_interface(interface).network.hosts())))


def _session(session, mode, width):
    peers = " ".join(dict.fromkeys(one["peer"].rpartition(":")[0].strip("[]") for one in session["connections"]))
    # A client's session has the server's name, and the client's own addresses stand above.
    where = [*session["addresses"], *(["from", peers] if peers else [])] if mode == "server" else ["at", peers or "-"]
    who = rich.markup.escape(" ".join(where)) + f"  {session['cipher']}  up {span(session.get('age', 0))}"
    what = (f"out {rate(session.get('rate_out', 0))}, {size(session.get('bytes_out', 0))}  "
            f"in {rate(session.get('rate_in', 0))}, {size(session.get('bytes_in', 0))}")
    name = f"  [bold]{rich.markup.escape(session['identity'])}[/bold]  "
    if _markup(f"{name}{who}  {what}").cell_len <= width:
        yield Row(name, f"{who}  {what}")
    else:
        yield Row(name, who)
        yield Row("    ", what)
    if session.get("networks"):
        yield Row("    behind it  ", " ".join(session["networks"]))
    yield connections(session["connections"], width) if session["connections"] else "    [red]no connection[/red]"


def _workers(report):
    workers = report["workers"]
    alive = sum(worker["alive"] for worker in workers)
    text = f"{alive} of {len(workers)} alive, {sum(worker['restarts'] for worker in workers)} restarts"
    carried = dict.fromkeys((worker["index"] for worker in workers), 0)
    for session in report["sessions"]:
        for one in session["connections"]:
            carried[one["worker"]] = carried.get(one["worker"], 0) + one.get("bytes_in", 0) + one.get("bytes_out", 0)
    if len(workers) > 1 and any(carried.values()):
        text += "; of the bytes " + ", ".join(part(one, sum(carried.values())) for one in carried.values())
    return text if alive == len(workers) else f"[red]{text}[/red]"


@dataclasses.dataclass(frozen=True)
class _Column:
    """heading. show: what a row is about -> text. importance: a narrow terminal loses the least important first.
    is_text: words to the left, which may be wrapped; else numbers to the right."""

    heading: str
    show: Callable
    importance: int
    is_text: bool = False


def _both(name, show):
    return lambda one: f"{show(one.get(name + '_out', 0))} / {show(one.get(name + '_in', 0))}"


_COLUMNS = (
    _Column("", lambda one: str(one["index"]), 10),
    _Column("worker", lambda one: str(one["worker"]), 6),
    _Column("peer", lambda one: one["peer"], 5, is_text=True),
    _Column("age", lambda one: span(one.get("age", 0)), 4),
    _Column("rtt", lambda one: milliseconds(one.get("rtt_ms")), 9),
    _Column("bit/s out / in", _both("rate", decimal), 9),
    _Column("bytes out / in", _both("bytes", size), 7),
    _Column("packets out / in", _both("segments", "{:,}".format), 2),
    _Column("frames out / in", _both("frames", "{:,}".format), 1),
    _Column("resent", lambda one: part(one.get("bytes_retransmitted", 0), one.get("bytes_out", 0)), 8),
    _Column("delay", lambda one: milliseconds(one.get("queue_delay_ms", 0)), 8),
    _Column("waiting", lambda one: size(one.get("queued", 0)), 3),
    _Column("congestion", lambda one: one.get("congestion", "-"), 1),
)
"""delay: how long what leaves the send queue has waited there."""


_GAP = 2
"""Columns between two columns of a table: the padding of the first, and the box."""


def connections(found, width):
    """A table of connections with as many columns as fit."""
    return _table(_COLUMNS, found, width)


def _table(columns, found, width):
    """A table with a row for each of `found`, and with as many columns as fit into `width`."""
    cells = {column: [rich.text.Text.from_markup(column.show(one)) for one in found] for column in columns}
    widths = {column: max(len(column.heading), *(cell.cell_len for cell in cells[column]), 0) for column in columns}
    shown = list(columns)
    while len(shown) > 1 and sum(widths[column] + _GAP for column in shown) > width + 1:
        shown.remove(min(shown, key=lambda one: one.importance))
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in shown:
        table.add_column(column.heading, justify="left" if column.is_text else "right", no_wrap=not column.is_text,
                         overflow="fold")
    for row in zip(*(cells[column] for column in shown)):
        table.add_row(*row)
    return table


# All sessions, live

SPARK_WIDTH = 20
SPARK_WIDE = 180
"""Columns of a terminal from which a sparkline has its whole width, and half of it otherwise (choice)."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """A session of an instance, and its last rates: ways "in" and "out"."""

    instance: str
    session: dict
    rates: dict

    @property
    def connections(self):
        return self.session["connections"]


def _least_rtt(row):
    return milliseconds(min((one["rtt_ms"] for one in row.connections if one.get("rtt_ms") is not None), default=None))


def _sent_again(row):
    return part(sum(one.get("bytes_retransmitted", 0) for one in row.connections),
                sum(one.get("bytes_out", 0) for one in row.connections))


def _longest_delay(row):
    return milliseconds(max((one.get("queue_delay_ms", 0) for one in row.connections), default=0))


def _up(row):
    return f"{len(row.connections)} of {row.session.get('agreed_connections', len(row.connections))}"


def _sparkline(way, colour, width):
    return lambda row: f"[{colour}]{sparkline(row.rates[way], width)}[/{colour}]"


def _session_columns(spark):
    """spark: width of a sparkline."""
    return (
        _Column("instance", lambda row: rich.markup.escape(row.instance), 4, is_text=True),
        _Column("session", lambda row: rich.markup.escape(row.session["identity"]), 9, is_text=True),
        _Column("addresses", lambda row: " ".join(row.session["addresses"]), 1, is_text=True),
        _Column("", _sparkline("out", "cyan", spark), 7),
        _Column("out", lambda row: rate(row.session.get("rate_out", 0)), 8),
        _Column("", _sparkline("in", "green", spark), 7),
        _Column("in", lambda row: rate(row.session.get("rate_in", 0)), 8),
        _Column("rtt", _least_rtt, 6),
        _Column("resent", _sent_again, 5),
        _Column("delay", _longest_delay, 3),
        _Column("up", _up, 2),
    )


def sessions(reports, history, width):
    """The sessions of all reports, the busiest first, with as many columns as fit.

    history: {(instance, session, "in" or "out"): [rate]}.
    """
    spark = SPARK_WIDTH if width >= SPARK_WIDE else SPARK_WIDTH // 2
    found = [
        _Row(report["instance"], session,
             {way: history.get((report["instance"], session["identity"], way), ()) for way in ("out", "in")})
        for report in reports for session in report["sessions"]
    ]
    found.sort(key=lambda row: -row.session.get("rate_in", 0) - row.session.get("rate_out", 0))
    return _table(_session_columns(spark), found, width)


def summaries(reports):
    """A line for each instance: is it well, and if not why."""
    lines = []
    for report in reports:
        worst = next(iter(verdicts(report)), Verdict(FINE, "well"))
        colour = COLOURS[worst.state]
        lines.append(_markup(f"[{colour}]●[/{colour}] [bold]{rich.markup.escape(report['instance'])}[/bold]  "
                             f"{rich.markup.escape(worst.text)}"))
    return rich.console.Group(*lines)


def over(errors, shown):
    """Errors, one a line, over what else is shown."""
    return rich.console.Group(*(rich.text.Text(str(error), style="red") for error in errors), shown)
