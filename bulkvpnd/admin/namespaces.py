"""Hosts for a trial on one machine: network namespaces, joined by veth pairs.

    Host("left") ── veth0 ═══ veth0 ── Host("right")

Owns the namespaces that it makes and the processes that it starts in them. It never touches the machine's own
network: a pair of devices is born inside the two namespaces, and goes with them. Needs root and ip(8) of iproute2.
"""

import contextlib
import os
import select
import signal
import subprocess

COMMAND_TIMEOUT = 30
"""Seconds that a short command such as ip(8) may take (choice)."""
END_TIMEOUT = 10
"""Seconds between SIGTERM and SIGKILL (choice)."""


class CommandError(Exception):
    """A command that failed. message: one line that names the command and gives its last line of output."""


def unique_name(role):
    """The name `role` with this process's id: no two running processes take the same."""
    return f"{role}-{os.getpid()}"


class Host:
    """A network namespace with loopback up, as a context manager that leaves nothing behind.

    name: of the namespace, see ip-netns(8). One that exists already is an error and stays untouched.
    """

    def __init__(self, name):
        self.name = name
        self.processes = []

    def __enter__(self):
        execute(["ip", "netns", "add", self.name])
        try:
            self.ip("link", "set", "lo", "up")
        except BaseException:
            self.delete()
            raise
        return self

    def __exit__(self, *exception):
        self.delete()

    def command(self, argv):
        """The argument vector that runs `argv` on this host."""
        return ["ip", "netns", "exec", self.name, *map(str, argv)]

    def ip(self, *arguments):
        """Runs ip(8) on this host. Returns what it printed; raises CommandError."""
        return execute(["ip", "-n", self.name, *map(str, arguments)]).stdout

    def run(self, argv, **options):
        """Runs `argv` on this host to its end; see execute()."""
        return execute(self.command(argv), **options)

    def start(self, argv, **options):
        """Starts `argv` on this host as a process group of its own, so that Ctrl-C does not reach it.

        options: of subprocess.Popen. Returns the Popen, whose pid is that of `argv`; delete() ends it.
        """
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True, **options}
        process = subprocess.Popen(self.command(argv), **options)
        self.processes.append(process)
        return process

    def listening(self, port):
        """Whether anything accepts TCP connections on `port` of this host."""
        return bool(self.run(["ss", "-Htln", f"sport = :{port}"]).stdout)

    def delete(self):
        """Ends what was started here, the last first, and removes the namespace with every device in it."""
        try:
            while self.processes:
                end(self.processes.pop())
        finally:
            execute(["ip", "netns", "delete", self.name])


def link(first, second, first_addresses, second_addresses, device="veth0"):
    """Joins two hosts by a veth pair.

    first_addresses, second_addresses: ADDRESS/LENGTH texts, IPv4 or IPv6, usable at once. device: its name at
    both ends. Raises CommandError.
    """
    execute(["ip", "link", "add", device, "netns", first.name, "type", "veth",
             "peer", "name", device, "netns", second.name])
    for host, addresses in ((first, first_addresses), (second, second_addresses)):
        for address in addresses:
            # Without nodad an IPv6 address stays tentative for a second or two.
            host.ip("address", "add", address, "dev", device, *(["nodad"] if ":" in address else []))
        host.ip("link", "set", device, "up")


@contextlib.contextmanager
def pair(first_addresses, second_addresses, names=("bulkvpn-server", "bulkvpn-client")):
    """Two joined hosts with unique names: ``with pair(["192.0.2.1/30"], ["192.0.2.2/30"]) as (server, client)``."""
    with Host(unique_name(names[0])) as first, Host(unique_name(names[1])) as second:
        link(first, second, first_addresses, second_addresses)
        yield first, second


def execute(argv, timeout=COMMAND_TIMEOUT, check=True, **options):
    """Runs a command to its end and captures what it prints.

    argv: list of str. timeout: seconds. check: raise CommandError if its status is not 0.
    options: of subprocess.run. Returns subprocess.CompletedProcess with text; raises CommandError.
    """
    options = {"stdin": subprocess.DEVNULL, "start_new_session": True, **options}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, **options)
    except subprocess.TimeoutExpired:
        raise CommandError(f"{' '.join(argv)}: took longer than {timeout} s") from None
    except OSError as error:
        raise CommandError(f"{argv[0]}: cannot be run: {error.strerror}") from None
    if check and done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise CommandError(f"{' '.join(argv)}: {lines[-1]}")
    return done


def exited(process):
    """Whether a Popen has ended. Unlike poll() it does not reap, so that end() can still name the group safely."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end(process, timeout=END_TIMEOUT):
    """Ends a process from Host.start() and all of its group: SIGTERM, and SIGKILL after `timeout` seconds.

    Returns its exit status, negative for a signal.
    """
    if process.returncode is None:
        descriptor = os.pidfd_open(process.pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(timeout * 1000)
        finally:
            os.close(descriptor)
            # Not reaped yet, so its id still means this group and nobody else's.
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
