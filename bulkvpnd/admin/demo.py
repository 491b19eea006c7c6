"""``bulkvpnctl demo``: a server and a client on this machine, measured with and without the tunnel between them.

    client ── veth0 192.0.2.2 ═══ 192.0.2.1 veth0 ── server      two network namespaces
      └─ bulk0 ═══════ the session's connections ════════ bulk0 ─┘

1. check what is needed, make both hosts and a PKI in a private directory
2. measure the link itself
3. start both daemons, wait for READY=1 as systemd would, measure through the tunnel
4. end what was started and remove every trace, also after an error or a signal

A signal only sets a flag that every wait looks at: clean-up is never cut short.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import rich.box
import rich.console
import rich.progress
import rich.table

from bulkvpnd import config
from bulkvpnd.admin import namespaces, status

SERVER_ADDRESS, CLIENT_ADDRESS = "192.0.2.1", "192.0.2.2"
"""TEST-NET-1 of RFC 5737."""
SERVER_ADDRESSES = (f"{SERVER_ADDRESS}/30", "2001:db8::1/64")
CLIENT_ADDRESSES = (f"{CLIENT_ADDRESS}/30", "2001:db8::2/64")
"""IPv6: the documentation prefix of RFC 3849."""
IPERF_PORT, FILE_PORT = 5201, 5202
STREAMS = 4
FILE_SIZE = 64 * 1024 * 1024
"""Bytes."""
PINGS, PING_INTERVAL = 100, 0.01
"""Number; seconds."""
READY_TIMEOUT = 30
"""Seconds in which a daemon must be ready."""
STEP_TIMEOUT = 30
"""Seconds that a step may take beyond the time planned for it."""
POLL = 0.1
"""Seconds between two looks at what is waited for."""
LOG_LINES = 5
"""Lines of a daemon's log that an error shows. All of these are choices."""

PASSED_ON = ("connections", "workers", "offload", "cipher")
"""Options of the daemons that the demo takes too."""
TOOLS = {"ip": "iproute2", "ss": "iproute2", "iperf3": "iperf3", "ping": "iputils-ping"}
"""Command: Debian package."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KEYS = (
    "direct.tcp_mbps", "tunnel.tcp_mbps", "tunnel.tcp_reverse_mbps", "direct.rtt_ms", "tunnel.rtt_ms",
    "tunnel.connections", "tunnel.workers", "tunnel.packets_per_frame", "tunnel.cpu_s_per_gb", "tunnel.cipher",
    "tunnel.sha256_ok",
)
"""Of the result: Mbit/s are 10^6 bits, GB 10^9 bytes, both of what was received inside the tunnel."""


class DemoError(Exception):
    """The demo cannot go on. message: one line. status: of exit. details: lines of a log to show above it."""

    def __init__(self, message, status=1, details=""):
        super().__init__(message)
        self.status = status
        self.details = details


def add_arguments(parser):
    """Adds the demo's arguments to an argparse parser."""
    parser.add_argument("--seconds", type=_checked(config.integer(1, 600)), default="5", metavar="N",
                        help="how long each measurement of the throughput takes, 1 to 600 (default 5)")
    parser.add_argument("--json", metavar="FILE",
                        help="write the result to FILE; - is standard output, without a table")
    parser.add_argument("--keep", action="store_true",
                        help="leave both hosts and the tunnel up, and say how to enter and to remove them")
    for option in (config.BY_NAME[name] for name in PASSED_ON):
        parser.add_argument(f"--{option.name}", metavar=option.metavar, type=_checked(option.parse, keep_text=True),
                            help=config.help_text(option).replace("%", "%%"))


def _checked(parse, keep_text=False):
    def check(raw):
        try:
            value = parse(raw)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"should be {error}") from None
        return raw if keep_text else value

    return check


