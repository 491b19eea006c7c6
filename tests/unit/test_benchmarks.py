"""The pure parts of the benchmark: what tools print becomes numbers, and numbers become rows, floors and a report."""

import json
import os
import pathlib
import sys

import pytest

# benchmarks/ is part of the tree and not of the package; at the end, so that the bulkvpnd under test stays the same.
sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import network, relay, report, runner, systems, tests, udp  # noqa: E402
from benchmarks.__main__ import rows_named  # noqa: E402
from benchmarks.trial import TrialError  # noqa: E402

SETTINGS = systems.Settings("/usr/bin/python3", pathlib.Path("/tree"))


def iperf(**end):
    return json.dumps({"end": {name: {"bits_per_second": rate, "bytes": size} for name, (rate, size) in end.items()}})


@pytest.mark.parametrize("text", ["", "iperf3: command not found", "{}", '{"error": "unable to connect"}',
                                  '{"end": {}, "error": "x"}', iperf(sum_sent=(8e6, 9)), iperf(sum_received=(0, 0))])
def test_iperf_without_a_result_is_an_error(text):
    with pytest.raises(TrialError):
        tests.parse_iperf(text)


def test_iperf_error_names_its_reason():
    with pytest.raises(TrialError, match="unable to connect"):
        tests.parse_iperf('{"error": "unable to connect"}')


def test_iperf_counts_what_was_received():
    assert tests.parse_iperf(iperf(sum_sent=(9e9, 900), sum_received=(8e9, 800))) == (8000, 800)


def test_iperf_adds_both_directions():
    text = iperf(sum_sent=(1, 1), sum_received=(8e9, 800), sum_sent_bidir_reverse=(1, 1),
                 sum_received_bidir_reverse=(2e9, 200))  # fmt: skip
    assert tests.parse_iperf(text) == (10000, 1000)


PING = """\
PING 192.0.2.1 (192.0.2.1) 56(84) bytes of data.
64 bytes from 192.0.2.1: icmp_seq=1 ttl=64 time=0.050 ms
64 bytes from 192.0.2.1: icmp_seq=3 ttl=64 time=12 ms
64 bytes from 192.0.2.1: icmp_seq=2 ttl=64 time=1.5 ms
64 bytes from 192.0.2.1: icmp_seq=2 ttl=64 time=1.5 ms (DUP!)

--- 192.0.2.1 ping statistics ---
4 packets transmitted, 3 received, +1 duplicates, 25% packet loss, time 3ms
"""


def test_ping_orders_answers_and_counts_a_loss_as_the_timeout():
    assert tests.parse_ping(PING) == [0.05, 1.5, 12.0, 2000.0]


@pytest.mark.parametrize("text", ["", "ping: connect: Network is unreachable",
                                  "4 packets transmitted, 0 received, 100% packet loss, time 3ms"])
def test_ping_without_an_answer_is_an_error(text):
    with pytest.raises(TrialError):
        tests.parse_ping(text)


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (95, 95), (99, 99), (100, 100), (0, 1)])
def test_percentile_of_a_hundred(percent, expected):
    assert tests.percentile(range(100, 0, -1), percent) == expected


def test_percentile_of_few():
    assert tests.percentile([7], 95) == 7
    assert tests.percentile([1, 2, 3, 4], 95) == 4


def test_reordering_is_counted_within_a_flow_only():
    counter = udp.Counter()
    for flow, number in [(0, 0), (1, 5), (0, 1), (1, 6), (0, 4), (0, 2), (0, 3), (0, 5)]:
        counter.count(flow, number)
    assert (counter.received, counter.reordered) == (8, 2)


def test_relay_holds_a_packet_for_its_delay():
    read_a, write_a = os.pipe2(os.O_NONBLOCK)
    read_b, write_b = os.pipe2(os.O_NONBLOCK)
    direction = relay.Direction(read_a, write_b, 0.02)
    os.write(write_a, b"packet")
    direction.take(5.0)
    assert direction.give(5.0199) == 5.02
    with pytest.raises(BlockingIOError):
        os.read(read_b, 10)
    assert direction.give(5.02) is None
    assert os.read(read_b, 10) == b"packet"
    for descriptor in (read_a, write_a, read_b, write_b):
        os.close(descriptor)


def test_every_row_of_every_test_is_described():
    assert {row for test in tests.TESTS for row in test.rows} == set(tests.ROWS)
    assert {test.link for test in tests.TESTS} == set(network.LINKS)


