"""Authenticated encryption from one buffer into another.

Which call is fastest depends on the installed version of `cryptography` and on the size (measured: see
docs/design.md, "The AEAD call"): ``encrypt_into`` where it exists; else the one-shot call for small payloads, whose
result is a fresh object, and for large ones ``update_into``, which writes where it is told. With ``update_into``
nothing decrypted may be used before ``finalize`` has accepted the tag; `open_into` returns only after that.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

KEY_SIZE = 32
NONCE_SIZE = 12
TAG_SIZE = 16
SLACK = 16
"""Bytes that `out` must have beyond the result: update_into wants room for one cipher block more."""

ONE_SHOT_LIMIT = 16 * 1024
"""Bytes; above it update_into beats the one-shot call on cryptography 38 and 43 (benchmarks/aead.py)."""


class AEAD:
    """One key. data, aad and out are buffers; nonce is 12 bytes; sizes are bytes."""

    def __init__(self, key):
        self._cipher = self.one_shot(key)
        into = hasattr(self._cipher, "encrypt_into")
        self.seal_into = self._seal_with_into if into else self._seal
        self.open_into = self._open_with_into if into else self._open

    # Each seal_into writes ciphertext and tag to out and returns their size; each open_into checks the tag, writes
    # the plaintext and returns its size, or raises InvalidTag.

    def _seal_with_into(self, nonce, data, aad, out):
        return self._cipher.encrypt_into(nonce, data, aad, out[: len(data) + TAG_SIZE])

    def _open_with_into(self, nonce, data, aad, out):
        return self._cipher.decrypt_into(nonce, data, aad, out[: len(data) - TAG_SIZE])

    def _seal(self, nonce, data, aad, out):
        sealed = self._cipher.encrypt(nonce, bytes(data), aad)
        out[: len(sealed)] = sealed
        return len(sealed)

    def _open(self, nonce, data, aad, out):
        plain = self._cipher.decrypt(nonce, bytes(data), aad)
        out[: len(plain)] = plain
        return len(plain)


class AES256GCM(AEAD):
    """NIST SP 800-38D, with 256-bit keys and 96-bit nonces."""

    name = "aes-256-gcm"
    one_shot = AESGCM

    def __init__(self, key):
        super().__init__(key)
        self._algorithm = algorithms.AES(key)

    def _seal(self, nonce, data, aad, out):
        size = len(data)
        if size <= ONE_SHOT_LIMIT:
            return super()._seal(nonce, data, aad, out)
        encryptor = Cipher(self._algorithm, modes.GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(aad)
        encryptor.update_into(data, out)
        encryptor.finalize()
        out[size : size + TAG_SIZE] = encryptor.tag
        return size + TAG_SIZE

    def _open(self, nonce, data, aad, out):
        size = len(data) - TAG_SIZE
        if size <= ONE_SHOT_LIMIT:
            return super()._open(nonce, data, aad, out)
        decryptor = Cipher(self._algorithm, modes.GCM(nonce, bytes(data[size:]))).decryptor()
        decryptor.authenticate_additional_data(aad)
        decryptor.update_into(data[:size], out)
        decryptor.finalize()
        return size


class ChaChaPoly(AEAD):
    """RFC 8439."""

    name = "chacha20-poly1305"
    one_shot = ChaCha20Poly1305


CIPHERS = {cipher.name: cipher for cipher in (AES256GCM, ChaChaPoly)}

__all__ = ["CIPHERS", "InvalidTag", "KEY_SIZE", "NONCE_SIZE", "SLACK", "TAG_SIZE"]
