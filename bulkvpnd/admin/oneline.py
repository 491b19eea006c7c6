"""A client's configuration as one line of text, short enough for a QR code.

    BULKVPN1: base32( zlib( record record ... ) )
    record: u16 length | bytes                        network byte order
      first record: the settings, lines of key = value
      each further one: KEY LABEL 0x0a DER            one PEM object of the block <KEY>, -----BEGIN LABEL-----

Base32 (RFC 4648 section 6, without padding) has letters and digits only: a shell, a chat and a terminal that wraps
leave it alone, and the alphanumeric mode of QR codes (ISO/IEC 18004) takes 5.5 bits for a character of 5. DER (ITU-T
X.690) compresses better than PEM, because two certificates of one authority have much in common.
"""

import base64
import binascii
import re
import struct
import zlib

from bulkvpnd import config

PREFIX = "BULKVPN1:"
LENGTH = struct.Struct("!H")
_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----([A-Za-z0-9+/=\s]*)-----END \1-----")
_HEAD = re.compile(rb"([a-z0-9-]{1,64}) ([A-Z0-9 ]{1,64})\n")
_EXPECTED = f"the whole line that bulkvpnctl pki add printed, from {PREFIX} on"


def encode(items):
    """The line for a configuration. items: {key: value, or list of values}, as config.read_items() has them.

    Raises ValueError, which says why, for what cannot be written so.
    """
    settings, blocks = [], []
    for key, value in items.items():
        for one in value if isinstance(value, list) else [value]:
            found = _PEM.findall(one)
            blocks += [f"{key} {label}\n".encode() + base64.b64decode("".join(text.split())) for label, text in found]
            settings += [f"{key} = {one}"] if not found else []
    records = ["\n".join(settings).encode(), *blocks]
    if max(map(len, records)) >= 1 << 8 * LENGTH.size:
        raise ValueError("it is too large for one line")
    payload = b"".join(LENGTH.pack(len(record)) + record for record in records)
    return PREFIX + base64.b32encode(zlib.compress(payload, 9)).decode("ascii").rstrip("=")


def is_line(text):
    """Whether it is, or was meant to be, such a line."""
    return text.lstrip()[: len(PREFIX)].upper() == PREFIX


def decode(text):
    """The configuration that a line stands for, as text. White space in it, such as line breaks, does not count.

    Raises ValueError with what would be right, whatever the text is. Nothing in the result has been checked yet.
    """
    line = "".join(text.split()).upper()
    if not line.startswith(PREFIX):
        raise ValueError(_EXPECTED)
    packed = line[len(PREFIX) :]
    inflater = zlib.decompressobj()
    try:
        payload = inflater.decompress(base64.b32decode(packed + "=" * (-len(packed) % 8)), config.MAX_FILE_SIZE)
        if not inflater.eof or inflater.unused_data:
            raise ValueError
        settings, *blocks = _records(payload)
        lines = [settings.decode("utf-8")]
        grouped = {}
        for block in blocks:
            head = _HEAD.match(block)
            key, label = head[1].decode("ascii"), head[2].decode("ascii")
            grouped.setdefault(key, []).append(_pem(label, block[head.end() :]))
    except (ValueError, TypeError, struct.error, zlib.error, binascii.Error):
        raise ValueError(_EXPECTED) from None
    lines += [f"\n<{key}>\n{''.join(pem)}</{key}>" for key, pem in grouped.items()]
    return "\n".join(lines) + "\n"


def _records(payload):
    """Raises struct.error, ValueError."""
    found, at = [], 0
    while at < len(payload):
        (length,) = LENGTH.unpack_from(payload, at)
        at += LENGTH.size
        if at + length > len(payload):
            raise ValueError
        found.append(payload[at : at + length])
        at += length
    return found


def _pem(label, der):
    """RFC 7468 section 2: lines of 64 characters."""
    text = base64.b64encode(der).decode("ascii")
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----"]) + "\n"
