"""The documents speak of what is there: files, commands, options, sections, pages, addresses."""

import argparse
import configparser
import importlib
import io
import pathlib
import re
import shlex

import pytest

import bulkvpnd
from bulkvpnd import cli, config, service
from bulkvpnd.admin import openvpn
from bulkvpnd.dataplane import worker

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PAGES = sorted((ROOT / "man").iterdir())

if not (ROOT / "README.md").exists():
    pytest.skip("needs the source tree; the documents are not beside these tests", allow_module_level=True)

AWAITED = {"benchmarks/run", "docs/benchmarks/"}
"""Named by the documents already; they come with the comparison that the README announces."""

INSTALLED = (
    "/etc/bulkvpn", "/run/bulkvpn", "/var/lib/bulkvpnd", "/dev/net/tun", "/usr/sbin/bulkvpn", "/usr/bin/python3",
    "/bin/ip", "/bin/sh", "/etc/sysctl.d/", "/etc/nftables.conf", "/usr/share/doc/bulkvpnd/examples/",
)  # fmt: skip
"""How an absolute path in a document may begin: what the package has, makes or calls."""

BUILT = "../bulkvpnd_"
"""dpkg-buildpackage puts the package beside the source tree."""

OTHERS = {
    # Commands of Debian that an example may use.
    "apt", "chmod", "dpkg-buildpackage", "echo", "gpg", "ip", "journalctl", "jq", "man", "ping", "rm", "scp", "ssh",
    "sysctl", "systemctl", "tar", "tee", "zbarcam",
}  # fmt: skip

OPENVPN = {*openvpn.CARRIED, *openvpn.REASONS}
"""Options of OpenVPN; what compares it with ours names both."""

MACROS = {"Ad", "An", "At", "Do", "Em", "Es", "Fa", "In", "It", "No", "Op", "Pa", "So"}
"""Those of mdoc(7) that a heading could have as a word."""


# What a document says


def fenced(text, language):
    """The blocks between ```language and ```."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def spans(text):
    """What stands between backticks, outside of blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def literal(page):
    """The lines of a manual page's literal blocks, as a reader sees them."""
    blocks = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed$", page, re.MULTILINE | re.DOTALL)
    return "".join(blocks).replace(r"\&", "")


def commands(text):
    """Every command of a piece of shell, as [word, ...] without what it is piped to and what follows it."""
    found = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                found.append(words)
                words = []
            else:
                words.append(word)
    return [words[words[0] == "sudo" :] for words in found if words]


def paths(text):
    """Words of examples and spans that are paths in the source tree."""
    code = re.sub(r"(?<= )# .*", "", " ".join([*fenced(text, "sh"), *spans(text)]))
    return [word for word in re.findall(r"[^\s,;'\"]+", code) if not re.fullmatch(r"[\d.]+/\d+", word)  # a network
            if re.fullmatch(r"(\./)?[\w.-]+(/[\w.-]+)*/?", word) and re.search(r"/|\.(py|md|cfg)$", word)]


# What is there


def flags(parser):
    """Every flag of a parser and of its own commands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*(flags(inner) for inner in action.choices.values()))
    return found


def control_parser(command):
    parser = argparse.ArgumentParser(prog=f"bulkvpnctl {command}", allow_abbrev=False)
    importlib.import_module(f"bulkvpnd.admin.{cli.COMMANDS[command][0]}").add_arguments(parser)
    return parser


def wrong_command(words):
    """Why this command of an example would not run, or None."""
    program, *arguments = words
    if program == "bulkvpnctl":
        if not arguments or arguments[0] not in cli.COMMANDS:
            return f"bulkvpnctl has no such command: {words}"
        try:
            control_parser(arguments[0]).parse_args(arguments[1:])
        except SystemExit:
            return f"bulkvpnctl does not understand: {words}"
    elif program == "bulkvpnd":
        parser, _ = config.build_parser()
        try:
            namespace = parser.parse_args(arguments, config_file_contents="", env_vars={})
            for option in config.OPTIONS:
                raw = getattr(namespace, option.field)
                for one in raw if option.repeat and raw else [raw]:
                    if one is not None:
                        option.parse(one)
        except (config.ConfigurationError, ValueError) as error:
            return f"bulkvpnd does not understand: {words}: {error}"
    elif program.startswith("./"):
        if not (ROOT / program).is_file():
            return f"no such file in the tree: {program}"
    elif program not in OTHERS:
        return f"neither of this project nor in OTHERS: {program}"
    return None


def wrong_mention(words):
    """Why a command that is named in running text, perhaps shortened, does not exist; or None."""
    program, *arguments = words
    if program == "bulkvpnd":
        known = flags(config.build_parser()[0])
    elif not arguments or arguments[0].startswith("-"):
        known = {"--help", "--version"}
    elif arguments[0] not in cli.COMMANDS:
        return f"bulkvpnctl has no such command: {arguments[0]}"
    else:
        known = flags(control_parser(arguments[0]))
    unknown = [word for word in arguments if word.startswith("-") and word not in known]
    return f"{program} has no such flag: {unknown}" if unknown else None


def wrong_configuration(text):
    """Why a piece of a configuration file would be refused, or None."""
    parser = config.FileParser()
    try:
        for key, value in parser.parse(io.StringIO(text)).items():
            for one in value if isinstance(value, list) else [value]:
                config.BY_NAME[key].parse(one)
    except (config.ConfigurationError, ValueError) as error:
        return str(error)
    return None


def foreign_paths(text, directory):
    """Paths that mean something on one machine only, or lie outside of the tree. directory: of the document."""
    absolute = re.findall(r"(?<![\w.:/)\]>*-])/[\w.@-]+/[\w.@/-]*", text)
    upwards = re.findall(r"\.\./[\w./-]*", text)
    return [one for one in absolute if not one.startswith(INSTALLED)] + [
        one for one in upwards
        if not one.startswith(BUILT) and not (directory / one).resolve().is_relative_to(ROOT.resolve())
    ]  # fmt: skip


def anchors(text):
    """What a link may point to in a document: its headings, as GitHub and GitLab name them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda file: file.name)


