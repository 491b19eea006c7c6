"""What is measured: a table of tests, each a function on a trial that returns {row: value}.

Rows and units are in ROWS. A value is what one measurement gave; the report takes medians over the rounds.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable

from benchmarks import network
from benchmarks.trial import TrialError

IPERF_PORT, UDP_PORT = 5201, 5300
PING_INTERVAL = 0.01
"""Seconds."""
PING_TIMEOUT = 2
"""Seconds. A ping without an answer counts as one that took this long."""
RAMP = 1
"""Seconds at the start of a load whose round trips do not count: connections open their windows (choice)."""
LISTEN_TIMEOUT = 10
"""Seconds."""
UDP_FLOWS = 4
FLOOD_SIZE, FLOOD_PAIRS = 10000, 3
"""Connections; measurements without and with them."""
FLOOD_TIMEOUT = 60
"""Seconds in which they have to be made."""
LOSSY_STREAMS = 16
"""Inner TCP streams on the lossy link: enough to use every connection of a session. All of these are choices."""
REORDER_FLOWS, REORDER_SIZES = 16, (64, 1400, 200, 28, 700)
"""Flows and sizes that bulkvpnd's connections and workers get mixed."""

ROWS = {
    # name: (unit, whether more is better, what it is)
    "tcp1": ("Mbit/s", True, "TCP, 1 stream, client to server"),
    "tcp4": ("Mbit/s", True, "TCP, 4 streams"),
    "tcp16": ("Mbit/s", True, "TCP, 16 streams"),
    "tcp4_reverse": ("Mbit/s", True, "TCP, 4 streams, server to client"),
    "tcp4_both": ("Mbit/s", True, "TCP, 4 streams each way at once, sum"),
    "loaded_rtt_ms": ("ms", False, "round trip during tcp4, median"),
    "loaded_rtt_p95_ms": ("ms", False, "round trip during tcp4, 95th percentile"),
    "cpu_s_per_gb": ("s/GB", False, "CPU seconds of both ends for each GB received, during tcp4"),
    "cpu_server_s_per_gb": ("s/GB", False, "of the server alone"),
    "cpu_client_s_per_gb": ("s/GB", False, "of the client alone"),
    "rss_mb": ("MB", False, "memory of both ends after tcp4, shared pages once (PSS)"),
    "rss_server_mb": ("MB", False, "of the server alone"),
    "rss_client_mb": ("MB", False, "of the client alone"),
    "udp64_pps": ("packets/s", True, "UDP datagrams of 64 bytes delivered"),
    "udp64_loss": ("%", False, "of them lost, of as many as one core can send"),
    "udp200_pps": ("packets/s", True, "UDP datagrams of 200 bytes delivered"),
    "udp200_loss": ("%", False, "of them lost"),
    "udp1400_mbps": ("Mbit/s", True, "UDP datagrams of 1400 bytes delivered"),
    "udp1400_loss": ("%", False, "of them lost"),
    "udp_reorder": ("packets", False, "datagrams that came after a later one of their flow, 16 flows of mixed sizes"),
    "flood_mbps": ("Mbit/s", True, "besieged link: TCP, 4 streams, during the flood"),
    "flood_loss": ("%", False, "of what passed right before it, median of three pairs"),
    "idle_rtt_ms": ("ms", False, "round trip without load, median"),
    "idle_rtt_p95_ms": ("ms", False, "95th percentile"),
    "idle_rtt_p99_ms": ("ms", False, "99th percentile"),
    "shaped_rtt_ms": ("ms", False, "shaped link: round trip without load, median"),
    "shaped_mbps": ("Mbit/s", True, "shaped link: TCP, 4 streams"),
    "shaped_rtt_p95_ms": ("ms", False, "shaped link: round trip during these, 95th percentile"),
    "lossy01_mbps": ("Mbit/s", True, "lossy link, 0.1 %: TCP, 16 streams"),
    "lossy_mbps": ("Mbit/s", True, "lossy link, 1 %: TCP, 16 streams"),
    "lossy_rtt_ms": ("ms", False, "lossy link, 1 %: round trip without load, median"),
    "lossy_ping_loss": ("%", False, "lossy link, 1 %: pings without an answer; outside a tunnel 2 % are expected"),
    **{
        f"clients{count}_{row}": (unit, more, f"{count} client{'s' if count > 1 else ''} at once: {text}")
        for count in network.CLIENT_COUNTS
        for row, unit, more, text in (
            ("mbps", "Mbit/s", True, "TCP, 1 stream each, sum"),
            ("cpu_s_per_gb", "s/GB", False, "CPU seconds of the server for each GB"),
            ("rss_mb", "MB", False, "memory of the server"),
        )
    },
}


