"""The command line of the benchmark; benchmarks/run starts it."""

import argparse
import os
import pathlib
import sys

import rich.box
import rich.console
import rich.table

from benchmarks import machine, network, report, runner, systems, tests
from benchmarks.trial import ROOT, Interrupted, Signals, environment
from bulkvpnd.admin import demo, namespaces

QUICK = {"rounds": 1, "seconds": 2}
NORMAL = {"rounds": 3, "seconds": 5}


def parser():
    """The argparse parser."""
    made = argparse.ArgumentParser(
        prog="benchmarks/run", allow_abbrev=False,
        description="Measures bulkvpnd beside its peers in network namespaces of this machine, as root.",
        epilog=f"Systems: {', '.join(systems.DEFAULT)}; "
               "bulkvpnd[-instances-N][-OPTION-VALUE...][@DIR] for several instances, other options or another "
               f"checkout, wireguard-go@PATH for another program. Tests: {', '.join(tests.ROWS)}.",
    )  # fmt: skip
    made.add_argument("--systems", metavar="NAME,...", default=",".join(systems.DEFAULT), help="default: all")
    made.add_argument("--only", metavar="TEST,...",
                      help="only these tests; a first word such as clients or udp64 stands for all that have it")
    made.add_argument("--rounds", type=int, metavar="N", help=f"default {NORMAL['rounds']}")
    made.add_argument("--seconds", type=int, metavar="N",
                      help=f"how long each measurement takes (default {NORMAL['seconds']})")
    made.add_argument("--quick", action="store_true",
                      help=f"{QUICK['rounds']} round of {QUICK['seconds']} s a measurement, to see that all works")
    made.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows to FILE")
    made.add_argument("--output", type=pathlib.Path, metavar="DIR",
                      help="write the report with its plots to DIR; default docs/benchmarks/RELEASE if all systems "
                           "and tests are measured, else none")
    made.add_argument("--python", default="/usr/bin/python3", metavar="PATH",
                      help="interpreter for bulkvpnd, as of a virtual environment (default /usr/bin/python3)")
    made.add_argument("--tree", type=pathlib.Path, default=ROOT, metavar="DIR",
                      help="the checkout of bulkvpnd that is measured (default: this one)")
    made.add_argument("--installed", action="store_true", help="measure the installed bulkvpnd, not a checkout")
    made.add_argument("--logs", type=pathlib.Path, metavar="DIR", help="keep the logs of what failed in DIR")
    return made


def rows_named(text):
    """The rows that --only names: a row, or with a prefix before the first _ all of them. Raises ValueError."""
    chosen = set()
    for name in text.split(","):
        matching = {row for row in tests.ROWS if row == name} or {
            row for row in tests.ROWS if row.partition("_")[0].rstrip("0123456789" if name == "clients" else "") == name
        }
        if not matching:
            raise ValueError(f"{name}: no such test; there are {', '.join(tests.ROWS)}")
        chosen |= matching
    return chosen


def main():
    arguments = parser().parse_args()
    for name, value in (QUICK if arguments.quick else NORMAL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    environment()
    settings = systems.Settings(arguments.python, None if arguments.installed else arguments.tree.absolute())
    try:
        demo.check_requirements()
        chosen = rows_named(arguments.only) if arguments.only else None
        asked = [systems.system(name, settings) for name in arguments.systems.split(",")]
        facts = machine.describe(arguments.python, arguments.rounds, arguments.seconds)
    except (ValueError, demo.DemoError, namespaces.CommandError) as error:
        print(f"benchmarks/run: {error}", file=sys.stderr)
        return getattr(error, "status", os.EX_USAGE)

    missing = {system.name: why for system in asked if (why := system.missing())}
    present = [system for system in asked if system.name not in missing]
    versions = {system.name: system.version() for system in present}
    if "wireguard-go" in versions and not report.has_offload(versions["wireguard-go"]):
        missing["wireguard-go with offload"] = "this release's apt offers none from 2023 or later"
    complete = arguments.only is None and set(systems.DEFAULT) <= {system.name for system in asked}
    output = arguments.output or (ROOT / "docs" / "benchmarks" / machine.release()[0] if complete else None)
    steps = runner.plan(present, arguments.rounds, arguments.seconds, chosen)
    used = {link: network.LINKS[link][1] for link in network.LINKS if any(step[2] == link for step in steps)}

    results = runner.Results()
    circumstances = report.Circumstances(facts, used, versions, missing, results.failures,
                                         int(facts["cryptography"].partition(".")[0]) >= report.NEW_CRYPTOGRAPHY)

    def after_round():
        report.write(results.values, circumstances, output, arguments.json)

    status = 0
    with Signals() as signals:
        try:
            runner.run(steps, results, arguments.seconds, chosen, signals, after_round, arguments.logs)
        except Interrupted as error:
            print(f"benchmarks/run: ended by {error}; only whole rounds were written to files", file=sys.stderr)
            status = 128 + signals.came
    show(results, circumstances)
    return status or (1 if results.failures else 0)


def show(results, circumstances):
    """Prints the results, the floors and what is missing on standard output."""
    found = report.medians(results.values)
    if not found:
        return
    names = list(dict.fromkeys(system for system, _ in found))
    console = rich.console.Console(width=None if sys.stdout.isatty() else 200)
    table = rich.table.Table(title=f"medians, {circumstances.machine['rounds']}", box=rich.box.SIMPLE)
    for name in ("test", "unit", *names):
        table.add_column(name, justify="left" if name in ("test", "unit") else "right")
    for row, (unit, _, _) in tests.ROWS.items():
        if any((system, row) in found for system in names):
            table.add_row(row, unit, *(report.number(found.get((system, row))) for system in names))
    console.print(table)
    for text, value, floor, outcome in report.compare(found, circumstances.versions, circumstances.new_cryptography):
        if value is not None:
            console.print(f"{text}: {value:.3g}, {floor}: {outcome}", highlight=False)
    for name, why in circumstances.missing.items():
        console.print(f"missing: {name}: {why}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
