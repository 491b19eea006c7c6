"""bulkvpnctl explain: what the manual pages say of one word."""

import gzip
import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkvpnd import config
from bulkvpnd.admin import explain
from bulkvpnd.metrics import METRICS

PAGE = r""".Dd November 24, 2026
.Dt BULKVPN.CONF 5
.Os
.Sh OPTIONS
.Bl -tag -width Ds
.It Cm mtu Li = Ar BYTES
The words of this page.
.Bl -tag -width Ds
.It Li inner
belongs to it
.El
After the list.
.It Cm ipv4 , ipv6
Two at once.
.El
Not an item.
"""

formatted = pytest.mark.skipif(not (shutil.which("mandoc") or shutil.which("man")), reason="needs mandoc or man")
in_the_tree = pytest.mark.skipif(not explain.SOURCE.is_dir(), reason="needs the package in its source tree")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A man path with one page, as Debian has it."""
    (tmp_path / "man5").mkdir()
    (tmp_path / "man5" / "bulkvpn.conf.5.gz").write_bytes(gzip.compress(PAGE.encode()))
    monkeypatch.setenv("MANPATH", str(tmp_path))
    return tmp_path / "man5"


def test_an_item_ends_with_the_next_and_keeps_its_own_list():
    found = explain.entries(PAGE, "Cm")
    assert list(found) == ["mtu", "ipv4", "ipv6"] and found["ipv4"] == found["ipv6"]
    assert found["mtu"].endswith("After the list.\n") and "belongs to it" in found["mtu"]
    assert found["ipv6"] == ".It Cm ipv4 , ipv6\nTwo at once.\n"


@given(st.text(alphabet=".BlEItCm \n,a-", max_size=200) | st.text(max_size=50))
def test_any_page_has_items_or_none(text):
    assert all(name and item.startswith(".It Cm ") for name, item in explain.entries(text, "Cm").items())


@in_the_tree
@formatted
def test_a_word_is_the_same_in_capitals(ctl):
    assert ctl("explain", "MTU") == ctl("explain", "mtu") and ctl("explain", "Crowded")[0] == 0


@in_the_tree
def test_every_option_and_every_metric_can_be_explained():
    found = explain._entries()
    assert {option.name for option in config.OPTIONS} <= set(found)
    names = {f"bulkvpn_{one.name}" for one in METRICS}
    assert len([name for name in names if {name, f"{name}_total"} & set(found)]) == len(names)
    assert {"no_session", "IDENTITY"} <= set(found)


@formatted
def test_the_page_in_the_man_path_is_read(installed, ctl):
    status, out, error = ctl("explain", "mtu")
    assert (status, error) == (0, "")
    assert "bulkvpn.conf(5)" in out and "mtu = BYTES" in out and "words of this page" in out
    assert "Two at once" not in out and "\x08" not in out and "\033" not in out


@formatted
@pytest.mark.parametrize("content", [b"\x1f\x8b damaged", gzip.compress(PAGE.encode())[:-20]])
def test_a_damaged_page_does_not_count(installed, ctl, content):
    (installed / "bulkvpn.conf.5.gz").write_bytes(content)
    status, out, _ = ctl("explain", "mtu")
    assert status == 0 and "words of this page" not in out and "MTU" in out


def test_without_a_formatter_the_option_table_answers(monkeypatch, ctl):
    monkeypatch.setenv("PATH", "/nonexistent")
    status, out, error = ctl("explain", "mtu")
    assert (status, error) == (0, "") and out.startswith("mtu = BYTES: ") and "(default 1500)" in " ".join(out.split())


@in_the_tree
def test_without_a_formatter_the_rest_says_what_is_missing(monkeypatch, ctl):
    monkeypatch.setenv("PATH", "/nonexistent")
    status, out, error = ctl("explain", "no_session")
    assert status == 1 and out == "" and "apt install mandoc" in error and error.count("\n") == 1


@pytest.mark.parametrize(("key", "near"), [("conections", "connections"), ("max-handshake", "max-handshakes")])
def test_a_misspelt_word_gets_what_is_near(ctl, key, near):
    status, out, error = ctl("explain", key)
    assert status == 1 and out == "" and f"did you mean {near}" in error and error.count("\n") == 1


@pytest.mark.parametrize("key", ["xyzzyxyzzy", "", "\x1b[31m", "a\nb", "../../x"])
def test_anything_else_is_one_line(ctl, key):
    status, out, error = ctl("explain", key)
    assert status == 1 and out == "" and "bulkvpn.conf(5)" in error
    assert error.count("\n") == 1 and error.rstrip("\n").isprintable()


def test_a_terminal_gets_bold_and_underlined_and_a_file_neither(monkeypatch):
    struck = "m\bmt\btu\bu = _\bB_\bY aa"
    assert explain._emphasised(struck) == "mtu = BY aa"
    main, other = os.openpty()
    with os.fdopen(main), os.fdopen(other, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        assert explain._emphasised(struck) == "\033[1mmtu\033[m = \033[4mBY\033[m aa"
