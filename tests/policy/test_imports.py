"""The arrows between the parts of the package: who may import whom.

    cli --> control --> host
     |         |-----> service, metrics
     |         |-----> pki ----> config
     |         '--+--> protocol
     |            |--> workerlink, hardening
     |         dataplane
     '-> admin --> pki, config, host, metrics

A part is a package or a module directly below bulkvpnd/. What is not in the table is not allowed, so a new arrow is
a decision that shows in a diff.
"""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[2] / "bulkvpnd"

ARROWS = {
    # part: (parts that it may import besides itself, packages that are not in the standard library)
    "__init__": (set(), set()),
    "__main__": ({"cli"}, set()),
    "cli": ({"config", "control", "admin", "dataplane"}, {"argcomplete", "gevent"}),
    "config": (set(), {"configargparse"}),
    "pki": ({"config"}, {"cryptography"}),
    "metrics": (set(), {"prometheus_client"}),
    "service": (set(), {"systemd"}),
    "events": (set(), set()),
    "hardening": (set(), {"seccomp"}),
    "workerlink": (set(), {"gevent"}),
    "protocol": (set(), {"cryptography"}),
    "dataplane": ({"hardening", "protocol", "workerlink"}, {"gevent"}),
    "host": (set(), {"nftables", "pyroute2"}),
    "control": ({"config", "events", "hardening", "host", "metrics", "pki", "protocol", "service", "workerlink"},
                {"dns", "gevent", "prometheus_client"}),
    "admin": ({"config", "host", "metrics", "pki"}, {"rich", "segno"}),
}
FORBIDDEN = {
    # part: what of the standard library it may not import either
    "protocol": {  # pure: bytes in, bytes out; time and randomness are arguments
        "asyncio", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "random", "secrets", "select",
        "selectors", "signal", "socket", "ssl", "subprocess", "threading", "time",
    },
    "dataplane": {"logging", "secrets", "ssl", "subprocess"},  # neither decisions nor secrets, nor other programs
}
IMPORTERS = {"cli"}
"""Parts that may import a module by a name made at run time, which this test cannot follow."""
EXCEPTIONS = {
    # file: what it may import besides, and what is below that
    "admin/__main__.py": {"bulkvpnd.cli"},  # `python3 -m bulkvpnd.admin` is the command itself
    # The doctor greets the server as a client does, and checks what the daemon checks, by the same code. It asks the
    # tunnel's name servers whether they answer.
    "admin/machine.py": {"bulkvpnd.control.ciphers", "bulkvpnd.control.clients", "bulkvpnd.control.gateway",
                         "bulkvpnd.control.tls", "bulkvpnd.control.transport", "bulkvpnd.protocol.errors", "dns"},
    # What it writes is checked by the code of the daemon's start.
    "admin/instances.py": {"bulkvpnd.control.current"},
}  # fmt: skip

ALONE = {
    # file: all of ours that it imports; beyond that the standard library. It runs as root.
    "host/resolvconf.py": {"host/program.py"},
    "host/program.py": set(),
}


def imported(source):
    """Every import in a module's source, also inside functions: [(line, "package.module.name")]."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def is_excepted(file, name):
    return any(f"{name}.".startswith(f"{one}.") for one in EXCEPTIONS.get(file, ()))


def violations(file, source):
    """What the imports of a module break, one line each. file: path below bulkvpnd/."""
    part = file.partition("/")[0].removesuffix(".py")
    if part not in ARROWS:
        return [f"{file}: {part} has no row in ARROWS"]
    parts, packages = ARROWS[part]
    broken = []
    for line, name in imported(source):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if name.startswith("."):
            allowed = False  # one way to write an import, so that a search finds it
        elif top == "bulkvpnd":
            allowed = target in parts | {part, "__version__"}  # not part of a package, but what everything may show
        elif top in sys.stdlib_module_names:
            # importlib.metadata imports nothing.
            imports = top == "importlib" and not f"{name}.".startswith("importlib.metadata.")
            allowed = top not in FORBIDDEN.get(part, ()) and (not imports or part in IMPORTERS)
        else:
            allowed = top in packages
        if not allowed and not is_excepted(file, name):
            broken.append(f"{file}:{line}: {part} may not import {name}")
    return broken


MODULES = sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", MODULES)
def test_imports_follow_the_arrows(file):
    assert violations(file, (PACKAGE / file).read_text()) == []


@pytest.mark.parametrize("file", EXCEPTIONS)
def test_every_exception_is_used(file):
    used = [name for _, name in imported((PACKAGE / file).read_text())]
    for one in EXCEPTIONS[file]:
        assert any(f"{name}.".startswith(f"{one}.") for name in used), one


@pytest.mark.parametrize("file", ALONE)
def test_what_runs_as_root_imports_little(file):
    ours, others = set(), set()
    for _, name in imported((PACKAGE / file).read_text()):
        (ours if name.startswith(("bulkvpnd", ".")) else others).add(name)
    assert {f"{name.removeprefix('bulkvpnd.').replace('.', '/')}.py" for name in ours} == ALONE[file]
    assert {name.partition(".")[0] for name in others} <= sys.stdlib_module_names
    for package in ("__init__.py", "host/__init__.py"):
        assert imported((PACKAGE / package).read_text()) == [], "python3 -m imports it before"


def test_every_row_has_a_part():
    parts = {file.partition("/")[0].removesuffix(".py") for file in MODULES}
    assert set(ARROWS) == parts


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("protocol/fake.py", "import socket"),
        ("protocol/fake.py", "from os import urandom"),
        ("protocol/fake.py", "import gevent.monkey"),
        ("protocol/fake.py", "def later():\n    from time import monotonic"),
        ("protocol/fake.py", "from bulkvpnd.dataplane import tun"),
        ("dataplane/fake.py", "from bulkvpnd import config"),
        ("dataplane/fake.py", "from bulkvpnd.protocol import frame\nimport bulkvpnd.pki"),
        ("dataplane/fake.py", "from .tun import Queue"),
        ("host/fake.py", "import gevent"),
        ("host/fake.py", "from bulkvpnd.control import session"),
        ("control/fake.py", "from bulkvpnd.admin import status"),
        ("control/fake.py", "import importlib"),
        ("config/fake.py", "import cryptography"),
        ("admin/fake.py", "from bulkvpnd.cli import bulkvpnctl"),
        ("admin/fake.py", "from bulkvpnd.control import tls"),
        ("admin/fake.py", "import dns.query"),
        ("admin/fake.py", "from pyroute2 import IPRoute"),
        ("admin/machine.py", "from bulkvpnd.control import session"),
        ("admin/machine.py", "from bulkvpnd.control.tlsx import Handshake"),
        ("admin/machine.py", "from bulkvpnd.protocol import keys"),
        ("admin/machine.py", "import bulkvpnd.control"),
        ("helpers.py", ""),
    ],
)
def test_a_wrong_arrow_is_found(file, source):
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("protocol/fake.py", "import struct\nfrom cryptography.exceptions import InvalidTag"),
        ("dataplane/fake.py", "from bulkvpnd.protocol import frame\nfrom gevent import socket"),
        ("control/fake.py", "from bulkvpnd import __version__, config\nfrom bulkvpnd.control.session import Session"),
        ("admin/machine.py", "from bulkvpnd.control import clients\nfrom bulkvpnd.protocol.errors import RemoteError"),
        ("admin/fake.py", "import importlib.metadata\nfrom importlib.metadata import version"),
    ],
)
def test_a_right_arrow_is_not(file, source):
    assert violations(file, source) == []
