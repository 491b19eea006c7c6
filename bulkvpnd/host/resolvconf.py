"""A record of resolvconf(8): name servers and search domains under the name of an instance.

resolvconf(8) lets only root write, and the unit's daemon is not root. So the package has a helper that is. systemd
starts it for each connection to a socket that only root and the daemon's user may open:

    daemon                               helper
      |---- instance, servers, domains ---->|  checks all of it, adds the record
      |<--- null, or why it is not there ---|
      |                ...                  |
      |---- end of the connection --------->|  removes the record
      |<--- end of the connection ----------|

The record lives as long as the connection, which the kernel closes whatever becomes of the daemon. A message is JSON,
one datagram of a SEQPACKET socket. The helper trusts nothing in it, also because openresolv has the shell evaluate what
it is given, and serves only who has CAP_NET_ADMIN, as a main process has and a worker has not. This file is all that
runs as root, with the one that it imports (tests/policy/test_imports.py).
"""

import contextlib
import dataclasses
import fcntl
import ipaddress
import json
import logging
import pathlib
import re
import signal
import socket
import struct

from bulkvpnd.host import program

log = logging.getLogger(__name__)

RECORDS = pathlib.Path("/run/resolvconf")
"""Below it both kinds of resolvconf keep a file for each interface."""
SOCKET = pathlib.Path("/run/bulkvpnd-resolvconf/socket")
"""Made by bulkvpnd-resolvconf.socket. Beside it the helpers have their locks."""
REQUEST_MAX = 4096
"""Bytes of a request (choice: the longest that is allowed has some 2700) and of an answer."""
SERVERS_MAX, DOMAINS_MAX = 8, 8
"""As in bulkvpnd.protocol.handshake."""
REQUEST_TIMEOUT = 10
"""Seconds that the helper waits for a request (choice: it comes with the connection)."""
ANSWER_TIMEOUT = program.TIMEOUT + 2
"""Seconds that the daemon waits for the answer (choice: the helper's own wait, and its start)."""
CAP_NET_ADMIN = 1 << 12
"""linux/capability.h; the bit in /proc/PID/status."""

