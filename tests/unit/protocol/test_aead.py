"""bulkvpnd.protocol.aead: whichever call does the work, the bytes are those of the standards, and nothing else is
written; what is not authentic is never reported as opened.
"""

import json
import pathlib

import cryptography
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkvpnd.protocol import aead

VECTORS = json.loads(pathlib.Path(__file__).with_name("aead_vectors.json").read_text("ascii"))["vectors"]
ONE_SHOT = {"aes-256-gcm": AESGCM, "chacha20-poly1305": ChaCha20Poly1305}
CIPHERS = sorted(ONE_SHOT)
TAG = 16
GUARD = 64  # bytes on both sides of what may be written
LIMIT = aead.ONE_SHOT_LIMIT
SIZES = [0, 1, 15, 16, 17, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 16, 65536, 256 * 1024, 1024 * 1024]

KEY = bytes(range(32))
NONCE = bytes(range(100, 112))
HEADER = b"\x01\x00\x40\x10"


class Guarded:
    """A buffer amid bytes that must stay as they are."""

    def __init__(self, size):
        self._all = bytearray(b"\xa5") * (size + 2 * GUARD)
        self.out = memoryview(self._all)[GUARD : GUARD + size]

    def written(self, size):
        """The first `size` bytes; none behind them has changed, nor in front."""
        end = GUARD + size
        assert self._all[:GUARD] == b"\xa5" * GUARD
        assert self._all[end:] == b"\xa5" * (len(self._all) - end)
        return bytes(self._all[GUARD:end])


def seal(cipher, key, nonce, plaintext, aad):
    guarded = Guarded(len(plaintext) + TAG + aead.SLACK)
    size = aead.CIPHERS[cipher](key).seal_into(nonce, memoryview(plaintext), aad, guarded.out)
    assert size == len(plaintext) + TAG
    return guarded.written(size)


def open_(cipher, key, nonce, sealed, aad):
    guarded = Guarded(len(sealed) + aead.SLACK)
    size = aead.CIPHERS[cipher](key).open_into(nonce, memoryview(sealed), aad, guarded.out)
    assert size == len(sealed) - TAG
    return guarded.written(size)


