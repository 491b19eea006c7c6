"""Medians, the table, the comparison with the floors, and the plots, from what runner.py collected.

    DIRECTORY/README.md     the report
    DIRECTORY/rows.json     [{"system", "test", "value", "unit"}], the medians
    DIRECTORY/run.json      what the medians are from: every value, and the circumstances
    DIRECTORY/*.png *.svg   the plots
"""

import dataclasses
import json
import math
import operator
import re
import statistics

from benchmarks.tests import ROWS

NEW_CRYPTOGRAPHY = 42
"""Major version from which the right column of floors counts: Debian 12 has 38, Debian 13 has 43."""


def medians(values):
    """{(system, row): median} of {(system, row): [value]}."""
    return {key: statistics.median(several) for key, several in values.items()}


def rows(values):
    """The medians as [{"system", "test", "value", "unit"}], systems in the order they were measured."""
    return [{"system": system, "test": row, "value": float(f"{value:.4g}"), "unit": ROWS[row][0]}
            for (system, row), value in medians(values).items()]


@dataclasses.dataclass(frozen=True, slots=True)
class Floor:
    """What bulkvpnd must reach. combine: of the value of `ours` and of the best of `theirs`, both (systems, row).

    new, old: the floor with new and with Debian 12's cryptography. least: whether it is the least that must be
    reached, and not the most that is allowed. unit: of the combined value.
    """

    text: str
    ours: tuple
    theirs: tuple
    new: float
    old: float
    least: bool = True
    combine: object = operator.truediv
    unit: str = ""


BULKVPND, DIRECT, OPENVPN_TCP, OPENVPN_UDP = "bulkvpnd", "direct", "openvpn-tcp", "openvpn-udp"
FLOORS = (
    Floor("TCP 4 streams / direct single stream", (BULKVPND, "tcp4"), (DIRECT, "tcp1"), 0.42, 0.36),
    Floor("TCP 4 streams / OpenVPN TCP", (BULKVPND, "tcp4"), (OPENVPN_TCP, "tcp4"), 20, 17),
    Floor("TCP 4 streams / wireguard-go with offload", (BULKVPND, "tcp4"), ("wireguard-go", "tcp4"), 3.5, 3.0),
    Floor("delivered 200-byte packets a second / OpenVPN UDP",
          (BULKVPND, "udp200_pps"), (OPENVPN_UDP, "udp200_pps"), 2.0, 1.5),
    Floor("idle RTT p50 / OpenVPN TCP", (BULKVPND, "idle_rtt_ms"), (OPENVPN_TCP, "idle_rtt_ms"), 1.8, 2.5, least=False),
    Floor("shaped link: RTT p95 at full load over the idle RTT of the link",
          (BULKVPND, "shaped_rtt_p95_ms"), (DIRECT, "shaped_rtt_ms"), 15, 15, False, operator.sub, " ms"),
    Floor("lossy link, 4 connections / 1 connection",
          (BULKVPND, "lossy_mbps"), ("bulkvpnd-connections-1", "lossy_mbps"), 3, 3),
    Floor("lossy link / OpenVPN TCP", (BULKVPND, "lossy_mbps"), (OPENVPN_TCP, "lossy_mbps"), 3, 3),
    Floor("CPU seconds per GB / OpenVPN TCP",
          (BULKVPND, "cpu_s_per_gb"), (OPENVPN_TCP, "cpu_s_per_gb"), 0.10, 0.12, least=False),
    Floor("reordered packets within a flow", (BULKVPND, "udp_reorder"), None, 0, 0, least=False),
)


def has_offload(version):
    """Whether a wireguard-go of this version text has TUN offload, which came in 2023."""
    numbers = re.findall(r"0\.0\.(20\d{6})", version)
    return bool(numbers) and min(numbers) >= "2023"


def compare(values, versions, new):
    """How bulkvpnd stands against each floor.

    values: {(system, row): median}. versions: {system: text}. new: whether cryptography is new.
    Returns [(text, value or None, floor as text, "met", "not met" or why it was not measured)].
    """
    lines = []
    for floor in FLOORS:
        limit = floor.new if new else floor.old
        limit_text = f"{'at least' if floor.least else 'at most'} {limit:g}{floor.unit}"
        ours = values.get(floor.ours)
        value = reason = None
        if floor.theirs is None:
            value = ours
        else:
            theirs = _best(values, *floor.theirs, versions)
            if theirs is None:
                reason = f"{floor.theirs[0]} has no {floor.theirs[1]}"
                if floor.theirs[0] == "wireguard-go":
                    reason = "no wireguard-go with offload was measured"
            elif ours is not None:
                value = floor.combine(ours, theirs) if theirs or floor.combine is operator.sub else None
        if value is None:
            reason = reason or f"{floor.ours[0]} has no {floor.ours[1]}"
            lines.append((floor.text, None, limit_text, f"not measured: {reason}"))
            continue
        met = value >= limit if floor.least else value <= limit
        lines.append((floor.text, value, limit_text, "met" if met else "not met"))
    return lines


