"""Files that may hold a private key, and other text from outside: opened with care, and read up to a bound."""

import errno
import os
import pathlib
import stat

from bulkvpnd.config.errors import ConfigurationError

MAX_FILE_SIZE = 1024 * 1024
"""Bytes of a configuration, certificate or key file; more is a mistake (choice)."""
_MENDS = {
    errno.EACCES: "run it as root, or let its user read the file and enter the directories above it",
    errno.ELOOP: "a symbolic link is not followed; give the file itself",
}


def read_secret_file(file, original=False):
    """Opens a file that may hold a private key, checked on the descriptor that is then read.

    file: path. systemd's copy of it, see credential_of, is read in its place unless `original`.
    Returns its text. Raises ConfigurationError with the command that mends it.
    """
    try:
        source = None if original else credential_of(file)
        with os.fdopen(open_regular(source or file, os.O_NOFOLLOW), "rb") as stream:
            status = os.fstat(stream.fileno())
            text = bounded_text(stream, file)
    except OSError as error:
        mend = _MENDS.get(error.errno, "give the path of a file that can be read")
        status = os.EX_NOPERM if isinstance(error, PermissionError) else os.EX_CONFIG
        raise ConfigurationError(f"{file}: cannot be read: {error.strerror}; {mend}", status=status) from None
    if "PRIVATE KEY-----" in text:
        if status.st_uid not in (0, os.geteuid()):
            raise ConfigurationError(
                f"{file}: holds a private key and belongs to user id {status.st_uid}; run: chown root {file}"
            )
        # A group may read, so that root:bulkvpnd 0640 works; nobody else, and only the owner may write.
        if status.st_mode & 0o027:
            raise ConfigurationError(
                f"{file}: holds a private key and has mode {stat.S_IMODE(status.st_mode):04o}, "
                f"so others can read or change it; run: chmod 600 {file}"
            )
    return text


def credential_of(file):
    """systemd's copy of the file in $CREDENTIALS_DIRECTORY, as old as the start of the unit; None if there is none."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    copy = pathlib.Path(credentials, file.name) if credentials else None
    return copy if copy and copy.exists() else None


def open_regular(file, flags=0):
    """A descriptor for reading a regular file. flags: more of open(2). Raises OSError, ConfigurationError."""
    # Nonblocking: nobody may ever write to a pipe of that name.
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigurationError(f"{file}: is not a regular file; give the file itself")
    return descriptor


def bounded_text(stream, file):
    """The text of a binary stream, UTF-8 with any kind of line end, at most MAX_FILE_SIZE bytes.

    file: path, for messages. Raises OSError, ConfigurationError.
    """
    raw = stream.read(MAX_FILE_SIZE + 1)
    if len(raw) > MAX_FILE_SIZE:
        raise ConfigurationError(f"{file}: has more than {MAX_FILE_SIZE} bytes, the most that is read; is it the right "
                                 "file?")
    try:
        return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file}: is not UTF-8 text; is it the right file?") from None
