"""Authenticated encryption from one buffer into another.

Which call is fastest depends on the installed version of `cryptography` and on the size (benchmarks/aead.py measures
it, docs/design.md, "The AEAD call", has the figures); used is the first of these that is there:

    _Into      encrypt_into and decrypt_into, which write where they are told. The newest versions have them.
    _Context   OpenSSL's EVP interface, as far as the bindings have it (up to version 41, and Debian 12 has 38): one
               context for the life of a key. The documented calls of those versions make one for each frame, in
               Python, which takes ten times as long as sealing a small packet.
    _OneShot   the documented calls of the versions between: one-shot for small payloads, and update_into for large
               ones, since a fresh object of that size costs a page fault for every 4 KiB.

Nothing decrypted may be used before its tag is accepted; `open_into` returns only after that.
"""

import dataclasses
import functools

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.bindings.openssl.binding import Binding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

KEY_SIZE = 32
NONCE_SIZE = 12
TAG_SIZE = 16
SLACK = 16
"""Bytes that `out` must have beyond the result: update_into wants room for one cipher block more."""

ONE_SHOT_LIMIT = 16 * 1024
"""Bytes; above it update_into beats the one-shot call on cryptography 43 (benchmarks/aead.py)."""


# Each of the three is one key of one `suite`. seal_into writes ciphertext and tag to out and returns their size;
# open_into checks the tag, writes the plaintext and returns its size, or raises InvalidTag. data, aad and out are
# buffers; nonce is 12 bytes; sizes are bytes.


class _Into:
    """For cryptography with encrypt_into."""

    def __init__(self, suite, key):
        cipher = suite.one_shot(key)
        self._encrypt, self._decrypt = cipher.encrypt_into, cipher.decrypt_into

    @staticmethod
    def works():
        return hasattr(AESGCM, "encrypt_into") and hasattr(ChaCha20Poly1305, "encrypt_into")

    def seal_into(self, nonce, data, aad, out):
        return self._encrypt(nonce, data, aad, out[: len(data) + TAG_SIZE])

    def open_into(self, nonce, data, aad, out):
        return self._decrypt(nonce, data, aad, out[: len(data) - TAG_SIZE])


class _Context:
    """For cryptography whose bindings have OpenSSL's EVP interface, see EVP_EncryptInit(3)."""

    _lib, _ffi = Binding.lib, Binding.ffi
    _FUNCTIONS = (
        "EVP_CIPHER_CTX_new", "EVP_CIPHER_CTX_free", "EVP_CIPHER_CTX_ctrl", "EVP_CipherInit_ex", "EVP_CipherUpdate",
        "EVP_CipherFinal_ex", "EVP_get_cipherbyname", "EVP_CTRL_AEAD_GET_TAG", "EVP_CTRL_AEAD_SET_TAG",
    )  # fmt: skip

    def __init__(self, suite, key):
        if len(key) != KEY_SIZE:
            raise ValueError(f"a key of {len(key)} bytes")
        lib, ffi = self._lib, self._ffi
        cipher = lib.EVP_get_cipherbyname(suite.evp_name)
        self._contexts = []
        for sealing in (0, 1):
            context = ffi.gc(lib.EVP_CIPHER_CTX_new(), lib.EVP_CIPHER_CTX_free)
            self._check(lib.EVP_CipherInit_ex(context, cipher, ffi.NULL, bytes(key), ffi.NULL, sealing))
            self._contexts.append(context)
        self._size = ffi.new("int *")
        self._tag = ffi.new("unsigned char[]", TAG_SIZE)

    @classmethod
    def works(cls):
        return all(hasattr(cls._lib, name) for name in cls._FUNCTIONS)

    def seal_into(self, nonce, data, aad, out):
        size = len(data)
        context = self._run(1, nonce, data, size, aad, out, size + TAG_SIZE)
        self._check(self._lib.EVP_CipherFinal_ex(context, self._tag, self._size))
        self._check(self._lib.EVP_CIPHER_CTX_ctrl(context, self._lib.EVP_CTRL_AEAD_GET_TAG, TAG_SIZE, self._tag))
        out[size : size + TAG_SIZE] = self._ffi.buffer(self._tag)
        return size + TAG_SIZE

    def open_into(self, nonce, data, aad, out):
        size = len(data) - TAG_SIZE
        if size < 0:
            raise InvalidTag
        context = self._run(0, nonce, data, size, aad, out, size)
        tag = bytes(data[size:])
        self._check(self._lib.EVP_CIPHER_CTX_ctrl(context, self._lib.EVP_CTRL_AEAD_SET_TAG, TAG_SIZE, tag))
        if self._lib.EVP_CipherFinal_ex(context, self._tag, self._size) != 1:
            raise InvalidTag
        return size

    def _run(self, sealing, nonce, data, size, aad, out, room):
        # OpenSSL gets addresses, so nothing else would notice a buffer that is too small.
        if len(out) < room or len(nonce) != NONCE_SIZE:
            raise ValueError("a buffer that is too small for its result")
        lib, ffi = self._lib, self._ffi
        context = self._contexts[sealing]
        self._check(lib.EVP_CipherInit_ex(context, ffi.NULL, ffi.NULL, ffi.NULL, nonce, sealing))
        self._check(lib.EVP_CipherUpdate(context, ffi.NULL, self._size, aad, len(aad)))
        if size:
            target = ffi.from_buffer(out, require_writable=True)
            self._check(lib.EVP_CipherUpdate(context, target, self._size, ffi.from_buffer(data), size))
        return context

    @staticmethod
    def _check(result):
        if result != 1:
            raise RuntimeError("OpenSSL: the cipher failed")


