"""One function for each parser of what others wrote: it takes any bytes, and raises only if the parser is wrong.

Each catches the error that its parser may answer with; every other one is a finding, and so is an answer that does not
hold what the parser promises. Nothing here needs the fuzzer: test_fuzz.py runs the corpus through the same functions.
"""

import base64
import collections
import contextlib
import datetime
import functools
import io
import ipaddress
import json
import pathlib
import re
import shutil
import socket
import tempfile
import zlib

from bulkvpnd import config, pki, workerlink
from bulkvpnd.admin import oneline
from bulkvpnd.admin import openvpn as admin_openvpn
from bulkvpnd.control import clients as control_clients
from bulkvpnd.control import pool, status, tls
from bulkvpnd.dataplane import routing
from bulkvpnd.dataplane.worker import DROPS
from bulkvpnd.host import resolvconf, sysctl
from bulkvpnd.protocol import frame, handshake, packet
from bulkvpnd.protocol.errors import Refused, RemoteError

LIMIT = 128 * 1024
"""Bytes of payload that both ends agreed on."""


@functools.cache
def scratch():
    """A folder for the parsers that take a file; `clean` removes it."""
    return pathlib.Path(tempfile.mkdtemp(prefix="bulkvpnd-fuzz-"))


def clean():
    shutil.rmtree(scratch(), ignore_errors=True)
    scratch.cache_clear()
    _server.cache_clear()
    _ledger.cache_clear()


def header(data):
    """The header of a bulk frame."""
    if len(data) < frame.HEADER_SIZE:
        return
    try:
        kind, size = frame.unpack_header(data, 0, LIMIT)
    except RemoteError as error:
        assert error.reason in ("type", "length")
        return
    assert kind in frame.TYPES and 0 <= size - frame.TAG_SIZE <= LIMIT
    assert frame.pack_header(kind, size - frame.TAG_SIZE) == data[: frame.HEADER_SIZE]


def close(data):
    """The payload of a CLOSE frame."""
    assert frame.close_reason(memoryview(data)) in (*frame.CLOSE_REASONS, "unknown")


_ADDRESSES = {bytes((10, 9, 0, 2)), bytes((0xFD, *bytes(14), 2))}
_NETWORKS = [ipaddress.ip_network("10.9.1.0/24")]
_ISOLATION = routing.Isolation([ipaddress.ip_network("10.9.0.0/16")], {bytes((10, 9, 0, 1))})


def payload(data):
    """The payload of a DATA frame, and what is done with each packet of it. The first byte says what was agreed."""
    if not data:
        return
    offloads = [name for bit, name in enumerate(packet.OFFLOADS) if data[0] >> bit & 1]
    verdicts = routing.Verdicts(_ADDRESSES, _NETWORKS, _ISOLATION if data[0] & 16 else None) if data[0] & 8 else None
    drops = collections.Counter()
    view = memoryview(data[1:])
    spans, segments, at = [], 0, 0
    try:
        while at != len(view):
            more, count, at = packet.inspect(view, at, len(view), offloads, verdicts, drops)
            spans, segments = spans + more, segments + count
    except RemoteError as error:
        assert error.reason in ("length", "vnet")
        return
    assert set(drops) <= set(DROPS)
    assert len(spans) <= segments <= len(spans) * packet.TCP_SEGMENTS_MAX
    end = 0
    for start, next_end in spans:
        assert end + frame.LENGTH_SIZE <= start < next_end <= len(view)
        end = next_end
        ip = start + packet.VNET_SIZE
        if verdicts is not None:
            source = bytes(view[ip + 12 : ip + 16] if view[ip] >> 4 == 4 else view[ip + 8 : ip + 24])
            assert source in _ADDRESSES or source[:3] == bytes((10, 9, 1))
        assert 0 <= packet.flow_hash(view, ip, end) < 1 << 32


def outbound(data):
    """A packet of this machine: any program may have written it."""
    buffer = bytearray(data)
    if not buffer:
        return
    assert 0 <= packet.flow_hash(buffer, 0, len(buffer)) < 1 << 32
    if buffer[0] >> 4 == 4 and len(buffer) >= 20 or buffer[0] >> 4 == 6 and len(buffer) >= 40:
        packet.mark_congestion(buffer, 0)
        assert len(buffer) == len(data)
    entry = packet.VNET_NONE + data
    if len(entry) >= packet.ENTRY_MIN and (headers := packet.joinable(entry, 0, len(entry))):
        assert packet.VNET_SIZE < headers < len(entry)
        packet.joined_key(entry[:headers])


def hello(data):
    _message(handshake.Hello, data)


def welcome(data):
    _message(handshake.Welcome, data)


