"""What a report says of the machine that it was made on."""

import datetime
import os
import pathlib
import platform
import re

from bulkvpnd.admin import namespaces

PACKAGES = ("iperf3", "iproute2", "iputils-ping", "nftables", "python3-matplotlib")


def release():
    """(name for a directory, name for a reader) of the running system, from os-release(5)."""
    facts = platform.freedesktop_os_release()
    return f"{facts['ID']}-{facts.get('VERSION_ID', 'unstable')}", facts["PRETTY_NAME"]


def cryptography_version(python):
    """The version of the `cryptography` that interpreter has, as a text."""
    return namespaces.execute([python, "-c", "import cryptography; print(cryptography.__version__)"]).stdout.strip()


def describe(python, rounds, seconds):
    """{what: text}."""
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    kernel = pathlib.Path("/proc/sys/net")
    return {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        "machine": f"{len(os.sched_getaffinity(0))} cores of {cpu[1] if cpu else platform.machine()}, "
                   f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "system": release()[1],
        "cryptography": cryptography_version(python),
        "tools": ", ".join(f"{name} {version}" for name in PACKAGES if (version := _package(name))),
        "TCP": "; ".join(f"{name.partition('/')[2]} {' '.join((kernel / name).read_text().split())}" for name in (
            "ipv4/tcp_congestion_control", "ipv4/tcp_rmem", "ipv4/tcp_wmem", "core/rmem_max", "core/wmem_max")),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "rounds": f"{rounds} of {seconds} s a test",
    }  # fmt: skip


def _package(name):
    return namespaces.execute(["dpkg-query", "-W", "-f", "${Version}", name], check=False).stdout
