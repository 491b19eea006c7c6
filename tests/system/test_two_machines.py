"""Two machines with a tunnel: what is left of it after a stop, and that it comes back whatever ends one of them."""

import pytest

from machines import BOOTING, Machine

pytestmark = pytest.mark.long


def test_stop_leaves_nothing(pair):
    pair.server.run("systemctl", "stop", "bulkvpnd@server")
    assert not pair.through(4) and not pair.through(6)
    assert pair.server.run("ip", "-o", "link", "show", "type", "tun").stdout == ""
    pair.server.run("systemctl", "start", "bulkvpnd@server")
    pair.wait_through()


def cut_power(machine):
    machine.cut_power()
    machine.start(BOOTING)


@pytest.mark.parametrize("end", ["server", "client"])
@pytest.mark.parametrize("restart", [Machine.reboot, cut_power], ids=["reboot", "power-cut"])
def test_restart(pair, restart, end):
    """The tunnel comes up without anybody's help, and the client has the addresses that it had."""
    addresses = pair.addresses()
    restart(getattr(pair, end))
    assert not pair.through(4) and not pair.through(6), "the cable is cut"
    pair.lay_cable()
    pair.wait_through()
    assert pair.addresses() == addresses
