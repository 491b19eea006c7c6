"""What pyroute2 leaves to its callers: a listing that changed while it was read, and what an error says."""

import errno

from pyroute2.netlink.exceptions import NetlinkDumpInterrupted

LISTINGS_MAX = 10
"""How often a listing that changed meanwhile is asked for again (choice: as several instances start at once)."""
UNSETTLED = "the kernel's tables change faster than they can be read; try again"


def listing(ask, *arguments, **options):
    """What `ask` lists, a method of an IPRoute or of a nexthop.Netlink, as one piece. Returns a list.

    The kernel marks a listing during which something came or went (NLM_F_DUMP_INTR of linux/netlink.h), which may lack
    entries or have them twice, so it is asked for again. Raises OSError when that has no end, and what `ask` raises.
    """
    for _ in range(LISTINGS_MAX):
        try:
            return list(ask(*arguments, **options))
        except NetlinkDumpInterrupted:
            continue
    raise OSError(errno.EINTR, UNSETTLED)


def reason(error):
    """What a NetlinkError says, without its number."""
    return error.args[1] if len(error.args) > 1 else str(error)
