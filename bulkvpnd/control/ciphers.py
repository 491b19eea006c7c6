"""Which ciphers this end offers, fastest first."""

import time

from bulkvpnd.protocol import aead, frame, keys

SAMPLE_SIZE = 192 * 1024
"""Bytes: a frame with three super-packets; under load speed counts, and there frames are large."""
ROUNDS = 40
"""Of each cipher (choice: 15 ms together, where one bad moment of the machine is over before all of them are)."""


def offer(configuration, clock=time.perf_counter):
    """The names to offer: the one that is configured, or with auto all, ordered by measurement on this CPU.

    clock: returns seconds.
    """
    if configuration.cipher != "auto":
        return (configuration.cipher,)
    return tuple(sorted(aead.CIPHERS, key=_seconds(aead.CIPHERS, clock).get))


def _seconds(ciphers, clock):
    """What sealing SAMPLE_SIZE bytes takes: {cipher: seconds}.

    The best of the rounds, because noise only ever adds; by turns, so that all have the same chance of a quiet one.
    """
    payload = memoryview(bytearray(SAMPLE_SIZE))
    out = memoryview(bytearray(SAMPLE_SIZE + aead.TAG_SIZE + aead.SLACK))
    header = frame.pack_header(frame.DATA, SAMPLE_SIZE)
    sealers = {cipher: keys.Sealer(cipher, bytes(keys.SECRET_SIZE)) for cipher in ciphers}
    best = dict.fromkeys(ciphers, float("inf"))
    for _ in range(ROUNDS):
        for cipher, sealer in sealers.items():
            begun = clock()
            sealer.seal_into(header, payload, out)
            best[cipher] = min(best[cipher], clock() - begun)
    return best
