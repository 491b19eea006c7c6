"""oneline: a configuration as one line of text, and back."""

import base64
import io
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkvpnd import config
from bulkvpnd.admin import oneline


def items(text):
    return config.FileParser().parse(io.StringIO(text))


def line(payload):
    return oneline.PREFIX + base64.b32encode(zlib.compress(payload)).decode().rstrip("=")


def record(content):
    return struct.pack("!H", len(content)) + content


def pem(der, label="CERTIFICATE"):
    return oneline._pem(label, der)


@given(
    remotes=st.lists(st.from_regex(r"[a-z]{1,30}(\.[a-z]{1,30}){0,2}:[1-9][0-9]{0,3}", fullmatch=True), max_size=5),
    chain=st.lists(st.binary(min_size=1, max_size=700), min_size=1, max_size=3),
    key=st.binary(min_size=1, max_size=200),
)
def test_what_is_encoded_comes_back(remotes, chain, key):
    text = "# a comment\nmode = client\n" + "".join(f"remote = {one}\n" for one in remotes) + "log-level = debug\n"
    text += f"<certificate>\n{''.join(map(pem, chain))}</certificate>\n<key>\n{pem(key, 'PRIVATE KEY')}</key>\n"
    made = oneline.encode(items(text))
    assert made.isascii() and made.removeprefix(oneline.PREFIX).isalnum() and made == made.upper()
    assert items(oneline.decode(made)) == items(text)


def test_case_and_white_space_do_not_count():
    made = oneline.encode(items("mode = client\nmtu = 1400\n"))
    wrapped = "\n  ".join(made[at : at + 20] for at in range(0, len(made), 20)).lower()
    assert oneline.is_line("\n" + wrapped) and not oneline.is_line("mode = client\n")
    assert oneline.decode(wrapped) == "mode = client\nmtu = 1400\n"


@given(st.text(max_size=100) | st.text(alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ234567=", max_size=100))
def test_any_text_is_refused_with_the_mend(text):
    with pytest.raises(ValueError, match="the whole line that bulkvpnctl pki add printed"):
        oneline.decode(oneline.PREFIX + text)


@given(st.binary(max_size=200))
def test_any_payload_is_a_text_or_refused(payload):
    try:
        assert isinstance(oneline.decode(line(payload)), str)
    except ValueError as error:
        assert "the whole line" in str(error)


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\0", b"\0\5four", record(b"mode = client") + b"\0", record(b"\xff"), record(b"") + record(b"no head"),
        record(b"") + record(b"../x CERTIFICATE\n0"), record(b"") + record(b"ca -----\n0"),
    ],
)  # fmt: skip
def test_damaged_records_are_refused(payload):
    with pytest.raises(ValueError, match="the whole line"):
        oneline.decode(line(payload))
    assert oneline.decode(line(record(b"mode = client"))) == "mode = client\n"


def test_a_line_that_was_cut_or_has_more_behind_it_is_refused():
    made = oneline.encode(items("mode = client\nmtu = 1400\n"))
    packed = base64.b32decode(made.removeprefix(oneline.PREFIX) + "=" * (-len(made.removeprefix(oneline.PREFIX)) % 8))
    for wrong in (packed[:-1], packed[:-5], packed + b"x"):
        with pytest.raises(ValueError, match="the whole line"):
            oneline.decode(oneline.PREFIX + base64.b32encode(wrong).decode())


def test_a_line_that_would_become_huge_is_refused_before_it_is():
    bomb = line(bytes(64 * config.MAX_FILE_SIZE))
    tracemalloc.start()
    with pytest.raises(ValueError, match="the whole line"):
        oneline.decode(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * config.MAX_FILE_SIZE


def test_what_is_too_long_for_a_record_is_refused():
    with pytest.raises(ValueError, match="too large"):
        oneline.encode({"ca": pem(bytes(1 << 16))})
