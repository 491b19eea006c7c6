"""Files of the administrator: read, made and replaced, each whole or not at all, with errors that say the mend."""

import contextlib
import errno
import os
import secrets
import sys

from bulkvpnd import config
from bulkvpnd.admin.errors import CommandError


@contextlib.contextmanager
def about(path, problem, missing="run bulkvpnctl pki init first, or name the right --directory"):
    """Turns an OSError inside into a CommandError that names `path`, the problem and the mend.

    missing: the mend where there is no such file.
    """
    mends = {
        errno.EACCES: "run it as root",
        errno.EPERM: "run it as root",
        errno.EEXIST: "nothing is overwritten; choose another name, or move it away first",
        errno.ENOENT: missing,
    }
    try:
        yield
    except OSError as error:
        mend = mends.get(error.errno, "nothing was changed; mend that and run it again")
        status = os.EX_NOPERM if isinstance(error, PermissionError) else 1
        raise CommandError(f"{path}: {problem}: {error.strerror}; {mend}", status) from None


def read(file):
    """Its text; a private key only if nobody else can read it. Raises CommandError, ConfigurationError."""
    with about(file, "cannot be read"):
        file.open().close()  # the next line finds the same problems, but has no mend and no exit status for them
    return config.read_secret_file(file)


def read_any(file):
    """Text of a file, whoever may read it, or of standard input for ``-``. Raises CommandError, ConfigurationError."""
    with about(file, "cannot be read", "name a file that is there"), contextlib.ExitStack() as stack:
        stream = sys.stdin.buffer if str(file) == "-" else stack.enter_context(open(file, "rb"))
        return config.bounded_text(stream, file)


def make_directory(directory, mode, undo):
    """Makes it if it is not there; `undo`, an ExitStack, then takes it away again. Raises CommandError."""
    with about(directory, "cannot be created"):
        if os.path.isdir(directory):
            return
        os.mkdir(directory, 0o700)
        undo.callback(_remove_directory, directory)
        os.chmod(directory, mode)


def _remove_directory(directory):
    # Somebody else may have put a file there in the meantime; then it stays.
    with contextlib.suppress(OSError):
        os.rmdir(directory)


def create(file, text, mode):
    """Creates a file with all of `text`, or leaves no trace. mode: its permission bits, whatever the umask.

    Raises CommandError, also where the file exists: link(2) never replaces one, as rename(2) would.
    """
    with about(file, "cannot be created"), _temporary(file, text, mode) as temporary:
        os.link(temporary, file)


def replace(file, text, mode):
    """As create, but takes the place of a file that exists; whoever reads it meanwhile gets the old or the new one."""
    with about(file, "cannot be replaced"), _temporary(file, text, mode) as temporary:
        os.replace(temporary, file)


def move(file, to):
    """Moves a file within its file system, onto whatever is there. Raises CommandError."""
    with about(file, f"cannot be moved to {to}"):
        os.replace(file, to)
        _flush_directory(to.parent)
        _flush_directory(file.parent)


@contextlib.contextmanager
def _temporary(file, text, mode):
    """A file with all of `text`, on the disk, beside `file`; removed again if it is still there at the end."""
    temporary = file.parent / f".bulkvpnctl-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _flush_directory(file.parent)


def _flush_directory(path):
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
