"""The table of tips: what is wanted where, on a tree of sysctls in a temporary directory."""

import types

import pytest

from bulkvpnd import config
from bulkvpnd.host import tuning
from bulkvpnd.host.tuning import Situation, Wish

FOUND = {
    "net/core/rmem_max": "212992",
    "net/core/wmem_max": "33554432",
    "net/ipv4/tcp_rmem": "4096 131072 6291456",
    "net/ipv4/tcp_wmem": "4096 16384 4194304",
    "net/core/optmem_max": "20480",
    "net/core/netdev_max_backlog": "1000",
    "net/ipv4/ip_forward": "0",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/bulk0/rp_filter": "0",
}
SERVER = Situation("bulk0", ("veth9",), forwards=True)


def options(**changed):
    """The defaults of all options, but for `changed`."""
    values = {option.field: config.value_of(option, None, "", None) for option in config.OPTIONS}
    return types.SimpleNamespace(**{**values, "mode": "server", **changed})


def wanted(ledger, situation=SERVER, **changed):
    return {wish.key: wish.value for wish in tuning.wishes(options(**changed), situation, ledger)}


def test_applied_and_restored(tree, ledger):
    outcomes = {outcome.key: outcome for _, outcome in tuning.apply(options(), SERVER, ledger)}
    assert outcomes["net.core.rmem_max"].set == "16777216"
    assert (tree / "net/core/wmem_max").read_text() == "33554432\n"
    assert (tree / "net/ipv4/tcp_rmem").read_text() == "4096 131072 16777216\n"
    assert (tree / "net/core/netdev_max_backlog").read_text() == "10000\n"
    ledger.restore()
    assert {key: (tree / key).read_text() for key in FOUND} == {key: value + "\n" for key, value in FOUND.items()}


def test_each_key_that_cannot_be_set_is_one_line(tree, ledger, caplog):
    caplog.set_level("INFO")
    (tree / "net/core/optmem_max").unlink()
    tuning.apply(options(), SERVER, ledger)
    begin = "not tuned: net.core.optmem_max: not 131072: No such"
    assert len([line for line in caplog.messages if line.startswith(begin)]) == 1


@pytest.mark.parametrize("changed", [{}, {"wan_mtu": 1500}, {"mode": "client"}])
@pytest.mark.parametrize("forwards", [False, True])
def test_an_interface_that_is_not_there_is_one_line(ledger, caplog, changed, forwards):
    caplog.set_level("INFO")
    # One that was found by its route, and went, is no mistake of anybody.
    for name, lines in ((None, 0), ("veth9", 1)):
        tuning.apply(options(wan_interface=name, **changed), Situation("bulk0", ("veth9",), forwards), ledger)
        found = [line for line in caplog.messages if "veth9" in line]
        assert len(found) == lines
    assert found[0].startswith("wan-interface = veth9: No such device, so it is not tuned; correct it")


@pytest.mark.parametrize(
    ("of_all", "of_device", "option", "value"),
    [
        ("0", "0", "loose", "nothing"), ("1", "0", "loose", "2"), ("0", "1", "loose", "2"),
        ("2", "1", "loose", "nothing"), ("0", "2", "loose", "nothing"), ("1", "1", "system", None),
    ],
)  # fmt: skip
def test_loose_only_where_it_would_be_strict(tree, ledger, of_all, of_device, option, value):
    (tree / "net/ipv4/conf/all/rp_filter").write_text(of_all)
    (tree / "net/ipv4/conf/bulk0/rp_filter").write_text(of_device)
    assert wanted(ledger, rp_filter=option).get("net/ipv4/conf/bulk0/rp_filter", "nothing") == value


def test_what_is_for_a_machine_that_forwards(ledger):
    assert "rx-udp-gro-forwarding veth9" in wanted(ledger)
    assert "rx-udp-gro-forwarding veth9" not in wanted(ledger, Situation("bulk0", ("veth9",)))


def test_every_outer_device_and_no_device(ledger):
    keys = wanted(ledger, Situation(None, ("veth8", "veth9"), forwards=True))
    assert {"mtu veth8", "mtu veth9"} <= keys.keys()
    assert not any("None" in key or "{" in key for key in keys)
    assert not any("veth" in key for key in wanted(ledger, Situation("bulk0")))


def test_every_tip_has_an_option():
    assert {tip.option for tip in tuning.TIPS} <= {option.name for option in config.OPTIONS}


@pytest.mark.parametrize(("values", "changed", "forwards"), [
    ({}, {}, False),
    ({"net/ipv4/ip_forward": "1"}, {}, True),
    ({"net/ipv6/conf/all/forwarding": "1"}, {}, True),
    ({}, {"nat": True}, True),
    ({"net/ipv4/ip_forward": "1"}, {"mode": "client"}, False),
])
def test_whether_it_forwards(tree, ledger, values, changed, forwards):
    for key, value in values.items():
        (tree / key).parent.mkdir(parents=True, exist_ok=True)
        (tree / key).write_text(value)
    assert tuning.situation(options(**changed), "bulk0", ["127.0.0.1"], ledger).forwards == forwards