def tcp(trial, streams, reverse=False, both=False):
    """iperf3 through the system for the trial's seconds. Returns (Mbit/s, bytes received)."""
    with _iperf_server(trial, trial.inner, IPERF_PORT):
        with _iperf_client(trial, trial.client, trial.inner, IPERF_PORT, streams, reverse, both) as client:
            return parse_iperf(client.finish(trial.seconds))


def tcp_with_ping(trial, streams):
    """tcp() and, meanwhile, pings. Returns (Mbit/s, bytes received, [round trip in ms])."""
    with _iperf_server(trial, trial.inner, IPERF_PORT):
        with _iperf_client(trial, trial.client, trial.inner, IPERF_PORT, streams) as client:
            with _ping(trial, trial.seconds) as ping:
                rate, received = parse_iperf(client.finish(trial.seconds))
                times = parse_ping(ping.finish(PING_TIMEOUT))
    return rate, received, times[int(min(RAMP, trial.seconds / 2) / PING_INTERVAL):]


def udp(trial, flows, sizes):
    """Datagrams through the system for the trial's seconds. Returns what both ends of udp.py say, as one dictionary."""
    arguments = (trial.inner, UDP_PORT, trial.seconds)
    with trial.start_tool(trial.server, trial.python("udp", "receive", *arguments)) as receiver:
        trial.wait(lambda: trial.server.run(["ss", "-Huln", f"sport = :{UDP_PORT}"]).stdout, LISTEN_TIMEOUT)
        with trial.start_tool(trial.client, trial.python("udp", "send", *arguments, flows,
                                                         ",".join(map(str, sizes)))) as sender:
            sent = sender.finish(trial.seconds)
            received = receiver.finish(trial.seconds)
    try:
        return {**json.loads(sent), **json.loads(received)}
    except ValueError:
        raise TrialError(f"udp: no result: {(sent + received).strip().splitlines()[-1:]}") from None


def throughput(row, **options):
    def test(trial):
        return {row: tcp(trial, **options)[0]}

    return test


def loaded(trial):
    """tcp4, with everything that is looked at under its load."""
    before = trial.cpu_seconds()
    rate, received, times = tcp_with_ping(trial, 4)
    found = {"tcp4": rate, "loaded_rtt_ms": percentile(times, 50), "loaded_rtt_p95_ms": percentile(times, 95)}
    if not before:  # no tunnel, no processes
        return found
    used = {role: (seconds - before[role]) / (received / 1e9) for role, seconds in trial.cpu_seconds().items()}
    held = {role: size / 1e6 for role, size in trial.memory().items()}
    return {
        **found,
        "cpu_s_per_gb": sum(used.values()), **{f"cpu_{role}_s_per_gb": value for role, value in used.items()},
        "rss_mb": sum(held.values()), **{f"rss_{role}_mb": value for role, value in held.items()},
    }  # fmt: skip


