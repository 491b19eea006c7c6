"""The daemon as the unit runs it: as a user of its own, with one capability that is ambient."""

import os
import pathlib
import shutil
import tempfile

from harness import ROOT, two_hosts, wait_until
from test_global_sysctls import USER, WITH_CAPABILITY

CAP_NET_ADMIN = f"{1 << 12:016x}"
"""linux/capability.h, as /proc/PID/status has it."""


def status_of(pid):
    with open(f"/proc/{pid}/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


def test_a_worker_has_none_where_the_main_process_has_one_and_is_not_root():
    """As under the unit, where the capability is ambient: what a process starts has it too, unless it is taken away."""
    with tempfile.TemporaryDirectory(prefix="bulkvpn-test-") as name, two_hosts(pathlib.Path(name)) as network:
        # The user may not look into the checkout, but into this.
        shutil.copytree(ROOT / "bulkvpnd", network.directory / "bulkvpnd")
        for path in (network.directory, *network.directory.rglob("*")):
            os.chown(path, int(USER), int(USER))
        server = network.start_server(prefix=WITH_CAPABILITY, environment={"PYTHONPATH": name})
        wait_until(lambda: server.lines("ready: device"), 30, "it is ready")
        assert status_of(server.process.pid)["CapEff"] == status_of(server.process.pid)["CapAmb"] == CAP_NET_ADMIN
        workers = [worker["pid"] for worker in server.status()["workers"]]
        assert len(workers) >= 1
        for pid in workers:
            status = status_of(pid)
            assert [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapAmb")] == [0] * 3
            assert status["NoNewPrivs"] == "1"
        assert server.stop() == 0
