"""``bulkvpnctl speedtest``: what a running tunnel carries, what the path beside it carries, and what limits it.

    server   speedtest --serve [--beside ADDRESS]     iperf3 -s -1 on the tunnel's addresses, and that one, for a time
    client   speedtest                                ping alone, then iperf3 in each direction with a ping beside it

iperf3(1) and ping(8) do the measuring; nothing is changed on either machine. iperf3 lets in whoever reaches its port,
so it listens on single addresses only, for a limited time, and takes one test after the other.

What goes beside a full tunnel is bound to the device that leads outside, since iperf3 can set no mark: the table of the
tunnel has no route by that device, so the kernel goes on to the table main. Where a kill switch lets nothing out there
is no measurement, never a wrong one.
"""

import argparse
import dataclasses
import ipaddress
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import rich.box
import rich.console
import rich.markup
import rich.table

from bulkvpnd.admin import screen, status
from bulkvpnd.admin.demo import cpu_seconds
from bulkvpnd.admin.errors import CommandError
from bulkvpnd.host import device, redirect

PORT = 7444
"""Where iperf3 listens (choice: the one after the daemon's default)."""
SERVE_TIME = 600
"""Seconds after which --serve ends (choice)."""
RESTART_TIME = 0.1
"""Seconds after which an iperf3 that has ended, which each does after its test, is replaced (choice)."""
ABSENT_TIME = 2.0
"""Seconds in which the other end must have replaced it, from the first refusal on (choice)."""
PING_TIME = 5.0
"""Seconds that a ping may take beyond the load that it was beside (choice)."""
STREAMS = 4
"""TCP streams of a measurement (choice: with one, a single connection would be measured)."""
LIKE_THE_PATH, BUSY, LOSSY = 0.85, 0.85, 0.02
"""Choices: part of the path's own throughput from which the path is the limit; part of a core from which a worker is
the limit; part of the bytes sent again from which loss is."""


