"""Microseconds of each AEAD call of the installed `cryptography`, by the size of the payload.

    python3 benchmarks/aead.py [--milliseconds N]

The calls are those that bulkvpnd/protocol/aead.py chooses between, each from one buffer that is kept into another:
the one-shot call, which on some versions takes only bytes and whose result is a fresh object, both of which cost a
copy; ``update_into``; and, where it exists, ``encrypt_into``. ChaCha20-Poly1305 has no ``update_into`` with a tag.
Each value is the least of several runs, for what else happens on the machine only adds.
"""

import argparse
import os
import time

import cryptography
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

SIZES = (64, 256, 1500, 4096, 16384, 65536, 131072, 262144, 524288, 1048576)
"""Bytes."""
NONCE, AAD = bytes(12), bytes(4)
TAG_SIZE, SLACK = 16, 16
RUNS = 5


def one_shot(cipher, key):
    encrypt = cipher(key).encrypt

    def seal(data, out):
        out[: len(data) + TAG_SIZE] = encrypt(NONCE, bytes(data), AAD)

    return seal


def update_into(cipher, key):
    if cipher is not AESGCM:
        return None
    algorithm = algorithms.AES(key)

    def seal(data, out):
        encryptor = Cipher(algorithm, modes.GCM(NONCE)).encryptor()
        encryptor.authenticate_additional_data(AAD)
        encryptor.update_into(data, out)
        encryptor.finalize()
        out[len(data) : len(data) + TAG_SIZE] = encryptor.tag

    return seal


def encrypt_into(cipher, key):
    if not hasattr(cipher, "encrypt_into"):
        return None
    seal = cipher(key).encrypt_into
    return lambda data, out: seal(NONCE, data, AAD, out[: len(data) + TAG_SIZE])


CIPHERS = {"aes-256-gcm": AESGCM, "chacha20-poly1305": ChaCha20Poly1305}
CALLS = (one_shot, update_into, encrypt_into)


def microseconds(seal, data, out, seconds):
    """The least time that a call took, as an average over a run of `seconds`, in several runs."""
    start = time.perf_counter()
    seal(data, out)
    count = max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(count):
            seal(data, out)
        best = min(best, (time.perf_counter() - start) / count)
    return best * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--milliseconds", type=float, default=10, help="of each of several runs (default 10)")
    seconds = parser.parse_args().milliseconds / 1000
    columns = {f"{name} {call.__name__}": seal for name, cipher in CIPHERS.items() for call in CALLS
               if (seal := call(cipher, os.urandom(32)))}
    print(f"cryptography {cryptography.__version__}, microseconds a call\n")
    print(f"| bytes | {' | '.join(columns)} |\n|{'---:|' * (len(columns) + 1)}")
    for size in SIZES:
        data, out = memoryview(bytearray(os.urandom(size))), memoryview(bytearray(size + TAG_SIZE + SLACK))
        cells = (f"{microseconds(seal, data, out, seconds):.2f}" for seal in columns.values())
        print(f"| {size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