def datagrams(row, size):
    name = row.partition("_")[0]

    def test(trial):
        result = udp(trial, UDP_FLOWS, [size])
        packets = result["in_time"] / result["seconds"]
        return {row: result["bytes"] * 8 / result["seconds"] / 1e6 if row.endswith("mbps") else packets,
                f"{name}_loss": 100 * (1 - result["received"] / result["sent"])}

    return test


def reordering(trial):
    return {"udp_reorder": udp(trial, REORDER_FLOWS, REORDER_SIZES)["reordered"]}


def idle(trial):
    times = _idle_times(trial, trial.seconds)
    return {"idle_rtt_ms": percentile(times, 50), "idle_rtt_p95_ms": percentile(times, 95),
            "idle_rtt_p99_ms": percentile(times, 99)}


def besieged(trial):
    """Without the flood and with it, by turns: the machine may be slower for a while."""
    pairs = []
    for _ in range(FLOOD_PAIRS):
        before = tcp(trial, 4)[0]
        planned = trial.seconds + LISTEN_TIMEOUT
        with trial.start_tool(trial.client, trial.python("flood", trial.address, trial.system.port, FLOOD_SIZE, planned,
                                                         network.FLOOD_NETWORK)) as flood:
            if not trial.wait(lambda: flood.text(), FLOOD_TIMEOUT) or not flood.text().startswith("ready"):
                raise TrialError(f"flood: is not up: {flood.text().strip().splitlines()[-1:]}")
            pairs.append((before, tcp(trial, 4)[0]))
    return {"flood_mbps": percentile([during for _, during in pairs], 50),
            "flood_loss": percentile([100 * (1 - during / before) for before, during in pairs], 50)}


def on_shaped_link(trial):
    quiet = percentile(_idle_times(trial, 2), 50)
    rate, _, times = tcp_with_ping(trial, 4)
    return {"shaped_rtt_ms": quiet, "shaped_mbps": rate, "shaped_rtt_p95_ms": percentile(times, 95)}


def on_lossy_link(trial):
    times = _idle_times(trial, 2)
    lost = sum(time >= PING_TIMEOUT * 1000 for time in times)
    return {"lossy_rtt_ms": percentile(times, 50), "lossy_ping_loss": 100 * lost / len(times),
            "lossy_mbps": tcp(trial, LOSSY_STREAMS)[0]}


def with_clients(count):
    """One stream from each client at once."""

    def test(trial):
        before = trial.cpu_seconds()
        with contextlib.ExitStack() as stack:
            for index in range(count):
                stack.enter_context(_iperf_server(trial, trial.inner, IPERF_PORT + index))
            clients = [stack.enter_context(_iperf_client(trial, host, trial.inner, IPERF_PORT + index, 1))
                       for index, host in enumerate(trial.network.clients)]
            results = [parse_iperf(client.finish(trial.seconds)) for client in clients]
        found = {f"clients{count}_mbps": sum(rate for rate, _ in results)}
        if before:
            used = trial.cpu_seconds()["server"] - before["server"]
            found[f"clients{count}_cpu_s_per_gb"] = used / (sum(received for _, received in results) / 1e9)
            found[f"clients{count}_rss_mb"] = trial.memory()["server"] / 1e6
        return found

    return test


@dataclasses.dataclass(frozen=True, slots=True)
class Test:
    """link: of network.LINKS. run: Trial to {row: value}. factor: its time, in measurements. rows: that it gives."""

    link: str
    run: Callable
    factor: float
    rows: tuple