def run(arguments):
    """Runs the demo. Returns 0 if all of it worked, 77 without permission, 128 + the number of a signal, else 1."""
    try:
        check_requirements()
        if arguments.json not in (None, "-") and not pathlib.Path(arguments.json).absolute().parent.is_dir():
            raise DemoError(f"{arguments.json}: its directory does not exist")
        with _noted_signals() as signals:
            result = _measure(arguments, signals)
        if arguments.json is not None:
            _write_json(arguments.json, result)
        if arguments.json != "-":
            rich.console.Console().print(table(result, arguments.seconds))
        if not result["tunnel.sha256_ok"]:
            raise DemoError("the file that went through the tunnel arrived changed")
    except (DemoError, namespaces.CommandError) as error:
        sys.stderr.write(getattr(error, "details", ""))
        print(f"bulkvpnctl demo: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    return 0


def check_requirements():
    """Raises DemoError that names what is missing, with the command that gets it."""
    if os.geteuid() != 0:
        raise DemoError("only root can make network namespaces; run it with sudo", os.EX_NOPERM)
    # A root shell from `su` has a user's PATH.
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    for tool, package in TOOLS.items():
        if not shutil.which(tool):
            raise DemoError(f"{tool} is missing; run: apt install {package}")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as error:
        raise DemoError(f"/dev/net/tun: {error.strerror}; this machine or container forbids it", os.EX_NOPERM) from None
    except OSError as error:
        raise DemoError(f"/dev/net/tun: {error.strerror}; run: modprobe tun") from None


def _measure(arguments, signals):
    """Everything between the checks and the result; leaves nothing behind but with --keep."""
    with contextlib.ExitStack() as stack:
        demo = Demo(arguments, stack, signals)
        steps = demo.steps()
        with Display(sum(seconds for _, seconds, _ in steps)) as display:
            demo.display = display
            for name, seconds, action in steps:
                display.begin(name, seconds)
                display.finish(action())
        if arguments.keep:
            demo.explain_removal()
            stack.pop_all()
    return demo.result


@contextlib.contextmanager
def _noted_signals():
    """Notes the signals that would end the process in the list it gives, until the end of the block."""
    noted = []
    # One that is ignored stays so: nohup(1) ignores SIGHUP.
    before = {number: signal.signal(number, lambda number, frame: noted.append(number))
              for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Demo:
    """Two hosts, two daemons and what is measured on them.

    stack: contextlib.ExitStack that gets every clean-up. signals: list of the signals that came.
    """

    def __init__(self, arguments, stack, signals):
        self.seconds = arguments.seconds
        self.flags = [f"--{name}={value}" for name in PASSED_ON if (value := getattr(arguments, name)) is not None]
        self.wanted = int(arguments.connections or config.BY_NAME["connections"].default)
        self.stack = stack
        self.signals = signals
        self.daemons = []
        self.result = dict.fromkeys(KEYS)

    def steps(self):
        """(name, planned seconds, function that does it and returns what it found, as a text) of each step."""
        return (
            ("two hosts and a PKI", 2, self.prepare),
            ("direct: TCP, 1 stream", self.seconds, self.direct_tcp),
            ("direct: round trip", 1, self.direct_rtt),
            ("start of server and client", 2, self.start_daemons),
            ("tunnel: round trip, idle", 1, self.tunnel_rtt),
            ("tunnel: round trip, IPv6", 1, self.tunnel_rtt_ipv6),
            (f"tunnel: TCP, {STREAMS} streams", self.seconds, self.tunnel_tcp),
            (f"tunnel: TCP, {STREAMS} streams, reverse", self.seconds, self.tunnel_tcp_reverse),
            ("tunnel: a file of 64 MiB", 2, self.tunnel_file),
        )

    def prepare(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="bulkvpn-demo-"))
        self.stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.daemon_command = set_environment()
        self.server, self.client = (
            self.stack.enter_context(namespaces.Host(namespaces.unique_name(f"bulkvpn-demo-{role}")))
            for role in ("server", "client")
        )
        namespaces.link(self.server, self.client, SERVER_ADDRESSES, CLIENT_ADDRESSES)
        pki = [sys.executable, "-m", "bulkvpnd.admin", "pki"]
        namespaces.execute([*pki, "init", "--directory", str(self.directory)], cwd=self.directory)
        namespaces.execute([*pki, "add", "demo", "--remote", SERVER_ADDRESS, "--directory", str(self.directory),
                            "--output", str(self.directory / "client.conf")], cwd=self.directory)
        configuration, _ = config.load(["--config", str(self.directory / "server.conf")])
        # bulkvpn.conf(5): the server takes the first address of each pool.
        self.inner, self.inner_ipv6 = (
            str(next(pool.hosts())) if pool else None for pool in (configuration.pool_ipv4, configuration.pool_ipv6)
        )
        return f"{self.server.name}, {self.client.name}"

    def start_daemons(self):
        for role, host in (("server", self.server), ("client", self.client)):
            daemon = Daemon(role, host, self.directory, self.daemon_command, self.flags)
            self.daemons.append(daemon)
            self.stack.callback(daemon.close)
            if not self.wait(daemon.ready, READY_TIMEOUT):
                raise DemoError(f"the {role} was not ready within {READY_TIMEOUT} s", details=daemon.last_lines())
        # The client is ready with its first connection; the others follow at once.
        self.wait(lambda: len(_connections(self._client_status())) >= self.wanted, STEP_TIMEOUT / 10)
        report = self._client_status()
        connections, workers = len(_connections(report)), len(report["workers"])
        cipher = next((session["cipher"] for session in report["sessions"]), None)
        self.result.update({"tunnel.connections": connections, "tunnel.workers": workers, "tunnel.cipher": cipher})
        return f"connections: {connections}, workers: {workers}, cipher: {cipher}"

    def direct_tcp(self):
        return self._tcp("direct.tcp_mbps", SERVER_ADDRESS, 1)

    def direct_rtt(self):
        return self._rtt("direct.rtt_ms", SERVER_ADDRESS)

    def tunnel_rtt(self):
        return self._rtt("tunnel.rtt_ms", self.inner)

    def tunnel_rtt_ipv6(self):
        return self._rtt(None, self.inner_ipv6) if self.inner_ipv6 else "no IPv6 in the tunnel"

    def tunnel_tcp(self):
        """Forward, from client to server, with the daemons' CPU time and the filling of the client's frames."""
        cpu, sent = self._cpu_seconds(), _sent(self._client_status())
        text = self._tcp("tunnel.tcp_mbps", self.inner, STREAMS)
        used = sum(seconds - cpu.get(pid, 0) for pid, seconds in self._cpu_seconds().items())
        self.result["tunnel.cpu_s_per_gb"] = round(used / (self.received / 1e9), 2)
        packets, frames = (sum(column) for column in zip((0, 0), *(
            (packets - sent[index][0], frames - sent[index][1])
            for index, (packets, frames) in _sent(self._client_status()).items() if index in sent
        )))
        if frames > 0:
            self.result["tunnel.packets_per_frame"] = round(packets / frames, 1)
        return text

    def tunnel_tcp_reverse(self):
        return self._tcp("tunnel.tcp_reverse_mbps", self.inner, STREAMS, reverse=True)

    def tunnel_file(self):
        """Random data from the client to the server; each end prints the SHA-256 of what it sent or received."""
        call = "import sys; from bulkvpnd.admin import demo; demo.{}(sys.argv[1], int(sys.argv[2]))"
        with (self.directory / "received").open("w+") as output:
            receiver = self.server.start([sys.executable, "-c", call.format("receive_file"), self.inner, FILE_PORT],
                                         stdout=output, cwd=self.directory)
            self._wait_listening(receiver, FILE_PORT)
            sent = self._output(self.client, [sys.executable, "-c", call.format("send_file"), self.inner, FILE_PORT], 2)
            self.wait(lambda: namespaces.exited(receiver), STEP_TIMEOUT)
            namespaces.end(receiver)
            output.seek(0)
            received = output.read()
        self.result["tunnel.sha256_ok"] = bool(sent) and sent == received
        return "the same SHA-256 at both ends" if self.result["tunnel.sha256_ok"] else "NOT the same SHA-256"

    def wait(self, condition, timeout):
        """Waits until `condition()` is true, at most `timeout` seconds. Returns whether it is.

        Raises DemoError after a signal, and where a daemon has ended.
        """
        deadline = time.monotonic() + timeout
        while True:
            if self.signals:
                raise DemoError(f"ended by {signal.Signals(self.signals[0]).name}", 128 + self.signals[0])
            for daemon in self.daemons:
                if namespaces.exited(daemon.process):
                    raise DemoError(f"the {daemon.role} ended by itself", details=daemon.last_lines())
            if condition():
                return True
            if time.monotonic() >= deadline:
                return False
            self.display.tick()
            time.sleep(POLL)

    def explain_removal(self):
        """Says how to enter the hosts that stay, and the commands that remove everything."""
        hosts = (self.server, self.client)
        print("Both hosts stay up. To enter them:",
              *(f"  ip netns exec {host.name} bash" for host in hosts),
              f"  ip netns exec {self.client.name} ping {self.inner}",
              "To remove everything:",
              "  kill " + " ".join(str(daemon.process.pid) for daemon in self.daemons) + "; sleep 2",
              *(f"  ip netns delete {host.name}" for host in hosts),
              f"  rm -r {self.directory}",
              sep="\n", file=sys.stderr)

    def _tcp(self, key, address, streams, reverse=False):
        server = self.server.start(["iperf3", "--server", "--one-off", "--port", IPERF_PORT],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.directory)
        self._wait_listening(server, IPERF_PORT)
        output = self._output(self.client, ["iperf3", "--json", "--client", address, "--port", IPERF_PORT,
                                            "--time", self.seconds, "--parallel", streams, "--connect-timeout", "5000",
                                            *(["--reverse"] if reverse else [])], self.seconds)
        namespaces.end(server)
        try:
            report = json.loads(output)
            rate, self.received = (report["end"]["sum_received"][name] for name in ("bits_per_second", "bytes"))
        except (ValueError, KeyError):
            report = report if output.startswith("{") else {}
            raise DemoError(f"iperf3: {report.get('error', 'no result')}") from None
        if not self.received:
            raise DemoError("iperf3: nothing was received")
        self.result[key] = round(rate / 1e6, 1)
        return f"{rate / 1e6:,.0f} Mbit/s"

    def _rtt(self, key, address):
        output = self._output(self.client, ["ping", "-n", "-q", "-c", PINGS, "-i", PING_INTERVAL, "-W", "1", address],
                              PINGS * PING_INTERVAL)
        average = re.search(r"= [0-9.]+/([0-9.]+)/", output)
        if not average:
            raise DemoError(f"ping: no answer from {address}")
        if key:
            self.result[key] = float(average[1])
        return f"{average[1]} ms"

    def _output(self, host, argv, seconds):
        """What a measurement on `host` prints; DemoError if it takes much longer than the planned `seconds`."""
        with (self.directory / "output").open("w+") as output:
            process = host.start(argv, stdout=output, stderr=subprocess.DEVNULL, cwd=self.directory)
            ended = self.wait(lambda: namespaces.exited(process), seconds + STEP_TIMEOUT)
            namespaces.end(process)
            if not ended:
                raise DemoError(f"{argv[0]}: took more than {STEP_TIMEOUT} s longer than planned")
            output.seek(0)
            return output.read()

    def _wait_listening(self, process, port):
        self.wait(lambda: self.server.listening(port) or namespaces.exited(process), STEP_TIMEOUT)
        if not self.server.listening(port):
            raise DemoError(f"{process.args[4]}: does not listen on port {port} of {self.server.name}")

    def _client_status(self):
        return self.daemons[1].status()

    def _cpu_seconds(self):
        """{pid: CPU seconds so far} of the main and worker processes of both daemons."""
        return {pid: seconds for daemon in self.daemons for pid, seconds in cpu_seconds(daemon.process.pid).items()}


class Daemon:
    """A daemon that was started on a host, with this process in the place of systemd.

    role: server or client. command, flags: argument vectors.
    """

    def __init__(self, role, host, directory, command, flags):
        self.role = role
        self.log = directory / f"{role}.log"
        self.status_path = directory / f"run-{role}" / status.SOCKET_NAME
        self._is_ready = False
        notify = directory / f"{role}.notify"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.bind(str(notify))
        directories = {name: directory / f"{short}-{role}"
                       for name, short in (("runtime-directory", "run"), ("state-directory", "state"))}
        for path in directories.values():
            path.mkdir(mode=0o700)
        argv = [*command, "--config", directory / f"{role}.conf",
                *(f"--{name}={path}" for name, path in directories.items()), *flags]
        with self.log.open("wb") as log:
            self.process = host.start(argv, stdout=log, stderr=log, cwd=directory,
                                      env={**os.environ, "NOTIFY_SOCKET": str(notify)})

    def ready(self):
        """Whether it has said READY=1; see sd_notify(3)."""
        with contextlib.suppress(BlockingIOError):
            while not self._is_ready:
                self._is_ready = b"READY=1" in self._notify.recv(4096).split(b"\n")
        return self._is_ready

    def status(self):
        """What ``bulkvpnctl status --json`` shows of it, as a dictionary. Raises DemoError."""
        try:
            return status.ask(self.status_path, STEP_TIMEOUT)
        except status.StatusError as error:
            raise DemoError(f"the {self.role} does not give its status: {error}", details=self.last_lines()) from None

    def last_lines(self):
        """The end of its log, each line with its role in front."""
        lines = self.log.read_text(errors="backslashreplace").splitlines()[-LOG_LINES:]
        return "".join(f"{self.role}: {line}\n" for line in lines)

    def close(self):
        namespaces.end(self.process)
        self._notify.close()


class Display:
    """Shows the steps on standard error: a bar with the time left on a terminal, one line for each step elsewhere.

    seconds: planned for all steps.
    """

    def __init__(self, seconds):
        self.total = seconds
        self.planned = self.spent = 0
        console = rich.console.Console(stderr=True)
        self.progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[left]:.0f} s left"),
            console=console, transient=True, disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=seconds, left=seconds)

    def __enter__(self):
        if not self.progress.disable:
            self.progress.start()
        return self

    def __exit__(self, *exception):
        if not self.progress.disable:  # else rich 13.3 prints an empty line
            self.progress.stop()

    def begin(self, name, seconds):
        """The step `name`, planned to take `seconds`, begins."""
        self.name = name
        self.spent += self.planned
        self.planned = seconds
        self.started = time.monotonic()
        self.tick()

    def tick(self):
        """Moves the bar; a step that takes longer than planned stands still at its end."""
        done = self.spent + min(time.monotonic() - self.started, self.planned)
        self.progress.update(self.task, description=self.name, completed=done, left=self.total - done)

    def finish(self, outcome):
        print(f"{self.name}: {outcome}", file=sys.stderr)


