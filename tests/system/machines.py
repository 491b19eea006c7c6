"""Fresh Debian roots and booted Debian machines, for the tests of the installed package.

    Image    what mmdebstrap makes of a release; kept for some days
      └─ Root       an overlay on it: commands run in it, with this machine's network
           ├─ Machine    the same root, booted by systemd-nspawn with a network of its own
           └─ a command with a kernel of its own, on a copy of the root, booted by QEMU

Every command runs in a mount and process namespace of its own that ends with it, so no mount outlives its process,
not even one that was killed. What remains is a directory and the machine's cgroup, which the context managers remove.
Needs root, mmdebstrap and systemd-nspawn. This machine needs no systemd as process 1.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import select
import shlex
import shutil
import subprocess
import time

from bulkvpnd.admin import namespaces

CACHE = pathlib.Path("/var/cache/bulkvpnd-tests")
"""Images and downloaded packages. May be removed at any time when no test runs."""
IMAGE_AGE = 7 * 24 * 3600
"""Seconds after which an image is made anew, so that it does not fall behind its release (choice)."""
PACKAGES = ("systemd", "systemd-sysv", "dbus", "kmod", "procps", "iproute2")
"""What a machine needs to boot and to be looked at. Everything else has to be asked for by the package."""
RELEASES = {"bookworm": "12", "trixie": "13"}
"""Code name: version of Debian."""
MIRRORS = {"Debian": "http://deb.debian.org/debian", "Debian-Security": "http://deb.debian.org/debian-security"}
"""Label of an archive: where it is, if apt of this machine knows no other place."""
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

IMAGE_TIMEOUT, COMMAND_TIMEOUT, BOOT_TIMEOUT, HALT_TIMEOUT = 300, 300, 60, 20
"""Seconds; choices."""
VIRTUAL_TIMEOUT = 1800
"""Seconds for a command with its boot where every instruction is emulated, some twenty times slower (choice)."""
ENVIRONMENT = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive")
"""All that a command gets: nothing of this machine's may decide how it runs."""

UP = ("running", "degraded")
"""Of `systemctl is-system-running`. Degraded: some unit of Debian's own may fail in a container."""
BOOTING = ("starting", *UP)
"""A client's machine is not up before its tunnel is, and that waits for the cable."""

