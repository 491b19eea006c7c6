"""What `bulkvpnctl speedtest` makes of what iperf3 and ping say; tests/netns measures."""

import argparse
import io
import json

import pytest
import rich.console
from reports import REPORT, changed

from bulkvpnd.admin import speedtest

ONE = {"bits": 1e9, "rtt_ms": 3.0, "cpu": 0.5, "machine": 0.5, "again": 0.0}


def result(beside=2e9, offload=("csum", "tso"), **fields):
    return {"offload": list(offload),
            "tunnel": {"address": "10.86.0.1", "rtt_idle_ms": 1.0, "out": {**ONE, **fields}, "in": ONE},
            "beside": {"address": "192.0.2.1", "rtt_idle_ms": None,
                       **({"out": {**ONE, "bits": beside}} if beside else {})},
            "bottleneck": {"out": "[x]"}}


@pytest.mark.parametrize(("made", "words"), [
    (result(beside=1.1e9), "the path outside"),
    (result(beside=1.3e9), "not this end"),
    (result(cpu=0.9), "used a whole core"),
    (result(cpu=0.9, offload=()), "busy with single packets"),
    (result(machine=0.9), "has none left"),
    (result(again=0.03), "3 % was sent again"),
    (result(offload=()), "perhaps that offload"),
    (result(beside=None), "measure beside"),
])  # fmt: skip
def test_bottleneck(made, words):
    assert words in speedtest.bottleneck(made, "out")


def test_what_iperf3_says():
    assert speedtest.received('{"end": {"sum_received": {"bits_per_second": 12.5}}}', "x") == 12.5
    with pytest.raises(speedtest.SpeedtestError, match="iperf3 to 10.86.0.1: refused"):
        speedtest.received('{"error": "refused"}', "10.86.0.1")
    for output in ("", "[]", '{"end": {"sum_received": null}}', "[" * 5000):
        with pytest.raises(speedtest.SpeedtestError, match="no result"):
            speedtest.received(output, "x")
    with pytest.raises(speedtest.SpeedtestError) as caught:
        speedtest.received(json.dumps({"error": "a\x1b\nb" * 100}), "x")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 250


def test_what_ping_says():
    assert speedtest.round_trip("rtt min/avg/max/mdev = 0.1/0.25/0.3/0.0 ms") == 0.25
    assert speedtest.round_trip("3 packets transmitted, 0 received") is None


def test_only_a_client_with_a_connection_measures():
    console = rich.console.Console(file=io.StringIO())
    for report in (REPORT, changed(mode="client", session__connections=[])):
        with pytest.raises(speedtest.SpeedtestError, match="--serve"):
            speedtest.measure(lambda: report, None, 1, console)


def test_shown():
    console = rich.console.Console(file=io.StringIO(), width=200)
    made = result(beside=None)
    made["beside"]["why_not"] = "no [answer]"
    speedtest.show(made, console)
    text = console.file.getvalue()
    assert "1.0 Gbit/s" in text and "limit: [x]" in text and "no [answer]" in text


@pytest.mark.parametrize("flags", [["--seconds", "0"], ["--seconds", "61"], ["--beside", "name"]])
def test_wrong_usage(flags, capsys):
    parser = argparse.ArgumentParser()
    speedtest.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(flags)
