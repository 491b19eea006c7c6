"""Which ciphers this end offers, fastest first."""

import time

from bulkvpnd.protocol import aead, frame, keys

SAMPLE_SIZE = 192 * 1024
"""Bytes: a frame with three super-packets; under load speed counts, and there frames are large."""
ROUNDS = 12


def offer(configuration):
    """The names to offer: the one that is configured, or with auto all, ordered by measurement on this CPU."""
    if configuration.cipher != "auto":
        return (configuration.cipher,)
    return tuple(sorted(aead.CIPHERS, key=_seconds))


def _seconds(cipher):
    """The best of a few rounds of sealing SAMPLE_SIZE bytes; the best, because noise only ever adds."""
    sealer = keys.Sealer(cipher, bytes(keys.SECRET_SIZE))
    payload = memoryview(bytearray(SAMPLE_SIZE))
    out = memoryview(bytearray(SAMPLE_SIZE + aead.TAG_SIZE + aead.SLACK))
    header = frame.pack_header(frame.DATA, SAMPLE_SIZE)
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        sealer.seal_into(header, payload, out)
        best = min(best, time.perf_counter() - begun)
    return best
