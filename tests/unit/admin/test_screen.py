"""admin.screen: how reports look on a terminal."""

import os

import pytest
import rich.console
from reports import REPORT, changed

from bulkvpnd.admin import screen


def text_of(renderable, width=220):
    console = rich.console.Console(width=width, record=True, file=open(os.devnull, "w"), highlight=False)
    console.print(renderable)
    return console.export_text()


def shown(*reports, width=220):
    return text_of(screen.instances(reports, width), width)


def test_an_instance_that_is_well():
    text = shown(REPORT)
    for part in (
        "● server  well", "process 7, version 1", "bulk0 10.86.0.1/24", "csum tso", "2 of 2 alive, 1 restarts",
        "of the bytes 75.0 %, 25.0 %", "no_session 3", "accept   2 now, admitted 9, source full 4",
        "alice  10.86.0.2 from 2001:db8::2 192.0.2.1  aes-256-gcm  up 1m 1s  out 1.5 Mbit/s, 1.0 MiB  in 2.0 Gbit/s, "
        "5.0 GiB",
        "[2001:db8::2]:4711", "1d 1h", "0.8 ms", "1.0 k / 999",
        "1.5 KiB / 3.0 GiB", "1,234,567 / 1", "2 / 3", "1.0 %",
        "2.0 KiB", "12.3 ms", "bbr",
    ):  # fmt: skip
        assert part in text, part
    assert "queue_full" not in text and "problem" not in text


def test_one_that_is_not_says_why_and_what_mends_it():
    text = shown(changed(mode="client", session__connections=[], offload=[]))
    assert "● server  1 problem " in text
    assert "problem  no connection to the server\n           bulkvpnctl doctor server\n" in text
    assert "\n    no connection\n" in text
    assert "note     no offload" in text
    assert "2 problems" in shown(changed(drops={"foreign_source": 1}, session__agreed_connections=3))


def test_a_client_without_a_session():
    report = changed(mode="client", sessions=[], addresses=[], offload=[], drops={})
    text = shown({name: value for name, value in report.items() if name != "listener"})
    assert "accept" not in text
    for part in ("sessions none", "no address yet", "offload  none", "drops    none"):
        assert part in text


def test_a_client_shows_the_server_s_addresses_in_the_tunnel():
    assert "  server " not in shown(REPORT)
    report = changed(mode="client", addresses=["10.86.0.7/24", "fd86::7/64", "10.9.9.9/32"])
    assert "  server   10.86.0.1 fd86::1 10.9.9.9\n" in shown(report)
    # Its session is with the server, which has other addresses than the client's own.
    assert "alice  at 2001:db8::2 192.0.2.1  aes-256-gcm" in shown(report)


@pytest.mark.parametrize("width", [60, 80])
def test_what_is_too_wide_goes_on_below_its_beginning(width):
    lines = shown(changed(drops={"foreign_source": 1}), width=width).splitlines()
    assert max(map(len, lines)) <= width
    start = next(number for number, line in enumerate(lines) if line.startswith("  problem  1 packet came"))
    end = next(number for number, line in enumerate(lines) if line.startswith("  device "))
    assert end > start + 2 and all(line.startswith(" " * 11) for line in lines[start + 1 : end])
    assert "\n    out 1.5 Mbit/s, 1.0 MiB" in "\n".join(lines)
    session = next(number for number, line in enumerate(lines) if line.startswith("  alice  10.86.0.2 from "))
    assert lines[session + 1].startswith(" " * (4 if width == 80 else 9))


def test_networks_behind_a_client():
    assert "behind it" not in shown(changed(session__networks=[]))
    networks = ["192.168.7.0/24", "fd07::/64"]
    assert "    behind it  192.168.7.0/24 fd07::/64\n" in shown(changed(session__networks=networks))


