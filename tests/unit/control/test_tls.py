"""control.tls over socket pairs, with real certificates: who gets in, who does not, and which bytes come out."""

import datetime
import hmac
import ipaddress
import itertools
import ssl
import tempfile

import gevent
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from doubles import CLIENT, DAY, NOW, SERVER, Authority, configuration, context, descriptors
from gevent import socket
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkvpnd import config, pki
from bulkvpnd.control import tls
from bulkvpnd.protocol import handshake
from bulkvpnd.protocol.errors import RemoteError


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def server(directory, authority):
    return context(directory, "server", authority.issue("server", "server"))


@pytest.fixture(scope="module")
def client(directory, authority):
    return context(directory, "client", authority.issue())


def unchecked(end, alpn=(handshake.ALPN,), newest=ssl.TLSVersion.TLSv1_3):
    """The SSLContext of a client that lacks what ours insists on. end: (ca, certificate, key), or None."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode, made.maximum_version = False, ssl.CERT_NONE, newest
    if alpn:
        made.set_alpn_protocols(alpn)
    if end:
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(end[1] + end[2])
            file.flush()
            made.load_cert_chain(file.name)
    return made


def both(server, client, server_name="server"):
    """A handshake over a socket pair. Returns what each end got: a name or the exception. Both sockets are closed."""
    ours, theirs = socket.socketpair()

    def run(sock, *arguments):
        try:
            with sock:
                shake = tls.Handshake(sock, *arguments)
                name = shake.authenticate()
                # With TLS 1.3 a client is done before the server has judged it; it learns so from the next message.
                if arguments[1:]:
                    shake.receive_message()
                else:
                    shake.send(b"\0\2{}")
                return name
        except (RemoteError, OSError) as error:
            return error

    ends = [gevent.spawn(run, ours, server), gevent.spawn(run, theirs, client, server_name)]
    gevent.joinall(ends, raise_error=True)
    return [end.value for end in ends]


def refused(result, reason, text=""):
    assert isinstance(result, RemoteError) and result.reason == reason and text in str(result).lower(), result
    assert str(result).isprintable() and len(str(result)) < 200


def test_each_end_learns_the_other_s_name(server, client):
    assert both(server, client) == ["alice", "server"]


ODD_CLIENTS = {
    # name: (how Authority.odd makes it, reason, text)
    "expired": ({"last": NOW - datetime.timedelta(seconds=5)}, "certificate", "expired"),
    "not yet valid": ({"first": NOW + DAY, "last": NOW + 2 * DAY}, "certificate", "not yet valid"),
    "self-signed": ({"self_signed": True}, "certificate", ""),
    "no usage": ({"usages": None}, "certificate", "usage"),
    "server's usage": ({"usages": [SERVER]}, "certificate", "purpose"),
    "no name": ({"names": None}, "certificate", "exactly one"),
    "two names": ({"names": ["alice", "bob"]}, "certificate", "exactly one"),
    "an address": ({"names": [x509.IPAddress(ipaddress.IPv4Address("192.0.2.1"))]}, "certificate", "exactly one"),
    "newline in the name": ({"names": ["alice\nroot"]}, "certificate", r"alice\nroot"),
    "NUL in the name": ({"names": ["alice\0.example"]}, "certificate", r"alice\x00"),
    "path as a name": ({"names": ["../alice"]}, "certificate", "../alice"),
}


@pytest.mark.parametrize("case", ODD_CLIENTS.values(), ids=ODD_CLIENTS)
def test_the_server_refuses_a_client_with(authority, server, case):
    shape, reason, text = case
    seen, _ = both(server, unchecked(authority.odd(**shape)))
    refused(seen, reason, text)


def test_a_certificate_of_the_right_shape_from_elsewhere_gets_in(authority, server):
    """So that the refusals above are for the one thing each has wrong."""
    seen, _ = both(server, unchecked(authority.odd(usages=[CLIENT])))
    assert seen == "alice"


def test_the_server_refuses_another_authority_of_the_same_name(directory, server):
    seen, other = both(server, unchecked(Authority().issue()))
    refused(seen, "certificate")
    refused(other, "tls", "unknown_ca")


def test_the_server_refuses_a_server_s_certificate(authority, server):
    refused(both(server, unchecked(authority.issue("server", "server")))[0], "certificate", "purpose")


def test_the_server_refuses_no_certificate(server):
    refused(both(server, unchecked(None))[0], "tls", "certificate")


def test_the_server_refuses_tls_1_2(authority, server):
    old = unchecked(authority.issue(), newest=ssl.TLSVersion.TLSv1_2)
    refused(both(server, old)[0], "tls", "unsupported_protocol")


def test_the_handshake_does_not_rely_on_the_context_for_its_version(directory, authority):
    made = context(directory, "server", authority.issue("server", "server"))
    made.minimum_version = made.maximum_version = ssl.TLSVersion.TLSv1_2
    refused(both(made, unchecked(authority.issue(), newest=ssl.TLSVersion.TLSv1_2))[0], "tls", "version 1.3")


@pytest.mark.parametrize("alpn", [(), ("http/1.1",), ("bulkvpn/2",), ("bulkvpn/11",)])
def test_the_server_refuses_another_alpn(authority, server, alpn):
    refused(both(server, unchecked(authority.issue(), alpn))[0], "tls", "bulkvpn/1")


def test_the_client_refuses_a_server_without_alpn(authority, directory, client):
    mute = context(directory, "server", authority.issue("server", "server"))
    mute.set_alpn_protocols([])
    refused(both(mute, client)[1], "tls", "bulkvpn/1")


@pytest.mark.parametrize("make", [
    lambda authority: Authority().issue("server", "server"),
    lambda authority: authority.odd(["server"], [CLIENT]),
    lambda authority: authority.odd(["server"], None),
    lambda authority: authority.odd(["other"], [SERVER]),
    lambda authority: authority.odd(["server", "other"], [SERVER]),
    lambda authority: authority.odd(["server"], [SERVER], last=NOW - datetime.timedelta(seconds=5)),
    lambda authority: authority.odd(["*"], [SERVER]),
])  # fmt: skip
def test_the_client_refuses_a_server_with(authority, directory, client, make):
    ca, certificate, key = make(authority)
    impostor = context(directory, "server", (authority.pem, certificate, key))
    _, seen = both(impostor, client)
    refused(seen, "certificate")


# The bytes of one handshake, whole and cut short


def pair(server, client):
    """Two Handshakes over a socket pair whose TLS is done."""
    ours, theirs = socket.socketpair()
    ends = tls.Handshake(ours, server), tls.Handshake(theirs, client, "server")
    done = [gevent.spawn(end.authenticate) for end in ends]
    gevent.joinall(done, raise_error=True)
    return *ends, ours, theirs


def test_messages_pass_and_bytes_behind_close_notify_are_handed_on_exactly(server, client):
    here, there, ours, theirs = pair(server, client)
    frames = bytes(range(256)) * 40  # as much as comes with close_notify in one piece, and more
    with ours, theirs:
        here.send(handshake.encode(handshake.Refuse("busy")))
        assert there.receive_message() == b'{"message":"REFUSE","reason":"busy"}'
        finishing = gevent.spawn(there.finish)
        gevent.sleep(0)
        # Behind this end's close_notify come its frames at once.
        closing = gevent.spawn(here.finish)
        theirs_head = finishing.get()
        theirs.sendall(frames)
        assert theirs_head == b""
        got = closing.get()
        while len(got) < len(frames):
            got += ours.recv(len(frames))
        assert got == frames


@settings(max_examples=25, deadline=None)
@given(behind=st.binary(max_size=40), cut=st.integers(0, 60))
def test_any_split_of_close_notify_and_what_follows_loses_nothing(server, client, behind, cut):
    """The other end's bytes pass through this test's hands, which cut them anywhere."""
    here, there, ours, theirs = pair(server, client)
    with ours, theirs:
        middle, far = socket.socketpair()
        with middle, far:
            there._socket = far
            with pytest.raises(gevent.Timeout):
                with gevent.Timeout(0.005):
                    there.finish()  # says close_notify and hears none
            stream = middle.recv(4096) + behind
            finishing = gevent.spawn(here.finish)
            for part in (stream[:cut], stream[cut:]):
                if part:
                    theirs.sendall(part)
                    gevent.sleep(0)
                    gevent.sleep(0)
            head = finishing.get()
            rest = b""
            while len(head + rest) < len(behind):
                rest += ours.recv(100)
            assert head + rest == behind


def test_bytes_before_the_handshake_are_never_handed_on(server, client):
    """The class of CVE-2023-40217: sent before TLS, and the connection closed at once."""
    for data in (handshake.encode(handshake.Refuse("busy")), b"\0" * 5, b"\x17\x03\x03\0\2{}"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            shake = tls.Handshake(ours, server)
            theirs.sendall(data)
            theirs.close()
            for method in (shake.receive_message, shake.authenticate, shake.receive_message, shake.finish):
                with pytest.raises(RemoteError) as caught:
                    method()
                # OpenSSL 3.5 waits for more of a record that older ones see to be none.
                assert caught.value.reason in ("tls", "left")


def test_the_reason_is_named_though_the_peer_is_gone(server):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"GET / HTTP/1.0\r\n\r\n")
        theirs.close()
        with pytest.raises(RemoteError, match="HTTP_REQUEST"):
            tls.Handshake(ours, server).authenticate()


def test_application_data_in_place_of_close_notify_is_refused(server, client):
    here, there, ours, theirs = pair(server, client)
    with ours, theirs:
        there.send(b"one more")
        with pytest.raises(RemoteError) as caught:
            here.finish()
        assert caught.value.reason == "tls"


@pytest.mark.parametrize("sent", [b"", b"\1", b"\0\4{}"])
def test_a_peer_that_closes_in_the_middle_of_a_message(server, client, sent):
    here, there, ours, theirs = pair(server, client)
    with ours, theirs:
        there.send(sent) if sent else None
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(RemoteError, match="closed the connection") as ended:
            here.receive_message()
        assert ended.value.reason == "left"


def test_a_peer_that_ends_tls_in_the_middle_of_a_message(server, client):
    here, there, ours, theirs = pair(server, client)
    with ours, theirs:
        there.send(b"\0")
        gevent.spawn(there.finish)
        with pytest.raises(RemoteError, match="TLS") as caught:
            here.receive_message()
        assert caught.value.reason == "tls"


def test_a_message_in_parts_does_not_take_from_the_next(server, client):
    here, there, ours, theirs = pair(server, client)
    with ours, theirs:
        there.send(b"\0\4{")
        there.send(b"  }\0\2{}")
        assert (here.receive_message(), here.receive_message()) == (b"{  }", b"{}")


@pytest.mark.parametrize("size", [0, 1, handshake.MESSAGE_MAX + 1, 65535])
def test_a_length_that_is_not_allowed_is_refused_before_its_message_comes(server, client, size):
    here, there, ours, theirs = pair(server, client)
    with ours, theirs:
        there.send(size.to_bytes(2, "big"))
        with pytest.raises(RemoteError, match="allowed"):
            here.receive_message()


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 3000), bit=st.integers(0, 7))
def test_no_flipped_bit_of_the_client_s_handshake_changes_what_the_server_takes(server, client, at, bit):
    """A relay flips one bit somewhere in what the client sends. (Few are harmless: a record's legacy version.)"""
    ours, near = socket.socketpair()
    far, theirs = socket.socketpair()
    flipped = []

    def relay(source, sink, harm):
        seen = 0
        while data := source.recv(4096):
            if harm and seen <= at < seen + len(data):
                data = bytearray(data)
                data[at - seen] ^= 1 << bit
                flipped.append(at)
            seen += len(data)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def speak():
        shake = tls.Handshake(theirs, client, "server")
        shake.authenticate()
        shake.send(b"\0\2{}")

    with ours, near, far, theirs:
        greenlets = [gevent.spawn(relay, near, far, False), gevent.spawn(relay, far, near, True)]
        speaking = gevent.spawn(lambda: attempt(speak))
        shake = tls.Handshake(ours, server)
        seen = []
        failed = attempt(lambda: (seen.append(shake.authenticate()), seen.append(shake.receive_message())))
        assert failed and flipped or seen == ["alice", b"{}"]
        gevent.killall([*greenlets, speaking])


def attempt(function):
    """Returns the error that the peer or a broken record caused, or None."""
    try:
        with gevent.Timeout(0.2, TimeoutError("a flipped length waits for more; the daemon's deadline ends that")):
            function()
    except (RemoteError, OSError) as error:
        return error
    return None


def test_a_recorded_server_says_nothing_to_a_client(server, client):
    """Another hello of the client wants another answer, whatever a server once said."""
    replayed = []
    far, near = socket.socketpair()
    middle, end = socket.socketpair()

    def relay(source, sink, kept):
        while data := source.recv(4096):
            kept.append(data)
            sink.sendall(data)

    with far, near, middle, end:
        running = [gevent.spawn(relay, near, middle, []), gevent.spawn(relay, middle, near, replayed)]
        ends = tls.Handshake(end, server), tls.Handshake(far, client, "server")
        gevent.joinall([gevent.spawn(one.authenticate) for one in ends], raise_error=True)
        gevent.killall(running)
    assert replayed
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"".join(replayed))
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(RemoteError) as caught:
            tls.Handshake(ours, client, "server").authenticate()
        assert caught.value.reason == "tls"


