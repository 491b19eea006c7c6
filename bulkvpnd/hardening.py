"""What a process lets others see of its memory, where the keys are: nothing."""

import resource

PR_SET_DUMPABLE = 4
"""linux/prctl.h."""


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