@pytest.mark.parametrize("name", ["", "tcp", "nonsense", "tcp4,nonsense"])
def test_an_unknown_test_is_an_error(name):
    with pytest.raises(ValueError, match="no such test"):
        rows_named(name)


def test_tests_are_named_one_by_one_or_by_their_first_word():
    assert rows_named("tcp4,udp200_pps") == {"tcp4", "udp200_pps"}
    assert rows_named("shaped") == {"shaped_rtt_ms", "shaped_mbps", "shaped_rtt_p95_ms"}
    assert rows_named("lossy") == {"lossy_mbps", "lossy_rtt_ms", "lossy_ping_loss"}
    assert rows_named("clients") == {row for row in tests.ROWS if row.startswith("clients")}
    assert rows_named("clients4") == {"clients4_mbps", "clients4_cpu_s_per_gb", "clients4_rss_mb"}


@pytest.mark.parametrize("name", ["", "openvpn", "bulkvpnd-", "bulkvpnd-colour-red", "bulkvpnd-workers", "direct@/x",
                                  "bulkvpnd-workers-1-nonsense", "bulkvpnd-instances-0", "bulkvpnd-instances",
                                  "bulkvpnd-instances-100", "bulkvpnd-workers-1-instances-2"])
def test_an_unknown_system_is_an_error(name):
    with pytest.raises(ValueError, match="no such system"):
        systems.system(name, SETTINGS)


@pytest.mark.parametrize(("name", "options", "tree"), [
    ("bulkvpnd", {}, "/tree"),
    ("bulkvpnd@/other", {}, "/other"),
    ("bulkvpnd-connections-1", {"connections": "1"}, "/tree"),
    ("bulkvpnd-frame-size-1024K-cipher-chacha20-poly1305@/x",
     {"frame-size": "1024K", "cipher": "chacha20-poly1305"}, "/x"),
])
def test_bulkvpnd_takes_options_and_a_checkout_from_its_name(name, options, tree):
    system = systems.system(name, SETTINGS)
    assert (system.name, system.options, str(system.settings.tree)) == (name, options, tree)


def test_several_instances_take_options_too():
    system = systems.system("bulkvpnd-instances-4-connections-2@/x", SETTINGS)
    assert (system.count, system.options, str(system.settings.tree)) == (4, {"connections": "2"}, "/x")
    assert not system.several_clients and systems.system("bulkvpnd", SETTINGS).several_clients


def test_every_default_system_exists():
    for name in systems.DEFAULT:
        assert systems.system(name, SETTINGS).name == name


def test_a_system_without_its_command_is_missing():
    system = systems.system("direct", SETTINGS)
    assert system.missing() is None
    system.commands = {"no-such-command": "no-such-package"}
    assert "no-such-package" in system.missing()


def test_rounds_are_outermost_and_only_chosen_tests_are_planned():
    measured = [systems.system(name, SETTINGS) for name in ("direct", "tinc")]
    steps = runner.plan(measured, 2, 5, {"tcp4", "clients4_mbps"})
    assert [(number, system.name, link) for number, system, link, _, _ in steps] == [
        (number, name, link)
        for number in (1, 2)
        for name, link in (("direct", "plain"), ("direct", "star4"), ("tinc", "plain"))
    ]
    assert all(len(wanted) == 1 for _, _, _, wanted, _ in steps)


def test_variants_are_not_measured_where_it_takes_minutes_unless_asked_for():
    measured = [systems.system(name, SETTINGS) for name in ("bulkvpnd", "bulkvpnd-connections-1", "openvpn-tcp-chacha")]
    large = {"besieged", *(f"star{count}" for count in network.CLIENT_COUNTS)}

    def links(chosen):
        found = {}
        for _, system, link, _, _ in runner.plan(measured, 1, 5, chosen):
            found.setdefault(system.name, set()).add(link)
        return found

    assert links(None) == {
        "bulkvpnd": set(network.LINKS),
        "bulkvpnd-connections-1": set(network.LINKS) - large,
        "openvpn-tcp-chacha": set(network.LINKS) - large,
    }
    assert links({"flood_mbps"}) == {"bulkvpnd": {"besieged"}, "bulkvpnd-connections-1": {"besieged"}}


