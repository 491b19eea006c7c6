"""Tells the log what is going to expire: once a day from 30 days ahead, and each hour once it has.

An instance runs for months, so what it found at its start is not enough.
"""

import dataclasses
import datetime
import logging

from bulkvpnd import events, pki

log = logging.getLogger(__name__)

WARNING_PERIOD = datetime.timedelta(days=1)
"""Between two lines about what is going to expire (choice)."""
EXPIRED_PERIOD = datetime.timedelta(hours=1)
"""Between two lines about what has expired (choice)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """What expires: its name, what no longer works then, the mend, and the fields of its lines in the journal."""

    name: str
    consequence: str
    mend: str
    extra: dict


KINDS = {
    # option: Kind
    "certificate": Kind(
        "the certificate of this end", "no connection can be made", "bulkvpnctl doctor says how it is renewed",
        extra={"MESSAGE_ID": events.ID["certificate-expires"]}),
    "ca": Kind(
        "the certificate of the authority", "no connection can be made",
        "bulkvpnctl pki list, where the authority is, says how it is renewed",
        extra={"MESSAGE_ID": events.ID["authority-expires"]}),
    "crl": Kind(
        "the revocation list", "every new connection is refused", "make a new one with: bulkvpnctl pki crl",
        extra={"MESSAGE_ID": events.ID["revocations-expired"]}),
}  # fmt: skip


class Expiry:
    """What has been said already."""

    def __init__(self):
        self._said = {}  # option: ((its expiry, whether it has expired), when)

    def check(self, expiries, now):
        """expiries: {option of KINDS: when it expires}, of what is in force. now, and these: aware datetimes."""
        for option, expiry in expiries.items():
            if expiry - now <= pki.WARNING_TIME:
                self._say(option, expiry, now)

    def _say(self, option, expiry, now):
        has_expired = now > expiry
        # Another one that ends soon too, and that it has expired, are said at once.
        state = expiry, has_expired
        former, since = self._said.get(option, (None, now))
        if state == former and now - since < (EXPIRED_PERIOD if has_expired else WARNING_PERIOD):
            return
        self._said[option] = state, now
        kind = KINDS[option]
        if has_expired:
            log.error("%s has expired, so %s; %s", kind.name, kind.consequence, kind.mend, extra=kind.extra)
        else:
            log.warning("%s expires in %d days; %s", kind.name, (expiry - now).days, kind.mend, extra=kind.extra)