class SpeedtestError(CommandError):
    """Something could not be measured."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One direction of one way. bits: a second. rtt_ms: under that load, None without answers. cpu: the busiest worker
    here, part of a core. machine: part of this machine's CPU time that was used. again: part of what this end
    sent outside that TCP sent again."""

    bits: float
    rtt_ms: float | None
    cpu: float
    machine: float
    again: float


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("instance", nargs="?", metavar="INSTANCE",
                        help="name of the instance, or its runtime directory (default: the only one that runs)"
                        ).completer = status.instances
    parser.add_argument("--serve", action="store_true",
                        help=f"be the other end, on the server, for {SERVE_TIME // 60} minutes or until Ctrl-C")
    parser.add_argument("--beside", metavar="ADDRESS", type=_address,
                        help="the server's address outside the tunnel: with --serve listen there too, else measure the "
                             "path to it (default: what the tunnel is connected to)")
    parser.add_argument("--seconds", type=_seconds, default=5, metavar="N",
                        help="how long each measurement takes, 1 to 60 (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _address(raw):
    try:
        return str(ipaddress.ip_address(raw))
    except ValueError:
        raise argparse.ArgumentTypeError("an IP address") from None


def _seconds(raw):
    if not re.fullmatch("[0-9]{1,2}", raw) or not 1 <= int(raw) <= 60:
        raise argparse.ArgumentTypeError("a whole number of seconds from 1 to 60")
    return int(raw)


def run(arguments):
    """Returns the exit status."""
    reports, errors = status.ask_all(arguments.instance)
    if errors or len(reports) != 1:
        raise CommandError(str(errors[0]) if errors else "several instances run here; name one")
    if arguments.serve:
        return serve(reports[0], arguments.beside)
    console = rich.console.Console(highlight=False, stderr=arguments.json)
    result = measure(lambda: status.ask_all(arguments.instance)[0][0], arguments.beside, arguments.seconds, console)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        show(result, console)
    return os.EX_OK


# The server's end


def serve(report, beside, seconds=SERVE_TIME):
    """Listens on the tunnel's addresses, and on `beside`, text or None, for so many seconds."""
    addresses = [str(ipaddress.ip_interface(text).ip) for text in report["addresses"]] + ([beside] if beside else [])
    print(f"measuring from a client: bulkvpnctl speedtest (here on {', '.join(addresses)}, TCP port {PORT}, "
          f"for {seconds // 60} minutes)", flush=True)
    children, deadline = {}, time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            for address in addresses:
                if address not in children or children[address].poll() is not None:
                    # --one-off: one test, so that a client which goes away leaves no server that waits for it.
                    children[address] = _start(["iperf3", "--server", "--one-off", "--bind", address, "--port",
                                                str(PORT)])
            time.sleep(RESTART_TIME)
    finally:
        for child in children.values():
            child.terminate()
            child.wait()
    return os.EX_OK


def _start(command, stdout=subprocess.DEVNULL):
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        package = {"ping": "iputils-ping"}.get(command[0], command[0])
        raise SpeedtestError(f"{command[0]} is missing; run: apt install {package}") from None


# The client's end


def measure(ask, beside, seconds, console):
    """What is to be shown, JSON-able. ask: () -> the report of the instance. beside: address, or None. Raises
    SpeedtestError, StatusError."""
    report = ask()
    peers = [one["peer"] for session in report["sessions"] for one in session["connections"]]
    if report["mode"] != "client" or not report["addresses"] or not peers:
        raise SpeedtestError(f"instance {report['instance']} is no client with a connection; on a server: "
                             "bulkvpnctl speedtest --serve")
    inner = screen.server_address(report["addresses"][0])
    outer = beside or peers[0].rpartition(":")[0].strip("[]")
    result = {"offload": report["offload"], "tunnel": {"address": inner}, "beside": {"address": outer}}
    try:
        _one_way(result["tunnel"], "tunnel", ask, inner, None, seconds, console)
    except SpeedtestError as error:
        raise SpeedtestError(f"{error}; run on the server: bulkvpnctl speedtest --serve") from None
    # In the order in which they are best; the first is there whenever the instance itself finds its way.
    outside = next(iter(device.towards([outer], redirect.choose_mark())), None)
    if outside is None:
        result["beside"] |= {"rtt_idle_ms": None,
                             "why_not": f"no device leads to {outer} past the tunnel; see: ip route"}
    else:
        try:
            _one_way(result["beside"], "beside", ask, outer, outside, seconds, console)
        except SpeedtestError as error:
            result["beside"]["why_not"] = f"{error}; run on the server: bulkvpnctl speedtest --serve --beside {outer}"
            if "refused" not in str(error):
                result["beside"]["why_not"] += "; with kill-switch = yes here nothing can be measured past the tunnel"
    result["bottleneck"] = {direction: bottleneck(result, direction) for direction in ("out", "in")}
    return result


def _one_way(found, way, ask, address, outside, seconds, console):
    """Measures both directions, into `found`. outside: the device to go by, None where the routes know."""
    found["rtt_idle_ms"] = round_trip(_finish(_ping(address, outside, 2), PING_TIME))
    for direction, flags in (("out", ()), ("in", ("--reverse",))):
        with console.status(f"{way}, {direction}, {seconds} s"):
            found[direction] = dataclasses.asdict(_one(ask, address, outside, flags, seconds))


def _one(ask, address, outside, flags, seconds):
    until = None
    while True:
        try:
            return _try(ask, address, outside, flags, seconds)
        except SpeedtestError:
            now = time.monotonic()
            until = until or now + ABSENT_TIME
            if now > until:
                raise
        time.sleep(RESTART_TIME)


def _try(ask, address, outside, flags, seconds):
    before, began = ask(), time.monotonic()
    used, machine = cpu_seconds(before["pid"]), _machine_time()
    ping, patience = _ping(address, outside, seconds), 0.0
    bound = ("--bind-dev", outside) if outside else ()
    load = _start(["iperf3", "--json", "--client", address, "--port", str(PORT), "--time", str(seconds), "--parallel",
                   str(STREAMS), "--connect-timeout", "3000", *bound, *flags], subprocess.PIPE)
    try:
        # Its exit status says nothing: iperf 3.12 is content with a refusal if it is to print JSON.
        bits = received(_finish(load, seconds + 15), address)
        patience = PING_TIME
    finally:
        pinged = _finish(ping, patience)
    elapsed, after = time.monotonic() - began, _machine_time()
    workers = [total - used.get(pid, total) for pid, total in cpu_seconds(before["pid"]).items()]
    idle, total = after[0] - machine[0], after[1] - machine[1]
    return Measured(bits, round_trip(pinged), max(workers, default=0) / elapsed, 1 - idle / max(total, 1),
                    _sent_again(before, ask()))


def _ping(address, outside, seconds):
    bound = ("-I", outside) if outside else ()
    return _start(["ping", "-n", "-q", "-i", "0.2", "-c", str(5 * seconds), "-w", str(seconds + 1), *bound, address],
                  subprocess.PIPE)


def _finish(child, timeout):
    """What it printed; nothing if it took longer than `timeout` seconds."""
    try:
        return child.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        return ""
    finally:
        if child.returncode is None:
            child.kill()
            child.communicate()


def _machine_time():
    """(idle, all) CPU time of this machine so far, in the kernel's ticks (proc(5), /proc/stat)."""
    ticks = [int(one) for one in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _sent_again(before, after):
    """Part of the bytes, of the connections that were there all the time."""
    def total(report, name):
        return sum(one.get(name, 0) for session in report["sessions"] for one in session["connections"])

    sent = total(after, "bytes_out") - total(before, "bytes_out")
    again = total(after, "bytes_retransmitted") - total(before, "bytes_retransmitted")
    return max(0.0, again / sent) if sent > 0 else 0.0


# What came of it


def received(output, address):
    """Bits a second that arrived, from iperf3's JSON. Raises SpeedtestError."""
    said = "no result"
    try:
        report = json.loads(output)
        said = str(report.get("error", said))
        return float(report["end"]["sum_received"]["bits_per_second"])
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        shown = said.encode("unicode_escape").decode("ascii")[:200]
        raise SpeedtestError(f"iperf3 to {address}: {shown}") from None


def round_trip(output):
    """Milliseconds on average, from what ping(8) printed; None without an answer."""
    match = re.search(r"= [0-9.]+/([0-9.]+)/", output)
    return float(match[1]) if match else None


def bottleneck(result, direction):
    """What limits a direction, as a sentence. result: as measure() makes it."""
    tunnel, beside = result["tunnel"][direction], result["beside"].get(direction)
    if beside and tunnel["bits"] >= LIKE_THE_PATH * beside["bits"]:
        return "the path outside: the tunnel carries about what it carries"
    if tunnel["cpu"] >= BUSY and "tso" not in result["offload"]:
        return "offload is missing: a process of this end is busy with single packets; see bulkvpnctl doctor"
    if tunnel["cpu"] >= BUSY:
        return "the CPU of this end: one of its processes used a whole core; more workers help if there are more cores"
    if tunnel["machine"] >= BUSY:
        return "the CPU of this end: the machine has none left"
    if tunnel["again"] >= LOSSY:
        return f"loss: {100 * tunnel['again']:.0f} % was sent again; more connections share it, see connections"
    if "tso" not in result["offload"]:
        return "perhaps that offload is missing; see bulkvpnctl doctor"
    if not beside:
        return "not this end's CPU, nor loss: the path, or the other end; measure beside the tunnel to tell"
    return "not this end: the CPU of the server, or loss that only it sees; look there with bulkvpnctl status and top"


_WAYS = ("tunnel", "beside")
_ROWS = {
    "arrived": lambda one: screen.rate(one["bits"]),
    "rtt meanwhile": lambda one: screen.milliseconds(one["rtt_ms"]),
    "CPU, busiest process of the instance": lambda one: screen.part(one["cpu"], 1),
    "CPU, this machine": lambda one: screen.part(one["machine"], 1),
    "sent again by the instance": lambda one: screen.part(one["again"], 1),
}


def show(result, console):
    """Prints a result on a rich Console."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", *_WAYS):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_row("rtt, idle", *(screen.milliseconds(result[way]["rtt_idle_ms"]) for way in _WAYS))
    for direction in ("out", "in"):
        for name, value in _ROWS.items():
            both = [result[way].get(direction) for way in _WAYS]
            table.add_row(f"{direction}: {name}", *(value(one) if one else "-" for one in both))
    console.print(table)
    if "why_not" in result["beside"]:
        console.print(f"beside: {rich.markup.escape(result['beside']['why_not'])}")
    for direction, text in result["bottleneck"].items():
        console.print(f"{direction:3}  limit: {rich.markup.escape(text)}")
