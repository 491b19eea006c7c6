"""The option table, the manual pages and the example files say the same."""

import argparse
import importlib
import pathlib
import re
import shutil
import subprocess

import pytest

from bulkvpnd import cli, config
from bulkvpnd.admin import example
from bulkvpnd.control import clients

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted((ROOT / "man").iterdir())
CONFIGURATION_PAGE = ROOT / "man" / "bulkvpn.conf.5"
ROLES = {None: "Server and client", "server": "Server", "client": "Client"}


def section(page, name):
    """The lines of one .Sh section."""
    _, _, rest = page.read_text().partition(f"\n.Sh {name}\n")
    assert rest, f"{page.name} has no section {name}"
    return rest.partition("\n.Sh ")[0]


def documented_options():
    """{name: (value, mode, default, repeat)} as bulkvpn.conf(5) has them, in its order."""
    found = {}
    for entry in section(CONFIGURATION_PAGE, "OPTIONS").split("\n.It Cm ")[1:]:
        head, _, text = entry.partition("\n")
        name, _, value = head.partition(" Li = ")
        facts = text.rpartition("\n.Pp\n")[2]
        default = re.search(r"; default\n\.Li (\S+) \.$", facts, re.MULTILINE)
        assert default or "; no default.\n" in facts + "\n", f"{name}: the entry should end with its default"
        assert name not in found, f"{name} stands twice"
        found[name] = (value, facts.partition(";")[0], default and default[1], "; may be repeated;" in facts)
    return found


def metavar(macros):
    """An item's value as a reader sees it: Ar ADDRESS Ns Op : Ns Ar PORT -> ADDRESS[:PORT], Ar A : Ns Ar B -> A:B."""
    macros = re.sub(r"Ns Op : Ns Ar (\S+)", r"[:\1]", macros).replace(" [", "[")
    macros = re.sub(r" : Ns Ar (\S+)", r":\1", macros)
    return re.sub(r"\b(Ar|Cm) ", "", macros).replace(" | ", "|")


@pytest.mark.parametrize("option", config.OPTIONS, ids=lambda option: option.name)
def test_manual_has_the_option_with_mode_and_default(option):
    documented = documented_options()
    assert option.name in documented
    value, mode, default, repeat = documented[option.name]
    assert mode == ROLES[option.role]
    assert default == option.default
    assert repeat == option.repeat
    assert metavar(value) == option.metavar


def test_manual_has_no_other_option_and_the_same_order():
    assert list(documented_options()) == [option.name for option in config.OPTIONS]


def test_manual_has_the_groups():
    assert tuple(re.findall(r"^\.Ss (.+)$", section(CONFIGURATION_PAGE, "OPTIONS"), re.MULTILINE)) == config.GROUPS


RELOADS = {"\\&At once": config.NOW, "For connections made from then on": config.CONNECTIONS,
           "For sessions begun from then on": config.SESSIONS}


@pytest.mark.parametrize("head", RELOADS)
def test_manual_says_what_a_reload_does(head):
    text = section(CONFIGURATION_PAGE, "RELOAD").partition(f".It {head}\n")[2].partition("\n.It ")[0]
    named = re.findall(r"^\.Cm ([a-z0-9-]+)(?: [,.])$", text.partition("\n.El")[0], re.MULTILINE)
    roles = {None: ("server", "client"), "server": ("server",), "client": ("client",)}
    assert named == [option.name for option in config.OPTIONS
                     if RELOADS[head] in {option.reload_of(role) for role in roles[option.role]}]
    assert RELOADS[head].lower() in head.lower()


def test_manual_page_examples_name_only_options():
    text = section(CONFIGURATION_PAGE, "EXAMPLES")
    for block in re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed$", text, re.MULTILINE | re.DOTALL):
        if "[Service]" not in block and not block.startswith("ip "):
            known = clients.KEYS if block.startswith("[client ") else config.BY_NAME
            for name in re.findall(r"^([a-z0-9-]+) = ", block, re.MULTILINE):
                assert name in known


