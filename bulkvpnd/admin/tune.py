"""``bulkvpnctl tune``: what the machine is tuned with, and the same by hand, without an instance."""

import errno
import json
import os
import pathlib
import sys

import rich.box
import rich.markup
import rich.table

from bulkvpnd import config, pki
from bulkvpnd.admin import screen, status
from bulkvpnd.admin.errors import CommandError
from bulkvpnd.admin.machine import Machine
from bulkvpnd.host import conntrack, device, firewall, gateway, multipath, sysctl, tuning

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
    rows, wrong = _ACTIONS[arguments.action][0](_options(arguments.config))
    if not rows and not wrong and not arguments.json:
        print("nothing is set by hand, so nothing was changed")
    elif arguments.json:
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
    machine = Machine(options)
    rows = tuning.examine(options, situation, ledger, report.get("not_tuned", {}), _others(options, machine))
    return [*rows, *_timeouts(options, ledger), *_cipher(options, machine, report), *_key(options, machine)], None


def _apply(options):
    ledger = _ledger(options)
    rows = tuning.apply(options, tuning.situation(options, None, device.resolve(options.remote), ledger), ledger)
    reasons = [outcome.why_not for _, outcome in rows]
    # In a container some keys cannot be set, whoever asks.
    wrong = f"nothing could be tuned: {reasons[0]}" if reasons and all(reasons) else None
    return rows, f"{wrong}; run it as root" if wrong and os.geteuid() else wrong


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


def _report(options):
    """Of the instance, empty while it does not run."""
    try:
        return status.ask(options.runtime_directory / status.SOCKET_NAME)
    except status.StatusError:
        return {}


def _others(options, machine):
    """What a running instance wants of the kernel beside the tips: [Wish, ...]."""
    askers = machine.forwards_for() if options.mode == "server" else ()
    forwarded = machine.forwarded() if askers else ()
    spread = {wish.prefix.version for wish in options.multipath}
    wanted = [(", ".join(askers), key, version in forwarded) for version, key in gateway.FORWARDING.items()]
    wanted += [("multipath", key, version in spread) for version, key in multipath.HASH_POLICY.items()]
    return [tuning.Wish(option, key, "1" if is_wanted else None, "exact") for option, key, is_wanted in wanted]


def _timeouts(options, ledger):
    """One row for the timeouts of forwarded connections, as far as an instance has them."""
    if options.mode != "server":
        return
    key = "conntrack timeouts"
    wish = tuning.Wish("conntrack-timeouts", key, options.conntrack_timeouts, "exact")
    now, why_not = "system", None
    try:
        tables = [one["table"]["name"] for one in firewall.run([{"list": {"tables": None}}]) if "table" in one]
        ours = [name for name in tables if name.startswith(firewall.PREFIX) and name.endswith(conntrack.SUFFIX)]
        # Without a configuration any instance is meant.
        if (conntrack.table_name(options.name) in ours) if options.path.name else ours:
            now = "short"
    except OSError as error:
        now, why_not = None, error.strerror + ("; run it as root to see" if error.errno == errno.EPERM else "")
    except firewall.FirewallError as error:
        now, why_not = None, str(error)
    if any(map(ledger.is_wanted, conntrack.SYSCTLS)):
        now, why_not = "short", "for all connections, since the kernel has none for the tunnel's alone"
    if now != wish.value and why_not is None:
        why_not = "no instance wants it" if options.nat else "only with nat = yes"
    yield wish, sysctl.Outcome(key, "system", wish.value, now, why_not)


def _cipher(options, machine, report):
    """One row: what the sessions use, and without any what is the fastest here or insisted on."""
    used = sorted({session["cipher"] for session in report.get("sessions", ())})
    yield (tuning.Wish("cipher", "cipher", options.cipher, "exact"),
           sysctl.Outcome("cipher", None, options.cipher, ", ".join(used) or machine.cipher()))


def _key(options, machine):
    """One row for the kind of this end's key, on which it depends how long a handshake takes."""
    if options.certificate is None:
        return
    kind = None
    try:
        kind = pki.kind_of_key(machine.pem("certificate"))
        why_not = "handshakes are slower; bulkvpnctl pki makes elliptic curve keys" if kind.startswith("RSA") else None
    except (pki.PKIError, config.ConfigurationError) as error:
        why_not = str(error)
    yield (tuning.Wish("certificate", "key", "elliptic curve", "exact"),
           sysctl.Outcome("key", None, "elliptic curve", kind, why_not))