def set_environment():
    """Readies this process's environment for the daemons and tools. Returns the daemon's command, as a list."""
    # What systemd or a shell tells this process is not meant for its children.
    for name in ("RUNTIME_DIRECTORY", "STATE_DIRECTORY", "CREDENTIALS_DIRECTORY", "WATCHDOG_USEC", "WATCHDOG_PID",
                 "LISTEN_FDS", "LISTEN_PID", "JOURNAL_STREAM"):
        os.environ.pop(name, None)
    # ping reads and writes numbers as the locale has them.
    os.environ["LC_ALL"] = "C.UTF-8"
    root = pathlib.Path(__file__).resolve().parents[2]
    if (root / "setup.py").exists():
        # A source tree is tried itself, not what may be installed beside it.
        os.environ["PYTHONPATH"] = str(root)
    elif installed := shutil.which("bulkvpnd"):
        return [installed]
    return [sys.executable, "-m", "bulkvpnd"]


def cpu_seconds(ancestor):
    """{pid: seconds of user and system time} of a process and its descendants."""
    parents, used = {}, {}
    for directory in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # proc_pid_stat(5): the name, in parentheses, may hold anything; ppid, utime and stime are fields 4, 14, 15.
            fields = (directory / "stat").read_text(errors="replace").rpartition(")")[2].split()
            pid = int(directory.name)
            parents[pid] = int(fields[1])
            used[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    family = {ancestor}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return {pid: used[pid] for pid in family if pid in used}


def _connections(report):
    return [connection for session in report["sessions"] for connection in session["connections"]]


def _sent(report):
    """{index: (packets as large as on a wire, frames)} that each connection of a report has sent."""
    # A connection whose worker did not answer in time has no counters.
    return {connection["index"]: (connection.get("segments_out", connection["packets_out"]), connection["frames_out"])
            for connection in _connections(report) if "frames_out" in connection}


def send_file(address, port):
    """Sends FILE_SIZE random bytes to a receive_file() and prints their SHA-256. Runs as a process of its own."""
    data = os.urandom(FILE_SIZE)
    with socket.create_connection((address, port), timeout=STEP_TIMEOUT) as connection:
        connection.sendall(data)
    print(hashlib.sha256(data).hexdigest())


def receive_file(address, port):
    """Prints the SHA-256 of what one connection sends until its end. Runs as a process of its own."""
    digest = hashlib.sha256()
    with socket.create_server((address, port)) as listener:
        listener.settimeout(STEP_TIMEOUT)
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(STEP_TIMEOUT)
        while data := connection.recv(1 << 20):
            digest.update(data)
    print(digest.hexdigest())


def table(result, seconds):
    """The result as a rich.table.Table. seconds: of each measurement of the throughput."""
    def shown(value, unit=""):
        if value is None:
            return "-"
        return f"{value:,.3g}{unit}" if isinstance(value, float) and value < 100 else f"{value:,.0f}{unit}"

    view = rich.table.Table(title=f"bulkvpnd between two hosts of this machine, {seconds} s each", box=rich.box.SIMPLE,
                            caption=f"TCP: 1 stream direct, {STREAMS} streams through the tunnel")
    view.add_column("")
    for name in ("direct", "tunnel", "tunnel/direct"):
        view.add_column(name, justify="right")
    for name, direct, tunnel in (
        ("TCP, Mbit/s", "direct.tcp_mbps", "tunnel.tcp_mbps"),
        ("TCP, reverse, Mbit/s", "direct.tcp_mbps", "tunnel.tcp_reverse_mbps"),
        ("round trip, ms", "direct.rtt_ms", "tunnel.rtt_ms"),
    ):
        view.add_row(name, shown(result[direct]), f"[bold]{shown(result[tunnel])}[/bold]",
                     shown(result[tunnel] / result[direct]))
    for name, text in (
        ("connections", shown(result["tunnel.connections"])),
        ("workers", shown(result["tunnel.workers"])),
        ("cipher", result["tunnel.cipher"]),
        ("packets in a frame", shown(result["tunnel.packets_per_frame"])),
        ("CPU of both ends, s/GB", shown(result["tunnel.cpu_s_per_gb"])),
        ("file of 64 MiB, SHA-256", "[green]equal[/green]" if result["tunnel.sha256_ok"] else "[red]different[/red]"),
    ):
        view.add_row(name, "", text)
    return view


def _write_json(file, result):
    text = json.dumps(result, indent=2) + "\n"
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        pathlib.Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DemoError(f"{file}: cannot be written: {error.strerror}") from None