def test_manual_has_the_keys_of_a_client():
    """The heads of the list below them name every key, and no other."""
    text = section(CONFIGURATION_PAGE, "GATEWAY").partition(".Ss Clients with")[2]
    heads = re.findall(r"^\.It Cm (.+)$", text, re.MULTILINE)
    assert [name for head in heads for name in head.split(" , ")] == list(clients.KEYS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_manual_has_the_command(command):
    text = section(ROOT / "man" / "bulkvpnctl.8", "COMMANDS")
    assert command in re.findall(r"^\.Ss (\S+)$", text, re.MULTILINE)
    assert re.search(rf"^\.Cm {command}\b", section(ROOT / "man" / "bulkvpnctl.8", "SYNOPSIS"), re.MULTILINE)


def test_manual_has_no_other_command():
    text = section(ROOT / "man" / "bulkvpnctl.8", "COMMANDS")
    headings = set(re.findall(r"^\.Ss (.+)", text, re.MULTILINE))
    assert headings - {"The one-line form"} == set(cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_manual_has_the_flags_of_the_command(command):
    help_text = command_help(command)
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", help_text)) - {"help"}
    synopsis = section(ROOT / "man" / "bulkvpnctl.8", "SYNOPSIS")
    own = "".join(part for part in synopsis.split(".Nm\n") if re.match(rf"\.Cm {command}(?![\w-])", part))
    assert set(re.findall(r"Fl -([a-z0-9-]+)", own)) == flags


def command_help(command):
    """The command's help, and that of its own commands if it has any."""
    parser = argparse.ArgumentParser(prog=command)
    importlib.import_module(f"bulkvpnd.admin.{cli.COMMANDS[command][0]}").add_arguments(parser)
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return parser.format_usage() + "".join(
        inner.format_usage() for action in nested for inner in action.choices.values()
    )


@pytest.mark.parametrize("role", ["server", "client"])
def test_example_file_is_what_the_table_makes(role):
    file = ROOT / "etc" / "bulkvpn" / f"{role}.conf.example"
    assert file.read_text() == example.example(role), f"run: bulkvpnctl example {role} > etc/bulkvpn/{file.name}"


@pytest.mark.parametrize("role", ["server", "client"])
def test_example_file_has_every_option_and_can_be_used(role, tmp_path):
    text = example.example(role)
    used = "\n".join(re.sub(r"^#(?=[a-z])", "", line) for line in text.splitlines())
    keys = re.findall(r"^([a-z0-9-]+) = ", used, re.MULTILINE)
    assert keys == [option.name for option in config.OPTIONS if option.role in (None, role)]
    file = tmp_path / f"{role}.conf"
    file.write_text(used + "\n")
    configuration, _ = config.load(["--config", str(file)])
    assert configuration.mode == role
    for option in config.OPTIONS:
        if option.default is not None and option.role in (None, role):
            value = option.parse(option.default)
            assert getattr(configuration, option.field) == ((value,) if option.repeat else value)


def test_every_page_is_made_for_the_package():
    installed = (ROOT / "debian" / "bulkvpnd.manpages").read_text().split()
    assert sorted(ROOT / name for name in installed) == PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_has_nothing_to_say(page):
    mandoc = shutil.which("mandoc")
    if not mandoc:
        pytest.skip("needs mandoc")
    result = subprocess.run([mandoc, "-T", "lint", page], capture_output=True, text=True)
    # Whether other pages can be found depends on the machine, not on the page.
    said = [line for line in result.stdout.splitlines() + result.stderr.splitlines()
            if "referenced manual not found" not in line and "outdated mandoc.db" not in line]
    assert said == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_man_has_nothing_to_say(page):
    man = shutil.which("man")
    if not man or not shutil.which("groff"):
        pytest.skip("needs man-db and groff")
    result = subprocess.run([man, "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page], capture_output=True,
                            text=True, env={"PATH": "/usr/bin:/bin", "MANWIDTH": "80", "LC_ALL": "C.UTF-8"})
    assert result.returncode == 0
    assert result.stderr == ""


def test_pages_name_only_pages_that_exist():
    own = {tuple(page.name.rsplit(".", 1)) for page in PAGES}
    known = {("ethtool", "8"), ("ip", "8"), ("iperf3", "1"), ("man", "1"), ("mandoc", "1"), ("ping", "8"),
             ("resolv.conf", "5"), ("resolvconf", "8"), ("sd_notify", "3"), ("systemctl", "1"), ("systemd.exec", "5")}
    for page in PAGES:
        for name, number in re.findall(r"^\.Xr (\S+) (\d)", page.read_text(), re.MULTILINE):
            assert (name, number) in own | known, f"{page.name}: {name}({number})"