NAMESPACES = ("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Everything inside ends with unshare, and that with the tests, even where these are killed."""

# $1 image, $2 the root's directory, $3 packages that were downloaded before
OVERLAY = """
image=$1 directory=$2 archives=$3
shift 3
mount -t overlay overlay -o "lowerdir=$image,upperdir=$directory/upper,workdir=$directory/work" "$directory/root"
mount --bind "$archives" "$directory/root/var/cache/apt/archives"
cd "$directory/root"
"""
CHROOT = OVERLAY + """
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
# What is started by chroot(8) may not make user namespaces.
pivot_root . mnt
umount --lazy /mnt
exec env -i "$@"
"""
# $1 the machine's name. Its cgroup is left by what is outside, so that inside it is the root of the hierarchy.
# Both cgroup versions may be mounted here; a machine takes the one that it finds. systemd-nspawn writes to /run.
BOOT = OVERLAY + """
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p "/sys/fs/cgroup/$1"
echo 0 >"/sys/fs/cgroup/$1/cgroup.procs"
mount -t tmpfs tmpfs /run
exec unshare --cgroup sh -euc '
    umount /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    exec systemd-nspawn --directory=. --machine="$1" --boot --register=no --keep-unit --private-network \
        --resolv-conf=off --timezone=off --bind=/dev/net/tun --console=pipe
' sh "$1"
"""
REMOVE_CGROUP = """
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
find "/sys/fs/cgroup/$1" -depth -type d -exec rmdir {} +
"""
# Emulated even where there is a /dev/kvm: that of a machine which is virtual itself may take a guest and not run it.
# What the command prints goes out by the second serial port; the first is the console. A panic ends it, too.
VIRTUAL = OVERLAY + """
umount var/cache/apt/archives
mke2fs -q -t ext4 -d . "$directory/disk" 4G
exec qemu-system-x86_64 -accel tcg -m 1G -nodefaults -display none -no-reboot \
    -kernel boot/vmlinuz-* -initrd boot/initrd.img-* \
    -drive "file=$directory/disk,format=raw,if=virtio,cache=unsafe" \
    -serial "file:$directory/console" -serial "file:$directory/report" \
    -append 'root=/dev/vda rw console=ttyS0 panic=-1 systemd.run="/bin/sh /root/command"'
"""
# Through a pipe, so that no program takes the port for somebody's terminal.
COMMAND = """{{
    {command}
    echo "status $?"
}} 2>&1 | cat >/dev/ttyS1
"""


class Image:
    """The root of a fresh Debian, as few packages as apt and a boot need, as a context manager for a run of the tests.

    release: a key of RELEASES.
    archives: the run's own directory of downloaded packages. apt locks it for as long as it works, and does not wait
    for another.
    """

    def __init__(self, release):
        self.release = release
        self.directory = CACHE / release
        self.downloaded = CACHE / f"{release}-archives"

    def __enter__(self):
        self.downloaded.mkdir(parents=True, exist_ok=True)
        self.lock = open(CACHE / f"{self.release}.lock", "w")
        try:
            # Whoever has it alone may change what is there; with this it waits until that is done.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._renew()
            fcntl.flock(self.lock, fcntl.LOCK_SH)
            self.archives = CACHE / namespaces.unique_name(f"{self.release}-run")
            self.archives.mkdir()
            _link_packages(self.downloaded, self.archives)
        except BaseException:
            self.lock.close()
            raise
        return self

    def __exit__(self, *exception):
        _link_packages(self.archives, self.downloaded)
        shutil.rmtree(self.archives)
        self.lock.close()

    def _renew(self):
        for left in CACHE.glob(f"{self.release}-run-*"):  # by a run that was killed
            shutil.rmtree(left)
        if not self.directory.exists() or time.time() - self.directory.stat().st_mtime > IMAGE_AGE:
            self._make()

    def _make(self):
        shutil.rmtree(self.directory, ignore_errors=True)
        made = self.directory.with_suffix(".new")
        shutil.rmtree(made, ignore_errors=True)
        options = CACHE / "apt.conf"
        options.write_text(_apt_options())
        namespaces.execute(["mmdebstrap", "--mode=root", "--variant=apt", f"--include={','.join(PACKAGES)}",
                            f"--aptopt={options}", self.release, str(made), *_sources(self.release)],
                           timeout=IMAGE_TIMEOUT)
        os.utime(made)
        made.rename(self.directory)  # so what has the name is complete


def _link_packages(source, target):
    for package in source.glob("*.deb"):
        with contextlib.suppress(FileExistsError):
            (target / package.name).hardlink_to(package)


def _sources(release):
    """Lines for sources.list(5), from the mirrors that this machine uses."""
    known = namespaces.execute(["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)",
                                "Created-By: Packages"]).stdout
    mirrors = {**MIRRORS, **dict(line.split() for line in known.splitlines() if line.split()[0] in MIRRORS)}
    return [f"deb [signed-by={KEYRING}] {mirrors[label]} {suite} main" for label, suite in (
        ("Debian", release), ("Debian", f"{release}-updates"), ("Debian-Security", f"{release}-security"))]


def _apt_options():
    """How this machine's apt reaches its mirrors and what it believes of their dates, for apt.conf(5)."""
    settings = namespaces.execute(["apt-config", "dump", "--format", '%f "%v";%n', "Acquire"]).stdout
    return "".join(line + "\n" for line in settings.splitlines() if re.match("Acquire::(https?::|Check-)", line))


class Root:
    """A fresh Debian, as a context manager. What is written stays in the directory and leaves the image as it was.

    directory: on a file system that can be the upper one of an overlay. What is below `path` shows up in the root
    with the next run().
    """

    def __init__(self, image, directory):
        self.image = image
        self.directory = directory

    def __enter__(self):
        for name in ("upper", "work", "root"):
            (self.directory / name).mkdir(parents=True)
        self.path = self.directory / "upper"
        # The image's are as old as the image.
        self.copy_in(pathlib.Path("/etc/resolv.conf"), "/etc/resolv.conf")
        self.copy_in(pathlib.Path("/etc/hosts"), "/etc/hosts")
        return self

    def __exit__(self, *exception):
        shutil.rmtree(self.directory)

    def arguments(self, script):
        """The start of an argument vector that runs one of the scripts above on this root."""
        return [*NAMESPACES, "sh", "-euc", script, "sh", str(self.image.directory), str(self.directory),
                str(self.image.archives)]

    def run(self, *argv, timeout=COMMAND_TIMEOUT, check=True, environment=()):
        """Runs a command in the root. Returns subprocess.CompletedProcess; raises AssertionError with its output.

        timeout: seconds. check: whether its status must be 0. environment: NAME=VALUE texts.
        """
        return _run([*self.arguments(CHROOT), *ENVIRONMENT, *environment, *argv], timeout, check)

    def copy_in(self, source, target):
        """Copies a file or directory of this machine into the root. Not while the root is in use."""
        target = self.path / target.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)

    def install(self, *packages, download_only=False):
        """apt-get install, with what Debian has today."""
        self.run("apt-get", "update")
        self.run("apt-get", "install", "-y", "--no-install-recommends",
                 *(["--download-only"] if download_only else []), *packages)

    def run_with_kernel(self, *argv, timeout=VIRTUAL_TIMEOUT):
        """Runs a command in a virtual machine without a network, under the kernel that is installed in the root.

        What it writes is lost. timeout: seconds, the boot included. Returns what it printed; raises AssertionError
        with that, or with what the console showed. Needs qemu-system-x86_64 and mke2fs.
        """
        command = shlex.join(["env", "-i", "--chdir=/root", *ENVIRONMENT, *argv])
        (self.path / "root" / "command").write_text(COMMAND.format(command=command))
        console, report = (self.directory / name for name in ("console", "report"))
        for file in (console, report):
            file.write_text("")
        done = _run(["timeout", str(timeout), *self.arguments(VIRTUAL)], timeout=None, check=False)
        printed = report.read_text(errors="replace")
        ended = re.fullmatch(r"(.*)status (\d+)\n", printed, re.DOTALL)
        if ended is None:
            shown = console.read_text(errors="replace")[-4000:]
            raise AssertionError(f"no end of: {shlex.join(argv)}\n{done.stdout}\n{shown}\n{printed[-4000:]}")
        if ended[2] != "0":
            raise AssertionError(f"status {ended[2]} of: {shlex.join(argv)}\n{ended[1][-8000:]}")
        return ended[1]

    def boot(self, role):
        """The root as a running Machine, once it is up; run() is not to be used until it is down again."""
        return Machine(self, role)


