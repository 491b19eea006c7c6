"""bulkvpnd.protocol.frame: a header is checked before anything is stored for its frame."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bulkvpnd.protocol import frame
from bulkvpnd.protocol.errors import RemoteError

LIMIT = 256 * 1024
TAG = 16
CONTROL_TYPES = sorted(set(frame.TYPES) - {frame.DATA})


def refused(header, limit=LIMIT):
    """The reason of the RemoteError that the header must raise."""
    with pytest.raises(RemoteError) as caught:
        frame.unpack_header(header, 0, limit)
    return caught.value.reason


def header(kind, length):
    """By hand: a byte of type, three of length."""
    return bytes([kind, length >> 16, length >> 8 & 0xFF, length & 0xFF])


# Refused.


@pytest.mark.parametrize("kind", sorted(set(range(256)) - set(frame.TYPES)))
def test_an_unknown_type_is_refused(kind):
    assert refused(header(kind, 100)) == "type"


@pytest.mark.parametrize("length", [0, 1, TAG - 1, TAG, LIMIT + TAG + 1, 2**24 - 1])
def test_a_length_of_data_outside_its_range_is_refused(length):
    assert refused(header(frame.DATA, length)) == "length"


@pytest.mark.parametrize("kind", CONTROL_TYPES)
@pytest.mark.parametrize("length", [0, 1, TAG - 1, 256 + TAG + 1, LIMIT + TAG, 2**24 - 1])
def test_a_length_of_a_control_frame_outside_its_range_is_refused(kind, length):
    assert refused(header(kind, length)) == "length"


def test_the_limit_is_the_one_agreed_for_the_connection():
    assert frame.unpack_header(header(frame.DATA, 2 * LIMIT + TAG), 0, 2 * LIMIT) == (frame.DATA, 2 * LIMIT + TAG)
    assert refused(header(frame.DATA, 2 * LIMIT + TAG)) == "length"


def test_a_message_of_an_error_is_text_of_ours():
    for first in range(256):
        with pytest.raises(RemoteError) as caught:
            frame.unpack_header(header(first, 0), 0, LIMIT)
        assert str(caught.value).isprintable() and str(caught.value).isascii()


# Taken.


@pytest.mark.parametrize("length", [TAG + 1, TAG + 2, LIMIT + TAG - 1, LIMIT + TAG])
def test_data_within_its_range(length):
    assert frame.unpack_header(header(frame.DATA, length), 0, LIMIT) == (frame.DATA, length)


@pytest.mark.parametrize("kind", CONTROL_TYPES)
@pytest.mark.parametrize("length", [TAG, TAG + 1, 256 + TAG])
def test_a_control_frame_within_its_range(kind, length):
    assert frame.unpack_header(header(kind, length), 0, LIMIT) == (kind, length)


def test_a_header_as_in_the_specification():
    # bulkvpn-protocol(7): DATA 1, PING 2, PONG 3, REKEY 4, CONTROL 5, CLOSE 6; the length counts payload and tag.
    assert frame.TYPES == {1: "DATA", 2: "PING", 3: "PONG", 4: "REKEY", 5: "CONTROL", 6: "CLOSE"}
    assert frame.pack_header(frame.DATA, 0x12345) == b"\x01\x01\x23\x55"
    assert frame.pack_header(frame.REKEY, 0) == b"\x04\x00\x00\x10"
    assert (frame.HEADER_SIZE, frame.LENGTH_SIZE) == (4, 4)
    assert frame.OVERHEAD == 20


@given(st.sampled_from(sorted(frame.TYPES)), st.integers(0, 2**20), st.binary(max_size=40), st.binary(max_size=4))
@settings(max_examples=200, deadline=None)
@example(frame.DATA, 0, b"", b"")
@example(frame.PING, 256, b"", b"")
@example(frame.PING, 257, b"", b"")
@example(frame.DATA, 2**20, b"", b"")
def test_round_trip(kind, payload_size, before, behind):
    stream = memoryview(before + frame.pack_header(kind, payload_size) + behind)
    allowed = 1 <= payload_size if kind == frame.DATA else payload_size <= 256
    if allowed:
        assert frame.unpack_header(stream, len(before), 2**20) == (kind, payload_size + TAG)
    else:
        with pytest.raises(RemoteError):
            frame.unpack_header(stream, len(before), 2**20)


@given(st.binary(min_size=4, max_size=4), st.integers(128 * 1024, 1024 * 1024))
@example(header(frame.DATA, TAG - 1), 128 * 1024)
@example(header(frame.DATA, 128 * 1024 + TAG + 1), 128 * 1024)
@settings(max_examples=200, deadline=None)
def test_any_four_bytes_are_refused_or_within_the_limit(word, limit):
    try:
        kind, size = frame.unpack_header(word, 0, limit)
    except RemoteError as error:
        assert error.reason in ("type", "length")
    else:
        assert word == header(kind, size)
        assert TAG <= size <= limit + TAG


# CLOSE.


@pytest.mark.parametrize("reason", ["done", "replaced", "protocol", "shutdown", "timeout", "refused", "moved"])
def test_a_known_reason(reason):
    assert frame.close_reason(memoryview(reason.encode())) == reason


@given(st.binary(max_size=256))
@settings(max_examples=200, deadline=None)
@example(b"")
@example(b"done\n")
@example(b"Done")
@example(b"done\0")
@example(b"\xff" * 256)
@example(b"\x1b[2Jdone")
def test_any_other_reason_is_unknown(payload):
    expected = payload.decode() if payload in [reason.encode() for reason in frame.CLOSE_REASONS] else "unknown"
    assert frame.close_reason(memoryview(payload)) == expected
