"""Everything of a host's network that a daemon could have changed, before and after.

    before = snapshot.take(host)
    ...
    assert snapshot.differences(before, snapshot.take(host)) == []
"""

import json
import pathlib

from harness import inside, wait_until

COMMANDS = {
    # part: the command that shows it as JSON
    "link": ["ip", "-j", "-d", "link"],
    "address": ["ip", "-j", "address"],
    "route": ["ip", "-j", "-4", "route", "show", "table", "all"],
    "route of IPv6": ["ip", "-j", "-6", "route", "show", "table", "all"],
    "rule": ["ip", "-j", "-4", "rule"],
    "rule of IPv6": ["ip", "-j", "-6", "rule"],
    "nexthop": ["ip", "-j", "nexthop"],
    "nftables": ["nft", "-j", "list", "ruleset"],
}
PASSING = {"metainfo", "handle"}
"""Keys of `nft -j` that count changes or name the program, and say nothing of what is there."""
VOLATILE = ("net/netfilter/nf_conntrack_count", "net/ipv6/conf/*/stable_secret", "net/ipv4/tcp_fastopen_key")
"""Sysctls that change by themselves or cannot be read."""
LOADED = ("net/netfilter/", "net/ipv4/vs/", "net/bridge/", "net/nf_conntrack_max")
"""Sysctls that appear when the kernel loads a module, which nobody unloads again."""


def take(host):
    """{part: {name: value}} of a namespaces.Host, and its sysctls and device features beside what COMMANDS has."""
    wait_until(lambda: _is_settled(host), 10, f"{host.name} is settled")
    found = {part: _named(part, host.run(command).stdout) for part, command in COMMANDS.items()}
    devices = [entry["ifname"] for entry in found["link"].values()]
    found["sysctl"] = _sysctls(host)
    found["feature"] = {
        f"{device} {line.strip()}": True
        for device in devices
        for line in host.run(["ethtool", "-k", device], check=False).stdout.splitlines()[1:]
    }
    return found


def differences(before, after):
    """One line for each thing that came, went or changed."""
    lines = []
    for part in before:
        for name in sorted({*before[part], *after[part]}):
            old, new = before[part].get(name), after[part].get(name)
            if old is None and part == "sysctl" and name.startswith(LOADED):
                continue
            if old != new:
                lines.append(f"{part} {name}: {_shown(old)} -> {_shown(new)}")
    return lines


def _is_settled(host):
    """Whether addresses that are being looked for elsewhere (RFC 4862) are in use, and the links of devices known."""
    devices = json.loads(host.run(COMMANDS["address"]).stdout)
    return not any(address.get("tentative") for one in devices for address in one["addr_info"]) and all(
        # LOWER_UP is there at once; the kernel's linkwatch takes up to a second to draw the conclusions.
        one["operstate"] in ("UP", "UNKNOWN") for one in devices if {"UP", "LOWER_UP"} <= set(one["flags"])
    )


def _named(part, text):
    entries = json.loads(text or "[]")
    entries = _without_passing(entries)
    if part == "nftables":
        entries = [entry for entry in entries["nftables"] if entry]
        # The order of rules in a chain counts, so each has its place in its name.
        return {f"{place} {json.dumps(entry, sort_keys=True)}": True for place, entry in enumerate(entries)}
    if part in ("link", "address"):
        return {entry["ifname"]: entry for entry in entries}
    return {json.dumps(entry, sort_keys=True): True for entry in entries}


def _without_passing(value):
    if isinstance(value, dict):
        return {key: _without_passing(inner) for key, inner in value.items() if key not in PASSING}
    if isinstance(value, list):
        return [_without_passing(inner) for inner in value]
    return value


def _sysctls(host):
    found = {}
    root = pathlib.Path("/proc/sys")
    with inside(host):
        for path in (root / "net").rglob("*"):
            name = str(path.relative_to(root))
            if path.is_file() and not any(pathlib.PurePath(name).match(pattern) for pattern in VOLATILE):
                try:
                    found[name] = " ".join(path.read_text().split())
                except OSError:
                    # Some can only be written, as net/ipv4/route/flush.
                    continue
    return found


def _shown(value):
    return "nothing" if value is None else value if isinstance(value, str) else json.dumps(value, sort_keys=True)
