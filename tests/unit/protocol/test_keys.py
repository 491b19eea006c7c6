"""bulkvpnd.protocol.keys against a second key schedule, written from the standards and bulkvpn-protocol(7) alone; and
what an attacker on the path may try with sealed frames.
"""

import hashlib
import hmac
import itertools
import json
import pathlib
import traceback

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkvpnd.protocol import aead, keys
from bulkvpnd.protocol.errors import RemoteError

FROZEN = json.loads(pathlib.Path(__file__).with_name("key_schedule.json").read_text("ascii"))
ONE_SHOT = {"aes-256-gcm": AESGCM, "chacha20-poly1305": ChaCha20Poly1305}
CIPHERS = sorted(ONE_SHOT)
SECRET = bytes(range(32))
HEADER = b"\x01\x00\x00\x20"
TAG = 16


# The second key schedule.


def hmac_sha256(key, data):
    return hmac.new(key, data, hashlib.sha256).digest()


def hkdf_extract(salt, ikm):
    """RFC 5869 section 2.2."""
    return hmac_sha256(salt, ikm)


def hkdf_expand(prk, info, length):
    """RFC 5869 section 2.3: T(n) = HMAC(PRK, T(n-1) | info | n)."""
    okm = block = b""
    for number in range(1, 256):
        if len(okm) >= length:
            break
        block = hmac_sha256(prk, block + info + bytes([number]))
        okm += block
    return okm[:length]


def hkdf_expand_label(secret, label, context, length, prefix=b"bulkvpn1 "):
    """RFC 8446 section 7.1: struct { uint16 length; opaque label<7..255>; opaque context<0..255>; } HkdfLabel."""
    label = prefix + label
    return hkdf_expand(
        secret, length.to_bytes(2, "big") + bytes([len(label)]) + label + bytes([len(context)]) + context, length
    )


def first_secrets(hello, welcome, client_random, server_random):
    """bulkvpn-protocol(7), KEYS."""
    transcript = hashlib.sha256(hashlib.sha256(hello).digest() + hashlib.sha256(welcome).digest()).digest()
    secret = hkdf_extract(transcript, client_random + server_random)
    return {
        "c2s": hkdf_expand_label(secret, b"c2s", b"", 32),
        "s2c": hkdf_expand_label(secret, b"s2c", b"", 32),
    }


def next_secret(secret):
    """RFC 8446 section 7.2, with the label of bulkvpn-protocol(7), REKEY."""
    return hkdf_expand_label(secret, b"upd", b"", 32)


def key_and_iv(secret):
    """RFC 8446 section 7.3."""
    return hkdf_expand_label(secret, b"key", b"", 32), hkdf_expand_label(secret, b"iv", b"", 12)


def nonce(iv, number):
    """RFC 8446 section 5.3: the number in network order, padded to the left with zeros, xor the IV."""
    padded = bytes(4) + number.to_bytes(8, "big")
    return bytes(left ^ right for left, right in zip(iv, padded))


def sealed_by_hand(cipher, secret, number, header, payload):
    key, iv = key_and_iv(secret)
    return ONE_SHOT[cipher](key).encrypt(nonce(iv, number), payload, header)


# A pair of ends.


def seal(sealer, payload, header=HEADER):
    out = bytearray(len(payload) + TAG + aead.SLACK)
    return bytes(out[: sealer.seal_into(header, memoryview(payload), memoryview(out))])


def open_(opener, sealed, header=HEADER):
    out = bytearray(len(sealed) + aead.SLACK)
    return bytes(out[: opener.open_into(header, memoryview(sealed), memoryview(out))])


def refused(opener, sealed, header=HEADER):
    with pytest.raises(RemoteError) as caught:
        open_(opener, sealed, header)
    assert caught.value.reason == "authentication"


def pair(cipher="aes-256-gcm", secret=SECRET):
    return keys.Sealer(cipher, secret), keys.Opener(cipher, secret)


def test_the_sizes_of_the_specification():
    assert (keys.SECRET_SIZE, keys.RANDOM_SIZE, keys.FRAME_COUNT_LIMIT) == (32, 32, 2**32)
    assert (keys.CLIENT_TO_SERVER, keys.SERVER_TO_CLIENT) == ("c2s", "s2c")


# The second key schedule is right itself.


