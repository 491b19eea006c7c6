"""The order of the ciphers, with a clock that says how long each took."""

import argparse
import itertools

import pytest

from bulkvpnd.control import ciphers
from bulkvpnd.protocol import aead

AUTO = argparse.Namespace(cipher="auto")


def clock(durations):
    """A clock by which what stands between two of its calls takes the next of the durations, seconds."""
    return itertools.chain.from_iterable((0.0, duration) for duration in durations).__next__


@pytest.mark.parametrize("cipher", aead.CIPHERS)
def test_the_one_that_is_configured_is_the_only_one(cipher):
    assert ciphers.offer(argparse.Namespace(cipher=cipher), clock(())) == (cipher,)


def test_all_are_offered():
    assert sorted(ciphers.offer(AUTO)) == sorted(aead.CIPHERS)


@pytest.mark.parametrize("fast", range(len(aead.CIPHERS)))
def test_the_fastest_stands_first(fast):
    turns = [1.0 if cipher == fast else 2.0 for cipher in range(len(aead.CIPHERS))]
    assert ciphers.offer(AUTO, clock(itertools.cycle(turns)))[0] == list(aead.CIPHERS)[fast]


@pytest.mark.parametrize("fast", range(len(aead.CIPHERS)))
def test_a_bad_moment_of_the_machine_does_not_decide(fast):
    turns = [1.0 if cipher == fast else 2.0 for cipher in range(len(aead.CIPHERS))]
    # As long as all rounds of one cipher would take, were they made at one go.
    slow = [9.0] * ((ciphers.ROUNDS - 1) * len(turns))
    assert ciphers.offer(AUTO, clock(slow + turns))[0] == list(aead.CIPHERS)[fast]