VALUES = {
    ("direct", "tcp1"): [10000, 20000, 15000],
    ("bulkvpnd", "tcp4"): [9000, 6000, 5000],
    ("openvpn-tcp-aes", "tcp4"): [290, 300, 310],
    ("openvpn-tcp-chacha", "tcp4"): [250, 250, 250],
    ("wireguard-go", "tcp4"): [400, 400, 400],
    ("bulkvpnd", "cpu_s_per_gb"): [2, 2, 2],
    ("openvpn-tcp-aes", "cpu_s_per_gb"): [25, 25, 25],
    ("openvpn-tcp-chacha", "cpu_s_per_gb"): [30, 30, 30],
    ("direct", "shaped_rtt_ms"): [0.1, 0.1, 0.1],
    ("bulkvpnd", "shaped_rtt_p95_ms"): [15.05, 15.05, 15.05],
    ("bulkvpnd", "udp_reorder"): [0, 0, 0],
}


def compared(new=False, versions=(), values=VALUES):
    return {text: (value, outcome)
            for text, value, _, outcome in report.compare(report.medians(values), dict(versions), new)}


def test_rows_are_medians_with_units():
    assert report.rows(VALUES)[:2] == [
        {"system": "direct", "test": "tcp1", "value": 15000, "unit": "Mbit/s"},
        {"system": "bulkvpnd", "test": "tcp4", "value": 6000, "unit": "Mbit/s"},
    ]


def test_floors_compare_with_the_best_peer():
    found = compared()
    assert found["TCP 4 streams / OpenVPN TCP"] == (20, "met")
    assert found["CPU seconds per GB / OpenVPN TCP"] == (0.08, "met")
    assert found["TCP 4 streams / direct single stream"] == (0.4, "met")
    assert found["reordered packets within a flow"] == (0, "met")


def test_floors_depend_on_the_version_of_cryptography():
    assert compared(new=True)["TCP 4 streams / direct single stream"] == (0.4, "not met")


def test_a_round_trip_is_compared_by_difference():
    value, outcome = compared()["shaped link: RTT p95 at full load over the idle RTT of the link"]
    assert value == pytest.approx(14.95)
    assert outcome == "met"
    slow = {**VALUES, ("bulkvpnd", "shaped_rtt_p95_ms"): [15.2]}
    assert compared(values=slow)["shaped link: RTT p95 at full load over the idle RTT of the link"][1] == "not met"


def test_what_was_not_measured_says_so():
    found = compared()
    assert found["lossy link / OpenVPN TCP"] == (None, "not measured: openvpn-tcp has no lossy_mbps")


def test_only_a_wireguard_go_with_offload_counts():
    name = "TCP 4 streams / wireguard-go with offload"
    assert compared()[name][1] == "not measured: no wireguard-go with offload was measured"
    old = {"wireguard-go": "wireguard-go v0.0.20220316 (0.0.20220316-1+b4)"}
    assert compared(versions=old)[name][0] is None
    new = {"wireguard-go": "wireguard-go v0.0.20231211"}
    assert compared(versions=new)[name] == (15, "met")


def circumstances(**changes):
    return report.Circumstances(**{"machine": {"kernel": "Linux 6"}, "links": {}, "versions": {"direct": ""},
                                   "missing": {"tinc": "not installed: tincd (tinc)"},
                                   "failures": {("nebula", "tcp4"): "iperf3: nothing was received"},
                                   "new_cryptography": False, **changes})


def test_report_names_missing_and_failed_systems_and_where_a_peer_is_ahead():
    values = {**VALUES, ("bulkvpnd", "idle_rtt_ms"): [1.0], ("openvpn-tcp-aes", "idle_rtt_ms"): [0.3]}
    text = report.markdown(values, circumstances())
    assert "* tinc: not installed: tincd (tinc)" in text
    assert "* nebula, tcp4: iperf3: nothing was received" in text
    assert "| `idle_rtt_ms` | 1 | 0.3 | openvpn-tcp-aes |" in text
    assert "| `tcp4` | Mbit/s | - | 6,000 | 300 | 250 | 400 |" in text


def test_report_shows_just_the_pictures_that_there_are():
    assert "![" not in report.markdown(VALUES, circumstances())
    assert "![a title](a.png)" in report.markdown(VALUES, circumstances(), [("a.png", "a title")])


def test_files_hold_the_rows_alone_and_every_value(tmp_path):
    report.write(VALUES, circumstances(), tmp_path / "report", tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == report.rows(VALUES)
    assert (tmp_path / "report" / "rows.json").read_text() == (tmp_path / "rows.json").read_text()
    run = json.loads((tmp_path / "report" / "run.json").read_text())
    assert run["values"]["bulkvpnd"]["tcp4"] == [9000, 6000, 5000]
    assert run["failures"] == [["nebula", "tcp4", "iperf3: nothing was received"]]
