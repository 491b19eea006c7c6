"""What a process lets others see of its memory, where the keys are: nothing. And what a worker can reach by itself."""

import errno
import os
import resource
import struct
import sys

PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
"""linux/prctl.h."""
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
"""System calls, with these numbers on every architecture of Debian (asm-generic/unistd.h)."""
LANDLOCK_CREATE_RULESET_VERSION = LANDLOCK_RULE_PATH_BENEATH = 1
"""linux/landlock.h. A flag that asks for the newest version that the kernel has; a rule about a directory."""
LANDLOCK_RIGHTS = (13, 14, 15, 15, 16)
"""How many rights to files each version knows, from the first on: bits of LANDLOCK_ACCESS_FS_* in linux/landlock.h."""
LANDLOCK_READ = 1 << 2 | 1 << 3
"""LANDLOCK_ACCESS_FS_READ_FILE, LANDLOCK_ACCESS_FS_READ_DIR."""
REFUSED_CALLS = (
    "socket", "connect",  # the status socket, D-Bus, the network: Landlock leaves sockets that have a path
    "io_uring_setup",  # it opens and connects without the other calls
    "kill", "tkill", "tgkill", "pidfd_send_signal", "rt_sigqueueinfo", "rt_tgsigqueueinfo",
    # What Landlock leaves of files.
    "chmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchownat", "setxattr", "lsetxattr", "truncate",
)  # fmt: skip
"""System calls that a worker never makes, and that would let it reach more than it has been given."""


def hide_memory():
    """No core file of this process, and no look into it by others of its user: another worker, a debugger.

    See PR_SET_DUMPABLE of prctl(2) and ptrace(2): the kernel then treats this process like one that has changed its
    user, and /proc/PID/mem and its like are root's. Execve undoes it, so each process does it for itself.
    Returns whether all of it could be done; the limit alone does not hold for a core_pattern that is a pipe, core(5).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        # The standard library has no other way to prctl(2). Where memory may not be both written and executed, some
        # builds of libffi cannot make the callback that this import makes.
        import ctypes

        return ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
    except (ImportError, OSError, MemoryError, AttributeError):
        return False


def confine():
    """Leaves this process what it has open or is given, for good, and besides Python and this package, to read.

    No other file, no program, no further socket, no signal to others. For a process of one thread; those that it begins
    later have the same bounds. Returns what could not be had, one line each: a kernel may be without.
    """
    missing = []
    for name, apply in (("Landlock", _close_files), ("seccomp", _refuse_calls)):
        try:
            apply()
        except (ImportError, OSError, MemoryError, AttributeError, RuntimeError) as error:
            missing.append(f"{name}: {getattr(error, 'strerror', None) or error}")
    return missing


def _close_files():
    """landlock(7): no right to a file, of all that the kernel knows, but reading below the directories of Python."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint]

    def call(function, *arguments):
        result = function(*arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    version = call(libc.syscall, LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION, 0)
    rights = struct.pack("=Q", (1 << LANDLOCK_RIGHTS[min(version, len(LANDLOCK_RIGHTS)) - 1]) - 1)
    ruleset = call(libc.syscall, LANDLOCK_CREATE_RULESET, rights, len(rights), None, 0)
    try:
        # Some of it is imported when it is first needed, and a traceback shows the lines.
        for path in filter(os.path.isdir, {sys.prefix, *sys.path}):
            directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                below = struct.pack("=Qi", LANDLOCK_READ, directory)
                call(libc.syscall, LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, below, 0)
            finally:
                os.close(directory)
        call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call(libc.syscall, LANDLOCK_RESTRICT_SELF, ruleset, 0, None, 0)
    finally:
        os.close(ruleset)


def _refuse_calls():
    """seccomp(2), by libseccomp, which knows the numbers of this architecture; of other ones none is let through."""
    import seccomp

    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in REFUSED_CALLS:
        rules.add_rule(seccomp.ERRNO(errno.EPERM), name)
    rules.load()
