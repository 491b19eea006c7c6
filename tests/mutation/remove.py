#!/usr/bin/python3
"""Takes one check of removals.py out of a copy of the tree, and sees whether the tests that stand for it fail.

    tests/mutation/remove.py [NAME...] [--show]

NAME is a row, such as C11, or a removal of it, such as C11.2; all without it. Prints each test that does not fail as
it should, and exits 1 if there is one; with --show also what the others say when they fail.
"""

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE)]

from removals import REMOVALS  # noqa: E402

TIMEOUT = 300
"""Seconds for the tests of one removal, those with daemons in namespaces too (choice)."""
SHOWN_MAX = 160
"""Characters of what a test says (choice)."""
LEFT_OUT = shutil.ignore_patterns(".git", "__pycache__", ".hypothesis")


def named():
    """{name: Removal}: C11.1 is the first of the row C11."""
    found, counts = {}, {}
    for removal in REMOVALS:
        row = removal.rows.split()[0]
        counts[row] = counts.get(row, 0) + 1
        found[f"{row}.{counts[row]}"] = removal
    return found


def locate(test):
    """"file.py::test" as pytest finds it, from the root of the tree: no two files of tests have one name."""
    name, _, rest = test.partition("::")
    (file,) = ROOT.joinpath("tests").rglob(name)
    return f"{file.relative_to(ROOT)}::{rest}"


def without(cut, text):
    """`text` of a file without the check. Raises ValueError if that does not stand there exactly once."""
    count = text.count(cut.check)
    if count != 1:
        raise ValueError(f"{cut.file}: stands there {count} times: {cut.check}")
    return text.replace(cut.check, cut.instead)


class Tree:
    """A copy of the tree in `directory`, from which checks can be taken out."""

    def __init__(self, directory):
        self._root = pathlib.Path(directory) / "tree"
        shutil.copytree(ROOT, self._root, ignore=LEFT_OUT, symlinks=True)

    def run(self, tests, cuts=(), timeout=TIMEOUT):
        """Runs `tests` without the checks of `cuts`, which are then put back.

        Returns (status of pytest or None after `timeout` seconds, {test: (outcome, message) of each of its cases}).
        """
        originals = {cut.file: (self._root / cut.file).read_text("utf-8") for cut in cuts}
        texts = dict(originals)
        for cut in cuts:
            texts[cut.file] = without(cut, texts[cut.file])
        try:
            self._write(texts)
            return self._pytest(tests, timeout)
        finally:
            self._write(originals)

    def _write(self, texts):
        for file, text in texts.items():
            (self._root / file).write_text(text, "utf-8")

    def _pytest(self, tests, timeout):
        report = self._root.with_name("report.xml")
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not long", f"--junitxml={report}",
                   *map(locate, tests)]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        with subprocess.Popen(command, cwd=self._root, env=environment, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                # SIGINT first: fixtures take their namespaces away.
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                return None, {}
        cases = xml.etree.ElementTree.parse(report).iter("testcase") if report.exists() else ()
        return status, _by_test(tests, cases)


def _by_test(tests, cases):
    found = {test: [] for test in tests}
    for case in cases:
        for test in tests:
            file, _, rest = test.partition("::")
            name, where = case.get("name"), f".{case.get('classname')}"
            if where.endswith(f".{file.removesuffix('.py')}.{rest}") or (
                where.endswith(f".{file.removesuffix('.py')}") and rest in (name, name.partition("[")[0])
            ):
                (outcome,) = [(one.tag, one.get("message", "")) for one in case][:1] or [("passed", "")]
                found[test].append(outcome)
    return found


def complaints(status, outcomes):
    """What is wrong with how the tests of a removal ended, [text]: each has to fail, unless it cannot run here."""
    if status is None:
        return ["no end: a test hangs"]
    wrong = []
    for test, cases in outcomes.items():
        # What a fixture finds wrong at the end is found by the test; at the beginning there was no test.
        kinds = {"failure" if text.startswith("failed on teardown") else kind for kind, text in cases}
        if "failure" not in kinds and kinds != {"skipped"}:
            wrong.append(f"{test}: {'does not fail' if 'passed' in kinds else f'cannot be run: {cases[:1]}'}")
    if not wrong and status != (0 if skipped(outcomes) else 1):
        wrong.append(f"pytest ends with {status}")
    return wrong


def skipped(outcomes):
    """Why none of the tests can run here, text; None if one can."""
    kinds = {kind for cases in outcomes.values() for kind, _ in cases}
    return next(text for cases in outcomes.values() for _, text in cases) if kinds == {"skipped"} else None


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Takes one check at a time out and runs the tests that stand for it.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a row, or a removal of it")
    parser.add_argument("--show", action="store_true", help="what the tests say when they fail")
    chosen = parser.parse_args(arguments)
    is_good = True
    with tempfile.TemporaryDirectory() as directory:
        tree = Tree(directory)
        for name, removal in named().items():
            if chosen.names and not {name, name.partition(".")[0]} & set(chosen.names):
                continue
            begun = time.monotonic()
            status, outcomes = tree.run(removal.tests, removal.cuts)
            wrong = complaints(status, outcomes)
            said = "; ".join(wrong) or skipped(outcomes) or "noticed"
            print(f"{name}: {said}; {time.monotonic() - begun:.0f} s", flush=True)
            for test, cases in outcomes.items() if chosen.show else ():
                texts = [text for kind, text in cases if kind in ("failure", "error")]
                first = texts[0].partition("\n")[0][:SHOWN_MAX] if texts else ""
                print(f"    {test}: {len(texts)} of {len(cases)}: {first}")
            is_good = is_good and not wrong
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
