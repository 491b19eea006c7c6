"""cli: the two commands as a shell sees them."""

import os
import pathlib
import signal
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


WITH_OUTPUT = [["--help"], ["--version"], ["status", "--help"], ["example", "server"], ["explain", "mtu"],
               ["tune", "show"]]  # fmt: skip


def administer(*arguments, **options):
    """Runs bulkvpnctl in a process of its own, whose standard output is another. Returns (status, its errors)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    done = subprocess.run([sys.executable, "-m", "bulkvpnd.admin", *arguments], stderr=subprocess.PIPE, text=True,
                          timeout=20, env=environment, **options)
    return done.returncode, done.stderr


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", WITH_OUTPUT, ids=" ".join)
def test_a_reader_that_goes_away_is_no_traceback(arguments, buffered):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        assert administer(*arguments, stdout=gone, env={"PYTHONUNBUFFERED": buffered}) == (1, "")


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", WITH_OUTPUT, ids=" ".join)
def test_a_full_disk_is_one_line(arguments, buffered):
    with open("/dev/full", "w") as full:
        status, error = administer(*arguments, stdout=full, env={"PYTHONUNBUFFERED": buffered})
    assert status == 1 and error == ("bulkvpnctl: standard output: cannot be written: No space left on device; make "
                                     "room, or write it to somewhere else\n")


def test_an_encoding_without_the_characters_is_one_line():
    code = ("from bulkvpnd import cli; from bulkvpnd.admin import example; example.run = lambda _: print('\\u25cf')\n"
            "raise SystemExit(cli.bulkvpnctl(['example', 'server']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("bulkvpnctl: standard output: cannot show this text; set a locale with UTF-8, such as "
                           "LC_ALL=C.UTF-8\n")


def test_standard_output_may_be_closed():
    command = [sys.executable, "-m", "bulkvpnd.admin", "example", "server"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=20,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_by_way_of_its_clean_up(monkeypatch, ctl, number):
    from bulkvpnd.admin import example

    undone = []

    def run(arguments):
        try:
            signal.raise_signal(number)
        finally:
            undone.append(number)

    monkeypatch.setattr(example, "run", run)
    # Whoever runs the tests may ignore it, as nohup does.
    former = signal.signal(number, signal.SIG_DFL)
    try:
        assert ctl("example", "server")[0] == 128 + number and undone == [number]
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, former)


def test_a_signal_that_is_ignored_stays_so(monkeypatch, ctl):
    from bulkvpnd.admin import example

    monkeypatch.setattr(example, "run", lambda arguments: signal.raise_signal(signal.SIGHUP) or 0)
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ctl("example", "server")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_command_that_is_mistyped(ctl):
    assert "'statsu': no such command; did you mean status?" in ctl("statsu")[2]
    assert "no such command; see" in ctl("xyzzy")[2]


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
