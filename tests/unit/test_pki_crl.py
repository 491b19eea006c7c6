"""bulkvpnd.pki: revocation lists, and what a certificate is called in them."""

import base64
import contextlib
import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from bulkvpnd import pki

NOW = datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc)
DAY, HOUR = datetime.timedelta(days=1), datetime.timedelta(hours=1)


@pytest.fixture(scope="module")
def authority():
    return pki.create_authority("authority", NOW, 100)


def make(authority, serials=(), days=10):
    return pki.create_crl(*authority, dict.fromkeys(serials, NOW), 7, NOW, days)


def refused(function, *arguments):
    with pytest.raises(pki.PKIError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 300
    return message


def test_a_list_comes_back_as_it_was_made(authority):
    crl = pki.read_crl(make(authority, (5, 1 << 150)), authority[0])
    assert crl.number == 7 and (crl.first, crl.last) == (NOW - HOUR, NOW + 10 * DAY)
    assert {(name.rfc4514_string(), serial): since for (name, serial), since in crl.revoked.items()} == {
        ("CN=authority", 5): NOW, ("CN=authority", 1 << 150): NOW
    }  # fmt: skip


def test_a_list_does_not_outlive_its_authority(authority):
    assert pki.read_crl(make(authority, days=1000), authority[0]).last <= NOW + 100 * DAY


def test_dates_of_a_list(authority):
    crl = pki.read_crl(make(authority), authority[0])
    moment = datetime.timedelta(seconds=1)
    for good in (crl.first, NOW, crl.last):
        pki.check_crl_dates(crl, good)
    assert "not valid before 2024-02-29 11:00 UTC" in refused(pki.check_crl_dates, crl, crl.first - moment)
    message = refused(pki.check_crl_dates, crl, crl.last + moment)
    assert "crl: expired at 2024-03-10 12:00 UTC" in message and "bulkvpnctl pki crl" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text, other: "", "not a revocation list"),
        (lambda text, other: text[:200], "not a revocation list"),
        (lambda text, other: text.replace("A", "B"), "crl: "),
        (lambda text, other: other, "not signed by the ca"),
        (lambda text, other: text + other, "not signed by the ca"),
    ],
)
def test_what_is_no_list_of_ours(authority, change, reason):
    # Of the same name, so that only the signature tells the two apart.
    other = make(pki.create_authority("authority", NOW, 100))
    text = make(authority)
    assert pki.read_crl(text, authority[0])
    assert reason in refused(pki.read_crl, change(text, other), authority[0])
    assert "ca: is not a certificate" in refused(pki.read_crl, text, "")


def test_lists_of_several_authorities_hold_for_as_long_as_the_first_that_ends(authority):
    other = pki.create_authority("other", NOW, 100)
    later = pki.create_crl(*other, {5: NOW}, 9, NOW + DAY, 3)
    for text in (make(authority, (6,)) + later, later + make(authority, (6,))):
        crl = pki.read_crl(text, authority[0] + other[0])
        assert (crl.number, crl.first, crl.last) == (9, NOW + DAY - HOUR, NOW + 4 * DAY)
        revoked = {(name.rfc4514_string(), serial) for name, serial in crl.revoked}
        assert revoked == {("CN=authority", 6), ("CN=other", 5)}
        assert "not signed by the ca" in refused(pki.read_crl, text, authority[0])


def test_an_authority_signs_lists_in_its_own_name_only(authority):
    """Who has one of several authorities does not revoke what another has issued."""
    other = pki.create_authority("other", NOW, 100)
    key = serialization.load_pem_private_key(other[1].encode(), None)
    name = x509.load_pem_x509_certificate(authority[0].encode()).subject
    entry = x509.RevokedCertificateBuilder(5, NOW).build()
    builder = x509.CertificateRevocationListBuilder(name, NOW, NOW + DAY, revoked_certificates=[entry])
    text = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    assert "not signed by the ca" in refused(pki.read_crl, text, authority[0] + other[0])


def test_an_authority_of_the_same_name_with_another_kind_of_key_does_no_harm(authority):
    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.load_pem_x509_certificate(authority[0].encode()).subject
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW + DAY)
    twin = builder.sign(key, None).public_bytes(serialization.Encoding.PEM).decode()
    text = make(authority, (5,))
    for ca in (authority[0] + twin, twin + authority[0]):
        assert pki.read_crl(text, ca) == pki.read_crl(text, authority[0])
    assert "not signed by the ca" in refused(pki.read_crl, text, twin)


def test_a_list_without_a_number(authority):
    key = serialization.load_pem_private_key(authority[1].encode(), None)
    name = x509.load_pem_x509_certificate(authority[0].encode()).subject
    builder = x509.CertificateRevocationListBuilder(name, NOW, NOW + DAY)
    text = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    crl = pki.read_crl(text, authority[0])
    assert (crl.number, crl.revoked, crl.last) == (0, {}, NOW + DAY)


def der(tag, *parts):
    """X.690: one value, its length in the short form or in that of one byte."""
    content = b"".join(parts)
    return bytes([tag, *([0x81] if len(content) > 127 else []), len(content)]) + content


def test_a_list_that_never_ends(authority):
    """RFC 5280 section 5.1.2.5 demands a next update, and no tool here makes a list without."""
    crl = x509.load_pem_x509_crl(make(authority).encode())
    content = crl.tbs_certlist_bytes[3 if crl.tbs_certlist_bytes[1] > 127 else 2 :]
    until = der(0x17, f"{NOW + 10 * DAY:%y%m%d%H%M%SZ}".encode())
    key = serialization.load_pem_private_key(authority[1].encode(), None)

    def signed(content):
        body, algorithm = der(0x30, content), der(0x30, der(6, bytes.fromhex("2a8648ce3d040302")))
        signature = key.sign(body, ec.ECDSA(hashes.SHA256()))
        whole = base64.encodebytes(der(0x30, body, algorithm, der(3, b"\0", signature))).decode()
        return f"-----BEGIN X509 CRL-----\n{whole}-----END X509 CRL-----\n"

    assert pki.read_crl(signed(content), authority[0]).last == NOW + 10 * DAY
    assert until in content
    assert "it has no next update" in refused(pki.read_crl, signed(content.replace(until, b"")), authority[0])


def test_what_a_list_calls_a_certificate(authority):
    pem, _ = pki.issue(*authority, "alice", "client", NOW, 10)
    certificate = x509.load_pem_x509_certificate(pem.encode())
    der = certificate.public_bytes(serialization.Encoding.DER)
    assert pki.issuer_and_serial(der) == (certificate.issuer, certificate.serial_number)
    assert pki.expiry(der) == NOW + 10 * DAY
    for damaged in (None, b"", der[:-1]):
        for function in (pki.issuer_and_serial, pki.expiry):
            assert "cannot be read" in refused(function, damaged)


def test_every_changed_byte_of_a_list_is_noticed(authority):
    """The list that came back is what was signed, or nothing comes back."""
    text = make(authority, (5,))
    lines = text.splitlines()
    body = "".join(lines[1:-1])
    good = pki.read_crl(text, authority[0])
    for at in range(0, len(body) - 2):
        changed = body[:at] + ("A" if body[at] != "A" else "B") + body[at + 1 :]
        with contextlib.suppress(pki.PKIError):
            assert pki.read_crl("\n".join([lines[0], changed, lines[-1]]), authority[0]) == good
