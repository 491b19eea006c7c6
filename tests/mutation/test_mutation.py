"""The runner of mutants does what it says; with --long, no mutant survives without a reason."""

import os
import pathlib
import subprocess
import sys

import pytest
from mutants import mutants
from run import MODULES, ROOT, all_mutants, justified

RUN = pathlib.Path(__file__).with_name("run.py")

SOURCE = '''
"""Two words."""
LIMIT = 4
"""The limit."""


@decorated(1)
def checked(size: int = 0, *, name="word"):
    """A docstring."""
    log.warning("too long", size)
    if size < LIMIT and not name:
        raise ValueError("a text for people", name)
    return size
'''


def run(*arguments, timeout=60):
    done = subprocess.run([sys.executable, RUN, *arguments], capture_output=True, text=True, timeout=timeout,
                          preexec_fn=lambda: os.nice(10))
    return done.returncode, done.stdout + done.stderr


def test_a_mutant_for_each_slip():
    assert [mutant.name for mutant in mutants(SOURCE, "source.py")] == [
        "module: LIMIT = 4 -> LIMIT = 5",
        "checked: size: int=0, *, name='word' -> size: int=0, *, name='wordX'",
        "checked: size: int=0, *, name='word' -> size: int=1, *, name='word'",
        "checked: if size < LIMIT and (not name): ... -> if not (size < LIMIT and (not name)): ...",
        "checked: size < LIMIT and (not name) -> size < LIMIT or not name",
        "checked: size < LIMIT -> size <= LIMIT",
        "checked: not name -> name",
        "checked: raise ValueError('a text for people', name) -> pass",
        "checked: return size -> return None",
    ]


def test_each_mutant_is_another_program():
    source = (ROOT / "bulkvpnd/protocol/keys.py").read_text()
    made = list(mutants(source, "keys.py"))
    assert len({mutant.name for mutant in made}) == len(made) > 50
    original = compile(source, "keys.py", "exec")
    assert original == compile(source, "keys.py", "exec")
    assert all(mutant.code != original for mutant in made)


def test_what_is_justified_is_a_mutant_of_today_and_has_a_reason():
    assert set(justified()) <= set(MODULES)
    for module, names in justified().items():
        assert names and set(names) <= {mutant.name for mutant in all_mutants(module)}
        assert all(names.values())


def test_every_module_with_a_check_of_hostile_input_is_in_the_table():
    assert {f"protocol/{path.name}" for path in (ROOT / "bulkvpnd/protocol").glob("[a-z]*.py")} <= set(MODULES)
    for module, (_, tests) in MODULES.items():
        assert (ROOT / "bulkvpnd" / module).is_file()
        assert tests and all((ROOT / "tests/unit" / test).exists() for test in tests)


def test_a_mutant_that_survives_is_reported():
    """Only the wrong tests: they import the module and notice little of it."""
    status, output = run("protocol/errors.py", "--tests", "protocol/test_frame.py", timeout=300)
    assert status == 1 and "unjustified: Refused.__init__: super().__init__(message) -> pass" in output, output


@pytest.mark.long
@pytest.mark.parametrize("module", MODULES)
def test_no_mutant_survives_without_a_reason(module):
    status, output = run(module, "--jobs", "2", timeout=7200)
    assert status == 0, output