_INSTANCE = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""As config.NAME has it. resolvconf(8) has a file of this name, behind a prefix."""
_ADDRESS = re.compile(r"[0-9a-fA-F.:]{2,45}")
"""No zone behind a percent sign, which ipaddress would take."""
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
"""RFC 1123 section 2.1, as bulkvpnd.protocol.handshake has it."""


class Refused(Exception):
    """A request that is not one. Says in one line what would be."""


def _instance(value):
    if not isinstance(value, str) or not _INSTANCE.fullmatch(value):
        raise Refused("instance: should be 1 to 64 letters, digits, dots, underscores and hyphens")
    return value


def _server(value):
    if not isinstance(value, str) or not _ADDRESS.fullmatch(value):
        raise ValueError
    address = ipaddress.ip_address(value)
    own = address.is_multicast or address.is_loopback or address.is_unspecified or address.is_link_local
    if own or getattr(address, "ipv4_mapped", None):
        raise ValueError
    return str(address)


def _domain(value):
    if not isinstance(value, str) or not _DOMAIN.fullmatch(value):
        raise ValueError
    return value


def _listed(values, most, parse, expected):
    try:
        if not isinstance(values, list) or len(values) > most:
            raise ValueError
        return tuple(map(parse, values))
    except ValueError:
        raise Refused(f"should be a list of at most {most} {expected}") from None


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What a daemon wants. instance: its name. servers: addresses, domains: names, as text; with neither, no record."""

    instance: str
    servers: tuple
    domains: tuple

    def encode(self):
        """The bytes of the message."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode("ascii")

    @classmethod
    def decode(cls, data):
        """The request in a message. Raises Refused."""
        if len(data) > REQUEST_MAX:
            raise Refused(f"should have at most {REQUEST_MAX} bytes")
        try:
            fields = json.loads(bytes(data).decode("ascii"))
        # RecursionError: brackets inside brackets.
        except (ValueError, RecursionError):
            raise Refused("should be JSON") from None
        if not isinstance(fields, dict) or set(fields) != {"instance", "servers", "domains"}:
            raise Refused("should be an object with instance, servers and domains")
        return cls(
            _instance(fields["instance"]),
            _listed(fields["servers"], SERVERS_MAX, _server, "unicast addresses of name servers"),
            _listed(fields["domains"], DOMAINS_MAX, _domain, "domain names of letters, digits, hyphens and dots"),
        )


class Record:
    """The record of one instance, which this process writes as root. directory: see RECORDS."""

    def __init__(self, instance, directory=RECORDS):
        # wg-quick(8) does the same: in resolvconf's interface-order, "tun." stands before the usual devices.
        self._name = f"tun.bulkvpnd-{instance}"
        self._directory = directory

    def file(self):
        """The path of what resolvconf has of it, from whichever run; None without."""
        return next(self._directory.glob(f"interface*/{self._name}"), None)

    def is_there(self):
        """Whether resolvconf has it."""
        return self.file() is not None

    def set(self, servers, domains):
        """Adds or replaces it. servers: addresses. domains: names. Returns None, or why it is not done."""
        lines = [f"nameserver {server}" for server in servers]
        if domains:
            lines.append("search " + " ".join(domains))
        # -m 0 -x, of openresolv: before all others, and alone. Debian's resolvconf does not look at them.
        text = "".join(line + "\n" for line in lines)
        error = program.run(["resolvconf", "-a", self._name, "-m", "0", "-x"], program.TIMEOUT, text)
        return self._failed_hook(error) if self.is_there() else error

    def remove(self, timeout=program.UNDO_TIMEOUT):
        """Removes it, if it is there. timeout: seconds. Returns None, or why it is not done."""
        error = program.run(["resolvconf", "-d", self._name, "-f"], timeout)
        return error if self.is_there() else self._failed_hook(error)

    def _failed_hook(self, error):
        """resolvconf did it, and fails all the same where one of its hooks does, as that of a stopped name server."""
        if error:
            log.warning("resolvconf, for %s: %s", self._name, error)


class HeldRecord(Record):
    """The same, by the helper: this process holds the connection. path: see SOCKET."""

    def __init__(self, instance, directory=RECORDS, path=SOCKET):
        super().__init__(instance, directory)
        self._instance = instance
        self._path = path
        self._connection = None

    def set(self, servers, domains):
        """As Record.set(), of a record that this process does not hold."""
        reason, self._connection = self._ask(servers, domains, ANSWER_TIMEOUT)
        return reason

    def remove(self):
        """Ends the connection, and waits until the helper has ended it too, but not for long."""
        connection, self._connection = self._connection, None
        if connection:
            with connection:
                try:
                    connection.settimeout(program.UNDO_TIMEOUT)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1)
                except TimeoutError:
                    return  # it is still at it
                except OSError:
                    pass  # it was ended before
        if self.is_there():
            # A helper that was killed has left it, or the last run had none.
            connection = self._ask((), (), program.UNDO_TIMEOUT)[1]
            if connection:
                connection.close()

    def _ask(self, servers, domains, timeout):
        """Returns (None, the connection that holds the record), or (why it is not there, None)."""
        request = Request(self._instance, tuple(map(str, servers)), tuple(domains))
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            try:
                connection.settimeout(timeout)
                connection.connect(str(self._path))
                connection.send(request.encode())
                answer = connection.recv(REQUEST_MAX)
            except TimeoutError:
                return f"{program.NO_ANSWER} within {timeout} s", None
            except OSError as error:
                return f"{self._path}: {error.strerror}", None
            if not answer:
                return "the helper has ended; journalctl -t bulkvpnd-resolvconf says why", None
            reason = json.loads(answer)
            if reason:
                return reason, None
            # Only what went well outlives this block, whatever ends it: a greenlet may be killed while it waits.
            stack.pop_all()
            return None, connection


def serve(connection, locks=SOCKET.parent, records=RECORDS, capabilities=CAP_NET_ADMIN):
    """The helper's work: has the record added, and removed when the connection has ended.

    locks: directory for a file of each instance. records: see RECORDS. capabilities: that who asks must have.
    """
    allowed = _has(connection, capabilities)
    try:
        connection.settimeout(REQUEST_TIMEOUT)
        data = connection.recv(REQUEST_MAX + 1)
        if not allowed:
            raise Refused("should come from a process with CAP_NET_ADMIN")
        request = Request.decode(data)
    except Refused as error:
        _answer(connection, f"request: {error}")
        return
    except OSError:
        return
    with open(locks / f"{request.instance}.lock", "wb") as lock:
        # The helper of the run before may still be removing its record, and must not remove this one.
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = Record(request.instance, records)
        if not request.servers and not request.domains:
            _answer(connection, record.remove(program.TIMEOUT))
            return
        try:
            reason = record.set(request.servers, request.domains)
            _answer(connection, reason)
            if reason is None:
                _await_end(connection)
        finally:
            reason = record.remove(program.TIMEOUT)
            if reason:
                log.error("the record of %s is not removed: %s", request.instance, reason)


def _has(connection, capabilities):
    """Whether the process that made a connection has capabilities (SO_PEERCRED of unix(7), proc(5))."""
    process, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        status = pathlib.Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    effective = int(re.search("^CapEff:\t([0-9a-f]+)$", status, re.MULTILINE)[1], 16)
    return effective & capabilities == capabilities


def _answer(connection, reason):
    # A daemon that has gone does not wait for it.
    with contextlib.suppress(OSError):
        connection.send(json.dumps(reason).encode("ascii"))


def _await_end(connection):
    with contextlib.suppress(OSError):
        connection.settimeout(None)
        connection.recv(1)


def main(*arguments):
    """The helper. Its connection is standard input (StandardInput=socket, systemd.exec(5)). arguments: of serve()."""
    with socket.socket(fileno=0) as connection:

        def end(*_):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

        # So there is one way to end, and what was added is removed also when the machine shuts down.
        signal.signal(signal.SIGTERM, end)
        serve(connection, *arguments)


if __name__ == "__main__":
    main()
