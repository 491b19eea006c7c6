"""The ledger of sysctls, on a tree in a temporary directory; other instances are real processes."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkvpnd.host import sysctl
from bulkvpnd.host.sysctl import BY_HAND, Ledger, Taken

ROOT = pathlib.Path(__file__).parents[3]
FOUND = {
    "net/core/rmem_max": "212992",
    "net/ipv4/tcp_rmem": "4096\t131072\t6291456",
    "net/ipv4/ip_forward": "0",
    "net/ipv4/conf/all/forwarding": "0",
    "net/ipv4/conf/veth0/forwarding": "1",
    "net/ipv4/conf/all/accept_redirects": "0",
    "kernel/core_pattern": "core",
}
OTHER = """
import pathlib, sys
from bulkvpnd.host.sysctl import Ledger
ledger = Ledger(pathlib.Path(sys.argv[1]), sys.argv[2], root=pathlib.Path(sys.argv[3]))
print(ledger.want(sys.argv[4], sys.argv[5], agreement="larger"), flush=True)
sys.stdin.read()
ledger.restore()
print("restored", flush=True)
"""


@pytest.fixture
def shared(tmp_path):
    directory = tmp_path / "shared"
    directory.mkdir()
    return directory


@pytest.fixture
def ledger_of(tree, shared):
    """Makes the ledger of an instance; those that were not restored are left as a crash leaves them."""
    made = []

    def make(instance="server", **options):
        made.append(Ledger(shared, instance, root=tree, **options))
        return made[-1]

    yield make
    for one in made:
        one.restore()


@pytest.fixture
def start_other(tree, shared):
    """Starts an instance as a process of its own, which holds what it wants until its input ends."""
    processes = []

    def start(instance, key, value):
        process = subprocess.Popen([sys.executable, "-c", OTHER, str(shared), instance, str(tree), key, value],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)})
        processes.append(process)
        assert value in process.stdout.readline()
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def read(tree, key):
    return (tree / key.replace(".", "/")).read_text().rstrip("\n")


def test_a_value_is_set_and_given_back(tree, shared, ledger_of):
    ledger = ledger_of()
    outcome = ledger.want("net.core.rmem_max", "16777216", agreement="larger")
    assert (outcome.found, outcome.wanted, outcome.set, outcome.why_not) == ("212992", "16777216", "16777216", None)
    assert read(tree, "net.core.rmem_max") == "16777216"
    assert ledger.restore() == ["net.core.rmem_max"]
    assert read(tree, "net.core.rmem_max") == FOUND["net/core/rmem_max"]
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "wanted", "agreement", "value"),
    [
        ("net.core.rmem_max", "212992", "exact", "212992"),
        ("net.core.rmem_max", "4096", "larger", "212992"),
        ("net.core.rmem_max", "4096", "exact", "4096"),
        ("net.ipv4.tcp_rmem", "16777216", "larger", "4096 131072 16777216"),
        ("net.ipv4.tcp_rmem", "1", "larger", "4096 131072 6291456"),
        ("net.core.rmem_max", "4096", "smaller", "4096"),
        ("net.core.rmem_max", "300000", "smaller", "212992"),
    ],
)
def test_what_is_agreed(tree, ledger_of, key, wanted, agreement, value):
    outcome = ledger_of().want(key, wanted, agreement)
    assert outcome.set == value and outcome.why_not is None
    assert read(tree, key).split() == value.split()


def test_what_is_right_already_is_not_written(tree, ledger_of):
    path = tree / "net/core/rmem_max"
    path.chmod(0o444)
    before = path.stat().st_mtime_ns
    assert ledger_of().want("net.core.rmem_max", "4096", agreement="larger").why_not is None
    assert path.stat().st_mtime_ns == before


def test_the_old_value_is_on_disk_first(tree, shared):
    class Watching(Ledger):
        def _write(self, key, value):
            (file,) = shared.glob("sysctl-*.json")
            saved.append(json.loads(file.read_text())[key]["found"])
            super()._write(key, value)

    saved = []
    ledger = Watching(shared, "server", root=tree)
    ledger.want("net.core.rmem_max", "1000000")
    assert saved == ["212992"]
    ledger.restore()


@pytest.mark.parametrize("key", ["net.core.missing", "net.nothing.here"])
def test_a_missing_key_is_one_line(shared, ledger_of, key):
    outcome = ledger_of().want(key, "1")
    assert str(outcome) == f"{key}: not 1: No such file or directory"
    assert outcome.found is None
    assert list(shared.glob("*.json")) == []


def test_a_read_only_key_is_one_line_and_nothing_is_remembered(tree, shared, ledger_of):
    class ReadOnly(Ledger):
        def _write(self, key, value):
            # Root may write to any file of a real directory.
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    ledger = ReadOnly(shared, "server", root=tree)
    outcome = ledger.want("net.core.rmem_max", "16777216")
    assert str(outcome) == "net.core.rmem_max: is 212992, not 16777216: Permission denied"
    assert outcome.set == outcome.found == "212992"
    assert list(shared.glob("*.json")) == []
    ledger.restore()


@pytest.mark.parametrize(
    "key", ["kernel.core_pattern", "net/../kernel/core_pattern", "net/..", "net..core", "/net/core/rmem_max", "net"]
)
def test_nothing_but_net_is_touched(tree, ledger_of, key):
    assert "not a key of net.*" in ledger_of().want(key, "x").why_not
    assert read(tree, "kernel.core_pattern") == "core"


def test_a_key_with_a_dot_in_a_name(tree, ledger_of):
    path = tree / "net/ipv4/conf/eth0.5/rp_filter"
    path.parent.mkdir()
    path.write_text("1\n")
    assert ledger_of().want("net/ipv4/conf/eth0.5/rp_filter", "2").set == "2"
    assert path.read_text() == "2\n"


def test_the_last_one_out_restores(tree, ledger_of, start_other):
    key = "net.core.rmem_max"
    other = start_other("client", key, "1000000")
    ledger = ledger_of()
    outcome = ledger.want(key, "2000000", agreement="larger")
    assert (outcome.found, outcome.set) == ("212992", "2000000")
    ledger.restore()
    assert read(tree, key) == "1000000"
    other.communicate("")
    assert read(tree, key) == "212992"


def test_whoever_began_it_may_leave_first(tree, ledger_of, start_other):
    key = "net.core.rmem_max"
    other = start_other("client", key, "1000000")
    ledger = ledger_of()
    assert ledger.want(key, "1000000", agreement="larger").found == "212992"
    other.communicate("")
    assert read(tree, key) == "1000000"
    ledger.restore()
    assert read(tree, key) == "212992"


def test_recover_gives_back_what_a_crashed_instance_set(tree, shared, ledger_of, start_other):
    key = "net.core.rmem_max"
    other = start_other("client", key, "1000000")
    ledger = ledger_of()
    assert ledger.recover() == []
    assert read(tree, key) == "1000000"
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert read(tree, key) == "1000000"
    assert ledger.recover() == [key]
    assert read(tree, key) == "212992"
    assert list(shared.iterdir()) == []
    assert ledger.recover() == []


def test_a_crashed_instance_of_the_same_name_does_not_hide_what_was_found(tree, ledger_of, start_other):
    key = "net.core.rmem_max"
    other = start_other("server", key, "1000000")
    other.kill()
    other.wait()
    ledger = ledger_of("server")
    # Even without recover().
    assert ledger.want(key, "1000000", agreement="larger").found == "212992"
    ledger.restore()
    assert read(tree, key) == "212992"


def test_whoever_gets_the_name_gives_back_what_was_wanted_in_it(tree, ledger_of, start_other):
    key = "net.core.rmem_max"
    other = start_other("server", key, "1000000")
    other.kill()
    other.wait()
    with ledger_of("server") as ledger:
        assert ledger.recover() == [key]
        assert read(tree, key) == "212992"


def test_a_crash_beside_a_live_instance_leaves_it_what_it_wants(tree, ledger_of, start_other):
    key = "net.core.rmem_max"
    other = start_other("client", key, "3000000")
    ledger = ledger_of()
    ledger.want(key, "1000000", agreement="larger")
    other.kill()
    other.wait()
    ledger_of("third").recover()
    assert read(tree, key) == "1000000"
    ledger.restore()
    assert read(tree, key) == "212992"


def test_what_a_crash_left_half_written_goes(shared, ledger_of):
    ledger = ledger_of()
    ledger.want("net.core.rmem_max", "1000000")
    (file,) = shared.glob("sysctl-*.json")
    file.with_suffix(".new").write_text("{")
    ledger.restore()
    assert list(shared.iterdir()) == []


def test_two_instances_of_one_name(tree, ledger_of, start_other):
    key = "net.core.rmem_max"
    other = start_other("server", key, "1000000")
    second = ledger_of("server")
    with pytest.raises(Taken, match=f"^instance server runs already, as process {other.pid}; stop that, or give "):
        second.__enter__()
    assert second.restore() == second.recover() == []
    assert second.want(key, "2000000").why_not.startswith("instance server runs already")
    assert second.restore() == []
    assert read(tree, key) == "1000000"
    other.communicate("")
    assert read(tree, key) == "212992"
    with second:
        assert second.want(key, "2000000").why_not is None
    assert read(tree, key) == "212992"


def test_the_name_is_taken_without_a_wish(shared, ledger_of):
    with ledger_of("server"):
        with pytest.raises(Taken, match=f"as process {os.getpid()};"):
            ledger_of("server").__enter__()
        with ledger_of("office"):
            pass
    with ledger_of("server"):
        pass
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("names", [("a b", "a_b"), ("a" * 65, "a" * 66)])
def test_names_that_look_alike_are_two(ledger_of, names):
    first, second = names
    with ledger_of(first), ledger_of(second):
        pass


def test_without_a_directory_the_name_is_anybody_s(tree, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with Ledger(tmp_path / "file", "server", root=tree):
        pass
    (line,) = caplog.messages
    assert line.startswith("another process with the name of this instance would not be noticed: ")


def test_one_wish_is_given_up_and_the_others_stay(tree, ledger_of, start_other):
    start_other("client", "net.core.rmem_max", "1000000")
    ledger = ledger_of()
    ledger.want("net.core.rmem_max", "2000000")
    ledger.want("net.ipv4.ip_forward", "1")
    assert ledger.give_up(["net.ipv4.conf.all.forwarding"]) == []
    assert ledger.give_up(["net.ipv4.ip_forward"]) == ["net.ipv4.ip_forward"]
    assert (read(tree, "net.ipv4.ip_forward"), read(tree, "net.core.rmem_max")) == ("0", "2000000")
    assert ledger.restore() == ["net.core.rmem_max"]
    assert read(tree, "net.core.rmem_max") == "1000000"


def test_what_somebody_else_set_meanwhile_stays(tree, ledger_of):
    path = tree / "net/core/rmem_max"
    ledger = ledger_of()
    ledger.want("net.core.rmem_max", "1000000")
    path.write_text("5555\n")
    assert ledger.restore() == []
    assert path.read_text() == "5555\n"


def test_what_somebody_else_set_meanwhile_is_found_by_the_next(tree, ledger_of, start_other):
    key, path = "net.core.rmem_max", tree / "net/core/rmem_max"
    other = start_other("client", key, "1000000")
    path.write_text("2000000\n")
    ledger = ledger_of()
    outcome = ledger.want(key, "3000000", agreement="larger")
    assert (outcome.found, outcome.set) == ("2000000", "3000000")
    other.communicate("")
    ledger.restore()
    assert path.read_text() == "2000000\n"


def test_by_hand_needs_no_process(tree, ledger_of):
    key = "net.core.rmem_max"
    ledger_of(by_hand=True).want(key, "1000000")
    assert ledger_of("server").recover() == []
    assert read(tree, key) == "1000000"
    assert list(ledger_of("server").entries()[key]["wants"]) == [BY_HAND]
    ledger_of("server").restore()
    assert read(tree, key) == "1000000"
    ledger_of(by_hand=True).restore()
    assert read(tree, key) == "212992"


def test_what_the_kernel_changes_with_forwarding_is_put_back(tree, ledger_of):
    paths = [tree / f"net/ipv4/conf/{name}" for name in ("all/forwarding", "veth0/forwarding", "all/accept_redirects")]
    ledger = ledger_of()
    ledger.want("net.ipv4.ip_forward", "1")
    for path in paths:
        path.write_text("9\n")  # in the kernel's place
    ledger.restore()
    assert [path.read_text() for path in paths] == ["0\n", "1\n", "0\n"]


def test_a_directory_that_cannot_be_used_changes_nothing(tree, tmp_path):
    (tmp_path / "file").write_text("")
    ledger = Ledger(tmp_path / "file", "server", root=tree)
    assert ledger.want("net.core.rmem_max", "1000000").why_not
    assert ledger.recover() == ledger.restore() == []
    assert read(tree, "net.core.rmem_max") == "212992"


def test_a_ledger_that_is_kept_locked_changes_nothing(tree, shared, ledger_of, monkeypatch):
    import fcntl

    monkeypatch.setattr(sysctl, "LOCK_TIME", 0.05)
    descriptor = os.open(shared, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    outcome = ledger_of().want("net.core.rmem_max", "1000000")
    assert "locked" in outcome.why_not and read(tree, "net.core.rmem_max") == "212992"
    os.close(descriptor)
    assert ledger_of().want("net.core.rmem_max", "1000000").why_not is None


def state_file(shared, ledger):
    """Where the ledger keeps what it knows."""
    ledger.want("net.core.rmem_max", "1000000")
    (file,) = shared.glob("sysctl-*.json")
    ledger.restore()
    return file


ENTRY = {"found": "1", "set": "core", "wants": {"gone": ["core", "exact"]}, "beside": {}}


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "[]", "3", "[" * 100000, '{"net.core.rmem_max": 3}', '{"net.core.rmem_max": {}}',
        json.dumps({"kernel.core_pattern": ENTRY}), json.dumps({"net/../kernel/core_pattern": ENTRY}),
        json.dumps({"net.core.rmem_max": {**ENTRY, "beside": {"kernel.core_pattern": "x"}}}),
        json.dumps({"net.core.rmem_max": {**ENTRY, "wants": {"gone": "x"}}}),
        json.dumps({"net.core.rmem_max": {**ENTRY, "wants": {"gone": ["x", "frobnicate"]}}}),
        json.dumps({"net/core/..": ENTRY}), json.dumps({"mtu ../x": ENTRY}), json.dumps({"colour eth0": ENTRY}),
        # What no file can be called, and nothing that the kernel takes or gives.
        json.dumps({"net/\ud800": ENTRY}), json.dumps({"mtu \udc80": ENTRY}), json.dumps({"mtu \xe9": ENTRY}),
        json.dumps({"net.core.rmem_max": {**ENTRY, "wants": {"\ud800": ["1", "exact"]}}}),
        json.dumps({"net.core.rmem_max": {**ENTRY, "wants": {"gone": ["\ud800", "exact"]}}}),
        json.dumps({"net.core.rmem_max": {**ENTRY, "found": "\ud800"}}),
        json.dumps({"net.core.rmem_max": {**ENTRY, "set": "\xe9"}}),
        json.dumps({"net.core.rmem_max": {**ENTRY, "beside": {"net/\ud800": "1"}}}),
        json.dumps({"net.core.rmem_max": {**ENTRY, "beside": {"net.core.wmem_max": "\ud800"}}}),
    ],
)  # fmt: skip
def test_a_file_that_this_program_did_not_write(tree, shared, ledger_of, text):
    ledger = ledger_of()
    file = state_file(shared, ledger)
    file.write_text(text)
    before = {key: read(tree, key) for key in FOUND}
    assert ledger.recover() == []
    assert str(file) in ledger.want("net.core.rmem_max", "1000000").why_not
    assert {key: read(tree, key) for key in FOUND} == before
    file.unlink()


def test_a_damaged_file_is_one_line_each_time(tree, shared, ledger_of, caplog):
    ledger = ledger_of()
    with ledger:
        ledger.want("net.core.rmem_max", "1000000")
        (file,) = shared.glob("sysctl-*.json")
        file.write_text("[")
        assert ledger.want("net.core.rmem_max", "1000000").why_not is None, "it is right already"
        assert ledger.want("net.core.rmem_max", "4096", "larger").why_not is None
        outcome = ledger.want("net.core.rmem_max", "2000000")
        assert str(outcome) == (f"net.core.rmem_max: is 1000000, not 2000000: {file}: not what this program writes; "
                                "remove the file")
        assert caplog.messages == []
    assert caplog.messages == ["not given back, since it is not known what was found: net.core.rmem_max = 1000000: "
                               f"{file}: not what this program writes; remove the file"]
    caplog.clear()
    assert ledger_of().recover() == []
    assert caplog.messages == ["what crashed instances have set of the kernel's settings is not given back: "
                               f"{file}: not what this program writes; remove the file"]
    file.unlink()
    (tree / "net/core/rmem_max").write_text("212992\n")


def test_a_link_in_the_place_of_the_file_is_not_followed(tree, shared, ledger_of, tmp_path):
    ledger = ledger_of()
    file = state_file(shared, ledger)
    target = tmp_path / "target"
    target.write_text("{}")
    file.symlink_to(target)
    assert ledger.want("net.core.rmem_max", "1000000").why_not
    assert target.read_text() == "{}"


def test_shared_directory_falls_back_beside_the_runtime_directory(tmp_path, monkeypatch):
    preferred, runtime = tmp_path / "run/bulkvpn", tmp_path / "run/bulkvpnd/server"
    monkeypatch.setattr(sysctl, "SHARED_DIRECTORY", preferred)
    assert sysctl.shared_directory(runtime) == tmp_path / "run/bulkvpnd/.shared"
    preferred.mkdir(parents=True)
    assert sysctl.shared_directory(runtime) == preferred


@given(st.sampled_from(sorted(sysctl.AGREEMENTS)), st.text(), st.text())
def test_any_text_can_be_agreed_on(agreement, found, wanted):
    assert isinstance(sysctl.AGREEMENTS[agreement](found, wanted), str)


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=4), st.integers(0, 1 << 40))
def test_an_agreement_touches_only_the_last_number(numbers, wanted):
    for agreement, choose in (("larger", max), ("smaller", min)):
        result = sysctl.AGREEMENTS[agreement](" ".join(map(str, numbers)), str(wanted))
        assert [int(one) for one in result.split()] == [*numbers[:-1], choose(numbers[-1], wanted)]


def test_no_descriptor_is_left(ledger_of):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        ledger = ledger_of()
        ledger.want("net.core.rmem_max", "1000000")
        ledger.restore()
    assert len(os.listdir("/proc/self/fd")) <= before
