#!/usr/bin/python3
"""Mutation testing: changes the code in one place at a time and sees whether the tests notice.

    tests/mutation/run.py [MODULE...] [--jobs N] [--only REGEX] [--tests TEST...]

MODULE is a path below bulkvpnd/; all of MODULES without it. Prints each mutant that survives and is not justified in
survivors.md, and each that is justified there and does not survive; exits 1 if there is one. Of those that are noticed
it prints the ones that hang: on a machine that was too busy that says nothing of them, so look at these again.

Why not mutmut or cosmic-ray: Debian packages neither; the first does not touch tables and bounds outside functions,
where this code has most of its checks, and the second changes the files and starts an interpreter for every mutant.
Here a mutant is a fork of a process that has everything imported but the code under test, and no file changes.
"""

import argparse
import concurrent.futures
import importlib.abc
import importlib.machinery
import os
import pathlib
import re
import resource
import signal
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from mutants import mutants  # noqa: E402

MODULES = {
    # module below bulkvpnd/: (mutants whose name has this regular expression, tests that concern it, below tests/unit);
    # the tests that notice most come first
    "protocol/errors.py": ("", ["protocol/test_errors.py"]),
    "protocol/frame.py": ("", ["protocol/test_frame.py", "dataplane/connection"]),
    "protocol/keys.py": ("", ["protocol/test_keys.py", "protocol/test_handshake.py", "dataplane/connection"]),
    "protocol/aead.py": ("", ["protocol/test_aead.py"]),
    "protocol/handshake.py": ("", ["protocol/test_handshake.py"]),
    "protocol/packet.py": (
        "",
        ["protocol/test_division.py", "protocol/test_segmentation.py", "protocol/test_flows.py",
         "protocol/test_packet.py", "dataplane/connection", "dataplane/test_sendqueue.py"],
    ),
    "control/admission.py": ("", ["control/test_admission.py"]),
    "control/session.py": ("", ["control/test_session.py", "control/server"]),
    "control/pool.py": ("", ["control/test_pool.py"]),
    "control/listener.py": ("", ["control/test_listener.py"]),
    "control/policy.py": ("", ["control/test_policy.py"]),
    "control/tls.py": ("", ["control/test_tls.py", "control/test_revocation.py"]),
    "control/revocation.py": ("", ["control/test_revocation.py"]),
    "dataplane/routing.py": ("", ["dataplane/test_routing.py"]),
    "dataplane/sendqueue.py": ("", ["dataplane/test_sendqueue.py"]),
    # What a peer's certificate and a revocation list say; the rest makes them.
    "pki.py": (
        "^(identity|issuer_and_serial|read_crl|check_crl_dates|_crl_validity|_has_signed|_revocation_date)",
        ["test_pki_crl.py", "test_pki.py"],
    ),
}
SURVIVES, NOTICED, HANGS = "survives", "noticed", "hangs"
SURVIVORS = HERE / "survivors.md"
BASELINE_MAX = 1800
"""Seconds for the tests of one module without a mutant (choice)."""
TIMEOUT_FACTOR, TIMEOUT_MIN = 5, 60
"""A mutant that takes so many times the baseline, and so many seconds, hangs, and counts as noticed (choice: on a busy
machine the same tests may take three times as long)."""
MEMORY_MAX = 4 << 30
"""Bytes of address space for one mutant: some of them allocate without end (choice)."""


def justified():
    """{module: {name of a mutant: reason}} of survivors.md."""
    found, module = {}, None
    for line in SURVIVORS.read_text("utf-8").splitlines():
        if line.startswith("## "):
            module = line[3:].strip()
            found[module] = {}
        elif line.startswith("- `") and module:
            # Double backquotes would be Markdown's way with names that hold one; no name does.
            name, _, reason = line[3:].partition("`: ")
            found[module][name] = reason.strip()
    return found


