"""``bulkvpnctl tune``: what the machine is tuned with, and the same by hand, without an instance."""

import json
import os
import pathlib
import sys

import rich.box
import rich.markup
import rich.table

from bulkvpnd import config
from bulkvpnd.admin import screen, status
from bulkvpnd.admin.errors import CommandError
from bulkvpnd.host import conntrack, device, firewall, sysctl, tuning

_COLUMNS = ("setting", "found", "wanted", "set", "option", "why not")


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    commands = parser.add_subparsers(dest="action", metavar="show|apply|revert", required=True)
    for name, (_, summary) in _ACTIONS.items():
        action = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        action.add_argument("--config", metavar="FILE",
                            help="configuration of the instance that is meant (default: a server with the defaults of "
                                 "all options)")
        action.add_argument("--json", action="store_true", help="print a JSON array with an object for each setting")


def run(arguments):
    """Returns the exit status."""
    try:
        options = _options(arguments.config)
    except config.ConfigurationError as error:
        raise CommandError(str(error), os.EX_CONFIG) from None
    rows, wrong = _ACTIONS[arguments.action][0](options)
    if arguments.json:
        json.dump([_described(*row) for row in rows], sys.stdout, indent=2)
        print()
    else:
        show(rows, screen.console())
    if wrong:
        raise CommandError(wrong)
    return os.EX_OK


def show(rows, console):
    """Prints rows, each (Wish, Outcome), on a rich Console."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in _COLUMNS:
        table.add_column(heading, overflow="fold")
    for row in rows:
        described = _described(*row)
        table.add_row(*(rich.markup.escape(described[heading.replace(" ", "_")] or "-") for heading in _COLUMNS))
    console.print(table)


def _described(wish, outcome):
    return {"setting": wish.key, "found": outcome.found, "wanted": wish.value, "set": outcome.set,
            "option": wish.option or None, "why_not": outcome.why_not}


# What can be done: each returns (rows, what went wrong or None)


def _show(options):
    ledger = _ledger(options)
    report = _report(options)
    situation = tuning.situation(options, report.get("device"), device.resolve(options.remote), ledger)
    rows = tuning.examine(options, situation, ledger, report.get("not_tuned", {}))
    return [*rows, *_timeouts(options)], None


def _apply(options):
    ledger = _ledger(options)
    rows = tuning.apply(options, tuning.situation(options, None, device.resolve(options.remote), ledger), ledger)
    refused = sum(outcome.why_not is not None for _, outcome in rows)
    # In a container some keys cannot be set, whoever asks.
    return rows, _whose_fault(rows) if refused == len(rows) else None


def _revert(options):
    ledger = _ledger(options)
    try:
        entries = ledger.entries()
    except sysctl.LedgerError as error:
        return [], str(error)
    mine = {key: entry for key, entry in entries.items() if sysctl.BY_HAND in entry["wants"]}
    ledger.restore()
    rows = []
    for key, entry in mine.items():
        value, agreement = entry["wants"][sysctl.BY_HAND]
        try:
            now, why_not = ledger.read(key), None
        except OSError as error:
            now, why_not = None, error.strerror
        if now is not None and now != entry["found"]:
            others = ", ".join(owner for owner in entry["wants"] if owner != sysctl.BY_HAND)
            why_not = f"wanted by {others}" if others else "something else has set it since"
        rows.append((tuning.Wish("", key, value, agreement), sysctl.Outcome(key, entry["found"], value, now, why_not)))
    left = mine.keys() & {key for key, entry in ledger.entries().items() if sysctl.BY_HAND in entry["wants"]}
    return rows, "not reverted; it needs root" if left else None


_ACTIONS = {
    "show": (_show, "show what is found, wanted and set, and why not; changes nothing"),
    "apply": (_apply, "tune the machine by hand, until it is reverted"),
    "revert": (_revert, "give back what was found before apply"),
}


def _options(file):
    """The configuration, or one of a server that has nothing but defaults. Raises ConfigurationError."""
    if file is not None:
        return config.load(["--config", file])[0]
    values = {option.field: config.value_of(option, None, "", None) for option in config.OPTIONS}
    values.update(mode="server", runtime_directory=status.RUNTIME_DIRECTORY / "none")
    return config.Configuration(name="none", path=pathlib.Path(), **values)


def _ledger(options):
    directory = sysctl.shared_directory(options.runtime_directory)
    return sysctl.Ledger(directory, sysctl.BY_HAND, by_hand=True)


def _whose_fault(rows):
    return f"nothing could be tuned; it needs root ({rows[0][1].why_not})" if rows else None


def _report(options):
    """Of the instance, empty while it does not run."""
    try:
        return status.ask(options.runtime_directory / status.SOCKET_NAME)
    except status.StatusError:
        return {}


def _timeouts(options):
    """One row for the timeouts of forwarded connections, as far as an instance has them."""
    if options.mode != "server":
        return
    key = "conntrack timeouts"
    wish = tuning.Wish("conntrack-timeouts", key, options.conntrack_timeouts, "exact")
    try:
        tables = [one["table"]["name"] for one in firewall.run([{"list": {"tables": None}}]) if "table" in one]
        why_not = None
    except (OSError, firewall.FirewallError) as error:
        tables, why_not = [], getattr(error, "strerror", None) or str(error)
    ours = [name for name in tables if name.endswith(conntrack.SUFFIX) and name.startswith(firewall.PREFIX)]
    if not ours and options.conntrack_timeouts == "short":
        why_not = why_not or "no server that translates addresses runs"
    yield wish, sysctl.Outcome(key, "system", wish.value, "short" if ours else "system", why_not)
