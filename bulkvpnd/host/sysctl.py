"""Sysctls and settings of devices that several instances share: the last one out gives back what was found.

    want      old value on disk first, then the write; nothing is written that is right already
    restore   at stop: what no other live instance wants is as it was found
    recover   at start: the same for instances that crashed, known by a lock that the kernel dropped with the process

The same lock is the claim to the instance's name: by that name are known the wishes here, and the instance's table of
nftables, so no two processes of a network namespace may have one.

A key is a sysctl, `net.core.rmem_max`, or, where a part has a dot itself, `net/ipv4/conf/eth0.5/rp_filter`; or it is a
setting of a device, `mtu eth0`, see host.device.KINDS.

Owns the files of the shared directory whose names begin with `sysctl-`. All of this belongs to a network namespace, and
so does a ledger: instances in different namespaces never see each other's. Of sysctls only net.* is ever written,
whatever the file on disk says: bulkvpnctl(8) reads it as root, and the daemon's user can write it.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import re
import socket
import struct
import time

from bulkvpnd.host import device, lock
from bulkvpnd.host.firewall import table_name

log = logging.getLogger(__name__)

SHARED_DIRECTORY = pathlib.Path("/run/bulkvpn")
"""Made by the package (tmpfiles.d), for every instance of this machine."""
PROC_SYS = pathlib.Path("/proc/sys")
BY_HAND = "(by hand)"
"""The owner of what `bulkvpnctl tune apply` sets. No process stands for it; it lives until `bulkvpnctl tune revert`."""
LOCK_TIME = 5.0
"""Seconds to wait for another instance that is just changing the ledger, which takes milliseconds (choice)."""
STATE_MAX = 1 << 20
"""Bytes of the ledger; more was not written by this program (choice)."""
SO_NETNS_COOKIE = 71
"""asm-generic/socket.h, Linux 5.14: a number that no other network namespace had or will have since boot."""

_SYSCTL = re.compile(r"net(\.[A-Za-z0-9_-]+)+|net(/(?!\.\.?(/|$))[!-.0-~]+)+")
_DEVICE = re.compile(rf"({'|'.join(device.KINDS)}) ([!-.0-~]{{1,15}})")
_BESIDE = {
    # A key: others that the kernel changes with it (inet_forward_change in net/ipv4/devinet.c,
    # addrconf_fixup_forwarding in net/ipv6/addrconf.c). They are put back after it.
    "net.ipv4.ip_forward": ("net/ipv4/conf/*/forwarding", "net/ipv4/conf/*/accept_redirects"),
    "net.ipv6.conf.all.forwarding": ("net/ipv6/conf/*/forwarding",),
}


AGREEMENTS = {
    # How several wishes for one key, and what was found, become one value.
    "exact": lambda found, wanted: wanted,  # the last wish counts
    "larger": lambda found, wanted: _last_number(max, found, wanted),  # for limits and the third value of tcp_rmem
    "smaller": lambda found, wanted: _last_number(min, found, wanted),  # for timeouts
}


class LedgerError(Exception):
    """The ledger cannot be used, so nothing may be changed. The message says why."""


class Taken(OSError):
    """Another process has the instance's name. The message says which, and what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one wish.

    found: the value before any instance changed it, None if the key does not exist. wanted: as asked for. set: the
    value now, None if unknown. why_not: why that is not what was wanted, None if it is. As text it is one line.
    """

    key: str
    found: str | None
    wanted: str
    set: str | None
    why_not: str | None = None

    def __str__(self):
        if self.why_not is None:
            return f"{self.key} = {self.set}"
        return f"{self.key}: {'is ' + self.set + ', ' if self.set is not None else ''}not {self.wanted}: {self.why_not}"


def shared_directory(runtime_directory):
    """Where the instances of this machine keep what they share. Makes nothing.

    runtime_directory: of one instance. Without the package's directory it lies beside that, so that instances of one
    user still find each other.
    """
    usable = SHARED_DIRECTORY.is_dir() and os.access(SHARED_DIRECTORY, os.R_OK | os.W_OK | os.X_OK)
    return SHARED_DIRECTORY if usable else runtime_directory.parent / ".shared"


class Ledger:
    """The sysctls of this network namespace, as one instance sees them.

    directory: where instances meet; it is made if it is missing. instance: the name of this one. root: the tree
    of sysctls. by_hand: what is wanted stays after this process, until restore().

    As a context manager it has the name from the beginning, and not only from the first wish on. Entering raises Taken;
    where the directory cannot be used at all, it is one line in the log.
    """

    def __init__(self, directory, instance, root=PROC_SYS, by_hand=False):
        self._directory = directory
        self._owner = BY_HAND if by_hand else instance
        self._by_hand = by_hand
        self._root = root
        prefix = f"sysctl-{_namespace()}"
        self._state_path = directory / f"{prefix}.json"
        self._live_prefix = f"{prefix}-"
        self._live = None  # descriptor of the lock that says this instance lives
        self._changed = {}  # key: what it was changed to for this instance

    def __enter__(self):
        try:
            with self._locked():
                self._announce()
        except Taken:
            raise
        except (OSError, LedgerError) as error:
            log.warning("another process with the name of this instance would not be noticed: %s: %s", self._directory,
                        _reason(error))
        return self

    def __exit__(self, *exception):
        self.restore()

    def want(self, key, value, agreement="exact"):
        """Sets `key` to `value`, a str, until restore(). Returns an Outcome; raises nothing.

        agreement: of AGREEMENTS: with "larger" only the last number counts, and a larger one that is there stays.
        """
        found = None
        try:
            found = self.read(key)
            with self._locked():
                self._announce()
                outcome = self._want(self._load(), key, value, agreement)
        except (OSError, LedgerError) as error:
            # What is right already needs no ledger.
            is_right = found is not None and AGREEMENTS[agreement](found, value) == found
            return Outcome(key, found, value, found, None if is_right else _reason(error))
        if outcome.set != outcome.found:
            self._changed[key] = outcome.set
        return outcome

    def _want(self, state, key, value, agreement):
        now = self.read(key)
        entry = state.get(key)
        if entry is None:
            entry = {"found": now, "set": now, "wants": {}, "beside": {}}
        elif now != entry["set"]:
            # Somebody else set it meanwhile, and that is what will be given back.
            entry.update(found=now, set=now)
        before = dict(entry["wants"])
        entry["wants"].pop(self._owner, None)
        entry["wants"][self._owner] = [value, agreement]
        target = _agreed(entry)
        state[key] = entry
        if target != now:
            if not entry["beside"]:
                entry["beside"] = self._read_beside(key)
            entry["set"] = target
        self._save(state)
        if target == now:
            return Outcome(key, entry["found"], value, now)
        try:
            self._write(key, target)
        except OSError as error:
            entry.update(wants=before, set=now)
            if not before:
                del state[key]
            self._save(state)
            return Outcome(key, entry["found"], value, now, _reason(error))
        entry["set"] = self.read(key)
        self._save(state)
        changed = None if entry["set"] == target else f"the kernel made {entry['set']} of {target}"
        return Outcome(key, entry["found"], value, entry["set"], changed)

    def give_up(self, keys):
        """Gives back those of `keys` that no other live instance wants. Raises nothing. Returns those written."""
        return self._leave(set(keys))

    def restore(self):
        """Gives back what no other live instance wants, and the name. Raises nothing. Returns the keys written."""
        if self._live is None and not self._by_hand:
            # What is there in this name is another process's.
            return []
        try:
            return self._leave(None)
        finally:
            self._changed = {}
            if self._live is not None:
                os.close(self._live)
                self._live = None

    def _leave(self, keys):
        """keys: a set, None for all, and then the name too."""
        try:
            with self._locked(make=False):
                if keys is None and self._live is not None:
                    self._live_path(self._owner).unlink(missing_ok=True)
                return self._drop(self._load(), {self._owner}, keys)
        except (OSError, LedgerError) as error:
            left = {key: value for key, value in self._changed.items() if keys is None or key in keys}
            if left:
                log.warning("not given back, since it is not known what was found: %s: %s",
                            ", ".join(f"{key} = {value}" for key, value in left.items()), _reason(error))
            return []

    def recover(self):
        """Gives back what crashed instances wanted, before the first wish. Raises nothing. Returns the keys written."""
        try:
            with self._locked(make=False):
                state = self._load()
                owners = {owner for entry in state.values() for owner in entry["wants"]}
                dead = {owner for owner in owners if owner != BY_HAND and not self._is_alive(owner)}
                for owner in dead:
                    self._live_path(owner).unlink(missing_ok=True)
                # Once this instance has its name, what is there in it is one's that crashed.
                return self._drop(state, dead | ({self._owner} if self._live is not None else set()))
        except (OSError, LedgerError) as error:
            log.warning("what crashed instances have set of the kernel's settings is not given back: %s",
                        _reason(error))
            return []

    def entries(self):
        """{key: {"found", "set", "wants": {instance: [value, agreement]}}} of all instances. Raises LedgerError."""
        try:
            return self._load()
        except OSError as error:
            raise LedgerError(f"{self._state_path}: {_reason(error)}") from None

    def is_wanted(self, key):
        """Whether any instance wants `key` now. Raises nothing."""
        try:
            return key in self.entries()
        except LedgerError:
            return False

    def read(self, key):
        """The value of `key`, its numbers separated by one space. Raises OSError."""
        place = self._device(key)
        return place[0].read(place[1]) if place else " ".join(self._path(key).read_text().split())

    # What the file on disk says, and who may change it

    @contextlib.contextmanager
    def _locked(self, make=True):
        """Every other instance is kept out. Raises OSError, LedgerError."""
        if make:
            # Nobody else may open it: whoever can, can lock it.
            self._directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        try:
            descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            yield
            return
        try:
            deadline = time.monotonic() + LOCK_TIME
            while not lock.take(descriptor):
                if time.monotonic() > deadline:
                    raise LedgerError(f"{self._directory}: another process keeps it locked")
                time.sleep(0.01)
            yield
        finally:
            os.close(descriptor)

    def _load(self):
        try:
            descriptor = os.open(self._state_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return {}
        with os.fdopen(descriptor, encoding="utf-8") as stream:
            try:
                state = json.loads(stream.read(STATE_MAX))
                return {key: _checked(key, entry) for key, entry in state.items()}
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise LedgerError(f"{self._state_path}: not what this program writes; remove the file") from None

    def _save(self, state):
        """Writes it whole or not at all; an empty one goes."""
        new = self._state_path.with_suffix(".new")
        new.unlink(missing_ok=True)  # a crash may have left one
        if not state:
            self._state_path.unlink(missing_ok=True)
            return
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            os.fchmod(descriptor, 0o644)  # whatever the umask: instances of other users read it too
            json.dump(state, stream)
        new.rename(self._state_path)

    def _drop(self, state, owners, keys=None):
        """Takes the wishes of `owners` out, for `keys` or all, and with them the values that nobody wants any more."""
        written = []
        for key, entry in list(state.items()):
            if not owners & set(entry["wants"]) or (keys is not None and key not in keys):
                continue
            for owner in owners:
                entry["wants"].pop(owner, None)
            written += self._give_back(key, entry)
            if not entry["wants"]:
                del state[key]
            self._save(state)
        return written

    def _give_back(self, key, entry):
        target = _agreed(entry)
        try:
            # What somebody else set meanwhile is theirs to keep.
            if self.read(key) != entry["set"] or target == entry["set"]:
                return []
            self._write(key, target)
            entry["set"] = target
            if not entry["wants"]:
                self._write_beside(entry["beside"])
            return [key]
        except OSError:
            # It went with its interface, or was made read-only meanwhile.
            return []

    # Whether an instance lives

    def _live_path(self, owner):
        return self._directory / f"{self._live_prefix}{table_name(owner)}.live"

    def _announce(self):
        """Takes the lock that says this instance lives. Raises Taken, OSError."""
        if self._by_hand or self._live is not None:
            return
        descriptor = _open_lock(self._live_path(self._owner))
        if not lock.take(descriptor):
            holder = lock.holder(descriptor)
            os.close(descriptor)
            raise Taken(f"instance {self._owner} runs already{f', as process {holder}' if holder else ''}; stop that, "
                        "or give this one's configuration another name")
        self._live = descriptor

    def _is_alive(self, owner):
        try:
            descriptor = os.open(self._live_path(owner), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            return not lock.take(descriptor)
        finally:
            os.close(descriptor)

    # The tree

    @staticmethod
    def _device(key):
        """(how to read and write it, the device's name), None for a sysctl."""
        match = _DEVICE.fullmatch(key)
        return match and (device.KINDS[match[1]], match[2])

    def _path(self, key):
        if not _SYSCTL.fullmatch(key):
            raise OSError(errno.EINVAL, f"not a key of net.*: {key!a}")
        return self._root / (key if "/" in key else key.replace(".", "/"))

    def _write(self, key, value):
        place = self._device(key)
        if place:
            place[0].write(place[1], value)
            return
        # One write(2), and no O_CREAT: in a tree without the key, as in a container, there is nothing to make.
        descriptor = os.open(self._path(key), os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode() + b"\n")
        finally:
            os.close(descriptor)

    def _read_beside(self, key):
        found = {}
        for pattern in _BESIDE.get(key, ()):
            for path in sorted(self._root.glob(pattern)):
                beside = str(path.relative_to(self._root))
                with contextlib.suppress(OSError):
                    found[beside] = self.read(beside)
        return found

    def _write_beside(self, values):
        for key, value in values.items():
            # A device may have gone, and its keys with it.
            with contextlib.suppress(OSError):
                if self.read(key) != value:
                    self._write(key, value)


def _agreed(entry):
    """What an entry's wishes make of the value that was found."""
    value = entry["found"]
    for wanted, agreement in entry["wants"].values():
        value = AGREEMENTS[agreement](value, wanted)
    return value


def _last_number(choose, found, wanted):
    """`found` with its last number replaced by what `choose` takes; `wanted` if they are not numbers."""
    try:
        *first, last = found.split()
        return " ".join([*first, str(choose(int(last), int(wanted.split()[-1])))])
    except (ValueError, IndexError):
        return wanted


def _checked(key, entry):
    """An entry of the file, if it is one. Raises ValueError and what a wrong type brings."""
    wants = {owner: [str(value), agreement] for owner, (value, agreement) in entry["wants"].items()}
    beside = {other: str(value) for other, value in entry["beside"].items()}
    if not all(_SYSCTL.fullmatch(one) or _DEVICE.fullmatch(one) for one in (key, *beside)):
        raise ValueError
    if not all(agreement in AGREEMENTS for _, agreement in wants.values()):
        raise ValueError
    found, now = str(entry["found"]), str(entry["set"])
    if not all(map(str.isascii, (found, now, *beside.values(), *(value for value, _ in wants.values())))):
        raise ValueError
    for owner in wants:
        os.fsencode(owner)  # by which a file is called
    return {"found": found, "set": now, "wants": wants, "beside": beside}


def _open_lock(path):
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        os.fchmod(descriptor, 0o644)  # whatever the umask
        return descriptor
    except FileExistsError:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _namespace():
    """A name for this process's network namespace."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            return struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0]
    except OSError:
        # Before Linux 5.14; the inode's number may be another namespace's later.
        return f"i{os.stat('/proc/self/ns/net').st_ino}"


def _reason(error):
    return getattr(error, "strerror", None) or str(error)