TESTS = (
    Test("plain", idle, 1, ("idle_rtt_ms", "idle_rtt_p95_ms", "idle_rtt_p99_ms")),
    Test("plain", throughput("tcp1", streams=1), 1, ("tcp1",)),
    Test("plain", loaded, 1, ("tcp4", "loaded_rtt_ms", "loaded_rtt_p95_ms", "cpu_s_per_gb", "cpu_server_s_per_gb",
                              "cpu_client_s_per_gb", "rss_mb", "rss_server_mb", "rss_client_mb")),
    Test("plain", throughput("tcp16", streams=16), 1, ("tcp16",)),
    Test("plain", throughput("tcp4_reverse", streams=4, reverse=True), 1, ("tcp4_reverse",)),
    Test("plain", throughput("tcp4_both", streams=4, both=True), 1, ("tcp4_both",)),
    Test("plain", datagrams("udp64_pps", 64), 1.3, ("udp64_pps", "udp64_loss")),
    Test("plain", datagrams("udp200_pps", 200), 1.3, ("udp200_pps", "udp200_loss")),
    Test("plain", datagrams("udp1400_mbps", 1400), 1.3, ("udp1400_mbps", "udp1400_loss")),
    Test("plain", reordering, 1.3, ("udp_reorder",)),
    Test("besieged", besieged, 3 * FLOOD_PAIRS, ("flood_mbps", "flood_loss")),
    Test("shaped", on_shaped_link, 1.5, ("shaped_rtt_ms", "shaped_mbps", "shaped_rtt_p95_ms")),
    Test("lossy01", throughput("lossy01_mbps", streams=LOSSY_STREAMS), 1, ("lossy01_mbps",)),
    Test("lossy", on_lossy_link, 1.5, ("lossy_rtt_ms", "lossy_ping_loss", "lossy_mbps")),
    *(
        Test(f"star{count}", with_clients(count), 1.5,
             tuple(f"clients{count}_{row}" for row in ("mbps", "cpu_s_per_gb", "rss_mb")))
        for count in network.CLIENT_COUNTS
    ),
)


def percentile(values, percent):
    """The nearest-rank percentile: the smallest value that at least `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def parse_iperf(text):
    """(Mbit/s, bytes) that were received, in both directions, from iperf3's JSON. Raises TrialError."""
    try:
        report = json.loads(text)
        if "error" in report:
            raise ValueError(report["error"])
        sums = [value for key, value in report["end"].items() if key.startswith("sum_received")]
        rate, received = (sum(one[name] for one in sums) for name in ("bits_per_second", "bytes"))
    except (ValueError, KeyError) as error:
        raise TrialError(f"iperf3: {error}") from None
    if not received:
        raise TrialError("iperf3: nothing was received")
    return rate / 1e6, received


def parse_ping(text):
    """Round trips in ms, in the order they were sent, from ping's output. Raises TrialError if none came back."""
    total = re.search(r"(\d+) packets transmitted", text)
    answers = {int(number): float(time) for number, time in re.findall(r"icmp_seq=(\d+) .*?time=([0-9.]+) ms", text)}
    if not total or not answers:
        raise TrialError("ping: no answer")
    return [answers.get(number, PING_TIMEOUT * 1000.0) for number in range(1, int(total[1]) + 1)]


def _idle_times(trial, seconds):
    with _ping(trial, seconds) as ping:
        return parse_ping(ping.finish(seconds + PING_TIMEOUT))


def _ping(trial, seconds):
    return trial.start_tool(trial.client, ["ping", "-n", "-c", round(seconds / PING_INTERVAL), "-i", PING_INTERVAL,
                                           "-W", PING_TIMEOUT, trial.inner])


@contextlib.contextmanager
def _iperf_server(trial, address, port):
    with trial.start_tool(trial.server, ["iperf3", "--server", "--one-off", "--bind", address, "--port", port]) as tool:
        if not trial.wait(lambda: trial.server.listening(port), LISTEN_TIMEOUT):
            raise TrialError(f"iperf3: does not listen: {tool.text().strip()}")
        yield


def _iperf_client(trial, host, address, port, streams, reverse=False, both=False):
    return trial.start_tool(host, ["iperf3", "--json", "--client", address, "--port", port, "--time", trial.seconds,
                                   "--parallel", streams, "--connect-timeout", "10000",
                                   *(["--reverse"] if reverse else []), *(["--bidir"] if both else [])])
