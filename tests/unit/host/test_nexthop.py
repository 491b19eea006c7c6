"""host.nexthop against a kernel that answers with any bytes: a list or an OSError, and an end."""

import contextlib
import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkvpnd.host import nexthop
from bulkvpnd.host.netlink import LISTINGS_MAX
from bulkvpnd.host.nexthop import Netlink

HEADER = struct.Struct("=IHHII")


class Kernel:
    """In place of the socket: answers every request with `messages`, [(type, flags, body)]."""

    def __init__(self, messages):
        self._messages = messages
        self.sent = []

    def send(self, data):
        self.sent.append(data)

    def recv(self, size):
        sequence = HEADER.unpack_from(self.sent[-1])[3]
        return b"".join(
            HEADER.pack(HEADER.size + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) % 4)
            for kind, flags, body in self._messages
        )


def netlink(*messages):
    made = Netlink()
    made._sock, made._sequence = Kernel(messages), 0
    return made


DONE = (nexthop.NLMSG_DONE, 0, struct.pack("=i", 0))
BODIES = st.lists(st.binary(max_size=60), max_size=4)


@given(BODIES)
@settings(deadline=None, max_examples=300)
def test_any_bodies_are_next_hops_or_left_out(bodies):
    answers = [(nexthop.RTM_NEWNEXTHOP, 0, body) for body in bodies]
    with contextlib.suppress(OSError):
        netlink(*answers, DONE).nexthops()


@given(BODIES, st.sampled_from([4, 6]))
@settings(deadline=None, max_examples=300)
def test_any_bodies_are_routes_or_left_out(bodies, version):
    answers = [(nexthop.RTM_NEWROUTE, 0, body) for body in bodies]
    with contextlib.suppress(OSError):
        netlink(*answers, DONE).routes(version)


@given(st.binary(max_size=60), st.integers(0, 0xFFFF))
@settings(deadline=None, max_examples=300)
def test_any_end_is_done_or_an_oserror(body, flags):
    with contextlib.suppress(OSError):
        netlink((nexthop.NLMSG_ERROR, flags, body)).delete(1)


def test_a_listing_that_changed_meanwhile_is_asked_for_again():
    made = netlink((nexthop.NLMSG_DONE, nexthop.NLM_F_DUMP_INTR, struct.pack("=i", 0)))
    with pytest.raises(OSError, match="faster than they can be read"):
        made.nexthops()
    assert len(made._sock.sent) == LISTINGS_MAX


def test_a_table_that_never_had_a_route_is_empty():
    assert netlink((nexthop.NLMSG_ERROR, 0, struct.pack("=i", -errno.ENOENT))).routes(4) == []
    with pytest.raises(FileNotFoundError):
        netlink((nexthop.NLMSG_ERROR, 0, struct.pack("=i", -errno.ENOENT))).delete(1)


def test_the_kernels_reason_is_the_errors():
    request = HEADER.pack(HEADER.size, nexthop.RTM_DELNEXTHOP, 0, 1, 0)
    text = struct.pack("=HH", 4 + 8, nexthop.NLMSGERR_ATTR_MSG) + b"no such\0"
    body = struct.pack("=i", -errno.EINVAL) + request + text
    made = netlink((nexthop.NLMSG_ERROR, nexthop.NLM_F_ACK_TLVS | nexthop.NLM_F_CAPPED, body))
    with pytest.raises(OSError, match="no such") as caught:
        made.delete(1)
    assert caught.value.errno == errno.EINVAL