def test_nothing_in_a_report_is_markup():
    strange = [{**REPORT["sessions"][0], "identity": "[green]z[/green]"}]
    text = shown(changed(instance="[red]x[/red]", device="[bold]", version="[b]", sessions=strange))
    for part in ("[red]x[/red]", "device   [bold]", "version [b]", "[green]z[/green]"):
        assert part in text
    for text in (text_of(screen.sessions([changed(instance="[red]x[/red]", sessions=strange)], {}, 200)),
                 text_of(screen.summaries([changed(instance="[red]x[/red]")]))):  # fmt: skip
        assert "[red]x[/red]" in text


@pytest.mark.parametrize("width", [40, 80, 120, 160, 220])
def test_a_narrow_terminal_shows_less_and_cuts_nothing(width):
    text = text_of(screen.connections(REPORT["sessions"][0]["connections"], width), width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for part, least in (("0.8 ms", 40), ("bit/s out / in", 40), ("[2001:db8::2]:4711", 120), ("congestion", 160)):
        assert (part in text) == (width >= least), part


def test_80_columns_have_what_says_whether_a_connection_is_well():
    busy = {"index": 3, "worker": 1, "peer": "203.0.113.241:34672", "age": 90061, "rtt_ms": 126.4,
            "bytes_out": 250 << 20, "bytes_in": 252 << 20, "rate_out": 154.8e6, "rate_in": 308e6, "queued": 1 << 20,
            "queue_delay_ms": 42.3, "bytes_retransmitted": 1 << 20, "congestion": "bbr"}  # fmt: skip
    text = text_of(screen.connections([busy], 80), 80)
    for part in ("worker", "126.4 ms", "154.8 M / 308.0 M", "250.0 MiB / 252.0 MiB", "0.4 %", "42.3 ms"):
        assert part in text, part


def test_sessions_the_busiest_first():
    quiet = {**REPORT["sessions"][0], "identity": "bob", "rate_in": 0, "rate_out": 0}
    report = changed(sessions=[quiet, *REPORT["sessions"]])
    text = text_of(screen.sessions([report], {("server", "alice", "in"): [0, 5, 10]}, 200))
    assert text.index("alice") < text.index("bob")
    assert " ▄█" in text and "2.0 Gbit/s" in text and "2 of 2" in text and "12.3 ms" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, 180])
def test_a_narrow_terminal_shows_fewer_of_each_session(width):
    rates = {("server", "alice", way): [0, 5] * 10 for way in ("in", "out")}
    text = text_of(screen.sessions([REPORT], rates, width), width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert "alice" in text
    for part, least in (("1.5 Mbit/s", 40), ("2.0 Gbit/s", 40), ("█", 60), ("0.8 ms", 80), ("resent", 80),
                        ("2 of 2", 100), ("10.86.0.2 ", 120)):
        assert (part in text) == (width >= least), part


def test_summaries():
    assert "● server  well" in text_of(screen.summaries([REPORT]))
    assert "● server  no offload" in text_of(screen.summaries([changed(offload=[])]))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m 59s"), (3600, "1h"), (86399, "23h 59m"), (90061, "1d 1h"),
     (86400 * 400, "400d")],
)  # fmt: skip
def test_spans_have_their_two_largest_units(seconds, text):
    assert screen.span(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (5 << 40, "5.0 TiB"),
     (1 << 60, "1048576.0 TiB")],
)  # fmt: skip
def test_sizes(count, text):
    assert screen.size(count) == text


@pytest.mark.parametrize(
    ("bits", "text"),
    [(0, "0 bit/s"), (999, "999 bit/s"), (1000, "1.0 kbit/s"), (2_500_000, "2.5 Mbit/s"), (4e9, "4.0 Gbit/s"),
     (5e12, "5000.0 Gbit/s")],
)  # fmt: skip
def test_rates(bits, text):
    assert screen.rate(bits) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [([], "    "), ([0, 0], "    "), ([8], "   █"), ([1, 8], "  ▁█"), ([0.001, 8], "  ▁█"), ([9, 1, 2, 4, 8], "▁▂▄█")],
)  # fmt: skip
def test_sparklines(values, text):
    assert screen.sparkline(values, 4) == text
