"""Completion in bash and zsh, through the files that the package installs."""

import argparse
import importlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from bulkvpnd import cli, config
from bulkvpnd.admin import doctor

ROOT = pathlib.Path(__file__).parents[2]
COMPLETIONS = ROOT / "debian" / "completions"

SHELLS = {
    # Each script takes the file and the line, and prints what would be offered, one on a line.
    "bash": r"""
        . "$1"
        function=$(complete -p bulkvpnctl | sed 's/.*-F \([^ ]*\).*/\1/')
        COMP_LINE=$2 COMP_POINT=${#2} COMP_TYPE=9
        $function bulkvpnctl
        printf '%s\n' "${COMPREPLY[@]}"
        """,
    "zsh": r"""
        file=$1 BUFFER=$2 CURSOR=${#2} words=(bulkvpnctl)
        _describe() { print -l -- ${found%%:*} }
        _files() { }
        complete_it() { source $file }
        complete_it
        """,
}
FILES = {"bash": "bulkvpnctl", "zsh": "_bulkvpnctl"}

if not importlib.util.find_spec("argcomplete") or not COMPLETIONS.is_dir():
    pytest.skip("needs argcomplete and the source tree", allow_module_level=True)


@pytest.fixture(params=SHELLS)
def offered(request, tmp_path):
    """offered(line) -> what the shell would offer at its end, as a set."""
    shell = shutil.which(request.param)
    if not shell or not shutil.which("register-python-argcomplete"):
        pytest.skip(f"needs {request.param} and register-python-argcomplete")
    program = tmp_path / "bulkvpnctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m bulkvpnd.admin "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    plain = {"bash": ["--norc"], "zsh": ["-f"]}[request.param]

    def run(line):
        done = subprocess.run(
            [shell, *plain, "-c", SHELLS[request.param], "x", COMPLETIONS / FILES[request.param], line],
            capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path,
        )
        return {one.strip() for one in done.stdout.splitlines() if one}

    return run


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("bulkvpnctl ", {"pki", "status", "import", "explain"}, {"init", "mtu"}),
        ("bulkvpnctl im", {"import", "import-openvpn"}, {"pki"}),
        ("bulkvpnctl pki re", {"renew", "revoke"}, {"add", "init"}),
        ("bulkvpnctl pki add x --re", {"--remote"}, {"--output"}),
        ("bulkvpnctl explain max-", {"max-handshakes", "max-handshakes-per-source"}, {"mtu"}),
        ("bulkvpnctl example ", {"server", "client"}, {"both"}),
    ],
)
def test_what_may_come_next_is_offered(offered, line, some, none):
    found = offered(line)
    assert some <= found and not none & found


@pytest.mark.parametrize("command", ["renew", "revoke"])
def test_names_that_have_a_certificate_are_offered(offered, tmp_path, ctl, command):
    line = f"bulkvpnctl pki {command} --directory {tmp_path}/site "
    assert not {"server", "laptop"} & offered(line)
    assert ctl("pki", "init", "--directory", tmp_path / "site")[0] == 0
    assert ctl("pki", "add", "laptop", "--remote", "x", "--directory", tmp_path / "site")[0] == 0
    assert {one for one in offered(line) if not one.startswith("-")} == {"server", "laptop"}


def test_every_instance_is_offered_by_name():
    for name, (module, _) in cli.COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(f"bulkvpnd.admin.{module}").add_arguments(parser)
        for action in parser._actions:
            assert action.metavar != "INSTANCE" or hasattr(action, "completer"), name


def test_doctor_looks_at_what_does_not_run_too(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CONFIGURATION_DIRECTORY", tmp_path)
    for name in ("server.conf", "office.conf", "server.conf.example"):
        (tmp_path / name).touch()
    assert doctor.instances() == ["office", "server"]


def test_the_package_installs_both_where_the_shells_look():
    lines = (ROOT / "debian" / "bulkvpnd.install").read_text().splitlines()
    assert "debian/completions/bulkvpnctl usr/share/bash-completion/completions/" in lines
    assert "debian/completions/_bulkvpnctl usr/share/zsh/vendor-completions/" in lines
