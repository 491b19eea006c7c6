"""bulkvpnctl import, and the forms in which pki add hands a configuration over."""

import io
import os
import pathlib
import shutil
import stat
import subprocess
import sys

import pytest

from bulkvpnd import config
from bulkvpnd.admin import oneline


@pytest.fixture
def site(tmp_path, ctl):
    assert ctl("pki", "init", "--directory", tmp_path / "site")[0] == 0
    return tmp_path / "site"


@pytest.fixture
def profile(site, tmp_path, ctl):
    status, text, _ = ctl("pki", "add", "laptop", "--remote", "vpn.example.org", "--directory", site)
    assert status == 0
    file = tmp_path / "laptop.conf"
    file.write_text(text)
    return file


@pytest.fixture
def systemctl(tmp_path, monkeypatch):
    """A systemctl that writes down what it is called with, and fails if the file `fails` is there."""
    directory = tmp_path / "bin"
    directory.mkdir()
    program = directory / "systemctl"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n[ ! -e {tmp_path}/fails ] || exit 5\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setattr(config, "CONFIGURATION_DIRECTORY", tmp_path / "etc")

    def called():
        file = tmp_path / "called"
        return file.read_text().splitlines() if file.exists() else []

    return called


def test_a_profile_is_installed_whatever_its_own_mode(profile, tmp_path, ctl, systemctl):
    profile.chmod(0o666)
    status, out, error = ctl("import", profile, "--directory", tmp_path / "etc")
    assert (status, error) == (0, "") and "systemctl enable --now bulkvpnd@client" in out
    file = tmp_path / "etc" / "client.conf"
    assert file.read_text() == profile.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and file.stat().st_uid == os.geteuid()
    assert config.load(["--config", str(file)])[0].name == "client"
    assert [one.name for one in file.parent.iterdir()] == ["client.conf"] and systemctl() == []


def test_nothing_is_overwritten_without_force(profile, tmp_path, ctl, systemctl):
    arguments = ("import", profile, "--directory", tmp_path / "etc", "--name", "office")
    assert ctl(*arguments)[0] == 0
    file = tmp_path / "etc" / "office.conf"
    file.write_text("mine")
    status, _, error = ctl(*arguments)
    assert status == 1 and "exists already" in error and file.read_text() == "mine"
    status, out, _ = ctl(*arguments, "--force")
    assert status == 0 and "systemctl restart bulkvpnd@office" in out and file.read_text() == profile.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_start_enables_the_unit_and_restarts_one_that_was_there(profile, tmp_path, ctl, systemctl):
    arguments = ("import", profile, "--directory", tmp_path / "etc", "--start")
    assert ctl(*arguments)[0] == 0
    assert systemctl() == ["enable --now bulkvpnd@client"]
    assert ctl(*arguments, "--force")[0] == 0
    assert systemctl()[1:] == ["enable bulkvpnd@client", "restart bulkvpnd@client"]


def test_a_start_that_fails_is_said(profile, tmp_path, ctl, systemctl):
    (tmp_path / "fails").touch()
    status, _, error = ctl("import", profile, "--directory", tmp_path / "etc", "--start")
    assert status == 1 and "status 5" in error and "journalctl -u bulkvpnd@client" in error


def test_without_systemd_a_start_says_what_to_do(profile, tmp_path, ctl, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(config, "CONFIGURATION_DIRECTORY", tmp_path / "etc")
    status, _, error = ctl("import", profile, "--directory", tmp_path / "etc", "--start")
    assert status == 1 and "bulkvpnd --config" in error and error.count("\n") == 1


def test_where_no_unit_looks_none_is_started(profile, tmp_path, ctl, systemctl):
    status, out, error = ctl("import", profile, "--directory", tmp_path / "other", "--start")
    assert (status, out) == (os.EX_USAGE, "") and "leave out --directory" in error and error.count("\n") == 1
    assert not (tmp_path / "other").exists() and systemctl() == []
    status, out, _ = ctl("import", profile, "--directory", tmp_path / "other")
    assert status == 0 and f"bulkvpnd --config {tmp_path}/other/client.conf" in out and "systemctl" not in out


def refused(text, tmp_path, ctl):
    file = tmp_path / "x.conf"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    status, out, error = ctl("import", file, "--directory", tmp_path / "etc")
    assert status in (1, os.EX_CONFIG) and out == "" and error.startswith("bulkvpnctl: ") and error.count("\n") == 1
    assert not (tmp_path / "etc").exists()
    return error


def test_a_bad_line_is_refused_by_file_line_key_value_and_mend(profile, tmp_path, ctl):
    number = profile.read_text().count("\n") + 1
    error = refused(profile.read_text() + "mtu = 9\n", tmp_path, ctl)
    assert f"x.conf:{number}: mtu = 9: should be a whole number of bytes from 1280" in error
    error = refused(profile.read_text() + "frobnicate = 9\n", tmp_path, ctl)
    assert f"x.conf:{number}: frobnicate: unknown option" in error


def test_what_is_no_client_s_is_refused(site, profile, tmp_path, ctl):
    assert "mode = server" in refused((site / "server.conf").read_text(), tmp_path, ctl)
    assert "mode: missing" in refused("", tmp_path, ctl)
    assert "UTF-8" in refused(b"\xff\xfe", tmp_path, ctl)
    assert "more than" in refused(b"#" * (config.MAX_FILE_SIZE + 1), tmp_path, ctl)
    elsewhere = profile.read_text().partition("<key>")[0] + "key = client.key\n"
    assert "key = client.key: should be the PEM text itself" in refused(elsewhere, tmp_path, ctl)


HOOKS = [option.name for option in config.OPTIONS if option.group == "Hooks" and option.role != "server"]


@pytest.mark.parametrize("name", HOOKS)
def test_a_profile_that_starts_programs_is_refused_unless_that_is_wanted(site, profile, tmp_path, ctl, name):
    number = profile.read_text().count("\n") + 1
    text = profile.read_text() + f"{name} = /usr/bin/true\n"
    error = refused(text, tmp_path, ctl)
    assert f"x.conf:{number}: {name} = /usr/bin/true: would start a program here; " in error
    assert error.endswith("--allow-hooks\n")
    # As one line it is the same.
    items, _ = config.read_items(profile, text)
    assert f"{name} = /usr/bin/true: would start a program" in refused(oneline.encode(items), tmp_path, ctl)
    assert ctl("import", tmp_path / "x.conf", "--directory", tmp_path / "etc", "--allow-hooks")[0] == 0
    installed, _ = config.load(["--config", str(tmp_path / "etc" / "client.conf")])
    assert str(getattr(installed, name.replace("-", "_"))) == "/usr/bin/true"


def test_certificates_that_the_daemon_would_not_take_are_refused(site, profile, tmp_path, ctl):
    other = ctl("pki", "add", "other", "--remote", "x", "--directory", site)[1]
    mixed = profile.read_text().partition("<key>")[0] + "<key>" + other.partition("<key>")[2]
    assert "key: does not belong to the certificate" in refused(mixed, tmp_path, ctl)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "-x", "a/b", "a b", ".hidden", "x" * 65])
