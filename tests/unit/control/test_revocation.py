"""Which revocation list is in force, over real TLS handshakes: who gets in before, with and after it."""

import datetime
import logging
import os

import pytest
from cryptography import x509
from doubles import DAY, NOW, Authority, configuration, context
from test_tls import both, refused

from bulkvpnd import config, pki
from bulkvpnd.control.revocation import Revocations

LATER = NOW + datetime.timedelta(seconds=1)
"""After the end of a list that is valid until NOW; to OpenSSL, which asks the real clock, NOW is in the past."""


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture(scope="module")
def clients(authority, tmp_path_factory):
    """{name: (SSLContext, serial number)}"""
    made = {}
    for name in ("alice", "bob"):
        end = authority.issue(name)
        serial = x509.load_pem_x509_certificate(end[1].encode()).serial_number
        made[name] = context(tmp_path_factory.mktemp(name), "client", end), serial
    return made


class Site:
    """A server's end that goes by the file `crl`."""

    def __init__(self, directory, authority):
        self.crl = directory / "crl.pem"
        self._authority = authority
        self._end = authority.issue("server", "server")
        self._directory = directory
        self.write()

    def write(self, *serials, days=90, now=NOW):
        text = pki.create_crl(self._authority.pem, self._authority.key, dict.fromkeys(serials, now), 1, now, days)
        # As bulkvpnctl does it: another file takes the place.
        new = self.crl.with_suffix(".new")
        new.write_text(text)
        os.replace(new, self.crl)

    def revocations(self, now=NOW):
        return Revocations(configuration(self._directory, "server", self._end, crl="crl.pem"), now)


@pytest.fixture
def site(tmp_path, authority):
    return Site(tmp_path, authority)


def gets_in(revocations, client):
    seen, _ = both(revocations.context, client[0])
    if isinstance(seen, Exception):
        refused(seen, "certificate", "revoked")
    return isinstance(seen, str)


def test_a_revoked_client_is_refused_and_no_other(site, clients):
    made = site.revocations()
    assert gets_in(made, clients["alice"]) and gets_in(made, clients["bob"])
    site.write(clients["alice"][1])
    assert made.check(NOW)
    assert not gets_in(made, clients["alice"]) and gets_in(made, clients["bob"])
    assert [serial for _, serial in made.revoked] == [clients["alice"][1]]
    site.write()
    assert made.check(NOW)
    assert gets_in(made, clients["alice"]), "a list that no longer has it, as for a certificate on hold"


def test_it_is_read_when_it_changed_or_on_demand_and_else_never(site, clients):
    made = site.revocations()
    first = made.context
    assert not made.check(NOW) and made.context is first
    assert made.check(NOW, force=True) and made.context is not first
    site.write(clients["alice"][1])
    assert made.check(NOW) and not made.check(NOW)


def test_without_the_option_nothing_is_ever_read(tmp_path, authority, clients):
    made = Revocations(configuration(tmp_path, "server", authority.issue("server", "server")), NOW)
    assert made.check(NOW, force=True) is False and made.revoked == {} and gets_in(made, clients["alice"])
    assert made.expires is None


BAD = {
    "gone": lambda site: site.crl.unlink(),
    "garbage": lambda site: site.crl.write_text("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"),
    "empty": lambda site: site.crl.write_text(""),
    "a certificate": lambda site: site.crl.write_text(Authority().pem),
    "expired": lambda site: site.write(days=0),
    "not yet valid": lambda site: site.write(now=NOW + 2 * DAY),
    "of another authority": lambda site: Site(site.crl.parent, Authority()),
    "a FIFO": lambda site: (site.crl.unlink(), os.mkfifo(site.crl)),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_a_list_that_cannot_be_used_leaves_the_former_in_force(site, clients, caplog, spoil):
    site.write(clients["alice"][1])
    made = site.revocations()
    spoil(site)
    assert not made.check(LATER)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "crl" in line and "stays in force" in line and line.isprintable()
    assert not made.check(LATER) and len(caplog.records) == 1, "said once"
    assert not gets_in(made, clients["alice"]) and gets_in(made, clients["bob"])


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_with_such_a_list_it_does_not_start(site, spoil):
    assert site.revocations(LATER)
    spoil(site)
    with pytest.raises(config.ConfigurationError, match="crl") as caught:
        site.revocations(LATER)
    assert "server.conf" in str(caught.value) or "crl.pem" in str(caught.value)


def test_a_list_that_expired_refuses_everybody(site, clients):
    """OpenSSL asks the real clock: the list has ended already, and the daemon's clock is before that."""
    site.write(days=0)
    made = site.revocations()
    seen, _ = both(made.context, clients["bob"][0])
    refused(seen, "certificate", "expired")
    assert made.expires == NOW
    site.write()
    assert made.check(LATER) and gets_in(made, clients["bob"]) and made.expires == NOW + 90 * DAY
