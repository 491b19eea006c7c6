"""docs/security.md names a test for every promise and every class of failure, and each of them exists, and has a check
in tests/mutation/removals.py without which it fails; and what only the source can show: nothing is compressed, nothing
starts a shell, tokens are compared in constant time.
"""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "mutation"))
DOCUMENT = ROOT / "docs" / "security.md"
PACKAGE = ROOT / "bulkvpnd"

if not DOCUMENT.exists():
    pytest.skip("needs the source tree; the documents are not beside these tests", allow_module_level=True)

from remove import named as removals_by_name  # noqa: E402
from remove import without  # noqa: E402
from removals import REMOVALS, UNREMOVED  # noqa: E402


REASONS = ("No test: ", "Does not apply: ", "Not yet: ")
"""How a row begins that has no test."""


def defined():
    """Every "file::test" there is; classes count too, and so does what is assigned (a state machine's TestCase)."""
    found = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            names = [getattr(node, "name", None)] + [getattr(one, "id", None) for one in getattr(node, "targets", [])]
            found += [f"{file.name}::{name}" for name in names if name and re.match("[tT]est", name)]
    return found


def named(text):
    return re.findall(r"`([\w.]+::\w+)`", text)


def rows(heading):
    """The cells of each row of the table below a heading."""
    section = DOCUMENT.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def calls(node):
    return [ast.unparse(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)]


def sources():
    return [(file, ast.parse(file.read_text())) for file in sorted(PACKAGE.rglob("*.py"))]


def test_every_test_that_is_named_exists_once():
    known, text = defined(), DOCUMENT.read_text()
    assert len(named(text)) > 80
    assert [one for one in dict.fromkeys(named(text)) if known.count(one) != 1] == []


def test_every_promise_has_a_test():
    promised = re.findall(r"^(\d+)\. \*\*(.+?)\.\*\*", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert [cells[0] for cells in rows("Promises and their tests")] == [f"{number} {name}" for number, name in promised]
    assert all(named(cells[1]) for cells in rows("Promises and their tests"))


def test_every_class_of_failure_has_a_rule_and_a_test_or_a_reason():
    table = rows("Classes of failure")
    assert [cells[0] for cells in table] == [str(number) for number in range(1, 29)]
    for _, name, rule, tests in table:
        assert name and rule and (named(tests) or tests.startswith(REASONS)), name


@pytest.mark.parametrize("name", removals_by_name())
def test_what_a_removal_takes_out_stands_there_once_and_leaves_a_program(name):
    texts = {}
    for cut in removals_by_name()[name].cuts:
        text = texts.get(cut.file) or (ROOT / cut.file).read_text()
        texts[cut.file] = without(cut, text)
        assert texts[cut.file] != text
    for file, text in texts.items():
        if file.endswith(".py"):
            ast.parse(text, file)


def test_every_test_of_a_removal_exists_once():
    known = defined()
    tests = {test.partition("[")[0] for removal in REMOVALS for test in removal.tests}
    assert [test for test in sorted(tests) if known.count(test) != 1] == []


def test_every_test_of_every_row_fails_without_something():
    of_document = {f"{letter}{cells[0].partition(' ')[0]}": set(named(cells[-1])) for letter, heading in
                   (("P", "Promises and their tests"), ("C", "Classes of failure")) for cells in rows(heading)}
    failing = {row: set() for row in of_document}
    for removal in REMOVALS:
        for row in removal.rows.split():
            failing[row] |= {test.partition("[")[0] for test in removal.tests}
    assert {row: tests - failing[row] for row, tests in of_document.items() if tests - failing[row]} == {}
    assert {row for row, tests in failing.items() if not tests} == set(UNREMOVED) and all(UNREMOVED.values())


COMPRESSORS = {"bz2", "compression", "gzip", "lzma", "tarfile", "zipfile", "zlib", "zstd", "zstandard"}
COMPRESSING = {
    # file: what of a compressor it names. Neither of admin/ is in a daemon, by the arrows of test_imports.py.
    "protocol/packet.py": {"zlib.crc32"},  # a hash
    "admin/explain.py": {"gzip.open"},  # reads manual pages
    "admin/oneline.py": {"zlib.compress", "zlib.decompressobj", "zlib.error"},  # makes a configuration short
}


def compressing(tree):
    """What of a compressor a module names, {"zlib.crc32", ...}; "import ..." for one that comes under another name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in COMPRESSORS:
            found.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in COMPRESSORS:
            found.add(f"import {node.module}")
        elif isinstance(node, ast.Import):
            found |= {f"import {one.name}" for one in node.names
                      if one.name.partition(".")[0] in COMPRESSORS and (one.asname or "." in one.name)}
    return found


def test_nothing_is_compressed():
    found = {str(file.relative_to(PACKAGE)): compressing(tree) for file, tree in sources()}
    assert {file: names for file, names in found.items() if names} == COMPRESSING


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import zlib\nzlib.compress(b'')", "zlib.compress"),
        ("import zlib\nf = zlib.compress", "zlib.compress"),
        ("from zlib import compress", "import zlib"),
        ("import lzma as other", "import lzma"),
        ("import compression.zstd", "import compression.zstd"),
    ],
)
def test_a_compressor_is_found(source, name):
    assert compressing(ast.parse(source)) == {name}


def test_nothing_starts_a_shell():
    for file, tree in sources():
        assert not set(calls(tree)) & {"os.system", "os.popen", "subprocess.getoutput", "eval", "exec"}, file
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.keyword) and node.arg == "shell"), file


FETCHERS = {"ftplib", "http", "httpx", "requests", "urllib", "urllib3", "xmlrpc"}


def fetching(tree):
    """What a module imports of those that fetch."""
    found = [one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names]
    found += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name for name in found if name.partition(".")[0] in FETCHERS}


def test_nothing_fetches_an_address():
    """Such as one that a certificate names for its revocation list."""
    assert {file: names for file, tree in sources() if (names := fetching(tree))} == {}
    assert fetching(ast.parse("import urllib.request")) == {"urllib.request"}


def test_tokens_are_compared_in_constant_time():
    tree = ast.parse((PACKAGE / "control" / "session.py").read_text())
    join = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "join")
    assert "hmac.compare_digest" in calls(join)
    compared = [ast.unparse(node) for node in ast.walk(join) if isinstance(node, ast.Compare)]
    assert not [one for one in compared if re.search(r"\btoken\b", one)]


@pytest.mark.parametrize("source", ["os.system('x')", "eval('1')", "subprocess.getoutput('x')"])
def test_a_call_is_found(source):
    assert calls(ast.parse(f"def f():\n    {source}")) == [source.partition("(")[0]]
