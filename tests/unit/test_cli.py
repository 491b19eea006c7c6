"""cli: the two commands as a shell sees them."""

import os
import pathlib
import subprocess
import sys

import pytest

from bulkvpnd import __version__, cli

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments, module="bulkvpnd", **options):
    """Runs one command in a process of its own. Returns (exit status, standard output, standard error)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=60,
                          env=environment, **options)
    return done.returncode, done.stdout, done.stderr


# bulkvpnctl


def test_version(ctl):
    assert ctl("--version") == (0, f"bulkvpnctl {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nonsense"], ["--nonsense"], ["sta"], ["status", "--nonsense"], ["status", "a", "b"], ["--vers"], [""],
        ["example"], ["example", "both"], ["pki"], ["pki", "nonsense"], ["demo", "--seconds", "soon"], ["-x", "status"],
    ],
)  # fmt: skip
def test_wrong_usage_is_64_with_usage_and_one_reason(ctl, arguments):
    status, out, error = ctl(*arguments)
    assert status == os.EX_USAGE and out == ""
    assert error.startswith("usage: bulkvpnctl") and error.rstrip().endswith("--help") and "Traceback" not in error


def test_help_names_every_command(ctl):
    status, out, _ = ctl("--help")
    assert status == 0
    for name, (_, summary) in cli.COMMANDS.items():
        assert name in out and summary.split()[0] in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(ctl, name):
    status, out, _ = ctl(name, "--help")
    assert status == 0 and out.startswith(f"usage: bulkvpnctl {name}")


def test_a_command_imports_only_what_it_needs():
    code = "import sys; from bulkvpnd import cli; cli.bulkvpnctl(['example', 'server'])\n" \
           "print(sorted({'cryptography', 'gevent', 'rich', 'ssl'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_a_reader_that_goes_away_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        done = subprocess.run([sys.executable, "-u", "-m", "bulkvpnd.admin", "example", "server"], stdout=gone,
                              stderr=subprocess.PIPE, text=True, timeout=20,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (1, "")


def test_control_c_is_130(monkeypatch, ctl):
    from bulkvpnd.admin import example

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "run", interrupted)
    assert ctl("example", "server")[0] == 130


# bulkvpnd


def test_the_daemon_s_version():
    status, out, error = run("--version")
    assert (status, out, error) == (0, f"bulkvpnd {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--nonsense"], os.EX_USAGE),
        (["positional"], os.EX_USAGE),
        (["--config", "/nonexistent/x.conf"], os.EX_CONFIG),
        (["--config", "/"], os.EX_CONFIG),
    ],
)
def test_the_daemon_says_in_one_line_what_is_wrong(arguments, status):
    got, out, error = run(*arguments)
    assert (got, out) == (status, "")
    assert error.startswith("bulkvpnd: ") and error.count("\n") == 1


def test_a_certificate_that_is_none_is_78_before_anything_is_touched(tmp_path):
    file = tmp_path / "server.conf"
    file.touch(0o600)
    pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    file.write_text("mode = server\npool-ipv4 = 10.86.0.0/24\n"
                    + "".join(f"<{name}>\n{pem}</{name}>\n" for name in ("ca", "certificate"))
                    + f"<key>\n{pem.replace('CERTIFICATE', 'PRIVATE KEY')}</key>\n")
    status, out, error = run("--config", str(file), "--runtime-directory", str(tmp_path / "run"),
                             "--state-directory", str(tmp_path / "state"))
    assert (status, out) == (os.EX_CONFIG, "") and error.count("\n") == 1 and str(file) in error
    assert sorted(os.listdir(tmp_path)) == ["server.conf"]


def test_the_daemon_is_patched_without_pkg_resources():
    """Its import would be a sixth of a start; whoever wants it later gets the real one."""
    program = ("import sys; from bulkvpnd import cli; cli._patch(); import gevent.socket, socket; "
               "print(socket.socket is gevent.socket.socket, 'pkg_resources' in sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout == "True False\n", done.stderr
