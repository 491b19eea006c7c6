"""TLS 1.3 on every connection: contexts, and the handshake over a plain gevent socket.

`ssl.SSLObject` over two `MemoryBIO`s and not gevent's SSLSocket: gevent before 24.2.1, as in Debian 12, lacks the fix
for CVE-2023-40217, by which bytes sent before the handshake could be read as if they were authenticated. Here no byte
reaches a parser that did not come out of the SSLObject.
"""

import contextlib
import os
import ssl

import gevent

from bulkvpnd import config, pki
from bulkvpnd.protocol import handshake
from bulkvpnd.protocol.errors import RemoteError

PEER_MAX = 40 * 1024
"""Bytes that a peer may send until TLS is over: a message of MESSAGE_MAX, the first frames behind it, and 20 KiB for
certificates and what belongs to TLS. OpenSSL takes KeyUpdates (RFC 8446 section 4.6.3) without end, and each costs 10
to 20 us for its 27 bytes (choice)."""
_READ_SIZE = 4096
"""Bytes that are taken in before everything else has its turn: 3 ms of KeyUpdates (choice)."""


def read_texts(configuration):
    """The PEM texts of ca, certificate, key and, where it is given, crl, {name: str}. Raises ConfigurationError."""
    names = ("ca", "certificate", "key", *(["crl"] if configuration.crl else []))
    return {name: config.pem_text(configuration, name) for name in names}


def make_context(configuration, texts=None):
    """The SSLContext of this end, from `texts` of read_texts, which is called without them.

    Raises ConfigurationError.
    """
    is_server = configuration.mode == "server"
    # Bare: create_default_context() would trust the system's authorities and honour SSLKEYLOGFILE.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.hostname_checks_common_name = False
    context.set_alpn_protocols([handshake.ALPN])
    if is_server:
        context.num_tickets = 0
    texts = texts or read_texts(configuration)
    with _blaming(configuration, "ca"), _memory_file(texts["ca"]) as file:
        context.load_verify_locations(cafile=file)
    if "crl" in texts:
        authorities = context.cert_store_stats()["x509"]
        with _blaming(configuration, "crl"), _memory_file(texts["crl"]) as file:
            context.load_verify_locations(cafile=file)
            # OpenSSL would trust it, and lists come by ways that need not be safe: they are signed.
            if context.cert_store_stats()["x509"] != authorities:
                raise ValueError("there is a certificate among its lists; take it out")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    with _blaming(configuration, "certificate and key"):
        with _memory_file(texts["certificate"].rstrip() + "\n" + texts["key"]) as file:
            context.load_cert_chain(file, password=_no_password)
    return context


@contextlib.contextmanager
def _blaming(configuration, what):
    """Says of which options a text is that OpenSSL does not take."""
    try:
        yield
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise config.ConfigurationError(f"{configuration.path}: {what}: cannot be used: {reason}") from None


@contextlib.contextmanager
def _memory_file(text):
    """The path of a file that is only in memory: ssl takes keys and lists from paths alone, and keys keep off disks."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(text.encode("ascii", "replace"))
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _no_password():
    raise ValueError("the key has a passphrase; a daemon cannot type it, remove it with: openssl pkey")


class Handshake:
    """TLS on one socket, from first byte to close_notify.

    sock: gevent's. context: of make_context. server_name: for the client, the name that the server's certificate must
    carry. All methods block cooperatively; the caller sets one deadline over all of them. They raise RemoteError for
    what the peer did wrong and OSError for the socket. certificate, expires: after authenticate, what a revocation list
    calls the peer's, and when it ends, aware datetime.
    """

    def __init__(self, sock, context, server_name=None):
        self._socket = sock
        self._is_server = server_name is None
        self.certificate = self.expires = None
        self._may_come = PEER_MAX
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=self._is_server, server_hostname=server_name
        )

    def authenticate(self):
        """Does the TLS handshake. Returns the name in the peer's certificate."""
        self._drive(self._tls.do_handshake)
        certificate = self._tls.getpeercert(binary_form=True)
        if self._tls.version() != "TLSv1.3" or not certificate:
            raise RemoteError("tls", "TLS without version 1.3 or without a certificate")
        if self._tls.selected_alpn_protocol() != handshake.ALPN:
            raise RemoteError("tls", f"the peer does not speak {handshake.ALPN}")
        try:
            self.certificate, self.expires = pki.issuer_and_serial(certificate), pki.expiry(certificate)
            return pki.identity(certificate, "client" if self._is_server else "server")
        except pki.PKIError as error:
            raise RemoteError("certificate", f"the peer's certificate: {error}") from None

    def send(self, data):
        """data: an encoded message."""
        self._drive(self._tls.write, data)

    def receive_message(self):
        """The JSON bytes of the next message."""
        return self._receive(handshake.message_size(self._receive(handshake.PREFIX_SIZE)))

    def _receive(self, size):
        data = b""
        while len(data) < size:
            part = self._drive(self._tls.read, size - len(data))
            if not part:
                raise RemoteError("tls", "the peer ended TLS in the middle of a message")
            data += part
        return data

    def finish(self):
        """Exchanges close_notify. Returns the bytes that came behind it, which are bulk frames already."""
        self._drive(self._tls.unwrap)
        return self._incoming.read()

    def _drive(self, operation, *arguments):
        while True:
            try:
                result = operation(*arguments)
            except ssl.SSLWantReadError:
                self._flush()
                self._take_in()
                continue
            except OSError as error:
                # ssl.SSLError, or what Python 3.13 makes of an errno that an earlier call left: no socket is involved.
                # The alert for the peer; one that is gone already must not hide why.
                with contextlib.suppress(OSError):
                    self._flush()
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise RemoteError("certificate", f"the peer's certificate: {error.verify_message}") from None
                raise RemoteError("tls", f"TLS: {getattr(error, 'reason', None) or 'failed'}") from None
            self._flush()
            return result

    def _take_in(self):
        if not self._may_come:
            raise RemoteError("tls", f"{PEER_MAX} bytes came and the handshake is not over; if the peer means well, "
                              "its certificate chain has to be shorter") from None
        data = self._socket.recv(min(_READ_SIZE, self._may_come))
        if not data:
            raise RemoteError("left", "the peer closed the connection during the handshake") from None
        self._may_come -= len(data)
        self._incoming.write(data)
        # recv() does not wait while there is something to read: without this neither a deadline nor anybody else would
        # have a turn.
        gevent.sleep(0)

    def _flush(self):
        if self._outgoing.pending:
            self._socket.sendall(self._outgoing.read())