def test_a_name_that_is_no_file_s_is_refused(profile, tmp_path, ctl, name):
    status, _, error = ctl("import", profile, "--directory", tmp_path / "etc", f"--name={name}")
    assert status == os.EX_USAGE and "should be 1 to 64" in error and not (tmp_path / "etc").exists()


def test_a_file_that_is_not_there_is_refused(tmp_path, ctl):
    status, _, error = ctl("import", tmp_path / "nowhere", "--directory", tmp_path / "etc")
    assert status == 1 and "nowhere: cannot be read: No such file" in error and "pki init" not in error


def test_standard_input_is_taken_as_text_and_as_one_line(site, profile, tmp_path, ctl, monkeypatch):
    status, made, _ = ctl("pki", "add", "phone", "--remote", "vpn.example.org", "--line", "--directory", site)
    assert status == 0 and made.count("\n") == 1 and made.startswith(oneline.PREFIX) and len(made) < 1400
    for name, text in (("a", profile.read_text()), ("b", made), ("c", "\n" + made.lower())):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert ctl("import", "-", "--name", name, "--directory", tmp_path / "etc")[0] == 0
        installed, _ = config.load(["--config", str(tmp_path / "etc" / f"{name}.conf")])
        assert installed.remote == (("vpn.example.org", 7443),) and installed.server_name == "server"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(made[:-9].encode())))
    status, _, error = ctl("import", "-", "--name", "d", "--directory", tmp_path / "etc")
    assert status == 1 and "-: should be the whole line" in error


# QR codes


def image(text, scale=4):
    """The block characters of a terminal as a picture (PGM), light where the terminal would be."""
    shades = {"█": (255, 255), "▀": (255, 0), "▄": (0, 255), " ": (0, 0)}
    lines = text.splitlines()
    rows = []
    for line in lines:
        for half in (0, 1):
            row = b"".join(bytes([shades[one][half]]) * scale for one in line)
            rows += [row] * scale
    return b"P5 %d %d 255\n" % (len(lines[0]) * scale, len(rows)) + b"".join(rows)


def test_a_qr_code_can_be_read_and_imported(site, tmp_path, ctl):
    if not shutil.which("zbarimg"):
        pytest.skip("needs zbar-tools")
    status, code, error = ctl("pki", "add", "phone", "--remote", "vpn.example.org", "--qr", "--directory", site)
    assert (status, error) == (0, "")
    (tmp_path / "code.pgm").write_bytes(image(code))
    read = subprocess.run(["zbarimg", "-q", "--raw", tmp_path / "code.pgm"], capture_output=True, text=True)
    (tmp_path / "line").write_text(read.stdout)
    assert ctl("import", tmp_path / "line", "--directory", tmp_path / "etc")[0] == 0


def test_a_terminal_that_is_too_small_gets_an_error_and_nothing_is_made(site):
    script = "import os, sys; os.environ.update(COLUMNS='80', LINES='24'); from bulkvpnd import cli\n" \
             "sys.exit(cli.bulkvpnctl(sys.argv[1:]))"
    main, terminal = os.openpty()
    with os.fdopen(main), os.fdopen(terminal, "w") as stdout:
        done = subprocess.run(
            [sys.executable, "-c", script, "pki", "add", "phone", "--remote", "x", "--qr", "--directory", str(site)],
            stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[3])},
        )
    assert done.returncode == 1 and "needs a terminal of" in done.stderr and "use --line" in done.stderr
    assert not (site / "pki" / "issued" / "phone.crt").exists()