def test_no_ticket_and_no_resumption(server, client, authority):
    """Each connection checks the certificate anew: there is nothing that a client could come back with."""
    ours, theirs = socket.socketpair()
    sessions = []
    with ours, theirs:
        here, there = tls.Handshake(ours, server), tls.Handshake(theirs, unchecked(authority.issue()), "server")
        gevent.joinall([gevent.spawn(one.authenticate) for one in (here, there)], raise_error=True)
        # A ticket would come with what the server says next.
        here.send(b"\0\2{}")
        assert there.receive_message() == b"{}"
        sessions.append(there._tls.session)
        assert not there._tls.session_reused and not here._tls.session_reused
    assert not sessions[0].has_ticket


# Peers that never come to an end


def key_updates(secret):
    """KeyUpdate messages without end (RFC 8446 section 4.6.3), each a record, from a traffic secret of SHA-384 on."""

    def expand(label, size):
        # RFC 8446 section 7.1, for lengths of one block.
        info = size.to_bytes(2, "big") + bytes([6 + len(label)]) + b"tls13 " + label + b"\0\1"
        return hmac.digest(secret, info, "sha384")[:size]

    # The message, which asks for none of the other's, and the type of what is inside the record.
    message, header = b"\x18\0\0\1\0" + b"\x16", b"\x17\3\3\0\x16"
    while True:
        # The first record under a key has the number 0, which leaves the nonce as it is derived.
        yield header + AESGCM(expand(b"key", 32)).encrypt(expand(b"iv", 12), message, header)
        secret = expand(b"traffic upd", 48)


