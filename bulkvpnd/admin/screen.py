"""How reports of instances look on a terminal. Nothing here asks an instance; `status` and `top` do."""

import dataclasses
import time
from collections.abc import Callable

import rich.box
import rich.console
import rich.markup
import rich.table
import rich.text

from bulkvpnd.admin.diagnosis import findings

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
    for unit in ("", "k", "M"):
        if bits < 1000:
            return f"{bits:.0f} bit/s" if not unit else f"{bits:.1f} {unit}bit/s"
        bits /= 1000
    return f"{bits:.1f} Gbit/s"


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


# An instance


def instances(reports, width):
    """Reports, each as status shows it, as something that rich prints. width: columns of the terminal."""
    parts = []
    for report in reports:
        parts += ["", *_instance(report, width)] if parts else _instance(report, width)
    return rich.console.Group(*(_markup(one) if isinstance(one, str) else one for one in parts))


def _markup(line):
    return rich.text.Text.from_markup(line, overflow="fold")


def _instance(report, width):
    escape = rich.markup.escape
    found = findings(report)
    faults = sum(one.is_fault for one in found)
    colour, verdict = ("red", f"{faults} problem{'s' if faults > 1 else ''}") if faults else ("green", "well")
    yield (f"[{colour}]●[/{colour}] [bold]{escape(report['instance'])}[/bold]  [{colour}]{verdict}[/{colour}]  "
           f"{report['mode']}, up {span(time.time() - report['since'])}, process {report['pid']}, "
           f"version {escape(report['version'])}")
    for one in found:
        style = "red" if one.is_fault else "yellow"
        yield f"  [{style}]{'problem' if one.is_fault else 'note':8}[/{style}] {escape(one.text)}"
        if one.mend:
            yield f"           {escape(one.mend)}"
    yield f"  device   {escape(report['device'])} {' '.join(report['addresses']) or 'no address yet'}"
    yield f"  offload  {' '.join(report['offload']) or '[yellow]none[/yellow]'}"
    yield f"  workers  {_workers(report)}"
    yield "  drops    " + (", ".join(f"{cause} {count}" for cause, count in report["drops"].items() if count) or "none")
    if "listener" in report:
        counts = dict(report["listener"])
        yield f"  accept   {counts.pop('handshakes')} now, " + ", ".join(
            f"{cause.replace('_', ' ')} {count}" for cause, count in counts.items()
        )
    if not report["sessions"]:
        yield "  [yellow]no session[/yellow]" if report["mode"] == "client" else "  no session"
    for session in report["sessions"]:
        yield ""
        yield (f"  [bold]{escape(session['identity'])}[/bold]  {' '.join(session['addresses'])}  {session['cipher']}  "
               f"up {span(session.get('age', 0))}  out {rate(session.get('rate_out', 0))}, "
               f"{size(session.get('bytes_out', 0))}  in {rate(session.get('rate_in', 0))}, "
               f"{size(session.get('bytes_in', 0))}")
        if session.get("networks"):
            yield f"    behind it  {' '.join(session['networks'])}"
        yield connections(session["connections"], width)


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
    """heading. show: connection -> text. importance: a narrow terminal loses the least important first. width: that it
    needs at most in practice."""

    heading: str
    show: Callable
    importance: int
    width: int


def _both(name, show):
    return lambda one: f"{show(one.get(name + '_out', 0))} / {show(one.get(name + '_in', 0))}"


def _waiting(one):
    return f"{size(one.get('queued', 0))}, {milliseconds(one.get('queue_delay_ms', 0))}"


_COLUMNS = (
    _Column("", lambda one: str(one["index"]), 9, 2),
    _Column("worker", lambda one: str(one["worker"]), 4, 6),
    _Column("peer", lambda one: one["peer"], 8, 24),
    _Column("age", lambda one: span(one.get("age", 0)), 5, 8),
    _Column("rtt", lambda one: milliseconds(one.get("rtt_ms")), 8, 9),
    _Column("rate out / in", _both("rate", rate), 8, 27),
    _Column("bytes out / in", _both("bytes", size), 7, 23),
    _Column("packets out / in", _both("segments", "{:,}".format), 3, 27),
    _Column("frames out / in", _both("frames", "{:,}".format), 2, 23),
    _Column("sent again", lambda one: part(one.get("bytes_retransmitted", 0), one.get("bytes_out", 0)), 6, 10),
    _Column("waiting", _waiting, 5, 20),
    _Column("congestion", lambda one: one.get("congestion", "-"), 1, 10),
)


def connections(found, width):
    """A table of connections with as many columns as fit."""
    shown = set(_COLUMNS)
    for column in sorted(_COLUMNS, key=lambda one: one.importance):
        if sum(one.width + 2 for one in shown) <= width:
            break
        shown.discard(column)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    columns = [column for column in _COLUMNS if column in shown]
    for column in columns:
        table.add_column(column.heading, justify="left" if column.heading == "peer" else "right", no_wrap=True)
    for connection in found:
        table.add_row(*(rich.markup.escape(column.show(connection)) for column in columns))
    return table


# All sessions, live

SPARK_WIDTH = 20


def sessions(reports, history):
    """The sessions of all reports, the busiest first. history: {(instance, session, "in" or "out"): [rate]}."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("instance", "session", "addresses", "out", "", "in", "", "rtt", "sent again", "waiting", "up"):
        table.add_column(heading, justify="left" if heading in ("instance", "session", "addresses") else "right",
                         no_wrap=True)
    rows = [(report, session) for report in reports for session in report["sessions"]]
    for report, session in sorted(rows, key=lambda row: -row[1].get("rate_in", 0) - row[1].get("rate_out", 0)):
        found = session["connections"]
        key = report["instance"], session["identity"]
        measured = [one["rtt_ms"] for one in found if one.get("rtt_ms") is not None]
        sent_again = sum(one.get("bytes_retransmitted", 0) for one in found)
        table.add_row(
            rich.markup.escape(report["instance"]),
            rich.markup.escape(session["identity"]),
            " ".join(session["addresses"]),
            f"[cyan]{sparkline(history.get((*key, 'out'), ()), SPARK_WIDTH)}[/cyan]",
            rate(session.get("rate_out", 0)),
            f"[green]{sparkline(history.get((*key, 'in'), ()), SPARK_WIDTH)}[/green]",
            rate(session.get("rate_in", 0)),
            milliseconds(min(measured, default=None)),
            part(sent_again, sum(one.get("bytes_out", 0) for one in found)),
            milliseconds(max((one.get("queue_delay_ms", 0) for one in found), default=0)),
            f"{len(found)} of {session.get('agreed_connections', len(found))}",
        )
    return table


def verdicts(reports):
    """A line for each instance: is it well, and if not why."""
    lines = []
    for report in reports:
        found = findings(report)
        worst = found[0] if found else None
        colour = "red" if worst and worst.is_fault else "yellow" if worst else "green"
        text = worst.text if worst else "well"
        lines.append(_markup(f"[{colour}]●[/{colour}] [bold]{rich.markup.escape(report['instance'])}[/bold]  "
                             f"{rich.markup.escape(text)}"))
    return rich.console.Group(*lines)


def over(errors, shown):
    """Errors, one a line, over what else is shown."""
    return rich.console.Group(*(rich.text.Text(str(error), style="red") for error in errors), shown)