def test_readme_begins_with_the_two_commands():
    first = fenced((ROOT / "README.md").read_text(), "sh")[0]
    assert commands(first) == [["./demo"], ["./tests/run"]]


@each_document
def test_commands_of_examples_exist_with_their_options(document):
    for block in fenced(document.read_text(), "sh"):
        assert [problem for words in commands(block) if (problem := wrong_command(words))] == []


@each_page
def test_commands_of_manual_examples_exist_with_their_options(page):
    own = "\n".join(re.findall(r"^bulkvpn(?:d|ctl) .*$", literal(page.read_text()), re.MULTILINE))
    ours = [words for words in commands(own) if words[0] in ("bulkvpnd", "bulkvpnctl")]
    assert [problem for words in ours if (problem := wrong_command(words))] == []


@each_document
def test_commands_in_running_text_exist(document):
    for span in spans(document.read_text()):
        if re.match(r"bulkvpn(d|ctl)( |$)", span):
            assert wrong_mention(span.split()) is None


@each_page
def test_commands_in_running_text_of_manuals_exist(page):
    quoted = re.findall(r"^\.Ql (bulkvpn(?:d|ctl) .*)$", page.read_text(), re.MULTILINE)
    for text in quoted:
        words = [word for word in text.split() if word not in ("Ar", "Cm", "Fl")]
        assert wrong_mention(words) is None


@each_document
def test_options_in_running_text_exist(document):
    for span in spans(document.read_text()):
        if re.fullmatch(r"[a-z]+(-[a-z0-9]+)+", span) and span not in OTHERS:
            assert span in config.BY_NAME or (document.name == "coming-from.md" and span in OPENVPN)
        elif re.fullmatch(r"[a-z0-9-]+ = \S+", span):
            assert wrong_configuration(span) is None


@each_document
def test_configurations_can_be_read(document):
    for block in fenced(document.read_text(), "ini"):
        assert wrong_configuration(block) is None


@pytest.mark.parametrize(
    ("document", "path"),
    [(document.name, path) for document in DOCUMENTS for path in dict.fromkeys(paths(document.read_text()))],
)
def test_files_exist(document, path):
    if path in AWAITED and not (ROOT / path).exists():
        pytest.xfail("comes with the comparison")
    assert (ROOT / path).exists()