class Machine:
    """A booted Debian with a network of its own, as a context manager.

    role: the start of its host name, which is unique on this machine.
    """

    def __init__(self, root, role):
        self.name = namespaces.unique_name(role)
        self.root = root

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self.stop()

    def start(self, states=UP):
        """Boots it and waits until it is up. states: of `systemctl is-system-running`, that are enough."""
        (self.root.path / "etc" / "hostname").write_text(self.name + "\n")
        self.console = (self.root.directory / "console").open("w+")
        self.process = subprocess.Popen([*self.root.arguments(BOOT), self.name], stdin=subprocess.DEVNULL,
                                        stdout=self.console, stderr=self.console, start_new_session=True)
        try:
            wait_until(lambda: self._is_in(states), BOOT_TIMEOUT, f"{self.name} is up")
        except BaseException:
            self.stop()
            raise

    def stop(self):
        """Shuts it down in good order, or else by force. The files stay; what was done to its network is gone."""
        try:
            if self.process.poll() is None:
                with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                    self.run("systemctl", "poweroff", check=False)
                    self.process.wait(HALT_TIMEOUT)
        finally:
            self.process.kill()
            self.process.wait()
            self.console.close()
            namespaces.execute(["unshare", "--mount", "sh", "-euc", REMOVE_CGROUP, "sh", self.name], check=False)

    def reboot(self):
        """Shuts it down for a reboot, from inside, and starts it. What was done to its network is gone."""
        self.run("systemctl", "reboot", check=False)
        # With --keep-unit it is for whoever runs systemd-nspawn to run it again.
        self.process.wait(HALT_TIMEOUT)
        self.stop()
        self.start(BOOTING)

    def cut_power(self):
        """Ends all of it at once. What was written stays, as on a disk that has kept up; the network is gone."""
        init = os.pidfd_open(self.init)
        try:
            self.process.kill()
            # The last of it: until then the files are in use.
            wait_until(lambda: select.select([init], [], [], 0)[0], HALT_TIMEOUT, f"nothing of {self.name} runs")
        finally:
            os.close(init)
            self.process.wait()
            self.stop()

    @property
    def init(self):
        """The process id here of the machine's process 1, or None before it runs. The namespaces are found by it."""
        pid = self.process.pid
        # unshare starts systemd-nspawn, and that process 1
        for _ in range(2):
            with contextlib.suppress(OSError, IndexError):
                pid = int(pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
                continue
            return None
        return pid

    def run(self, *argv, timeout=COMMAND_TIMEOUT, check=True, environment=()):
        """Runs a command in the machine, like Root.run(). Works from process 1's first moment."""
        namespace = ["nsenter", f"--target={self.init}", "--mount", "--uts", "--ipc", "--net", "--pid", "--root"]
        return _run([*namespace, "env", "-i", "--chdir=/root", *ENVIRONMENT, *environment, *argv], timeout, check)

    def journal(self, *arguments):
        """The lines of the journal that journalctl(1) gives for the arguments."""
        return self.run("journalctl", "--no-pager", "--output=short-monotonic", *arguments).stdout.splitlines()

    def _is_in(self, states):
        if self.process.poll() is not None:
            self.console.seek(0)
            raise AssertionError(f"{self.name} did not boot:\n{self.console.read()[-4000:]}")
        return self.init and self.run("systemctl", "is-system-running", check=False).stdout.strip() in states


def wait_until(condition, seconds, what):
    """Polls `condition` until it is true. Raises AssertionError with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        select.select([], [], [], 0.1)


def _run(argv, timeout, check):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", timeout=timeout, start_new_session=True, check=False)
    if check and done.returncode:
        command = " ".join(argv[argv.index(ENVIRONMENT[-1]) + 1:])[:1000]
        raise AssertionError(f"status {done.returncode} of: {command}\n{done.stdout[-8000:]}")
    return done