def test_hkdf_of_rfc_5869():
    # Appendix A.1.
    prk = hkdf_extract(bytes(range(13)), b"\x0b" * 22)
    assert prk.hex() == "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    assert hkdf_expand(prk, bytes(range(0xF0, 0xFA)), 42).hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def test_expand_label_of_rfc_8448():
    # Section 3, server: derive write traffic keys for handshake data.
    secret = bytes.fromhex("b67b7d690cc16c4e75e54213cb2d37b4e9c912bcded9105d42befd59d391ad38")
    key = hkdf_expand_label(secret, b"key", b"", 16, prefix=b"tls13 ")
    iv = hkdf_expand_label(secret, b"iv", b"", 12, prefix=b"tls13 ")
    assert key.hex() == "3fce516009c21727d0f2e4e86ee403bc"
    assert iv.hex() == "5d313eb2671276ee13000b30"


# Both key schedules say the same, and what they said when version 1 of the protocol was written.


@given(
    st.binary(max_size=200),
    st.binary(max_size=200),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=32, max_size=32),
)
@settings(max_examples=100, deadline=None)
def test_first_traffic_secrets(hello, welcome, client_random, server_random):
    assert keys.traffic_secrets(hello, welcome, client_random, server_random) == first_secrets(
        hello, welcome, client_random, server_random
    )


@given(
    st.sampled_from(CIPHERS),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 3),
    st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1)),
    st.binary(min_size=4, max_size=4),
    st.binary(max_size=64),
)
@settings(max_examples=100, deadline=None)
def test_any_frame_of_any_generation(cipher, secret, generation, number, header, payload):
    sealer, opener = pair(cipher, secret)
    for _ in range(generation):
        sealer.ratchet()
        opener.ratchet()
        secret = next_secret(secret)
    sealer.frames = opener.frames = number
    expected = sealed_by_hand(cipher, secret, number, header, payload)
    assert seal(sealer, payload, header) == expected
    assert open_(opener, expected, header) == payload
    assert (sealer.generation, opener.generation) == (generation, generation)


def test_frozen_traffic_secrets():
    inputs = [bytes.fromhex(FROZEN[name]) for name in ("hello", "welcome", "client_random", "server_random")]
    expected = {direction: bytes.fromhex(FROZEN[direction]["generations"][0]["secret"]) for direction in ("c2s", "s2c")}
    assert keys.traffic_secrets(*inputs) == expected
    assert first_secrets(*inputs) == expected


@pytest.mark.parametrize("direction", ["c2s", "s2c"])
@pytest.mark.parametrize("cipher", CIPHERS)
def test_frozen_frames(direction, cipher):
    header, payload = bytes.fromhex(FROZEN["header"]), bytes.fromhex(FROZEN["payload"])
    generations = FROZEN[direction]["generations"]
    secret = bytes.fromhex(generations[0]["secret"])
    sealer, opener = pair(cipher, secret)
    for generation in generations:
        assert secret.hex() == generation["secret"]
        assert [part.hex() for part in key_and_iv(secret)] == [generation["key"], generation["iv"]]
        for number, sealed in generation["sealed"][cipher].items():
            sealer.frames = opener.frames = int(number)
            assert seal(sealer, payload, header).hex() == sealed
            assert open_(opener, bytes.fromhex(sealed), header) == payload
        sealer.ratchet()
        opener.ratchet()
        secret = next_secret(secret)


def test_every_input_changes_every_secret():
    inputs = [b"hello", b"welcome", bytes(32), bytes([1] * 32)]
    seen = set(keys.traffic_secrets(*inputs).values())
    for at, other in enumerate([b"hellp", b"welcomf", bytes(31) + b"\1", bytes([1] * 31) + b"\2"]):
        changed = [other if at == number else one for number, one in enumerate(inputs)]
        seen.update(keys.traffic_secrets(*changed).values())
    assert len(seen) == 10


def test_no_byte_moves_between_the_messages_or_the_randoms_unseen():
    secrets = [
        keys.traffic_secrets(b"ab", b"c", bytes(32), bytes(32)),
        keys.traffic_secrets(b"a", b"bc", bytes(32), bytes(32)),
        keys.traffic_secrets(b"c", b"ab", bytes(32), bytes(32)),
        keys.traffic_secrets(b"", b"abc", bytes(32), bytes(32)),
    ]
    assert len({secret for one in secrets for secret in one.values()}) == 8