@each_document
def test_links_lead_somewhere(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            linked = document.parent / file if file else document
            assert linked.is_file(), target
            assert not anchor or anchor in anchors(linked.read_text()), target


@each_document
def test_manual_pages_that_are_named_exist(document):
    for name, number in re.findall(r"\b(bulk[\w.-]*)\((\d)\)", document.read_text()):
        assert (ROOT / "man" / f"{name}.{number}").is_file()


@pytest.mark.parametrize("file", [*DOCUMENTS, *PAGES], ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_outside_of_the_tree_is_named(file):
    assert foreign_paths(file.read_text(), file.parent) == []


def test_sections_that_the_code_refers_to_exist():
    found = []
    for module in sorted((ROOT / "bulkvpnd").rglob("*.py")):
        text = " ".join(module.read_text().split())
        found += re.findall(r'\b(docs/[\w./-]+\.md)(?:, "([^"]+)")?', text)
    assert found
    for document, heading in found:
        assert not heading or f"\n## {heading}\n" in (ROOT / document).read_text()
        assert (ROOT / document).is_file()


def test_changelog_begins_with_the_version():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    versions = [heading for heading in headings if heading != "[Unreleased]"]
    assert re.fullmatch(rf"\[{re.escape(bulkvpnd.__version__)}\] - (unreleased|\d{{4}}-\d\d-\d\d)", versions[0])


def test_there_is_one_address_for_mail():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = [address for document in DOCUMENTS
             for address in re.findall(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+", document.read_text())
             if not address.endswith(".service")]
    assert set(found) == {setup["metadata"]["author_email"]}


def test_manual_has_every_cause_of_a_drop():
    page = (ROOT / "man" / "bulkvpnctl.8").read_text()
    listed = page.partition("dropped are counted by cause")[2].partition("\n.El\n")[0]
    assert tuple(re.findall(r"^\.It Li (\w+)$", listed, re.MULTILINE)) == worker.DROPS


def test_manual_has_every_field_of_the_journal():
    listed = (ROOT / "man" / "bulkvpnd.8").read_text().partition("lines have these fields")[2].partition("\n.El\n")[0]
    assert tuple(re.findall(r"^\.It Li (\w+)$", listed, re.MULTILINE)) == service.FIELDS


@each_page
def test_no_heading_is_taken_for_a_macro(page):
    """mdoc(7) makes an include file of the heading `.Ss In the foreground`, without a word; `\\&In` is the mend."""
    headings = re.findall(r"^\.S[hs] (.+)$", page.read_text(), re.MULTILINE)
    assert [heading for heading in headings if MACROS & set(heading.split())] == []


def test_what_is_set_beside_openvpn_is_what_the_import_knows():
    """Each of its options in the table's first column is one that `import-openvpn` carries or has a reason for."""
    table = (ROOT / "docs" / "coming-from.md").read_text().partition("| OpenVPN |")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {span.split()[0] for cell in first for span in re.findall(r"`([^`]+)`", cell)}
    assert len(named) > 40 and named - OPENVPN - set(openvpn.IDENTITY) == set()


# The checks find what they are for


@pytest.mark.parametrize(
    "line",
    [
        "bulkvpnctl", "bulkvpnctl frobnicate", "bulkvpnctl status --frobnicate", "bulkvpnctl pki add laptop",
        "bulkvpnctl pki init --listen nowhere:0", "bulkvpnd --config FILE --frobnicate yes",
        "bulkvpnd --config FILE --mtu 9", "bulkvpnd --check", "./frobnicate", "frobnicate", "true && frobnicate",
        "sudo frobnicate",
    ],
)  # fmt: skip
def test_a_wrong_command_is_found(line):
    assert wrong_command(commands(line)[-1]) is not None


@pytest.mark.parametrize(
    "line",
    [
        "bulkvpnctl status server --json # a comment",
        "sudo bulkvpnctl pki add laptop --remote [2001:db8::1]:443 | ssh x",
        "bulkvpnd -c FILE --check && systemctl restart x", "./demo",
    ],
)  # fmt: skip
def test_a_right_command_is_not(line):
    assert wrong_command(commands(line)[0]) is None


@pytest.mark.parametrize("text", ["bulkvpnctl frobnicate", "bulkvpnctl status --frobnicate", "bulkvpnd --frobnicate"])
def test_a_wrong_mention_is_found(text):
    assert wrong_mention(text.split()) is not None


@pytest.mark.parametrize("text", ["frobnicate = yes", "mtu = 9", "mtu", "mtu = 1500\nmtu = 1400", "<ca>\n</ca>"])
def test_a_wrong_configuration_is_found(text):
    assert wrong_configuration(text) is not None


@pytest.mark.parametrize("text", ["see /srv/some/file", "(/opt/x/y)", "`../../elsewhere/x`", ".Pa /srv/some/file"])
def test_a_foreign_path_is_found(text):
    assert len(foreign_paths(text, ROOT / "docs")) == 1


@pytest.mark.parametrize(
    "text",
    ["/etc/bulkvpn/NAME.conf", "apt install ../bulkvpnd_*.deb", "[a](../README.md)", "https://example.org/a/b", "a/b/c",
     "10.86.0.0/24"],
)  # fmt: skip
def test_a_path_that_everybody_has_is_not_foreign(text):
    assert foreign_paths(text, ROOT / "docs") == []


def test_a_path_is_found_in_a_span_and_in_an_example():
    assert paths("`a/b.py`\n```sh\n./c  # d/e\nf g/h | i\n```\n`setup.cfg` and `word`") == [
        "./c", "g/h", "a/b.py", "setup.cfg"
    ]
