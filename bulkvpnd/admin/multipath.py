"""``bulkvpnctl multipath``: which prefixes the instances of this machine carry together, and which of them are up."""

import json
import sys

import rich.box
import rich.markup
import rich.table

from bulkvpnd.admin import screen, status


def add_arguments(parser):
    """Adds the subcommands and their arguments to an argparse parser."""
    commands = parser.add_subparsers(dest="multipath_command", metavar="COMMAND", required=True)
    show = commands.add_parser("show", help="show prefixes, members and weights, and which are up", allow_abbrev=False)
    show.add_argument("--json", action="store_true", help="print one JSON array with an object for each prefix")


def run(arguments):
    """Returns the exit status."""
    reports, code = status.asked(None)
    prefixes = collect(reports)
    if arguments.json:
        json.dump(prefixes, sys.stdout, indent=2)
        print()
    else:
        show(prefixes, screen.console())
    return code


def collect(reports):
    """Puts together what instances report: [{"prefix", "members": [{"instance", "device", "weight", …}]}].

    A member that the kernel has and that no report is from, as of an instance that hangs, has the instance None.
    """
    found = {}
    for report in reports:
        for one in report.get("multipath", ()):
            members = found.setdefault(one["prefix"], {})
            for device, weight in one["members"].items():
                members.setdefault(device, _member(None, device, weight, True))
            members[one["device"]] = _member(report["instance"], one["device"], one["weight"], one["up"],
                                             one["source"], one["why_not"])
    return [
        {"prefix": prefix, "members": sorted(members.values(), key=lambda one: (not one["instance"], one["device"]))}
        for prefix, members in sorted(found.items())
    ]


def _member(instance, device, weight, up, source=None, why_not=None):
    return {"instance": instance, "device": device, "weight": weight, "source": source, "up": up, "why_not": why_not}


_COLUMNS = (
    # heading, how a member shows it
    ("instance", lambda one: one["instance"] or "?"),
    ("device", lambda one: one["device"]),
    ("weight", lambda one: str(one["weight"])),
    ("source", lambda one: one["source"] or "-"),
    ("state", lambda one: "up" if one["up"] else f"down: {one['why_not'] or 'not known why'}"),
)


def show(prefixes, console):
    """Prints what collect() returned on a rich Console."""
    if not prefixes:
        console.print("no instance that runs here has the option multipath")
    for prefix in prefixes:
        console.print(f"[bold]{prefix['prefix']}[/bold]")
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for heading, _ in _COLUMNS:
            table.add_column(heading, justify="right" if heading == "weight" else "left", no_wrap=heading != "state")
        for member in prefix["members"]:
            table.add_row(*(rich.markup.escape(shown(member)) for _, shown in _COLUMNS),
                          style="" if member["up"] else "yellow")
        console.print(table)
