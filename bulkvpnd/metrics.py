"""What instances report, in Prometheus' terms, by its official client library.

    report of control.main --> Collector --> text exposition --> HTTP (control.exporter), or bulkvpnctl metrics

Names follow https://prometheus.io/docs/practices/naming/: base units, and _total for what only grows.
"""

import dataclasses
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

_COUNTER, _GAUGE = CounterMetricFamily, GaugeMetricFamily


@dataclasses.dataclass(frozen=True)
class Metric:
    """A family. name: without bulkvpn_ and _total. labels: beside instance. samples: report -> (values of labels,
    value); a value of None is left out."""

    name: str
    kind: type
    labels: tuple
    help: str
    samples: Callable[[dict], Iterable]


def _of_report(value):
    return lambda report: [((), value(report))]


def _of_workers(value):
    return lambda report: [((str(one["index"]),), value(one)) for one in report["workers"]]


def _of_sessions(value):
    return lambda report: [((one["identity"],), value(one)) for one in report["sessions"]]


def _both_ways(name):
    return lambda report: [
        ((one["identity"], way), one.get(f"{name}_{way}", 0)) for one in report["sessions"] for way in ("in", "out")
    ]


def _of_connections(value):
    return lambda report: [
        ((session["identity"], str(one["index"])), value(one))
        for session in report["sessions"]
        for one in session["connections"]
    ]


def _seconds(name):
    return lambda one: None if one.get(name) is None else one[name] / 1000


def _handshakes(report):
    return [((cause,), count) for cause, count in report.get("listener", {}).items() if cause != "handshakes"]


_SESSION, _WAY, _CONNECTION = ("session",), ("session", "direction"), ("session", "connection")
METRICS = (
    Metric("start_time_seconds", _GAUGE, (), "When the instance started, seconds since 1970.",
           _of_report(lambda report: report["since"])),
    Metric("sessions", _GAUGE, (), "Sessions that are up.", _of_report(lambda report: len(report["sessions"]))),
    Metric("dropped_packets", _COUNTER, ("cause",), "Packets dropped; bulkvpnctl(8) has the causes.",
           lambda report: [((cause,), count) for cause, count in report["drops"].items()]),
    Metric("handshakes_pending", _GAUGE, (), "Connections that are not authenticated yet; servers only.",
           lambda report: [((), report["listener"]["handshakes"])] if "listener" in report else []),
    Metric("handshakes", _COUNTER, ("result",), "Connections by what became of them; servers only.", _handshakes),
    Metric("worker_up", _GAUGE, ("worker",), "Whether the worker answers.", _of_workers(lambda one: int(one["alive"]))),
    Metric("worker_restarts", _COUNTER, ("worker",), "How often the worker was replaced.",
           _of_workers(lambda one: one["restarts"])),
    Metric("worker_tun_packets", _COUNTER, ("worker",), "Packets and super-packets read from the TUN device.",
           _of_workers(lambda one: one.get("counters", {}).get("packets_read"))),
    Metric("worker_tun_batches", _COUNTER, ("worker",), "Batches in which they were read.",
           _of_workers(lambda one: one.get("counters", {}).get("batches"))),
    Metric("session_age_seconds", _GAUGE, _SESSION, "Time since the session began.",
           _of_sessions(lambda one: one.get("age"))),
    Metric("session_connections", _GAUGE, _SESSION, "Connections of the session that are up.",
           _of_sessions(lambda one: len(one["connections"]))),
    Metric("session_connections_agreed", _GAUGE, _SESSION, "Connections that the session should have.",
           _of_sessions(lambda one: one.get("agreed_connections"))),
    Metric("session_bytes", _COUNTER, _WAY, "Bytes on the outer connections.", _both_ways("bytes")),
    Metric("session_packets", _COUNTER, _WAY, "Packets of wire size inside the tunnel.", _both_ways("segments")),
    Metric("session_frames", _COUNTER, _WAY, "Bulk frames.", _both_ways("frames")),
    Metric("connection_rtt_seconds", _GAUGE, _CONNECTION, "Round trip of the last PING through the connection.",
           _of_connections(_seconds("rtt_ms"))),
    Metric("connection_tcp_rtt_seconds", _GAUGE, _CONNECTION, "Round trip as TCP measures it, smoothed.",
           _of_connections(_seconds("tcp_rtt_ms"))),
    Metric("connection_retransmitted_bytes", _COUNTER, _CONNECTION, "Bytes that TCP sent again.",
           _of_connections(lambda one: one.get("bytes_retransmitted"))),
    Metric("connection_queued_bytes", _GAUGE, _CONNECTION, "Bytes that wait in the send queue.",
           _of_connections(lambda one: one.get("queued"))),
    Metric("connection_queue_delay_seconds", _GAUGE, _CONNECTION, "How long what waits longest has waited.",
           _of_connections(_seconds("queue_delay_ms"))),
    Metric("connection_marked_packets", _COUNTER, _CONNECTION, "Packets marked instead of dropped (ECN).",
           _of_connections(lambda one: one.get("marked"))),
)


class Collector:
    """For a prometheus_client registry. reports: () -> reports of instances."""

    def __init__(self, reports):
        self._reports = reports

    def describe(self):
        # So that registering it asks nobody.
        return ()

    def collect(self):
        """Yields every family of METRICS, and bulkvpn_info."""
        reports = self._reports()
        info = InfoMetricFamily("bulkvpn", "The instance.", labels=("instance", "mode", "version", "device"))
        for report in reports:
            info.add_metric((report["instance"], report["mode"], report["version"], report["device"]), {})
        yield info
        for metric in METRICS:
            family = metric.kind(f"bulkvpn_{metric.name}", metric.help, labels=("instance", *metric.labels))
            for report in reports:
                for labels, value in metric.samples(report):
                    if value is not None:
                        family.add_metric((report["instance"], *labels), value)
            yield family


def registry(reports):
    """A prometheus_client registry of the Collector."""
    made = CollectorRegistry(auto_describe=False)
    made.register(Collector(reports))
    return made


def exposition(reports):
    """The text exposition of reports, bytes."""
    return generate_latest(registry(lambda: reports))
