"""One Debian release after the other, and for each the package that this checkout builds there."""

import hashlib
import os
import pathlib
import shutil
import subprocess

import pytest

import machines
from pair import booted

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = {"mmdebstrap": "mmdebstrap", "systemd-nspawn": "systemd-container", "git": "git"}
"""Command: Debian package."""
FORMER = "48748689a030dc22bfee8bda919eb4ebdff08403"
"""The commit from which machines are upgraded: until there is a release, the last of the first day (choice)."""
BUILD_TIMEOUT = 1800
"""Seconds; the package's unit tests can be part of a build (choice)."""
UNCHECKED = ("DEB_BUILD_OPTIONS=nocheck",)
"""Environment of a build without them."""


@pytest.fixture(scope="session", params=machines.RELEASES)
def image(request):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not pathlib.Path("/dev/net/tun").exists():
        pytest.skip("needs /dev/net/tun")
    for tool, package in TOOLS.items():
        if not shutil.which(tool):
            pytest.skip(f"needs {tool} of the package {package}")
    with machines.Image(request.param) as made:
        yield made


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
    """file: a .deb. digests: SHA-256 of each build of the same source. lintian: its report, as lines."""

    def __init__(self, file, digests=(), lintian=()):
        self.file = file
        self.digests = digests
        self.lintian = lintian

    def copy_into(self, root, *others):
        """Lets a root have it in /root, and what it and others depend on, so that apt can do without a network."""
        root.copy_in(self.file, f"/root/{self.file.name}")
        root.install(f"/root/{self.file.name}", *others, download_only=True)

    def install(self, machine, *others):
        machine.run("apt-get", "install", "-y", "--no-install-recommends", f"/root/{self.file.name}", *others)


# What may differ between the machines of two developers, and must not be seen in the package.
SURROUNDINGS = (
    ("/build/one", "022", ("LC_ALL=C.UTF-8", "TZ=UTC", *UNCHECKED)),
    ("/build/elsewhere/two", "002", ("LC_ALL=C", "TZ=Asia/Kathmandu", *UNCHECKED)),
)
BUILD = 'umask "$1" && cd "$2" && exec dpkg-buildpackage -us -uc -b'


class Builder:
    """root: a machines.Root that has what a build needs."""

    def __init__(self, root):
        self.root = root

    def build(self, source, directory, umask="022", environment=()):
        """Builds a source tree in a directory of the root. Returns the .deb."""
        self.root.copy_in(source, f"{directory}/bulkvpnd")
        self.root.run("sh", "-c", BUILD, "sh", umask, f"{directory}/bulkvpnd", environment=environment,
                      timeout=BUILD_TIMEOUT)
        [built] = (self.root.path / directory.lstrip("/")).glob("*.deb")
        return built

    def digest(self, file):
        return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def builder(image, clone, tmp_path_factory):
    with machines.Root(image, tmp_path_factory.mktemp(f"{image.release}-builder") / "root") as root:
        root.copy_in(clone, "/build/dependencies")
        root.install("build-essential", "lintian")
        root.run("apt-get", "build-dep", "-y", "--no-install-recommends", "/build/dependencies")
        yield Builder(root)


@pytest.fixture(scope="session")
def package(builder, clone):
    """This checkout's."""
    files = [builder.build(clone, *surroundings) for surroundings in SURROUNDINGS]
    [changes] = files[0].parent.glob("*.changes")
    lintian = builder.root.run("lintian", "--allow-root", "--pedantic", "--tag-display-limit=0",
                               f"{SURROUNDINGS[0][0]}/{changes.name}", check=False).stdout.splitlines()
    return Package(files[0], [builder.digest(file) for file in files], lintian)


@pytest.fixture(scope="session")
def former(builder, clone, tmp_path_factory):
    """The package of an earlier commit, with a lower version."""
    source = tmp_path_factory.mktemp("former") / "bulkvpnd"
    subprocess.run(["git", "clone", "--quiet", clone, source], check=True)
    if subprocess.run(["git", "-C", source, "checkout", "--quiet", FORMER], check=False).returncode:
        pytest.skip(f"needs the history of this checkout, back to {FORMER}")
    changelog = source / "debian" / "changelog"
    changelog.write_text(changelog.read_text().replace(")", "~former)", 1))
    return Package(builder.build(source, "/build/former", environment=UNCHECKED))


@pytest.fixture(scope="session")
def pair(image, package, tmp_path_factory):
    """Two machines with a tunnel that every test leaves as it found it."""
    with booted(image, tmp_path_factory.mktemp(f"{image.release}-machines") / "pair", package) as made:
        made.make_tunnel()
        yield made