class _OneShot:
    """For every version of cryptography."""

    def __init__(self, suite, key):
        self._cipher = suite.one_shot(key)
        # One for all frames, which only get their mode each: making it costs as much as sealing 16 KiB.
        self._large = suite.algorithm and Cipher(suite.algorithm(key), modes.GCM(bytes(NONCE_SIZE)))

    @staticmethod
    def works():
        return True

    def seal_into(self, nonce, data, aad, out):
        size = len(data)
        if size <= ONE_SHOT_LIMIT or self._large is None:
            out[: size + TAG_SIZE] = self._cipher.encrypt(nonce, bytes(data), aad)
            return size + TAG_SIZE
        self._large.mode = modes.GCM(nonce)
        encryptor = self._large.encryptor()
        encryptor.authenticate_additional_data(aad)
        encryptor.update_into(data, out)
        encryptor.finalize()
        out[size : size + TAG_SIZE] = encryptor.tag
        return size + TAG_SIZE

    def open_into(self, nonce, data, aad, out):
        size = len(data) - TAG_SIZE
        if size <= ONE_SHOT_LIMIT or self._large is None:
            plain = self._cipher.decrypt(nonce, bytes(data), aad)
            out[:size] = plain
            return size
        self._large.mode = modes.GCM(nonce, bytes(data[size:]))
        decryptor = self._large.decryptor()
        decryptor.authenticate_additional_data(aad)
        decryptor.update_into(data[:size], out)
        decryptor.finalize()
        return size


@dataclasses.dataclass(frozen=True, slots=True)
class Suite:
    """A cipher. one_shot: its class in `cryptography`. evp_name: OpenSSL's name. algorithm: for GCM's update_into."""

    name: str
    one_shot: type
    evp_name: bytes
    algorithm: type | None


SUITES = (
    # NIST SP 800-38D, with 256-bit keys and 96-bit nonces
    Suite("aes-256-gcm", AESGCM, b"aes-256-gcm", algorithms.AES),
    # RFC 8439; `cryptography` has no update_into for it
    Suite("chacha20-poly1305", ChaCha20Poly1305, b"chacha20-poly1305", None),
)
KINDS = tuple(kind for kind in (_Into, _Context, _OneShot) if kind.works())
"""What the installed version of `cryptography` can do, best first; tests and benchmarks compare them."""


def ciphers(kind):
    """{name: function of a key} of all suites, by one of KINDS."""
    return {suite.name: functools.partial(kind, suite) for suite in SUITES}


CIPHERS = ciphers(KINDS[0])

__all__ = ["CIPHERS", "InvalidTag", "KEY_SIZE", "KINDS", "NONCE_SIZE", "SLACK", "TAG_SIZE", "ciphers"]
