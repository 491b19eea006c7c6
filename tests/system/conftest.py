"""One Debian release after the other, and for each the package that this checkout builds there."""

import hashlib
import os
import pathlib
import shutil
import subprocess

import pytest

import machines

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = {"mmdebstrap": "mmdebstrap", "systemd-nspawn": "systemd-container", "git": "git"}
"""Command: Debian package."""


@pytest.fixture(scope="session", params=machines.RELEASES)
def image(request):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not pathlib.Path("/dev/net/tun").exists():
        pytest.skip("needs /dev/net/tun")
    for tool, package in TOOLS.items():
        if not shutil.which(tool):
            pytest.skip(f"needs {tool} of the package {package}")
    return machines.Image(request.param)


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """What is committed, as a user gets it."""
    directory = tmp_path_factory.mktemp("clone") / "bulkvpnd"
    subprocess.run(["git", "clone", "--quiet", f"file://{ROOT}", directory], check=True)
    return directory


@pytest.fixture
def root(image, tmp_path):
    """A fresh Debian without this project."""
    with machines.Root(image, tmp_path / "root") as made:
        yield made


class Package:
    """What two builds of the same source made.

    file: the .deb of the first. digests: SHA-256 of both. lintian: its report, as lines.
    """

    def __init__(self, file, digests, lintian):
        self.file = file
        self.digests = digests
        self.lintian = lintian


# What may differ between the machines of two developers, and must not be seen in the package.
SURROUNDINGS = (
    ("/build/one", "022", ("LC_ALL=C.UTF-8", "TZ=UTC")),
    ("/build/elsewhere/two", "002", ("LC_ALL=C", "TZ=Asia/Kathmandu", "DEB_BUILD_OPTIONS=nocheck")),
)
BUILD = 'umask "$1" && cd "$2" && exec dpkg-buildpackage -us -uc -b'


@pytest.fixture(scope="session")
def package(image, clone, tmp_path_factory):
    directory = tmp_path_factory.mktemp(image.release)
    files = []
    with machines.Root(image, directory / "root") as root:
        for path, *_ in SURROUNDINGS:
            root.copy_in(clone, f"{path}/bulkvpnd")
        root.install("build-essential", "lintian")
        root.run("apt-get", "build-dep", "-y", "--no-install-recommends", f"{SURROUNDINGS[0][0]}/bulkvpnd")
        for path, umask, environment in SURROUNDINGS:
            root.run("sh", "-c", BUILD, "sh", umask, f"{path}/bulkvpnd", environment=environment)
            [built] = (root.path / path.lstrip("/")).glob("*.deb")
            files.append(directory / f"{len(files)}" / built.name)
            files[-1].parent.mkdir()
            shutil.copy(built, files[-1])
        changes = next((root.path / SURROUNDINGS[0][0].lstrip("/")).glob("*.changes"))
        lintian = root.run("lintian", "--allow-root", "--pedantic", "--tag-display-limit=0",
                           f"{SURROUNDINGS[0][0]}/{changes.name}", check=False).stdout.splitlines()
    return Package(files[0], [hashlib.sha256(file.read_bytes()).hexdigest() for file in files], lintian)