def all_mutants(module, only=""):
    """Yields those of `module` whose name matches the regular expression `only`, and its own in MODULES."""
    path = ROOT / "bulkvpnd" / module
    found = mutants(path.read_text("utf-8"), str(path))
    return (one for one in found if re.search(only, one.name) and re.search(MODULES[module][0], one.name))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a code object."""

    def __init__(self, name, code):
        self._name, self._code = name, code

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, origin=self._code.co_filename) if name == self._name else None

    def exec_module(self, module):
        module.__file__ = self._code.co_filename
        exec(self._code, module.__dict__)


def _preload():
    """Everything that tests import and that is not under test, once for all forks."""
    # fmt: off
    import cryptography.hazmat.primitives.ciphers.aead
    import cryptography.hazmat.primitives.kdf.hkdf
    import cryptography.x509  # noqa: F401
    import gevent  # noqa: F401
    import hypothesis.stateful
    import pytest  # noqa: F401
    # fmt: on

    # The same examples each time, or the list of survivors would change from run to run; no shrinking, since nobody
    # reads the failure.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutation")


def _fate(module, tests, code, timeout):
    """SURVIVES, NOTICED where one of `tests` fails, or HANGS where all of them take longer than `timeout` seconds.

    In a fork, so that the code under test is imported anew.
    """
    process = os.fork()
    if process == 0:
        try:
            os.setpgid(0, 0)
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in range(3):
                os.dup2(null, descriptor)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX, MEMORY_MAX))
            import pytest

            sys.meta_path.insert(0, _Finder("bulkvpnd." + module.removesuffix(".py").replace("/", "."), code))
            for test in tests:
                if pytest.main(["-x", "-p", "no:cacheprovider", "-m", "not long", str(ROOT / "tests/unit" / test)]):
                    os._exit(1)
            os._exit(0)
        finally:
            os._exit(2)
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return NOTICED if status else SURVIVES
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return HANGS
        time.sleep(0.02)


def survivors(module, tests, only, report, jobs):
    """[Mutant] of `module` that none of `tests` notices; report(mutant, fate) for each when it is found, and for each
    that hangs.

    only: as of all_mutants. Raises SystemExit if the tests fail without a mutant.
    """
    path = ROOT / "bulkvpnd" / module
    begun = time.monotonic()
    if _fate(module, tests, compile(path.read_text("utf-8"), str(path), "exec"), BASELINE_MAX) != SURVIVES:
        raise SystemExit(f"{module}: its tests fail as it is")
    timeout = max(TIMEOUT_MIN, TIMEOUT_FACTOR * (time.monotonic() - begun))
    found = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:

        def check(mutant):
            fate = _fate(module, tests, mutant.code, timeout)
            if fate == SURVIVES:
                found.append(mutant)
            if fate != NOTICED:
                report(mutant, fate)

        for _ in pool.map(check, all_mutants(module, only)):
            pass
    return sorted(found, key=lambda mutant: mutant.line)


def _print(mutant, fate):
    print(f"{mutant.line}: {fate}: {mutant.name}", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Changes the code in one place at a time and runs its tests.")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"one of {', '.join(MODULES)}")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--only", default="", metavar="REGEX", help="mutants whose name has this")
    parser.add_argument("--tests", nargs="+", metavar="TEST", help="below tests/unit, in place of those of MODULES")
    chosen = parser.parse_args(arguments)
    # Tests are compiled once, and not into the tree.
    sys.dont_write_bytecode = False
    with tempfile.TemporaryDirectory() as cache:
        sys.pycache_prefix = cache
        _preload()
        is_good = True
        for module in chosen.modules or MODULES:
            known = {name for name in justified().get(module, {}) if re.search(chosen.only, name)}
            started = time.monotonic()
            tests = chosen.tests or MODULES[module][1]
            found = survivors(module, tests, chosen.only, _print, chosen.jobs)
            made = len(list(all_mutants(module, chosen.only)))
            names = {mutant.name for mutant in found}
            fresh, stale = names - known, known - names
            print(f"{module}: {len(found)} of {made} survive, {len(fresh)} unjustified, "
                  f"{len(stale)} justified that do not; {time.monotonic() - started:.0f} s", flush=True)
            for title, some in (("unjustified", fresh), ("justified and noticed", stale)):
                for name in sorted(some):
                    print(f"  {title}: {name}")
            is_good = is_good and not fresh and not stale
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
