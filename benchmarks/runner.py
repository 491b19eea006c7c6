"""Goes through rounds, systems, links and tests, and collects every value.

Rounds are outermost and systems inside them: a machine that is slower for a minute is so for all systems alike.
A system that fails in a test is named in the report with the reason; the others go on.
"""

import dataclasses
import pathlib
import shutil
import sys
import tempfile

from benchmarks import network, tests
from benchmarks.trial import Trial, TrialError, Waiter
from bulkvpnd.admin import demo, namespaces

START_SECONDS = 4
"""Planned for hosts and systems to start and end, for the time that is left; one more for each further client."""


@dataclasses.dataclass
class Results:
    """values: {(system, row): [value of each round]}. failures: {(system, row or link): reason}."""

    values: dict = dataclasses.field(default_factory=dict)
    failures: dict = dataclasses.field(default_factory=dict)

    def add(self, system, rows):
        for row, value in rows.items():
            self.values.setdefault((system, row), []).append(value)


def plan(systems, rounds, seconds, chosen):
    """[(round, system, link, [test], planned seconds)] in the order they are done. chosen: names of rows, or None."""
    steps = []
    for number in range(1, rounds + 1):
        for system in systems:
            for link in network.LINKS:
                wanted = [test for test in tests.TESTS
                          if test.link == link and (chosen is None or chosen.intersection(test.rows))]
                several = link.startswith("star")
                if system.is_variant and chosen is None and (several or link == "besieged"):
                    continue
                if wanted and (system.several_clients or not several) and (system.port or link != "besieged"):
                    starting = START_SECONDS + (int(link.removeprefix("star")) if several else 0)
                    planned = starting + sum(test.factor * seconds + 1 for test in wanted)
                    steps.append((number, system, link, wanted, planned))
    return steps


def run(steps, results, seconds, chosen, signals, after_round, keep_logs=None):
    """Does the steps of plan() and adds what they give to `results`. Raises Interrupted.

    signals: trial.Signals. after_round: called after each round. keep_logs: a directory that gets the systems' logs
    of failures, or None.
    """
    with demo.Display(sum(planned for *_, planned in steps)) as display:
        for index, (number, system, link, wanted, planned) in enumerate(steps):
            display.begin(f"round {number}, {system.name}, {link}", planned)
            gained = _step(system, link, wanted, seconds, Waiter(signals, display.tick), results, keep_logs)
            shown = {row: value for row, value in gained.items() if chosen is None or row in chosen}
            results.add(system.name, shown)
            display.finish(", ".join(f"{row} {value:,.4g}" for row, value in shown.items()) or "failed")
            if index + 1 == len(steps) or steps[index + 1][0] != number:
                after_round()


def _step(system, link, wanted, seconds, wait, results, keep_logs):
    """One system on one link. Returns {row: value}."""
    gained = {}
    directory = pathlib.Path(tempfile.mkdtemp(prefix="bulkvpn-bench-"))
    failed = False
    try:
        with network.LINKS[link][0](wait) as made:
            trial = Trial(system, made, directory, wait, seconds)
            try:
                trial.start()
                for test in wanted:
                    try:
                        gained.update(test.run(trial))
                    except (TrialError, namespaces.CommandError, demo.DemoError) as error:
                        failed = True
                        _fail(results, system, test.rows[0], error)
            finally:
                trial.stop()
    except (TrialError, namespaces.CommandError, demo.DemoError) as error:
        failed = True
        _fail(results, system, link, error)
    finally:
        if failed and keep_logs:
            shutil.copytree(directory, keep_logs / f"{system.name.replace('/', '_')}-{link}", dirs_exist_ok=True,
                            ignore=lambda _, names: [name for name in names if not name.endswith(".log")
                                                     and not name.startswith("tool-")])
        shutil.rmtree(directory, ignore_errors=True)
    return gained


def _fail(results, system, what, error):
    # A name of this run's host or directory says nothing to a reader.
    results.failures[system.name, what] = str(error)
    print(f"{system.name}, {what}: {error}{getattr(error, 'details', '')}", file=sys.stderr)
