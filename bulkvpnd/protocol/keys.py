"""The key schedule of one connection, and the two objects that use its keys.

    client_random, server_random  (32 bytes each, from HELLO and WELCOME, secret inside TLS)
              |
    HKDF-Extract, salt = SHA-256(HELLO || WELCOME)           RFC 5869 section 2.2
              |
            secret --expand_label "c2s"--> traffic secret, client to server
                   --expand_label "s2c"--> traffic secret, server to client
                                              |--expand_label "key"--> AEAD key      RFC 8446 section 7.3
                                              |--expand_label "iv"---> nonce base    RFC 8446 section 7.3
                                              '--expand_label "upd"--> next one      RFC 8446 section 7.2

Nothing else derives keys, and a frame counter lives only in the object that seals or opens with its key.
"""

import hashlib
import hmac

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from bulkvpnd.protocol.aead import CIPHERS, KEY_SIZE, NONCE_SIZE, TAG_SIZE, InvalidTag
from bulkvpnd.protocol.errors import RemoteError

SECRET_SIZE = 32
"""Bytes of a traffic secret: the output of SHA-256."""
RANDOM_SIZE = 32
"""Bytes of each end's random value in HELLO and WELCOME."""
FRAME_COUNT_LIMIT = 1 << 32
"""Frames under one key (RFC 8446 section 5.5 allows 2^24.5 records of 16 KiB; a byte limit holds besides)."""
CLIENT_TO_SERVER = "c2s"
SERVER_TO_CLIENT = "s2c"


def expand_label(secret, label, size):
    """HKDF-Expand-Label of RFC 8446 section 7.1 with this protocol's own prefix and no context.

    secret: bytes. label: str. size: bytes of the result.
    """
    name = b"bulkvpn1 " + label.encode("ascii")
    info = size.to_bytes(2, "big") + bytes([len(name)]) + name + b"\0"
    return HKDFExpand(hashes.SHA256(), size, info).derive(secret)


def traffic_secrets(hello, welcome, client_random, server_random):
    """Both directions' first traffic secrets.

    hello, welcome: the messages as they went over the wire, without their length prefix. client_random,
    server_random: 32 bytes each. Returns {"c2s": 32 bytes, "s2c": 32 bytes}.
    """
    # Each message is hashed by itself first, so that no byte can move from one to the other unseen.
    transcript = hashlib.sha256(hashlib.sha256(hello).digest() + hashlib.sha256(welcome).digest()).digest()
    secret = hmac.digest(transcript, client_random + server_random, "sha256")  # HKDF-Extract(salt, input)
    return {label: expand_label(secret, label, SECRET_SIZE) for label in (CLIENT_TO_SERVER, SERVER_TO_CLIENT)}


class _Direction:
    """One direction's traffic secret, key and frame counter."""

    def __init__(self, cipher, secret):
        self._cipher = CIPHERS[cipher]
        self._secret = secret
        self.generation = 0
        self._install()

    def _install(self):
        self._aead = self._cipher(expand_label(self._secret, "key", KEY_SIZE))
        self._iv = int.from_bytes(expand_label(self._secret, "iv", NONCE_SIZE), "big")
        self.frames = 0
        self.bytes = 0

    def ratchet(self):
        """Goes on to the next traffic secret and forgets this one (RFC 8446 section 7.2)."""
        self._secret = expand_label(self._secret, "upd", SECRET_SIZE)
        self.generation += 1
        self._install()

    def is_due(self, limit):
        """Whether the key should be replaced: after `limit` bytes, or well before the frame counter is used up."""
        return self.bytes >= limit or self.frames >= FRAME_COUNT_LIMIT // 2

    def _nonce(self):
        # RFC 8446 section 5.3: the counter, padded on the left, xor the static IV.
        return (self._iv ^ self.frames).to_bytes(NONCE_SIZE, "big")


class Sealer(_Direction):
    """Seals frames of the sending direction; frames and bytes count what went under the present key."""

    def seal_into(self, header, payload, out):
        """Seals one payload.

        header: the 4 bytes of the frame header, authenticated with it. payload: buffer. out: writable buffer with
        room for payload, tag and aead.SLACK bytes. Returns the bytes written.
        """
        if self.frames >= FRAME_COUNT_LIMIT:
            raise OverflowError("frame counter used up; the key should have been replaced long ago")
        nonce = self._nonce()
        # Counted before the call: should it raise, this nonce is never used again.
        self.frames += 1
        self.bytes += len(payload)
        return self._aead.seal_into(nonce, payload, header, out)


class Opener(_Direction):
    """Opens frames of the receiving direction."""

    def open_into(self, header, sealed, out):
        """Checks and decrypts one payload. Arguments as Sealer.seal_into. Returns the bytes written.

        Raises RemoteError when the frame is not authentic: garbage, replayed, reordered or sealed with another key.
        """
        if self.frames >= FRAME_COUNT_LIMIT:
            raise RemoteError("rekey", "the peer did not replace its key in time")
        nonce = self._nonce()
        self.frames += 1
        # Payload, as the sealer counts: it is what both have agreed to limit.
        self.bytes += len(sealed) - TAG_SIZE
        try:
            return self._aead.open_into(nonce, sealed, header, out)
        except InvalidTag:
            raise RemoteError("authentication", "a frame is not authentic") from None
