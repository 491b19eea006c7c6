"""The corpus goes through every target; then, where atheris is installed, the fuzzer goes on from there."""

import hashlib
import os
import pathlib
import subprocess
import sys

import pytest
import targets

HERE = pathlib.Path(__file__).parent
PYTHON = os.environ.get("BULKVPND_FUZZ_PYTHON", "")
"""Of the virtual environment that tests/run makes."""
SECONDS, LONG_SECONDS = 1, 120
"""For each target, in every run and with --long (choice: all targets in half a minute, most of it their start)."""
NAMES = sorted(targets.TARGETS)


@pytest.fixture(scope="module", autouse=True)
def clean():
    yield
    targets.clean()


def corpus(name):
    return sorted((HERE / "corpus" / name).iterdir())


def fuzz(name, seconds, folder):
    """Runs the fuzzer. New inputs and findings stay in `folder`. Returns the CompletedProcess."""
    if not PYTHON:
        pytest.skip("atheris is not installed: tests/run could not make its virtual environment, and says why")
    found = folder / "found"
    found.mkdir()
    flags = [f"--target={name}", f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=1024"]
    known = [HERE / "corpus" / name] if name in NAMES else []
    # The fuzzer ends without Python's own end, so what a target wrote has to lie where pytest removes it.
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run([PYTHON, HERE / "fuzz.py", *flags, found, *known], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=seconds + 120)


def no_finding(name, seconds, folder):
    done = fuzz(name, seconds, folder)
    inputs = {path.name: path.read_bytes() for path in folder.glob("*-*") if path.is_file()}
    assert done.returncode == 0 and not inputs, f"{inputs}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert f"{len(corpus(name))} files found in" in done.stderr


def test_every_target_has_a_corpus_and_no_other_has():
    assert sorted(path.name for path in (HERE / "corpus").iterdir()) == NAMES
    assert all(corpus(name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_is_small_and_named_by_its_content(name):
    for path in corpus(name):
        assert path.stat().st_size <= 4096
        assert path.name == hashlib.sha1(path.read_bytes()).hexdigest()
    assert len(corpus(name)) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus(name):
    for path in corpus(name):
        targets.TARGETS[name](path.read_bytes())


def test_what_is_wrong_is_found(tmp_path):
    done = fuzz("planted", 30, tmp_path)
    assert done.returncode != 0 and "ValueError: found" in done.stdout + done.stderr
    assert [path.read_bytes()[:3] for path in tmp_path.glob("crash-*")] == [b"bug"]


@pytest.mark.parametrize("name", NAMES)
def test_fuzzed_for_a_moment(name, tmp_path):
    no_finding(name, SECONDS, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_fuzzed_for_long(name, tmp_path):
    no_finding(name, LONG_SECONDS, tmp_path)


def test_the_fuzzer_runs_under_the_python_of_the_tests():
    if not PYTHON:
        pytest.skip("atheris is not installed")
    version = subprocess.run([PYTHON, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
    assert version.stdout.strip() == str(sys.version_info[:2])
