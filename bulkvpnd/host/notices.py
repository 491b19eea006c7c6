"""What the kernel tells of changes that others make on this machine, by netlink(7) to whoever subscribes.

    nft flush ruleset        --> of_table()
    ip link set bulk0 down   --> of_device()

Who is too slow loses messages and gets ENOBUFS once instead; that counts as a notice of everything.
"""

import errno
import logging
import socket
import struct
import time

log = logging.getLogger(__name__)

NETLINK_NETFILTER = 12
"""linux/netlink.h"""
NFNLGRP_NFTABLES = 7
"""linux/netfilter/nfnetlink.h; takes CAP_NET_ADMIN."""
RTNLGRP_LINK = 1
RTM_NEWLINK = 16
"""linux/rtnetlink.h"""
IFF_UP = 1
"""linux/if.h"""
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr of linux/netlink.h: length, type, flags, sequence number, port
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg of linux/rtnetlink.h: family, type, index, flags, change
DATAGRAM_MAX = 1 << 17
"""Bytes; the kernel's are of a page or two (choice)."""
PERIOD = 5.0
"""Seconds between two looks where the kernel does not say when (choice)."""


def of_table(name):
    """Yields when it is time to look at the nftables tables whose name begins so: at once, and whenever one changes.

    The own changes count too. Without the subscription it is time every PERIOD.
    """
    try:
        sock = _subscribed(NETLINK_NETFILTER, NFNLGRP_NFTABLES)
    except OSError as error:
        log.info("the kernel gives no notice of changes to nftables, so they are looked for: %s", error.strerror)
        while True:
            yield
            time.sleep(PERIOD)
    with sock:
        yield
        for data in _received(sock):
            # To look in vain costs little, to take the messages apart would save little.
            if data is None or name.encode() in data:
                yield


def of_device(index):
    """Yields whether the device is up whenever that may have changed, None where it is not known. index: of the device.

    Raises OSError.
    """
    with _subscribed(socket.NETLINK_ROUTE, RTNLGRP_LINK) as sock:
        for data in _received(sock):
            if data is None:
                yield None
                continue
            for kind, body in _messages(data):
                if kind == RTM_NEWLINK:
                    _, _, about, flags, _ = _LINK.unpack_from(body)
                    if about == index:
                        yield bool(flags & IFF_UP)


def _subscribed(protocol, group):
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.bind((0, 1 << group - 1))
    except OSError:
        sock.close()
        raise
    return sock


def _received(sock):
    """The datagrams of a subscription, None in place of some that were lost."""
    while True:
        try:
            yield sock.recv(DATAGRAM_MAX)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield None


def _messages(data):
    """[(type, body), ...] of a datagram."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield kind, data[at + _HEADER.size : at + length]
        at += -(-length // 4) * 4