@pytest.fixture(params=["client", "server"])
def renewing(request, server, client, tmp_path):
    """(Handshake whose TLS is done, the other end's socket, its KeyUpdates): of either end, the other is hostile."""
    keys = tmp_path / "keys"
    hostile = {"client": client, "server": server}[request.param]
    hostile.keylog_filename = str(keys)
    try:
        here, there, ours, theirs = pair(server, client)
    finally:
        hostile.keylog_filename = None
    secrets = {line.split()[0]: bytes.fromhex(line.split()[2]) for line in keys.read_text().splitlines()
               if not line.startswith("#")}
    updates = key_updates(secrets[f"{request.param.upper()}_TRAFFIC_SECRET_0"])
    with ours, theirs:
        yield (here, theirs, updates) if request.param == "client" else (there, ours, updates)


def take(updates, size):
    """At least `size` bytes of them."""
    return b"".join(itertools.islice(updates, -(-size // 27)))


@pytest.mark.parametrize("step", ["receive_message", "finish"])
def test_keys_are_not_renewed_without_end(renewing, step):
    here, peer, updates = renewing
    peer.sendall(take(updates, 3 * tls.PEER_MAX))
    with pytest.raises(RemoteError, match="40960 bytes came .* certificate chain") as caught, gevent.Timeout(5):
        getattr(here, step)()
    assert caught.value.reason == "tls"


def test_keys_may_be_renewed(renewing):
    """So that the above is for the number of them."""
    here, peer, updates = renewing
    peer.sendall(take(updates, 1000))
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
        here.receive_message()


def test_bytes_before_authentication_are_bounded(server):
    """Of a ClientHello that OpenSSL would wait for: 131072 bytes, in records as large as they may be."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        piece = b"\x16\3\1\x40\0"
        theirs.sendall(piece + b"\1\1\xff\xfc\3\3" + bytes(16378) + (piece + bytes(16384)) * 2)
        with pytest.raises(RemoteError, match="40960 bytes came"), gevent.Timeout(2):
            tls.Handshake(ours, server).authenticate()


def test_the_largest_message_passes_and_frames_at_once_behind_it(server, client):
    """With what is left for certificates."""
    here, there, ours, theirs = pair(server, client)
    largest = b"{" + b" " * (handshake.MESSAGE_MAX - 2) + b"}"
    with ours, theirs:
        came = tls.PEER_MAX - here._may_come
        there.send(len(largest).to_bytes(2, "big") + largest)
        assert here.receive_message() == largest
        ending = gevent.spawn(there.finish)
        gevent.sleep(0)
        closing = gevent.spawn(here.finish)
        ending.get()
        theirs.sendall(bytes(100_000))
        assert not any(closing.get())
        assert here._may_come > 16384 and came < 4096


def test_a_peer_that_says_much_holds_up_nobody(renewing):
    here, peer, updates = renewing
    peer.sendall(take(updates, 2 * tls.PEER_MAX))
    turns = []

    def beside():
        while True:
            turns.append(None)
            gevent.sleep(0)

    other = gevent.spawn(beside)
    with pytest.raises(RemoteError, match="bytes came"):
        here.receive_message()
    other.kill()
    assert len(turns) >= tls.PEER_MAX // 4096


# Contexts


def test_what_the_daemon_s_context_insists_on(server, client):
    for made in (server, client):
        assert made.minimum_version == made.maximum_version == ssl.TLSVersion.TLSv1_3
        assert not made.hostname_checks_common_name
        assert made.verify_mode == ssl.CERT_REQUIRED and made.verify_flags & ssl.VERIFY_X509_STRICT
        assert not made.post_handshake_auth and made.keylog_filename is None
        assert len(made.get_ca_certs()) == 1
    assert server.num_tickets == 0 and client.check_hostname


def test_sslkeylogfile_is_not_honoured(directory, authority, monkeypatch):
    monkeypatch.setenv("SSLKEYLOGFILE", str(directory / "keys"))
    made = context(directory, "server", authority.issue("server", "server"))
    assert made.keylog_filename is None and not (directory / "keys").exists()


NONSENSE = "-----BEGIN {0}-----\nAAAA\n-----END {0}-----\n"


def encrypted(key):
    key = serialization.load_pem_private_key(key.encode(), None)
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.BestAvailableEncryption(b"x")).decode()


@pytest.mark.parametrize("name, change, message", [
    ("ca", lambda text: NONSENSE.format("CERTIFICATE"), "ca: cannot be used: .*PEM"),
    ("ca", lambda text: "", "ca: cannot be used: NO_CERTIFICATE_OR_CRL_FOUND"),
    ("crl", lambda text: NONSENSE.format("X509 CRL"), "crl: cannot be used: .*PEM"),
    ("crl", lambda text: text + Authority().pem, "crl: cannot be used: there is a certificate among its lists"),
    ("certificate", lambda text: NONSENSE.format("CERTIFICATE"), "certificate and key: cannot be used: .*PEM"),
    ("key", lambda text: Authority().key, "certificate and key: cannot be used: KEY_VALUES_MISMATCH"),
    ("key", encrypted, "certificate and key: cannot be used: the key has a passphrase; .* openssl pkey"),
])  # fmt: skip
def test_what_is_wrong_with_the_pem_texts_is_said(directory, authority, name, change, message):
    made = configuration(directory, "server", authority.issue("server", "server"))
    texts = {**tls.read_texts(made), "crl": pki.create_crl(authority.pem, authority.key, {}, 1, NOW, 9)}
    before = descriptors()
    assert tls.make_context(made, texts)
    with pytest.raises(config.ConfigurationError, match=f"server.conf: {message}") as caught:
        tls.make_context(made, {**texts, name: change(texts[name])})
    assert str(caught.value).isprintable()
    assert descriptors() <= before, "no copy of the key stays open"


def test_the_authority_s_own_certificate_among_its_lists_does_no_harm(directory, authority):
    made = configuration(directory, "server", authority.issue("server", "server"))
    crl = pki.create_crl(authority.pem, authority.key, {}, 1, NOW, 9)
    assert len(tls.make_context(made, {**tls.read_texts(made), "crl": crl + authority.pem}).get_ca_certs()) == 1


def test_words_of_any_language_around_the_pem_texts(directory, authority):
    made = configuration(directory, "server", authority.issue("server", "server"))
    assert tls.make_context(made, {name: f"Schlüssel\n{text}" for name, text in tls.read_texts(made).items()})
