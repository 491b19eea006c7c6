"""One system at work on one link: its processes, and the ways to wait, to measure and to account for them."""

import contextlib
import os
import pathlib
import signal
import sys
import time

from bulkvpnd.admin import demo, namespaces

ROOT = pathlib.Path(__file__).parents[1]
POLL = 0.05
"""Seconds between two looks at what is waited for."""
READY_TIMEOUT = 30
"""Seconds in which a system must carry the first ping, and 1 more for each of its clients."""
STEP_TIMEOUT = 30
"""Seconds that a measurement may take beyond the time planned for it."""
LOG_LINES = 3
"""Lines of a system's log that a failure shows. All of these are choices."""


class TrialError(Exception):
    """A system that does not start or a measurement without a result. message: one line for the report."""


class Interrupted(Exception):
    """A signal asks the benchmark to end."""


class Signals:
    """Notes SIGINT, SIGTERM and SIGHUP, so that every wait can end in order and no clean-up is cut short."""

    def __enter__(self):
        self.came = None
        self._before = {number: signal.signal(number, self._note)
                        for number in demo.SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.came = self.came or number

    def check(self):
        """Raises Interrupted if a signal came."""
        if self.came:
            raise Interrupted(signal.Signals(self.came).name)


class Waiter:
    """Waiting with a deadline, with an eye on signals and on the progress display. tick: called while waiting."""

    def __init__(self, signals, tick):
        self.signals = signals
        self.tick = tick

    def __call__(self, condition, seconds):
        """Waits until `condition()` is true, at most `seconds`. Returns whether it is. Raises Interrupted."""
        deadline = time.monotonic() + seconds
        while True:
            self.signals.check()
            if condition():
                return True
            if time.monotonic() >= deadline:
                return False
            self.tick()
            time.sleep(POLL)


class Trial:
    """A system on a network.

    system: of systems.py. network: network.Network. directory: private, for configurations and logs.
    wait: Waiter. seconds: how long each measurement takes. `inner` is the server's address inside the tunnel.
    """

    def __init__(self, system, network, directory, wait, seconds):
        self.system = system
        self.network = network
        self.server = network.server
        self.client = network.clients[0]
        self.address = network.address
        self.directory = directory
        self.wait = wait
        self.seconds = seconds
        self.inner = None
        self._processes = {}
        self._logs = []
        self._started = 0

    # What a system starts itself with.

    def spawn(self, host, argv, **options):
        """Starts a process of the system on `host`; its output goes to a log. Returns the Popen."""
        with self._log(pathlib.Path(argv[0]).name) as log:
            process = host.start(argv, **{"stdout": log, "stderr": log, "cwd": self.directory, **options})
        return self.adopt(host, process)

    def adopt(self, host, process):
        """Counts a process that runs on `host`, with all that it starts, to the system."""
        self._processes.setdefault("server" if host is self.server else "client", []).append(process)
        return process

    def await_or_fail(self, condition, seconds, what):
        """Raises TrialError, with the end of the logs, if `condition()` does not become true or a process ends."""
        if not self.wait(lambda: condition() or self._ended(), seconds) or self._ended():
            raise TrialError(f"{what}: not within {seconds} s{self._last_lines()}")

    def start(self):
        """Starts the system and waits until every client reaches the server through it. Raises TrialError."""
        self.inner = self.system.start(self)
        for host in self.network.clients:
            self.await_or_fail(lambda: host.run(["ping", "-n", "-q", "-c", 1, "-W", "0.5", self.inner],
                                                check=False).returncode == 0,
                               READY_TIMEOUT + len(self.network.clients), f"ping from {host.name}")
        self.system.settle(self)

    def stop(self):
        """Asks every process to end at once, so that the hosts, which end them one after the other, need not wait."""
        for processes in self._processes.values():
            for process in processes:
                if not namespaces.exited(process):
                    process.terminate()

    # What a test measures with.

    def start_tool(self, host, argv):
        """Starts a measuring tool on `host`. Returns a Tool."""
        self._started += 1
        output = self.directory / f"tool-{self._started}"
        with output.open("wb") as stream:
            process = host.start(argv, stdout=stream, stderr=stream, cwd=ROOT)
        return Tool(self, process, output)

    def python(self, module, *arguments):
        """The argument vector of a module of the benchmark, for the same interpreter as this."""
        return [sys.executable, "-m", f"benchmarks.{module}", *arguments]

    def cpu_seconds(self):
        """{"server": seconds, "client": seconds} of user and system time of the system's processes so far.

        Empty for a system without processes.
        """
        return {role: sum(sum(demo.cpu_seconds(process.pid).values()) for process in processes)
                for role, processes in self._processes.items()}

    def memory(self):
        """{"server": bytes, "client": bytes}: proportional set size, so that shared pages count once."""
        return {role: sum(map(memory, (pid for process in processes for pid in demo.cpu_seconds(process.pid))))
                for role, processes in self._processes.items()}

    def _log(self, name):
        path = self.directory / f"{name}-{len(self._logs)}.log"
        self._logs.append(path)
        return path.open("wb")

    def _ended(self):
        return any(namespaces.exited(process) for processes in self._processes.values() for process in processes)

    def _last_lines(self):
        lines = []
        for path in self._logs + sorted(self.directory.glob("*.log")):
            with contextlib.suppress(OSError):
                lines += path.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "".join(f"; {line.strip()}" for line in dict.fromkeys(lines) if line.strip())


class Tool:
    """A measuring tool that runs. output: path of the file with what it prints."""

    def __init__(self, trial, process, output):
        self.trial = trial
        self.process = process
        self.output = output

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        namespaces.end(self.process)

    def text(self):
        return self.output.read_text(errors="replace")

    def finish(self, seconds):
        """Waits for its end, `seconds` and STEP_TIMEOUT at most. Returns what it printed; raises TrialError."""
        ended = self.trial.wait(lambda: namespaces.exited(self.process), seconds + STEP_TIMEOUT)
        namespaces.end(self.process)
        if not ended:
            raise TrialError(f"{self.process.args[4]}: took more than {STEP_TIMEOUT} s longer than planned")
        return self.text()


def memory(pid):
    """Bytes of a process: Pss of /proc/PID/smaps_rollup, see proc(5); 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def environment():
    """Readies the environment that tools and systems inherit."""
    demo.set_environment()
    # Each system gets its own; what is for this process must not decide which daemon is measured.
    os.environ.pop("PYTHONPATH", None)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