def test_the_named_interface_counts_and_loopback_does_not(ledger):
    assert tuning.situation(options(wan_interface="eth7"), "bulk0", [], ledger).outer == ("eth7",)
    assert tuning.situation(options(mode="client"), "bulk0", ["127.0.0.1", "::1"], ledger).outer == ()


def examined(ledger, refused=(), **changed):
    return {wish.key: outcome for wish, outcome in tuning.examine(options(**changed), SERVER, ledger, dict(refused))}


def test_looked_at_before_while_and_after(tree, ledger):
    before = {key: (tree / key).read_text() for key in FOUND}
    row = examined(ledger)["net.core.rmem_max"]
    assert (row.found, row.set, row.why_not) == ("212992", "212992", "no instance wants it")
    assert {key: (tree / key).read_text() for key in FOUND} == before
    assert examined(ledger)["net.core.wmem_max"].why_not is None
    tuning.apply(options(), SERVER, ledger)
    row = examined(ledger)["net.core.rmem_max"]
    assert (row.found, row.set, row.why_not) == ("212992", "16777216", None)
    (tree / "net/core/rmem_max").write_text("4096")
    assert examined(ledger)["net.core.rmem_max"].why_not == "something else has set it since"
    assert examined(ledger)["mtu veth9"].why_not == "No such device"


def test_what_the_instance_could_not_set(tree, ledger):
    refused = {"net.core.rmem_max": "Permission denied", "net.core.wmem_max": "Permission denied"}
    rows = examined(ledger, refused)
    assert rows["net.core.rmem_max"].why_not == "Permission denied"
    assert rows["net.core.optmem_max"].why_not == "no instance wants it"
    assert rows["net.core.wmem_max"].why_not is None, "it is large enough by now"


def test_what_other_parts_want_is_shown_too(ledger):
    key = "net.ipv4.ip_forward"
    assert key not in examined(ledger)
    for value, reason in ((None, "no option asks for it"), ("1", "no instance wants it")):
        (row,) = [one for wish, one in tuning.examine(options(), SERVER, ledger, {}, [Wish("nat", key, value, "exact")])
                  if wish.key == key]
        assert (row.found, row.wanted, row.set, row.why_not) == ("0", value, "0", reason)
    ledger.want(key, "1")
    for others in ([], [Wish("nat", key, None, "exact")], [Wish("nat", key, "1", "exact")]):
        (row,) = [one for wish, one in tuning.examine(options(), SERVER, ledger, {}, others) if wish.key == key]
        assert (row.found, row.wanted, row.set, row.why_not) == ("0", "1", "1", None)


def test_every_tip_is_shown_and_why_it_does_nothing_here(tree, ledger):
    situation = Situation(None, ("lo",))
    rows = {wish.key: (wish.value, outcome.set, outcome.why_not)
            for wish, outcome in tuning.examine(options(), situation, ledger, {})}
    assert rows["net/ipv4/conf/bulk%d/rp_filter"] == (None, None, "there is no TUN device while no instance runs")
    assert rows["txqueuelen bulk%d"] == ("9000", None, "there is no TUN device while no instance runs")
    assert rows["rx-udp-gro-forwarding lo"][::2] == (None, "nothing is forwarded from there into the tunnel")
    assert rows["mtu lo"][::2] == (None, "wan-mtu does not ask for it")
    assert examined(ledger)["net/ipv4/conf/bulk0/rp_filter"].why_not == "it is not strict here"
    assert {key.format(device="bulk%d", outer="lo") for tip in tuning.TIPS for key in tip.keys} <= rows.keys()


def test_a_damaged_ledger_is_the_reason(tree, ledger, tmp_path):
    ledger.want("net.ipv4.ip_forward", "1")
    (file,) = (tmp_path / "shared").glob("sysctl-*.json")
    file.write_text("[")
    assert examined(ledger)["net.core.rmem_max"].why_not == f"{file}: not what this program writes; remove the file"
    file.unlink()


@pytest.mark.parametrize(("value", "shown"), [(None, "auto"), (65536, "65536")])
def test_buffers_are_tried_on_a_socket(ledger, value, shown):
    row = examined(ledger, sndbuf=value)["SO_SNDBUF"]
    assert (row.wanted, row.set, row.why_not) == (shown, shown, None)


def test_a_congestion_control_that_the_kernel_lacks(ledger):
    row = examined(ledger, congestion="frobnicate")["TCP_CONGESTION"]
    assert row.set == row.found and row.why_not == "No such file or directory"
    assert examined(ledger, congestion="system")["TCP_CONGESTION"].why_not is None
