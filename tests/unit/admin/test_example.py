"""bulkvpnctl example: what it prints is a configuration, and says what the daemon does without it."""

import pytest

from bulkvpnd import config
from bulkvpnd.admin import example

PEM = {name: f"<{name}>\n-----BEGIN {kind}-----\nAAAA\n-----END {kind}-----\n</{name}>\n"
       for name, kind in (("ca", "CERTIFICATE"), ("certificate", "CERTIFICATE"), ("key", "PRIVATE KEY"))}  # fmt: skip
NEEDED = {"server": "pool-ipv4 = 10.86.0.0/24\n", "client": "remote = vpn.example.org\n"}


def load(tmp_path, role, text):
    path = tmp_path / f"{role}.conf"
    path.touch(0o600)
    path.write_text(text)
    return config.load(["--config", str(path)])[0]


@pytest.mark.parametrize("role", sorted(example.HEADS))
def test_every_option_of_the_role_and_no_other(role):
    text = example.example(role)
    for option in config.OPTIONS:
        assert (f"\n#{option.name} = " in text or f"\n{option.name} = " in text) == (option.role in (None, role))
    assert all(len(line) <= 101 and line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("role", sorted(example.HEADS))
def test_commented_out_it_changes_nothing(tmp_path, role):
    least = load(tmp_path, role, f"mode = {role}\n" + NEEDED[role] + "".join(PEM.values()))
    whole = load(tmp_path, role, example.example(role) + NEEDED[role] + "".join(PEM.values()))
    assert [getattr(whole, option.field) for option in config.OPTIONS] == [
        getattr(least, option.field) for option in config.OPTIONS
    ]


@pytest.mark.parametrize("role", sorted(example.HEADS))
def test_with_every_comment_taken_out_it_still_says_the_same(tmp_path, role):
    """Each line shows the real default, so to take its comment away changes nothing; paths are only examples."""
    lines = []
    for line in example.example(role).splitlines():
        name = line[1:].split(" = ")[0] if line.startswith("#") and not line.startswith(("# ", "##")) else None
        if name and name not in PEM:
            line = line[1:]
        lines.append(line)
    whole = load(tmp_path, role, "\n".join(lines) + "\n" + "".join(PEM.values()))
    least = load(tmp_path, role, f"mode = {role}\n" + NEEDED[role] + "".join(PEM.values()))
    for option in config.OPTIONS:
        if option.default is not None:
            assert getattr(whole, option.field) == getattr(least, option.field), option.name