# Refused: whatever is not the next frame of this direction of this connection.


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(40))], ids=len)
def test_every_flipped_bit_of_header_payload_and_tag(cipher, payload):
    sealed = seal(keys.Sealer(cipher, SECRET), payload)
    assert open_(keys.Opener(cipher, SECRET), sealed) == payload
    wire = HEADER + sealed
    for bit in range(8 * len(wire)):
        forged = bytearray(wire)
        forged[bit // 8] ^= 1 << bit % 8
        refused(keys.Opener(cipher, SECRET), bytes(forged[4:]), bytes(forged[:4]))


@given(st.sampled_from(CIPHERS), st.integers(0, 20 * 1024), st.data())
@settings(max_examples=100, deadline=None)
def test_any_flipped_bit_of_a_frame_of_any_size(cipher, size, data):
    wire = bytearray(HEADER + seal(keys.Sealer(cipher, SECRET), bytes(size)))
    bit = data.draw(st.integers(0, 8 * len(wire) - 1))
    wire[bit // 8] ^= 1 << bit % 8
    refused(keys.Opener(cipher, SECRET), bytes(wire[4:]), bytes(wire[:4]))


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("size", [16, 17, 100, 1000, 20000])
def test_garbage(cipher, size):
    refused(keys.Opener(cipher, SECRET), hashlib.shake_256(b"garbage").digest(size))


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("payload", [b"a packet", bytes(20000)], ids=len)
def test_a_frame_comes_once_and_in_its_turn(cipher, payload):
    sealer = keys.Sealer(cipher, SECRET)
    frames = [seal(sealer, payload) for _ in range(4)]
    for order in itertools.product(range(4), repeat=3):
        opener = keys.Opener(cipher, SECRET)
        for turn, number in enumerate(order):
            if number == turn:
                assert open_(opener, frames[number]) == payload
            else:
                refused(opener, frames[number])
                break


def test_a_refused_frame_costs_its_turn():
    # After a refusal the connection ends; should anybody go on, nothing may be tried twice against one counter.
    sealer, opener = pair()
    first, second = seal(sealer, b"first"), seal(sealer, b"second")
    refused(opener, bytes(len(first)))
    refused(opener, first)
    assert open_(keys.Opener("aes-256-gcm", SECRET), first) == b"first"
    assert second != first


def both_ends(cipher, hello=b"{}", welcome=b"[]", client_random=bytes(32), server_random=bytes([1] * 32)):
    """A connection: (client's sealer, client's opener, server's sealer, server's opener)."""
    secrets = keys.traffic_secrets(hello, welcome, client_random, server_random)
    c2s, s2c = secrets[keys.CLIENT_TO_SERVER], secrets[keys.SERVER_TO_CLIENT]
    return keys.Sealer(cipher, c2s), keys.Opener(cipher, s2c), keys.Sealer(cipher, s2c), keys.Opener(cipher, c2s)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_frame_does_not_come_back_as_an_answer(cipher):
    client_sealer, client_opener, server_sealer, server_opener = both_ends(cipher)
    out, back = seal(client_sealer, b"ping"), seal(server_sealer, b"pong")
    refused(client_opener, out)
    refused(server_opener, back)
    _, client_opener, _, server_opener = both_ends(cipher)
    assert open_(server_opener, out) == b"ping"
    assert open_(client_opener, back) == b"pong"


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize(
    "other",
    [
        {"hello": b"{ }"},
        {"welcome": b"[ ]"},
        {"client_random": bytes(31) + b"\1"},
        {"server_random": bytes([1] * 31) + b"\2"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_frame_of_another_connection(cipher, other):
    first, second = both_ends(cipher), both_ends(cipher, **other)
    for sealer, opener in ((0, 3), (2, 1)):
        refused(second[opener], seal(first[sealer], b"a packet"))


def test_a_frame_of_the_other_cipher():
    for one, other in (CIPHERS, CIPHERS[::-1]):
        refused(keys.Opener(other, SECRET), seal(keys.Sealer(one, SECRET), b"a packet"))


@pytest.mark.parametrize("cipher", CIPHERS)
def test_frames_of_another_generation(cipher):
    sealer, opener = pair(cipher)
    old = seal(sealer, b"old")
    sealer.ratchet()
    new = seal(sealer, b"new")
    assert old != new
    # The new key without REKEY, and the old one after it.
    refused(keys.Opener(cipher, SECRET), new)
    opener.ratchet()
    refused(opener, old)
    opener = keys.Opener(cipher, SECRET)
    assert open_(opener, old) == b"old"
    opener.ratchet()
    assert open_(opener, new) == b"new"
    # One generation too many.
    opener = keys.Opener(cipher, SECRET)
    opener.ratchet()
    opener.ratchet()
    refused(opener, new)


# Counters.


def test_the_limit_of_frames_under_one_key():
    assert keys.FRAME_COUNT_LIMIT == 2**32
    sealer, opener = pair()
    sealer.frames = opener.frames = keys.FRAME_COUNT_LIMIT - 1
    last = seal(sealer, b"last")
    assert open_(opener, last) == b"last"
    with pytest.raises(OverflowError):
        seal(sealer, b"one more")
    with pytest.raises(RemoteError) as caught:
        open_(opener, last)
    assert caught.value.reason == "rekey"
    sealer.ratchet()
    opener.ratchet()
    assert open_(opener, seal(sealer, b"under the next key")) == b"under the next key"


def test_what_went_under_the_present_key_is_counted():
    sealer, opener = pair()
    for payload in (b"", b"12345", bytes(100)):
        open_(opener, seal(sealer, payload))
    assert (sealer.frames, sealer.bytes, opener.frames, opener.bytes) == (3, 105, 3, 105)
    sealer.ratchet()
    assert (sealer.generation, sealer.frames, sealer.bytes) == (1, 0, 0)


class Recorder:
    """A cipher that seals nothing and tells which key and nonce it was given. out of size 0: it fails."""

    seen = None

    def __init__(self, key):
        self._key = key

    def seal_into(self, nonce, data, aad, out):
        self.seen.append((self._key, nonce))
        if not len(out):
            raise ValueError("no room")
        return len(data) + TAG

    def open_into(self, nonce, data, aad, out):
        self.seen.append((self._key, nonce))
        return len(data) - TAG


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(aead.CIPHERS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "seen", [])
    return Recorder


def test_no_key_and_nonce_come_twice(recorder):
    """Both directions of two connections, each through 10,000 ratchets."""
    out = memoryview(bytearray(100))
    sealers = []
    for client_random in (bytes(32), bytes([7] * 32)):
        client_sealer, _, server_sealer, _ = both_ends("recorder", client_random=client_random)
        sealers += [client_sealer, server_sealer]
    for generation in range(10000):
        for sealer in sealers:
            for _ in range(1 + generation % 5):
                sealer.seal_into(HEADER, b"", out)
            sealer.ratchet()
    seen = recorder.seen
    assert len(seen) == 4 * 30000
    assert len(set(seen)) == len(seen)
    assert len({key for key, _ in seen}) == 4 * 10000


def test_the_opener_takes_the_keys_and_nonces_of_the_sealer(recorder):
    sealer, opener = pair("recorder")
    out = memoryview(bytearray(100))
    for act in (lambda: sealer.seal_into(HEADER, b"", out), lambda: opener.open_into(HEADER, bytes(TAG), out)):
        for _ in range(3):
            act()
    assert recorder.seen[:3] == recorder.seen[3:]
    assert len(set(recorder.seen)) == 3


def test_a_nonce_is_used_up_even_when_sealing_fails(recorder):
    sealer, _ = pair("recorder")
    with pytest.raises(ValueError):
        sealer.seal_into(HEADER, b"", memoryview(bytearray(0)))
    sealer.seal_into(HEADER, b"", memoryview(bytearray(100)))
    assert len(set(recorder.seen)) == 2


@pytest.mark.parametrize(
    ("frames", "bytes_", "is_due"),
    [(0, 0, False), (0, 999, False), (0, 1000, True), (2**31 - 1, 0, False), (2**31, 0, True), (2**31, 1000, True)],
)
def test_a_key_is_due_by_bytes_or_by_frames(frames, bytes_, is_due):
    sealer, _ = pair()
    sealer.frames, sealer.bytes = frames, bytes_
    assert sealer.is_due(1000) is is_due


# Secrets.


def secrets_of(secret):
    return [secret, next_secret(secret), *key_and_iv(secret), *key_and_iv(next_secret(secret))]


@pytest.mark.parametrize("cipher", CIPHERS)
def test_nothing_secret_is_shown(cipher):
    sealer, opener = pair(cipher)
    with pytest.raises(RemoteError) as caught:
        open_(opener, bytes(20))
    shown = "".join(traceback.format_exception(caught.value))
    for one in (sealer, opener):
        shown += f"{one!r} {one}"
        one.ratchet()
        shown += repr(one)
    for secret in secrets_of(SECRET):
        for text in (repr(secret)[2:-1], secret.hex(), str(int.from_bytes(secret, "big")), str(list(secret))[1:-1]):
            assert text not in shown
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_a_ratchet_forgets():
    sealer, _ = pair()
    sealer.ratchet()
    kept = [value for value in vars(sealer).values() if isinstance(value, (bytes, int))]
    gone = [SECRET, *key_and_iv(SECRET), int.from_bytes(key_and_iv(SECRET)[1], "big")]
    assert not [value for value in kept if value in gone]
