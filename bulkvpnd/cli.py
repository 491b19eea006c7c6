"""The two commands: bulkvpnd(8), the daemon, and bulkvpnctl(8), the administrator's tool."""

import argparse
import contextlib
import difflib
import errno
import gc
import importlib
import os
import signal
import sys
import types

from bulkvpnd import __version__

COMMANDS = {
    # name: (module in bulkvpnd.admin, help). Each module has add_arguments(parser) and run(arguments) -> exit status,
    # which raises CommandError or ConfigurationError for what the administrator has to mend.
    "pki": ("pki", "make the certificate authority, the server's and the clients' certificates"),
    "status": ("status", "show the sessions, connections and counters of running instances"),
    "multipath": ("multipath", "show which networks the instances here carry together"),
    "import": ("install", "install a client's configuration, and start it"),
    "import-openvpn": ("openvpn", "make a configuration from one of OpenVPN"),
    "init-instances": ("instances", "write the configurations of several instances that work as one"),
    "doctor": ("doctor", "look for what usually goes wrong, and say what mends it"),
    "speedtest": ("speedtest", "measure a running tunnel, and the path beside it"),
    "tune": ("tune", "show what the kernel is tuned with, or tune it by hand"),
    "top": ("top", "show the sessions of running instances, live"),
    "metrics": ("metrics", "print the metrics of running instances, as Prometheus reads them"),
    "reload": ("reload", "put a changed configuration into force, as far as that takes no restart"),
    "disconnect": ("disconnect", "end the sessions of a client, which may come again"),
    "drain": ("drain", "have a server accept no new sessions"),
    "demo": ("demo", "measure a tunnel between two network namespaces on this machine"),
    "explain": ("explain", "print what the manual says of an option, a cause of drops or a metric"),
    "example": ("example", "print a commented configuration with every option"),
}


def bulkvpnd(arguments=None):
    """Runs the daemon in the foreground. Returns the exit status (see EXIT STATUS in bulkvpnd(8))."""
    # Who is asked to stop so early still has to take back what a crash left, a kill switch for one.
    stops = []
    for number in _STOPS:
        signal.signal(number, lambda number, frame: stops.append(number))
    # What is imported stays. To look through it for garbage would take a fifth of the time until the daemon is ready,
    # and 0.2 s more when it ends.
    gc.disable()
    _patch()
    from bulkvpnd import config
    from bulkvpnd.control.workers import Workers

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        configuration, namespace = config.load(arguments)
    except config.ConfigurationError as error:
        print(f"bulkvpnd: {error}", file=sys.stderr)
        return os.EX_USAGE if error.on_command_line else os.EX_CONFIG
    workers = Workers(configuration.workers or min(len(os.sched_getaffinity(0)), configuration.connections))
    try:
        # They import what they need while this process does the same.
        if not namespace.check and (why_not := workers.launch()):
            print(f"bulkvpnd: no worker can be started: {why_not}", file=sys.stderr)
            return 1
        from bulkvpnd.control import main

        gc.freeze()
        gc.enable()
        return main.run(configuration, lambda text: config.load(arguments, text)[0], workers, stops, namespace.check)
    finally:
        # One that is repeated would make an error of a clean end: Python's handlers go before the process does.
        for number in _STOPS:
            signal.signal(number, signal.SIG_IGN)
        workers.stop()


_STOPS = (signal.SIGTERM, signal.SIGINT)


def _patch():
    """Makes the standard library gevent's."""
    # gevent before 23.9 asks pkg_resources for plugins; its import takes a sixth of the time until the daemon is ready.
    sys.modules["pkg_resources"] = types.SimpleNamespace(iter_entry_points=lambda group: ())
    from gevent import monkey

    monkey.patch_all()
    del sys.modules["pkg_resources"]


def bulkvpnctl(arguments=None):
    """Runs one command. Returns its exit status (see EXIT STATUS in bulkvpnctl(8))."""
    if sys.stdout is None:
        # Whoever started it closed it, as >&- does; what a command does besides is wanted all the same.
        sys.stdout = open(os.devnull, "w")
    try:
        with _signals_unwind():
            try:
                return _command(arguments)
            finally:
                # What fails when the interpreter exits would be a traceback, and the status 120.
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of the output went away, as `| head` does; nobody is left to tell.
        why_not = None
    except UnicodeEncodeError:
        why_not = "cannot show this text; set a locale with UTF-8, such as LC_ALL=C.UTF-8"
    except OSError as error:
        # What a command does with a file has its own message; the one without a name is the output.
        if error.filename is not None or error.errno not in _OUTPUT_FAILS:
            raise
        why_not = f"cannot be written: {error.strerror}; make room, or write it to somewhere else"
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if why_not:
        print(f"bulkvpnctl: standard output: {why_not}", file=sys.stderr)
    return 1


_OUTPUT_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""What write(2) says of a file that takes no more."""
_ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What ends a command besides Control-C: `timeout`, and a terminal that goes away."""


@contextlib.contextmanager
def _signals_unwind():
    """A signal that ends the command does so by SystemExit: a display gives the terminal back, a child is ended."""
    taken = [number for number in _ENDING if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _command(arguments):
    completes = "_ARGCOMPLETE" in os.environ
    if completes:
        # A shell that completes a line gives the line and no arguments: debian/completions.
        arguments = os.environ.get("COMP_LINE", "").split()[1:]
    elif arguments is None:
        arguments = sys.argv[1:]
    parser = _Parser(prog="bulkvpnctl", description="Administrator's tool of the bulk VPN daemon.", allow_abbrev=False,
                     epilog="The manual is bulkvpnctl(8).")
    parser.add_argument("--version", action="version", version=f"bulkvpnctl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == wanted:
            # Only the command that runs is imported: most need neither cryptography nor a terminal library.
            importlib.import_module(f"bulkvpnd.admin.{module}").add_arguments(command)
    if completes:
        import argcomplete

        argcomplete.autocomplete(parser)
    if wanted is not None and wanted not in COMMANDS:
        near = difflib.get_close_matches(wanted, COMMANDS, 1)
        parser.error(f"{wanted!a}: no such command" + (f"; did you mean {near[0]}?" if near else ""))
    namespace = parser.parse_args(arguments)
    module = importlib.import_module(f"bulkvpnd.admin.{COMMANDS[namespace.command][0]}")
    from bulkvpnd.admin.errors import CommandError
    from bulkvpnd.config import ConfigurationError

    try:
        return module.run(namespace)
    except (CommandError, ConfigurationError) as error:
        # What files and servers say is part of some.
        line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(error))
        if line:
            print(f"bulkvpnctl: {line}", file=sys.stderr)
        return error.status


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.print_usage(sys.stderr)
        self.exit(os.EX_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")

    def _print_message(self, message, file=None):
        # Python 3.12 and later let nobody know that the output took nothing.
        if message:
            (file or sys.stderr).write(message)
