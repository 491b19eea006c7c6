"""What lines of the log carry for journalctl(1): known fields, and ids that the catalog explains."""

import ast
import pathlib
import re
import shutil
import subprocess

import pytest

from bulkvpnd import events, service

ROOT = pathlib.Path(__file__).parents[2]
CATALOG = ROOT / "debian" / "catalog" / "bulkvpnd.catalog"
SOURCES = sorted((ROOT / "bulkvpnd").rglob("*.py"))
MARKS = {"MESSAGE_ID", "burst"}
"""What is no field of ours: journald's own, and a word to the handler."""


def logged():
    """What each call with `extra` carries: (place, keys that are written there, names of events in it)."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            for keyword in node.keywords if isinstance(node, ast.Call) else ():
                if keyword.arg == "extra":
                    inner = list(ast.walk(keyword.value))
                    keys = [key.value for one in inner if isinstance(one, ast.Dict) for key in one.keys if key]
                    names = [one.slice.value for one in inner if isinstance(one, ast.Subscript)
                             and ast.unparse(one.value) == "events.ID"]
                    yield f"{file.name}:{node.lineno}", keys, names


def test_fields_are_those_of_the_list():
    used = {key for _, keys, _ in logged() for key in keys} - MARKS
    assert used <= set(service.FIELDS), "add them to service.FIELDS and to bulkvpnd(8)"
    assert len(used) > 4


def test_few_places_say_much_at_once():
    """The output of the administrator's own programs, and one line for each setting of the kernel, at a start."""
    assert {place.partition(":")[0] for place, keys, _ in logged() if "burst" in keys} == {"hooks.py", "tuning.py"}


def test_every_event_is_logged_and_every_id_is_in_the_table():
    names = [name for _, _, found in logged() for name in found]
    assert set(names) == set(events.ID)
    for place, keys, found in logged():
        assert ("MESSAGE_ID" in keys) == bool(found), f"{place}: the id of an event comes from events.ID"


def test_ids_are_128_bits_and_each_its_own():
    ids = [event.id for event in events.EVENTS]
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
    assert len(set(ids)) == len(ids) == len(events.ID)


def test_texts_name_only_fields_that_there_are():
    for event in events.EVENTS:
        assert set(re.findall("@([A-Z_]+)@", event.subject + event.text)) <= set(service.FIELDS), event.name
        assert len(event.subject) < 79 and event.text.endswith((".", "@", "crl", ")")), event.name


def test_catalog_is_what_the_table_makes():
    assert CATALOG.read_text() == events.catalog(), "run: python3 -m bulkvpnd.events > debian/catalog/bulkvpnd.catalog"
    assert f"debian/catalog/{CATALOG.name} usr/lib/systemd/catalog/" in (ROOT / "debian/bulkvpnd.install").read_text()


def test_journalctl_understands_the_catalog(tmp_path):
    if not shutil.which("journalctl"):
        pytest.skip("needs journalctl")
    catalogs = tmp_path / "usr" / "lib" / "systemd" / "catalog"
    catalogs.mkdir(parents=True)
    shutil.copy(CATALOG, catalogs)
    command = ["journalctl", f"--root={tmp_path}"]
    result = subprocess.run([*command, "--update-catalog"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    listed = subprocess.run([*command, "--list-catalog"], capture_output=True, text=True).stdout
    assert {line.split()[0] for line in listed.splitlines() if line} == {event.id for event in events.EVENTS}