def _message(kind, data):
    try:
        message = kind.decode(data)
    except RemoteError as error:
        assert error.reason == "handshake" and str(error).isprintable()
        return
    except Refused as error:
        assert error.reason in handshake.REFUSALS
        return
    encoded = handshake.encode(message)
    assert kind.decode(encoded[handshake.PREFIX_SIZE :]) == message


def prefix(data):
    """The length in front of HELLO and WELCOME."""
    with contextlib.suppress(RemoteError):
        assert 2 <= handshake.message_size(data[: handshake.PREFIX_SIZE]) <= handshake.MESSAGE_MAX


class _Peer:
    """A socket whose other end sent `data` and nothing more."""

    def __init__(self, data):
        self._data = data

    def recv(self, size):
        part, self._data = self._data[:size], self._data[size:]
        return part

    def sendall(self, data):
        assert len(data) <= 1 << 20


def stranger(data):
    """A connection of somebody who has no certificate, up to the end of the handshake."""
    connection = tls.Handshake(_Peer(data), _context())
    try:
        name = connection.authenticate()
    except (RemoteError, OSError) as error:
        assert str(error).isprintable()
    else:
        raise AssertionError(f"authenticated as {name}")


@functools.cache
def _authority():
    """An authority that signs nothing but what is made here."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return now, *pki.create_authority("fuzz", now, 1)


@functools.cache
def _server():
    """The configuration of a server."""
    now, ca, ca_key = _authority()
    own, own_key = pki.issue(ca, ca_key, "server", "server", now, 1)
    blocks = {"ca": ca, "certificate": own, "key": own_key}
    file = scratch() / "server.conf"
    file.write_text("mode = server\npool-ipv4 = 10.9.0.0/24\npool-ipv6 = fd09::/64\n" + "".join(
        f"<{name}>\n{text}</{name}>\n" for name, text in blocks.items()
    ))
    file.chmod(0o600)
    return config.load(["--config", str(file)])[0]


@functools.cache
def _context():
    return tls.make_context(_server())


def certificate(data):
    """The certificate of a peer, first byte: which role it must have."""
    if not data:
        return
    try:
        name = pki.identity(data[1:], "server" if data[0] & 1 else "client")
    except pki.PKIError as error:
        assert str(error).isprintable()
        return
    assert config.NAME.fullmatch(name)


def revocations(data):
    """A revocation list in DER, as somebody else's program wrote it; or the whole file, if it is PEM."""
    text = data.decode("latin-1")
    if "-----BEGIN" not in text:
        text = "-----BEGIN X509 CRL-----\n" + base64.encodebytes(data).decode() + "-----END X509 CRL-----\n"
    try:
        pki.read_crl(text, _authority()[1])
    except pki.PKIError as error:
        assert str(error).isprintable()
    else:
        raise AssertionError("a list that the authority has not signed")


def configuration(data):
    """A configuration file, as the administrator wrote it."""
    parser = config.FileParser()
    parser.name = "fuzz.conf"
    try:
        items = parser.parse(io.StringIO(data.decode("utf-8", "surrogateescape")))
        for name, value in items.items():
            for one in value if isinstance(value, list) else [value]:
                config.BY_NAME[name].parse(one)
    except config.ConfigurationError as error:
        assert str(error).isprintable() and str(error).startswith("fuzz.conf:")
        return
    except ValueError as error:
        assert str(error).isprintable()
        return
    # All of it, which takes ten times as long, only for what may be right.
    file = scratch() / "fuzz.conf"
    file.write_bytes(data)
    file.chmod(0o600)
    try:
        loaded, _ = config.load(["--config", str(file)])
    except config.ConfigurationError as error:
        assert str(error).isprintable() and str(error).startswith(str(file))
        return
    assert loaded.mode in ("server", "client")


def clients(data):
    """A file with what is fixed for clients, as the administrator wrote it."""
    server = _server()
    directory = control_clients.directory_of(server)
    directory.mkdir(exist_ok=True)
    (directory / "fuzz.conf").write_bytes(data)
    try:
        found = control_clients.load(server)
    except config.ConfigurationError as error:
        assert str(error).isprintable() and str(error).startswith(str(directory))
        return
    assert all(config.NAME.fullmatch(one.name) for one in found)
    fixed = [address for one in found for address in one.addresses.values()]
    pools = (server.pool_ipv4, server.pool_ipv6)
    assert len(set(fixed)) == len(fixed) and all(any(address in pool for pool in pools) for address in fixed)
    networks = [network for one in found for network in one.networks]
    assert not any(network.overlaps(pool) for network in networks for pool in pools if pool.version == network.version)


