"""What an authority has issued and revoked, on record in files.

    DIR/                        0755   usually /etc/bulkvpn
      crl.pem                   0644   the revocation list; not secret, and the daemon, who is not root, reads it anew
      pki/                      0700
        ca.key ca.crt           0600, 0644; another certificate of the same key takes the place of ca.crt
        issued/NAME.crt         0644   the certificate in use of each name
        replaced/SERIAL.crt     0644   those that were renewed; they are good until they expire or are revoked
        revoked/SERIAL.crt      0644   those that are on the list

A certificate is in one of the three directories, and nothing ever leaves `revoked`. A list is written before the
certificate is moved there, and made of both, the directory and the list before it, so a crash in between forgets none.
"""

import dataclasses
import datetime
import os
import pathlib

from bulkvpnd import pki
from bulkvpnd.admin import files
from bulkvpnd.admin.errors import CommandError

IN_USE, REPLACED, REVOKED = "issued", "replaced", "revoked"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One certificate on record. place: IN_USE, REPLACED or REVOKED. description: pki.Description."""

    path: pathlib.Path
    place: str
    description: pki.Description


def authority(base):
    """(certificate, private key) of the authority, PEM. Raises CommandError, ConfigurationError."""
    return files.read(authority_path(base)), files.read(base / "pki" / "ca.key")


def authority_path(base):
    return base / "pki" / "ca.crt"


def path(base, place, name):
    """name: the end's for IN_USE, else a serial number in hexadecimal."""
    return base / "pki" / place / f"{name}.crt"


def crl_path(base):
    return base / "crl.pem"


def named(file, function, *arguments):
    """Calls a function of `pki`, and has its error name the file or directory that the arguments are from."""
    try:
        return function(*arguments)
    except pki.PKIError as error:
        raise CommandError(f"{file}: {error}") from None


def records(base, *places):
    """[Record] of the certificates in these places, by name. Raises CommandError."""
    found = []
    for place in places:
        directory = base / "pki" / place
        # A site that never renewed nor revoked has only the first of them.
        if place != IN_USE and not os.path.lexists(directory):
            continue
        with files.about(directory, "cannot be read"):
            names = [name for name in os.listdir(directory) if name.endswith(".crt")]
        for file in (directory / name for name in names):
            found.append(Record(file, place, named(file, pki.describe, files.read(file))))
    return sorted(found, key=lambda one: (one.description.name, places.index(one.place), one.description.expires))


def move(base, record, place, undo):
    """Moves a certificate to REPLACED or REVOKED. undo: an ExitStack that takes it back."""
    files.make_directory(base / "pki" / place, 0o700, undo)
    target = path(base, place, f"{record.description.serial:x}")
    files.move(record.path, target)
    undo.callback(files.move, target, record.path)


def crl(base):
    """The revocation list, a pki.RevocationList, or None if there is none. Raises CommandError."""
    file = crl_path(base)
    if not os.path.lexists(file):
        return None
    return named(file, pki.read_crl, files.read(file), files.read(authority_path(base)))


def revoked(base, now):
    """{serial: since when} of all that must be on the list. now: aware datetime."""
    try:
        before = crl(base)
    except CommandError:
        # Damaged, or of another authority: the directory has what counts.
        before = None
    listed = {serial: since for (_, serial), since in before.revoked.items()} if before else {}
    return {one.description.serial: now for one in records(base, REVOKED)} | listed


def write_crl(base, serials, now, days):
    """Writes the list. serials: {serial: since when}. days: of its validity. Raises CommandError."""
    ca, ca_key = authority(base)
    # Seconds since 1970: larger each time, without a counter that a restored backup would set back.
    text = named(base / "pki", pki.create_crl, ca, ca_key, serials, int(now.timestamp()), now, days)
    files.replace(crl_path(base), text, 0o644)


def rows(base, now):
    """Everything that can expire, as `pki list` shows it: [{name, role, state, serial, expires, days}]."""
    ca_file = authority_path(base)
    found = [
        _row(one.description.name, one.description.role, one.description.serial, one.description.expires, now,
             None if one.place == IN_USE else one.place)
        for one in records(base, IN_USE, REPLACED, REVOKED)
    ]
    name, serial, expires = named(ca_file, pki.describe_authority, files.read(ca_file))
    found.append(_row(name, "authority", serial, expires, now))
    listed = crl(base)
    if listed:
        found.append(_row(crl_path(base).name, "crl", listed.number, listed.last, now))
    return found


def _row(name, role, serial, expires, now, state=None):
    left = expires - now
    if state is None:
        is_soon = left < pki.WARNING_TIME
        state = "expired" if left < datetime.timedelta() else "expiring" if is_soon else "valid"
    return {
        "name": name, "role": role, "state": state, "serial": f"{serial:x}", "expires": expires.isoformat(),
        "days": left.days,
    }  # fmt: skip