def pattern(size):
    """Bytes whose period is no block's."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


USED = dict(aead.CIPHERS)
"""What the daemon takes, before `way` below puts each kind in its place."""
WAYS = [(kind, False) for kind in aead.KINDS] + [(aead.KINDS[-1], True)]


@pytest.fixture(params=WAYS, ids=lambda way: way[0].__name__.strip("_").lower() + "-in-place" * way[1], autouse=True)
def way(request, monkeypatch):
    """Every kind of call that this version has. The vectors are short; "in place" sends them the way of large ones."""
    kind, in_place = request.param
    monkeypatch.setattr(aead, "CIPHERS", aead.ciphers(kind))
    if in_place:
        monkeypatch.setattr(aead, "ONE_SHOT_LIMIT", -1)


def test_every_cipher_that_is_offered_is_tested():
    assert sorted(aead.CIPHERS) == CIPHERS
    assert (aead.KEY_SIZE, aead.NONCE_SIZE, aead.TAG_SIZE) == (32, 12, TAG)


def test_the_best_that_this_version_has_is_used():
    version = int(cryptography.__version__.split(".")[0])
    expected = ["_Into"] * all(hasattr(one, "encrypt_into") for one in ONE_SHOT.values())
    expected += ["_Context"] * (version < 42) + ["_OneShot"]  # the bindings lost OpenSSL's EVP interface in 42
    assert [kind.__name__ for kind in aead.KINDS] == expected
    assert {cipher.func.__name__ for cipher in USED.values()} == {expected[0]}


# Refused.


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("key", [b"", KEY[:-1], KEY + b"\0"], ids=len)
def test_a_key_of_another_size(cipher, key):
    with pytest.raises(ValueError):
        aead.CIPHERS[cipher](key)


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("size", [0, 100, LIMIT + 100])
def test_an_output_without_room_is_left_alone(cipher, size):
    """OpenSSL writes where it is told: nothing but these checks is between a frame and what lies behind its buffer."""
    one, plaintext = aead.CIPHERS[cipher](KEY), pattern(size)
    for room in {size + TAG - 1, max(0, size - 1)}:
        guarded = Guarded(room)
        with pytest.raises(ValueError):
            one.seal_into(NONCE, memoryview(plaintext), HEADER, guarded.out)
        guarded.written(room)
    sealed = seal(cipher, KEY, NONCE, plaintext, HEADER)
    if size:
        guarded = Guarded(size - 1)
        with pytest.raises(ValueError):
            one.open_into(NONCE, memoryview(sealed), HEADER, guarded.out)
        guarded.written(size - 1)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_an_output_that_may_not_be_written(cipher):
    out = bytes(1000)
    with pytest.raises((TypeError, ValueError, BufferError)):
        aead.CIPHERS[cipher](KEY).seal_into(NONCE, memoryview(pattern(100)), HEADER, memoryview(out))
    assert out == bytes(1000)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_nonce_that_is_too_short(cipher):
    with pytest.raises(ValueError):
        seal(cipher, KEY, NONCE[:7], b"payload", HEADER)


@pytest.mark.parametrize("vector", [one for one in VECTORS if not one["authentic"]], ids=lambda one: one["source"])
def test_a_vector_that_is_not_authentic(vector):
    key, nonce, aad, ciphertext, tag = (
        bytes.fromhex(vector[name]) for name in ("key", "nonce", "aad", "ciphertext", "tag")
    )
    with pytest.raises(aead.InvalidTag):
        open_(vector["cipher"], key, nonce, ciphertext + tag, aad)


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("size", SIZES)
def test_one_wrong_bit_anywhere(cipher, size):
    sealed = seal(cipher, KEY, NONCE, pattern(size), HEADER)
    for at in sorted({0, size // 2, max(0, size - 1), size, size + TAG - 1}):
        for bit in (0x01, 0x80):
            forged = bytearray(sealed)
            forged[at] ^= bit
            with pytest.raises(aead.InvalidTag):
                open_(cipher, KEY, NONCE, bytes(forged), HEADER)


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wrong", ["key", "nonce", "header", "no header", "one byte less", "one byte more", "no tag"])
def test_something_else_is_wrong(cipher, size, wrong):
    sealed = seal(cipher, KEY, NONCE, pattern(size), HEADER)
    key, nonce, header = KEY, NONCE, HEADER
    if wrong == "key":
        key = KEY[:-1] + b"\0"
    elif wrong == "nonce":
        nonce = NONCE[:-1] + b"\0"
    elif wrong == "header":
        header = HEADER[:-1] + b"\x11"
    elif wrong == "no header":
        header = b""
    elif wrong == "one byte less":
        sealed = sealed[:-1]
    elif wrong == "one byte more":
        sealed += b"\0"
    elif wrong == "no tag":
        sealed = sealed[:-TAG] + bytes(TAG)
    with pytest.raises(aead.InvalidTag):
        open_(cipher, key, nonce, sealed, header)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_an_object_that_refused_still_opens_what_is_authentic(cipher):
    one = aead.CIPHERS[cipher](KEY)
    for size in (100, LIMIT + 100):
        sealed = seal(cipher, KEY, NONCE, pattern(size), HEADER)
        out = memoryview(bytearray(size + TAG + aead.SLACK))
        with pytest.raises(aead.InvalidTag):
            one.open_into(NONCE, memoryview(sealed[:-1] + bytes([sealed[-1] ^ 1])), HEADER, out)
        assert one.open_into(NONCE, memoryview(sealed), HEADER, out) == size
        assert out[:size] == pattern(size)


# Right.


@pytest.mark.parametrize("vector", [one for one in VECTORS if one["authentic"]], ids=lambda one: one["source"])
def test_a_vector(vector):
    key, nonce, aad, plaintext, ciphertext, tag = (
        bytes.fromhex(vector[name]) for name in ("key", "nonce", "aad", "plaintext", "ciphertext", "tag")
    )
    assert seal(vector["cipher"], key, nonce, plaintext, aad) == ciphertext + tag
    assert open_(vector["cipher"], key, nonce, ciphertext + tag, aad) == plaintext


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_against_the_one_shot_call(cipher, size):
    plaintext = pattern(size)
    sealed = seal(cipher, KEY, NONCE, plaintext, HEADER)
    assert sealed == ONE_SHOT[cipher](KEY).encrypt(NONCE, plaintext, HEADER)
    assert open_(cipher, KEY, NONCE, sealed, HEADER) == plaintext


@given(
    st.sampled_from(CIPHERS),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=12, max_size=12),
    st.one_of(st.binary(max_size=100), st.integers(LIMIT - 20, LIMIT + 40).map(pattern)),
    st.binary(max_size=20),
)
@settings(max_examples=150, deadline=None)
def test_round_trip(cipher, key, nonce, plaintext, aad):
    sealed = seal(cipher, key, nonce, plaintext, aad)
    assert sealed == ONE_SHOT[cipher](key).encrypt(nonce, plaintext, aad)
    assert open_(cipher, key, nonce, sealed, aad) == plaintext
