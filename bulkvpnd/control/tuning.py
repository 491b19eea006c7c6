"""Finds out what is to be tuned for, and has it done: see host.tuning and host.conntrack."""

import gevent

from bulkvpnd.host import conntrack, tuning

RESOLVE_MAX = 3.0
"""Seconds to look for the servers' addresses, by which the outer interface is found (choice)."""


def tune(configuration, name, changes, remote_addresses):
    """Tunes the machine for an instance, as far as it lets itself be tuned; raises nothing.

    name: of the TUN device. changes: host.changes.Changes. remote_addresses(): of the servers, texts; it may take time.
    """
    addresses = []
    # Without an answer it is the default route that leads there, most likely.
    with gevent.Timeout(RESOLVE_MAX, False):
        addresses = remote_addresses()
    if configuration.tuning:
        tuning.apply(configuration, tuning.situation(configuration, name, addresses, changes.ledger), changes.ledger)
    short = configuration.tuning and configuration.conntrack_timeouts == "short"
    # Without translation the kernel may have no reason to remember connections at all, and shall not get one.
    changes.make(conntrack.ConntrackTimeouts(configuration.name, changes.ledger), name,
                 wanted=short and configuration.mode == "server" and configuration.nat)
