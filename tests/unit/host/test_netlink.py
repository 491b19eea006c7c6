"""Listings of the kernel's that change while they are read."""

import errno

import pytest
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from bulkvpnd.host.netlink import LISTINGS_MAX, listing


class Table:
    """Answers like IPRoute: what it has, and then that it changed, as often as `changes` says."""

    def __init__(self, changes):
        self.left = changes

    def ask(self, *arguments, **options):
        yield arguments, options
        if self.left:
            self.left -= 1
            raise NetlinkDumpInterrupted


@pytest.mark.parametrize("changes", [0, 1, LISTINGS_MAX - 1])
def test_a_listing_that_changed_is_asked_for_again(changes):
    table = Table(changes)
    assert listing(table.ask, "dump", family=2) == [(("dump",), {"family": 2})], "one of them, and not twice"
    assert table.left == 0


def test_one_that_never_stands_still_is_an_error():
    table = Table(LISTINGS_MAX + 1)
    with pytest.raises(OSError) as caught:
        listing(table.ask)
    assert caught.value.errno == errno.EINTR and table.left == 1


def test_other_errors_are_not_repeated():
    def ask():
        raise NetlinkError(errno.EPERM, "not permitted")

    with pytest.raises(NetlinkError):
        listing(ask)