def _best(values, peer, row, versions):
    """The best value of `row` that any variant of `peer` reached, or None."""
    better = max if ROWS[row][1] else min
    found = [value for (system, name), value in values.items()
             if name == row and (system == peer if peer in (DIRECT, "bulkvpnd-connections-1")
                                 else system.startswith(peer))
             and (peer != "wireguard-go" or has_offload(versions.get(system, "")))]
    return better(found) if found else None


@dataclasses.dataclass(frozen=True, slots=True)
class Circumstances:
    """What the report says beside the values.

    machine, links: {what: text}. versions: {system: text}. missing: {system: why}. failures: {(system, what): why}.
    """

    machine: dict
    links: dict
    versions: dict
    missing: dict
    failures: dict
    new_cryptography: bool


def markdown(values, circumstances, plots=()):
    """The report. values: {(system, row): [value]}. plots: (file, title) of pictures beside it."""
    found = medians(values)
    systems = list(dict.fromkeys(system for system, _ in found))
    measured = [row for row in ROWS if any((system, row) in found for system in systems)]
    lines = ["# bulkvpnd and its peers, measured", "",
             "Made by `benchmarks/run`. Medians over the rounds; all systems took turns on the same machine, with both "
             "ends, the tools that load them and the kernel on its cores. `-`: not measured.", ""]
    lines += _table(("", ""), circumstances.machine.items())
    lines += ["", "## Floors", "",
              f"With {'new' if circumstances.new_cryptography else 'old'} cryptography (new: from version "
              f"{NEW_CRYPTOGRAPHY}). A peer with several variants counts with its best.", ""]
    lines += _table(("measure", "value", "floor", ""), (
        (text, "-" if value is None else f"{value:.3g}", floor, outcome)
        for text, value, floor, outcome in compare(found, circumstances.versions, circumstances.new_cryptography)))
    lines += ["", "## Results", ""]
    lines += _table(("test", "unit", *systems), (
        (f"`{row}`", ROWS[row][0], *(number(found.get((system, row))) for system in systems)) for row in measured))
    lines += ["", "## Where a peer is ahead", ""]
    ahead = list(_ahead(found, systems, measured))
    lines += _table(("test", "bulkvpnd", "best peer", ""), ahead) if ahead else ["Nowhere in this run."]
    if plots:
        lines += ["", "## Plots", "", *(f"![{title}]({file})" for file, title in plots)]
    lines += ["", "## Systems", ""]
    lines += _table(("system", "version"), circumstances.versions.items())
    for title, table in (("Missing", circumstances.missing.items()),
                         ("Failures", ((f"{system}, {what}", why) for (system, what), why
                                       in circumstances.failures.items()))):
        entries = list(table)
        if entries:
            lines += ["", f"## {title}", "", *(f"* {name}: {why}" for name, why in entries)]
    lines += ["", "## What the tests are", ""]
    lines += _table(("test", "what"), ((f"`{row}`", ROWS[row][2]) for row in measured))
    lines += ["", *_table(("link", "what"), circumstances.links.items())]
    return "\n".join(lines) + "\n"


def _ahead(found, systems, measured):
    """(row, ours, theirs, peer) where a tunnel that is not ours does better than bulkvpnd by its defaults."""
    peers = [system for system in systems if system != DIRECT and not system.startswith(BULKVPND)]
    for row in measured:
        candidates = {system: found[system, row] for system in peers if (system, row) in found}
        if candidates and (BULKVPND, row) in found:
            more = ROWS[row][1]
            best = (max if more else min)(candidates, key=candidates.get)
            ours, theirs = found[BULKVPND, row], candidates[best]
            if theirs > ours if more else theirs < ours:
                yield f"`{row}`", number(ours), number(theirs), best


def _table(head, body):
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in body]