def leases(data):
    """The file of leases."""
    file = scratch() / "leases.json"
    file.write_bytes(data)
    networks = (ipaddress.ip_network("10.9.0.0/29"), ipaddress.ip_network("fd09::/64"))
    kept = pool.Pool(networks, file)
    given = [kept.lease(f"client{number}")[4] for number in range(5)]
    assert len(set(given)) == 5 and not set(given) & {kept.server_interfaces[0]}


def command(data):
    """A request on the status socket, of root and of anybody else."""
    report, done = {"mode": "server"}, {"sessions": 1}
    listening = status.StatusSocket(scratch(), lambda: report, {"drain": lambda request: done})
    for is_privileged in (False, True):
        answer = listening._answer_to(data, is_privileged)
        assert answer == report or answer == done and is_privileged or answer["error"].isprintable()


_TREE = {"net/core/rmem_max": "1\n", "net/ipv4/ip_forward": "0\n", "kernel/core_pattern": "core\n"}


def ledger(data):
    """The ledger of sysctls, which the daemon's user writes and root reads; and what is done by it, but for devices."""
    kept = _ledger()
    kept._state_path.unlink(missing_ok=True)  # to write into it takes much longer
    kept._state_path.write_bytes(data)
    try:
        entries = kept.entries()
    except sysctl.LedgerError as error:
        assert str(error).isprintable()
        return
    # Those are of the machine that the fuzzer runs on.
    keys = [key for name, entry in entries.items() for key in (name, *entry["beside"])]
    if not any(map(kept._device, keys)):
        for key in kept.recover():
            (kept._root / key.replace(".", "/")).write_text(_TREE[key.replace(".", "/")])
        found = {str(path.relative_to(kept._root)): path for path in kept._root.rglob("*") if path.is_file()}
        assert set(found) == set(_TREE) and found["kernel/core_pattern"].read_text() == "core\n"


@functools.cache
def _ledger():
    """An instance's, on a tree of its own."""
    tree, directory = scratch() / "sys", scratch() / "shared"
    directory.mkdir()
    for name, text in _TREE.items():
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text(text)
    return sysctl.Ledger(directory, "fuzz", root=tree)


def worker(data):
    """A message on the link between main process and worker."""
    link, theirs = workerlink.WorkerLink.pair()
    try:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * workerlink.MESSAGE_MAX)
        theirs.send(data[: workerlink.MESSAGE_MAX])
        with contextlib.suppress(workerlink.LinkClosed):
            message, descriptors = link.receive()
            assert not descriptors and json.loads(data) == message or message != message
    finally:
        theirs.close()
        link.close()


def name_servers(data):
    """What the helper that is root is asked for. What resolvconf(8) is given is nothing that a shell would evaluate."""
    try:
        request = resolvconf.Request.decode(data)
    except resolvconf.Refused as error:
        assert str(error).isprintable()
        return
    assert resolvconf.Request.decode(request.encode()) == request
    assert config.NAME.fullmatch(request.instance)
    assert len(request.servers) <= 8 and all(str(ipaddress.ip_address(one)) == one for one in request.servers)
    assert len(request.domains) <= 8 and all(re.fullmatch(r"[A-Za-z0-9.-]{1,253}", one) for one in request.domains)


def planted(data):
    """Not a parser: a bug that the fuzzer must find, or it finds nothing."""
    if data[:1] == b"b" and data[1:2] == b"u" and data[2:3] == b"g":
        raise ValueError("found")


def one_line(data):
    """What a configuration on one line unpacks to; as a line itself, too."""
    packed = base64.b32encode(zlib.compress(data, 1)).decode()
    for line in (oneline.PREFIX + packed, oneline.PREFIX + data.decode("utf-8", "replace")):
        with contextlib.suppress(ValueError):
            text = oneline.decode(line)
            with contextlib.suppress(config.ConfigurationError):
                config.FileParser().parse(io.StringIO(text))


def openvpn(data):
    """A configuration of OpenVPN: what it becomes is one of ours."""
    try:
        found = admin_openvpn.carry(admin_openvpn.parse(data.decode("utf-8", "replace")))
    except admin_openvpn.SyntaxProblem as error:
        assert error.line >= 1
        return
    items = config.FileParser().parse(io.StringIO(admin_openvpn._text("x", found, {})))
    assert items.pop("mode") == found.mode and set(items) == set(found.settings)
    assert all(reason.isprintable() for _, _, reason in found.notes)


TARGETS = {
    function.__name__: function
    for function in (
        header, close, payload, outbound, hello, welcome, prefix, stranger, certificate, revocations, configuration,
        clients, leases, command, ledger, worker, one_line, openvpn, name_servers,
    )
}  # fmt: skip
