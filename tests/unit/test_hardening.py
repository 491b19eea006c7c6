"""hardening: in processes of their own, because it cannot be taken back."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
PR_GET_DUMPABLE = 3
"""linux/prctl.h."""


def said(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.split(), result.stderr


def test_memory_is_hidden_afterwards_and_not_before():
    output, error = said(
        "import ctypes, resource\n"
        "from bulkvpnd.hardening import hide_memory\n"
        f"dumpable = lambda: ctypes.CDLL(None).prctl({PR_GET_DUMPABLE}, 0, 0, 0, 0)\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))\n"
        "print(dumpable(), hide_memory(), dumpable(), *resource.getrlimit(resource.RLIMIT_CORE))"
    )
    assert (output, error) == (["1", "True", "0", "0", "0"], "")


def test_where_prctl_cannot_be_reached_it_says_so_and_the_limit_holds():
    output, error = said(
        "import resource, sys\n"
        "from bulkvpnd.hardening import hide_memory\n"
        "sys.modules['ctypes'] = None\n"
        "print(hide_memory(), *resource.getrlimit(resource.RLIMIT_CORE))"
    )
    assert (output, error) == (["False", "0", "0"], "")


def test_it_still_opens_what_it_has_by_its_own_descriptors():
    """As the key does on its way into TLS: see control.tls.make_context."""
    output, error = said(
        "import ctypes, os\n"
        "from bulkvpnd.hardening import hide_memory\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "hidden = hide_memory()\n"
        "descriptor = os.memfd_create('certificate')\n"
        "os.write(descriptor, b'PEM')\n"
        "print(hidden, open(f'/proc/self/fd/{descriptor}').read())"
    )
    assert (output, error) == (["True", "PEM"], "")
