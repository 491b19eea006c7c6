"""How long the kernel remembers connections that are forwarded through the tunnel.

    table inet bulkvpnd_NAME/timeouts, with timeout objects for what comes from or goes to the TUN device
    else, where the kernel has none of these, sysctls for all connections of the machine, through the ledger

The table is apart from the one of host.firewall and written as text: the JSON of libnftables 1.0.6, Debian 12's, drops
the policy of a timeout object without a word (mended in 1.0.8, "parser_json: Wrong check in
json_parse_ct_timeout_policy"). No instance's name has a slash, so no other table has this name.
"""

import logging

from bulkvpnd.host import firewall

log = logging.getLogger(__name__)

TIMEOUTS = {
    # Seconds (choice; docs/design.md, "Tuning"): state of nft(8), {value, sysctl for all connections}.
    "tcp": {
        # RFC 5382, REQ-5: at least 2 hours and 4 minutes. The kernel's 5 days only fill the table.
        "established": (7440, "nf_conntrack_tcp_timeout_established"),
        "fin_wait": (60, "nf_conntrack_tcp_timeout_fin_wait"),
        "last_ack": (15, "nf_conntrack_tcp_timeout_last_ack"),
        "time_wait": (15, "nf_conntrack_tcp_timeout_time_wait"),
        "close": (5, "nf_conntrack_tcp_timeout_close"),
    },
    "udp": {
        # A question and its answer, DNS for one; after two seconds of both directions the other counts.
        "unreplied": (15, "nf_conntrack_udp_timeout"),
        # RFC 4787, REQ-5: not less than 2 minutes.
        "replied": (120, "nf_conntrack_udp_timeout_stream"),
    },
}
SYSCTLS = tuple(f"net.netfilter.{name}" for states in TIMEOUTS.values() for _, name in states.values())
SUFFIX = "/timeouts"
_FAMILIES = {"ip": "ipv4", "ip6": "ipv6"}


class ConntrackTimeouts:
    """A change for host.changes. instance: its name. ledger: host.sysctl.Ledger. nft: runs text of nft(8)."""

    def __init__(self, instance, ledger, nft=None):
        self._table = table_name(instance)
        self._ledger = ledger
        self._nft = nft or firewall.run_text

    def apply(self, device):
        """Shortens them for what is forwarded from and to `device`; raises nothing, but logs one line if it cannot."""
        try:
            self._nft(_text(self._table, device))
            return
        except (OSError, firewall.FirewallError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            log.info("no timeouts for the tunnel's connections alone, so those of all are set: %s", reason)
        for states in TIMEOUTS.values():
            for seconds, name in states.values():
                outcome = self._ledger.want(f"net.netfilter.{name}", str(seconds), "smaller")
                if outcome.why_not:
                    log.info("not tuned: %s", outcome)

    def undo(self):
        """Removes the table, also one that a crashed run of this instance left. The ledger has the rest."""
        try:
            # Adding first makes deleting succeed whether it was there or not.
            self._nft(f"add table inet {self._table}\ndelete table inet {self._table}\n")
        except (OSError, firewall.FirewallError) as error:
            log.debug("table inet %s: %s", self._table, error)


def table_name(instance):
    return firewall.table_name(instance) + SUFFIX


def _text(table, device):
    """The table for nft(8), in one transaction with the removal of an older one. device: [A-Za-z0-9_.-]+."""
    objects, rules = [], []
    for protocol, states in TIMEOUTS.items():
        policy = ", ".join(f"{state} : {seconds}" for state, (seconds, _) in states.items())
        for family, nfproto in _FAMILIES.items():
            name = f"{protocol}_{family}"
            objects.append(f"ct timeout {name} {{ protocol {protocol}; l3proto {family}; policy = {{ {policy} }}; }}")
            rules.append(f'meta nfproto {nfproto} meta l4proto {protocol} ct timeout set "{name}"')
    return "\n".join([
        f"add table inet {table}", f"delete table inet {table}", f"table inet {table} {{",
        *objects,
        "chain shorten {", *rules, "}",
        # Only the first packet of a connection can have its timeouts set.
        "chain forward { type filter hook forward priority mangle; policy accept;",
        f'iifname "{device}" ct state new goto shorten',
        f'oifname "{device}" ct state new goto shorten',
        "}", "}", "",
    ])  # fmt: skip