def number(value):
    """A value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


PLOTS = (
    # file, title, rows, whether the axis is logarithmic
    ("tcp", "TCP throughput, Mbit/s", ("tcp1", "tcp4", "tcp16", "tcp4_reverse", "tcp4_both"), True),
    ("datagrams", "UDP datagrams delivered, packets/s", ("udp64_pps", "udp200_pps"), False),
    ("rtt", "round trip, ms", ("idle_rtt_ms", "idle_rtt_p99_ms", "loaded_rtt_p95_ms"), True),
    ("shaped", "round trip on a shaped link of 100 Mbit/s, ms", ("shaped_rtt_ms", "shaped_rtt_p95_ms"), True),
    ("lossy", "TCP on a lossy link with 40 ms round trip, Mbit/s", ("lossy01_mbps", "lossy_mbps"), True),
    ("cpu", "CPU seconds of both ends for each GB", ("cpu_s_per_gb",), True),
    ("memory", "memory of both ends, MB", ("rss_mb",), False),
)
GROWTH = (("mbps", "sum of throughput, Mbit/s"), ("cpu_s_per_gb", "CPU of the server, s/GB"),
          ("rss_mb", "memory of the server, MB"))


def plot(values, directory):
    """Draws PNG and SVG into `directory`. Returns [(PNG file name, title)]; [] if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("agg")
    # So that a drawing of the same values is the same file.
    matplotlib.rcParams["svg.hashsalt"] = "bulkvpnd"
    found = medians(values)
    made = []
    for name, title, wanted, logarithmic in PLOTS:
        figure = _bars(found, title, wanted, logarithmic)
        if figure:
            made.append((_save(figure, directory, name), title))
    figure = _growth(found)
    if figure:
        made.append((_save(figure, directory, "clients"), "from 1 to 64 clients on one server"))
    return made


def _bars(found, title, wanted, logarithmic):
    """Horizontal bars, a group for each system, or None where no row has a value."""
    from matplotlib import pyplot

    wanted = [row for row in wanted if any(name == row for _, name in found)]
    systems = list(dict.fromkeys(system for system, row in found if row in wanted))
    if not any(found.get((system, row)) for system in systems for row in wanted):
        return None
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + len(systems) * (0.25 + 0.17 * len(wanted))), layout="constrained")
    height = 0.8 / len(wanted)
    for place_in_group, row in enumerate(wanted):
        bars = axes.barh([place + place_in_group * height for place in range(len(systems))],
                         [found.get((system, row), 0) for system in systems], height, label=row)
        axes.bar_label(bars, [number(found.get((system, row))) for system in systems], padding=3, fontsize=7)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(systems))], systems)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.margins(x=0.1, y=0.01)
    if logarithmic:
        least = min(value for (_, row), value in found.items() if row in wanted and value > 0)
        axes.set(xscale="log", xlim=(10 ** math.floor(math.log10(least)), None))
        axes.xaxis.set_major_formatter("{x:,g}")
    axes.grid(axis="x", alpha=0.3)
    if len(wanted) > 1:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _growth(found):
    """Lines over the number of clients, or None."""
    from matplotlib import pyplot

    curves = {}
    for (system, row), value in found.items():
        if row.startswith("clients"):
            count, _, what = row.removeprefix("clients").partition("_")
            curves.setdefault(what, {}).setdefault(system, []).append((int(count), value))
    if not curves:
        return None
    figure, several = pyplot.subplots(1, len(GROWTH), figsize=(12, 4), layout="constrained")
    colours = {system: f"C{number}" for number, system in enumerate(dict.fromkeys(
        system for systems in curves.values() for system in systems))}
    for axes, (what, title) in zip(several, GROWTH):
        for system, points in curves.get(what, {}).items():
            axes.plot(*zip(*sorted(points)), marker="o", label=system, color=colours[system])
        axes.set(title=title, xlabel="clients", xscale="log", ylim=(0, None))
        ticks = sorted({count for points in curves.get(what, {}).values() for count, _ in points})
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _save(figure, directory, name):
    from matplotlib import pyplot

    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        figure.savefig(directory / f"{name}.{kind}", metadata=metadata, dpi=110)
    pyplot.close(figure)
    return f"{name}.png"


def _run_text(values, circumstances):
    several = {}
    for (system, row), found in values.items():
        several.setdefault(system, {})[row] = [float(f"{value:.4g}") for value in found]
    facts = dataclasses.asdict(circumstances)
    facts["failures"] = [[*where, why] for where, why in circumstances.failures.items()]
    return json.dumps({**facts, "values": several}, indent=1) + "\n"


def write(values, circumstances, directory=None, json_file=None):
    """Writes the report into `directory`, and the rows alone to `json_file`; either may be None."""
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows(values)) + "\n]\n"
    if json_file:
        json_file.write_text(text)
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "rows.json").write_text(text)
        (directory / "run.json").write_text(_run_text(values, circumstances))
        (directory / "README.md").write_text(markdown(values, circumstances, plot(values, directory)))
