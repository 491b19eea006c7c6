"""Bulk frames: what goes over a connection once TLS is done.

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------+-----------------------------------------------+
    |     type      |                    length                     |  header, the AAD
    +---------------+-----------------------------------------------+
    |            length bytes: sealed payload and its tag           |
    +---------------------------------------------------------------+

The payload of DATA is a run of entries, each a packet behind its length and the kernel's virtio_net_hdr:

    +---------------------------------------------------------------+
    |                            length                             |  of what follows, bytes
    +---------------------------------------------------------------+
    |              virtio_net_hdr (10 bytes), IP packet ...         |
"""

import struct

from bulkvpnd.protocol.aead import TAG_SIZE
from bulkvpnd.protocol.errors import RemoteError

DATA, PING, PONG, REKEY, CONTROL, CLOSE = range(1, 7)
TYPES = {DATA: "DATA", PING: "PING", PONG: "PONG", REKEY: "REKEY", CONTROL: "CONTROL", CLOSE: "CLOSE"}

HEADER_SIZE = 4
LENGTH_SIZE = 4
"""Bytes of an entry's length prefix."""
OVERHEAD = HEADER_SIZE + TAG_SIZE
"""Bytes that a frame adds to its payload."""

CLOSE_REASONS = ("done", "replaced", "protocol", "shutdown", "timeout", "refused", "moved")
"""`moved` ends one direction only: what is still to come goes over the connection that replaces this one."""
CONTROL_PAYLOAD_LIMIT = 256
"""Bytes of payload in a frame that is not DATA (choice: PING carries 8, CLOSE one word)."""

_HEADER = struct.Struct(">I")


def pack_header(kind, payload_size):
    """The 4 bytes in front of a sealed payload of `payload_size` plaintext bytes."""
    return _HEADER.pack(kind << 24 | payload_size + TAG_SIZE)


def unpack_header(buffer, offset, limit):
    """Reads and checks the header at `offset` before anything of the frame is stored.

    limit: largest payload of DATA, bytes. Returns (type, bytes of sealed payload). Raises RemoteError.
    """
    (word,) = _HEADER.unpack_from(buffer, offset)
    kind, size = word >> 24, word & 0xFFFFFF
    if kind not in TYPES:
        raise RemoteError("type", f"unknown frame type {kind}")
    if not TAG_SIZE <= size <= (limit if kind == DATA else CONTROL_PAYLOAD_LIMIT) + TAG_SIZE:
        raise RemoteError("length", f"{TYPES[kind]} frame of {size} bytes, outside what was agreed")
    if kind == DATA and size == TAG_SIZE:
        raise RemoteError("length", "DATA frame without a packet")
    return kind, size


def close_reason(payload):
    """The word in a CLOSE payload, or "unknown": the peer's bytes go no further."""
    word = bytes(payload).decode("ascii", "replace")
    return word if word in CLOSE_REASONS else "unknown"
