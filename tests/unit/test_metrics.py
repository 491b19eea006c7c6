"""bulkvpnd.metrics, read by the client library's own parser."""

import json
import pathlib
import re
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bulkvpnd import metrics

sys.path.insert(0, str(pathlib.Path(__file__).parent / "admin"))

from reports import REPORT, changed  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
NAMES = {f"bulkvpn_{one.name}{'_total' * (one.kind is metrics._COUNTER)}" for one in metrics.METRICS} | {"bulkvpn_info"}


def samples(*reports):
    """{(name, label values in the order of their names ...): value}"""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition(reports).decode()):
        for sample in family.samples:
            key = (sample.name, *(value for _, value in sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def test_what_a_report_becomes():
    found = samples(REPORT)
    assert found["bulkvpn_info", "bulk0", "server", "server", "1"] == 1
    assert found["bulkvpn_sessions", "server"] == 1
    assert found["bulkvpn_dropped_packets_total", "no_session", "server"] == 3
    assert found["bulkvpn_handshakes_pending", "server"] == 2
    assert found["bulkvpn_handshakes_total", "server", "admitted"] == 9
    assert found["bulkvpn_worker_restarts_total", "server", "0"] == 1
    assert found["bulkvpn_session_bytes_total", "in", "server", "alice"] == 5 << 30
    assert found["bulkvpn_session_connections", "server", "alice"] == 2
    assert found["bulkvpn_connection_rtt_seconds", "0", "server", "alice"] == pytest.approx(0.00084)
    assert found["bulkvpn_connection_queue_delay_seconds", "0", "server", "alice"] == pytest.approx(0.01234)
    # What is not known is not said.
    assert ("bulkvpn_connection_rtt_seconds", "1", "server", "alice") not in found


def test_several_instances_and_one_without_anything():
    client = changed(instance="client", mode="client", sessions=[])
    del client["listener"]
    found = samples(REPORT, client)
    assert found["bulkvpn_sessions", "client"] == 0 and found["bulkvpn_sessions", "server"] == 1
    assert ("bulkvpn_handshakes_pending", "client") not in found
    assert samples() == {}


def test_names_follow_the_conventions():
    for metric in metrics.METRICS:
        assert metric.help.endswith(".") and metric.name == metric.name.lower() and not metric.name.endswith("_total")
        assert not any(unit in metric.name for unit in ("_ms", "_kb", "millis"))
    assert len({metric.name for metric in metrics.METRICS}) == len(metrics.METRICS)


def test_the_manual_has_every_metric_and_no_other():
    words = (ROOT / "man" / "bulkvpnctl.8").read_text().split()
    assert {word for word in words if word.startswith("bulkvpn_")} == NAMES


def test_the_dashboard_asks_for_metrics_that_there_are():
    dashboard = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
    asked = {name for panel in dashboard["panels"] for target in panel["targets"]
             for name in re.findall(r"bulkvpn_\w+", target["expr"])}  # fmt: skip
    assert asked and asked <= NAMES


def test_registering_asks_nobody():
    asked = []
    metrics.registry(lambda: asked.append(1) or [])
    assert not asked
