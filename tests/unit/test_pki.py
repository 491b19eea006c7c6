"""bulkvpnd.pki: real certificates, and real TLS 1.3 handshakes in memory between those that it makes."""

import contextlib
import dataclasses
import datetime
import ipaddress
import os
import shutil
import ssl
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkvpnd import cli, config, pki

NOW = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)  # OpenSSL asks the real clock
DAY = datetime.timedelta(days=1)
HOUR = datetime.timedelta(hours=1)
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER


# What somebody else's tools may make.


@dataclasses.dataclass(frozen=True)
class Made:
    certificate: x509.Certificate
    private_key: object

    @property
    def pem(self):
        return self.certificate.public_bytes(PEM).decode()

    @property
    def der(self):
        return self.certificate.public_bytes(DER)

    @property
    def key(self):
        encoding = (PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return self.private_key.private_bytes(*encoding).decode()


KEYS = {
    "ec": lambda: ec.generate_private_key(ec.SECP384R1()),
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ed448": ed448.Ed448PrivateKey.generate,
}


def outside(issuer=None, kind="ec", names=("alice",), usages=(CLIENT,), first=NOW - DAY, last=NOW + DAY, ids=True):
    """A certificate of any shape. names: str become DNS names. usages, names: None leaves the extension out."""
    key = KEYS[kind]()
    signer = issuer.private_key if issuer else key
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "alice" if issuer else "outside")])
    builder = x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=issuer.certificate.subject if issuer else subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=first,
        not_valid_after=last,
    )
    if ids:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        builder = builder.add_extension(authority_id, False)
    if names is not None:
        names = [x509.DNSName(name) if isinstance(name, str) else name for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    if usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), False)
    algorithm = None if isinstance(signer, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey)) else hashes.SHA256()
    return Made(builder.sign(signer, algorithm), key)


def der_of(pem):
    return ssl.PEM_cert_to_DER_cert(pem)


@pytest.fixture(scope="module")
def authority():
    return pki.create_authority("authority", NOW, 100)


def refused(function, *arguments):
    """The message of the PKIError that it must raise."""
    with pytest.raises(pki.PKIError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 300, message
    return message


@pytest.mark.parametrize(("kind", "shown"), [("ec", "EC secp384r1"), ("rsa", "RSA 2048"), ("ed25519", "Ed25519"),
                                             ("ed448", "Ed448")])
def test_the_kind_of_a_key(kind, shown):
    assert pki.kind_of_key(outside(kind=kind).pem) == shown


# TLS.


def context(protocol, ca, certificate, key):
    made = ssl.SSLContext(protocol)
    made.minimum_version = made.maximum_version = ssl.TLSVersion.TLSv1_3
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_verify_locations(cadata=ca)
    with open(os.memfd_create("pem"), "w") as file:
        file.write(certificate + key)
        file.flush()
        made.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return made


def handshake(server, client, server_name="server"):
    """A handshake of two (ca, certificate, key). Returns the DER that the server and the client saw of the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context(ssl.PROTOCOL_TLS_SERVER, *server).wrap_bio(to_server, to_client, server_side=True)
    client = context(ssl.PROTOCOL_TLS_CLIENT, *client).wrap_bio(to_client, to_server, server_hostname=server_name)
    waiting = [client, server]
    for end in [client, server] * 4:
        if end in waiting:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
                waiting.remove(end)
    assert not waiting and client.version() == server.version() == "TLSv1.3"
    return server.getpeercert(True), client.getpeercert(True)


def ends(authority, server_name="server"):
    """((ca, certificate, key) of the server, the same of the client)."""
    return tuple(
        (authority[0], *pki.issue(*authority, name, role, NOW, 10))
        for name, role in ((server_name, "server"), ("alice", "client"))
    )


@pytest.mark.parametrize("name", ["server", "vpn_1.example-x.ORG", "a" * 63])
def test_tls_accepts_what_issue_makes_and_identity_names_it(authority, name):
    seen_by_server, seen_by_client = handshake(*ends(authority, name), server_name=name)
    assert pki.identity(seen_by_server, "client") == "alice"
    assert pki.identity(seen_by_client, "server") == name


@pytest.mark.parametrize("foreigner", [0, 1])
def test_tls_refuses_a_foreign_authority(authority, foreigner):
    own, foreign = ends(authority), ends(pki.create_authority("authority", NOW, 100))
    pair = [foreign[at] if at == foreigner else own[at] for at in (0, 1)]
    with pytest.raises(ssl.SSLError, match="(?i)certificate.verify.failed|unknown.ca"):
        handshake(*pair)


def test_tls_refuses_another_server_name(authority):
    with pytest.raises(ssl.SSLCertVerificationError, match="(?i)hostname mismatch"):
        handshake(*ends(authority), server_name="other")


def test_a_servers_certificate_does_not_make_a_client(authority):
    server, client = ends(authority)
    with pytest.raises(ssl.SSLError, match="(?i)purpose|verify.failed"):
        handshake(server, server)
    assert "client" in refused(pki.identity, der_of(server[1]), "client")
    assert "server" in refused(pki.identity, der_of(client[1]), "server")


def test_identity_refuses_a_role_that_tls_does_not_miss(authority):
    server, _ = ends(authority)
    certificate, key = (text.encode() for text in authority)
    signer = Made(x509.load_pem_x509_certificate(certificate), serialization.load_pem_private_key(key, None))
    client = outside(signer, usages=None)
    seen_by_server, _ = handshake(server, (authority[0], client.pem, client.key))
    assert "client" in refused(pki.identity, seen_by_server, "client")


def test_tls_accepts_what_the_command_makes(tmp_path):
    site, client = tmp_path / "site", tmp_path / "client.conf"
    for command in (["init"], ["add", "alice", "--remote", "x", "--output", str(client)]):
        assert cli.bulkvpnctl(["pki", *command, "--directory", str(site)]) == 0
    pair = []
    for file in (site / "server.conf", client):
        configuration, _ = config.load(["--config", str(file)])
        pair.append([config.pem_text(configuration, name) for name in ("ca", "certificate", "key")])
    seen_by_server, seen_by_client = handshake(*pair, configuration.server_name)
    assert (pki.identity(seen_by_server, "client"), pki.identity(seen_by_client, "server")) == ("alice", "server")


# identity.


def test_identity_of_a_certificate_from_elsewhere():
    assert pki.identity(outside(usages=[SERVER, CLIENT]).der, "client") == "alice"
    assert pki.identity(outside(usages=[SERVER, CLIENT]).der, "server") == "alice"
    assert pki.identity(outside(names=["A.b_c-9"]).der, "client") == "A.b_c-9"


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"usages": None}, "extended key usage"),
        ({"usages": [SERVER]}, "extended key usage"),
        ({"usages": [x509.ObjectIdentifier("2.5.29.37.0")]}, "extended key usage"),
        ({"names": None}, "exactly one"),
        ({"names": ["alice", "bob"]}, "exactly one"),
        ({"names": ["alice", x509.IPAddress(ipaddress.IPv4Address("192.0.2.1"))]}, "exactly one"),
        ({"names": [x509.RFC822Name("alice")]}, "exactly one"),
        ({"names": [x509.UniformResourceIdentifier("alice")]}, "exactly one"),
        ({"names": ["alice\0.example.org"]}, r"alice\x00.example.org"),
        ({"names": ["alice\nroot logged in"]}, r"alice\nroot"),
        ({"names": ["alice\n"]}, r"alice\n"),
        ({"names": ["\x1b[2Jalice"]}, r"\x1b[2J"),
        ({"names": ["*.example.org"]}, "*.example.org"),
        ({"names": ["../alice"]}, "../alice"),
        ({"names": [""]}, "''"),
        ({"names": ["a" * 65]}, "aaa"),
        ({"names": ["a" * 9000]}, "..."),
    ],
)
def test_identity_refuses(shape, reason):
    assert reason in refused(pki.identity, outside(**shape).der, "client")


@pytest.mark.parametrize("data", [None, b"", b"\x30", b"\x30\x03\x02\x01\x01", b"-----BEGIN CERTIFICATE-----"])
def test_identity_refuses_what_is_no_certificate(data):
    assert "cannot be read" in refused(pki.identity, data, "client")


def name_or_reason(data):
    try:
        return pki.identity(data, "client")
    except pki.PKIError as error:
        assert str(error).isprintable() and len(str(error)) < 300
        return None


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_identity_of_garbage(data):
    assert name_or_reason(data) is None


VALID = outside(names=["alice", "bob"], usages=[CLIENT, SERVER]).der


@given(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=4), st.integers(0, 1))
@settings(deadline=None, max_examples=500)
def test_identity_of_damaged_certificates(at, new, cut):
    name = name_or_reason(VALID[:at] + new + VALID[at + len(new) + cut:])
    assert name is None or config.NAME.fullmatch(name)


ISSUER = outside()


@given(st.lists(st.text(st.characters(max_codepoint=127), max_size=70), max_size=3))
@settings(deadline=None, max_examples=50)
def test_identity_is_one_good_name_or_none(names):
    right = len(names) == 1 and config.NAME.fullmatch(names[0])
    assert name_or_reason(outside(ISSUER, names=names).der) == (names[0] if right else None)


# create_authority, renew_authority, issue.


def test_authority_may_sign_ends_and_nothing_else(authority):
    certificate = x509.load_pem_x509_certificate(authority[0].encode())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical and constraints.value == x509.BasicConstraints(True, 0)
    assert usage.critical and usage.value.key_cert_sign and usage.value.crl_sign and not usage.value.digital_signature
    assert pki.validity(certificate) == (NOW - HOUR, NOW + 100 * DAY)
    assert certificate.public_key().curve.name == "secp256r1"


def test_a_renewed_authority_is_the_same_but_for_its_dates(authority):
    old, new = (x509.load_pem_x509_certificate(pem.encode())
                for pem in (authority[0], pki.renew_authority(*authority, NOW + 5 * DAY, 700)))
    assert pki.validity(new) == (NOW + 5 * DAY - HOUR, NOW + 705 * DAY) and new.serial_number != old.serial_number
    assert (new.subject, new.issuer) == (old.subject, old.issuer) and is_signed_by(old, new) and is_signed_by(new, old)
    assert [(one.oid, one.critical, one.value) for one in new.extensions] == [
        (one.oid, one.critical, one.value) for one in old.extensions
    ]


def is_signed_by(certificate, issuer):
    issuer.public_key().verify(certificate.signature, certificate.tbs_certificate_bytes,
                               ec.ECDSA(certificate.signature_hash_algorithm))
    return True


@pytest.mark.parametrize("renewed", [(True, False), (False, True), (True, True)], ids=["server", "client", "both"])
@pytest.mark.parametrize("signed", ["before", "after"])
def test_tls_accepts_what_a_renewed_authority_signed_before_and_after(authority, renewed, signed):
    """Either end may have the new certificate first."""
    new = pki.renew_authority(*authority, NOW, 700)
    pair = ends(authority if signed == "before" else (new, authority[1]))
    pair = [(new if is_renewed else authority[0], *end[1:]) for end, is_renewed in zip(pair, renewed, strict=True)]
    seen_by_server, seen_by_client = handshake(*pair)
    assert (pki.identity(seen_by_server, "client"), pki.identity(seen_by_client, "server")) == ("alice", "server")
    for end, role in zip(pair, ("server", "client"), strict=True):
        assert pki.check_own(*end, role, NOW) == {
            "certificate": NOW + 10 * DAY, "ca": NOW + (700 if end[0] == new else 100) * DAY
        }


@pytest.mark.parametrize("order", [1, -1])
def test_the_former_certificate_of_an_authority_may_stand_beside_the_new_one(order):
    """Even when it has expired: OpenSSL and check_own take the one that is good."""
    authority = pki.create_authority("authority", NOW - 100 * DAY, 99)
    new = pki.renew_authority(*authority, NOW, 700)
    server, client = (("".join([authority[0], new][::order]), *end[1:]) for end in ends((new, authority[1])))
    handshake(server, client)
    assert pki.check_own(*client, "client", NOW)["ca"] == NOW + 700 * DAY


def test_an_authority_that_has_expired_is_renewed(authority):
    after = NOW + 200 * DAY
    assert "expired" in refused(pki.issue, *authority, "alice", "client", after, 1)
    new = pki.renew_authority(*authority, after, 5)
    assert pki.issue(new, authority[1], "alice", "client", after, 1)


@pytest.mark.parametrize("kind", KEYS)
def test_an_authority_from_elsewhere_is_renewed(kind):
    """Its own identifier of its issuer may name a serial number that is not the new one's, so it goes."""
    ca = outside(kind=kind)
    leaf = outside(ca)
    new = pki.renew_authority(ca.pem, ca.key, NOW, 5)
    assert pki.check_own(new, leaf.pem, leaf.key, "client", NOW)
    oids = [one.oid for one in x509.load_pem_x509_certificate(new.encode()).extensions]
    assert oids == [one.oid for one in ca.certificate.extensions
                    if one.oid != x509.AuthorityKeyIdentifier.oid] != []


def test_renew_authority_refuses(authority):
    root = outside()
    middle = outside(root)
    assert "signed by another authority" in refused(pki.renew_authority, middle.pem, middle.key, NOW, 5)
    assert "not the key" in refused(pki.renew_authority, root.pem, authority[1], NOW, 5)
    assert "not a certificate" in refused(pki.renew_authority, "", authority[1], NOW, 5)


def test_issue_allows_for_a_slow_clock_and_does_not_outlive_the_authority(authority):
    for days, expected in ((10, 10), (100, 100), (1000, 100)):
        certificate = x509.load_pem_x509_certificate(pki.issue(*authority, "a", "client", NOW, days)[0].encode())
        assert pki.validity(certificate) == (NOW - HOUR, NOW + expected * DAY)


@pytest.mark.parametrize("kind", KEYS)
def test_issue_by_an_authority_from_elsewhere(kind):
    ca = outside(kind=kind)
    certificate, key = pki.issue(ca.pem, ca.key, "alice", "client", NOW, 9)
    assert pki.check_own(ca.pem, certificate, key, "client", NOW)["certificate"] == pki.validity(ca.certificate)[1]


def test_serials_differ(authority):
    assert len({pki.describe(pki.issue(*authority, "a", "client", NOW, 1)[0]).serial for _ in range(8)}) == 8


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "client") for name in ("", "a b", "a/b", "a\n", "ä", "a" * 65)),
        *((name, "server") for name in (".", "a..b", ".a", "a.", "a" * 64, "192.0.2.1", "10.1")),
    ],
)
def test_issue_refuses_a_name(authority, name, role):
    assert "name" in refused(pki.issue, *authority, name, role, NOW, 1)


def test_authority_refuses_a_name():
    assert "name" in refused(pki.create_authority, "a\nb", NOW, 1)


def test_issue_refuses_a_bad_authority(authority):
    other = pki.create_authority("other", NOW, 100)
    arguments = ("alice", "client", NOW, 1)
    no_ids = outside(ids=False)
    assert "is not the key of ca.crt" in refused(pki.issue, authority[0], other[1], *arguments)
    assert "ca.crt: is not a certificate" in refused(pki.issue, "x", other[1], *arguments)
    assert "ca.key: is not a private key" in refused(pki.issue, authority[0], "x", *arguments)
    assert "expired" in refused(pki.issue, *authority, "alice", "client", NOW + 101 * DAY, 1)
    assert "subject key identifier" in refused(pki.issue, no_ids.pem, no_ids.key, *arguments)


# check_own.


def test_check_own_returns_the_expiries(authority):
    certificate, key = pki.issue(*authority, "alice", "client", NOW, 10)
    expiries = pki.check_own(authority[0], certificate, key, "client", NOW)
    assert expiries == {"certificate": NOW + 10 * DAY, "ca": NOW + 100 * DAY}
    assert {expiry.utcoffset() for expiry in expiries.values()} == {datetime.timedelta()}
    ca, unused = outside(last=NOW + 2 * DAY), outside(last=NOW + HOUR)
    leaf = outside(ca, last=NOW + 3 * DAY)
    assert pki.check_own(unused.pem + ca.pem, leaf.pem, leaf.key, "client", NOW) == {
        "certificate": NOW + 3 * DAY, "ca": NOW + 2 * DAY
    }


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("ca_kind", KEYS)
def test_check_own_with_any_kind_of_key(kind, ca_kind):
    ca = outside(kind=ca_kind)
    leaf = outside(ca, kind=kind)
    damaged = bytearray(leaf.der)
    damaged[-1] ^= 1
    assert pki.check_own(ca.pem, leaf.pem, leaf.key, "client", NOW)
    damaged = ssl.DER_cert_to_PEM_cert(bytes(damaged))
    assert "not signed by the ca" in refused(pki.check_own, ca.pem, damaged, leaf.key, "client", NOW)


def test_check_own_follows_a_chain_and_finds_the_right_authority():
    root, other = outside(), outside()
    middle = outside(root, last=NOW + HOUR)
    leaf = outside(middle)
    check = (leaf.key, "client", NOW)
    assert pki.check_own(other.pem + root.pem, leaf.pem + middle.pem, *check)["certificate"] == NOW + HOUR
    assert "not signed by the ca" in refused(pki.check_own, root.pem, leaf.pem, *check)
    assert "not signed by the ca" in refused(pki.check_own, other.pem, leaf.pem + middle.pem, *check)
    assert "not signed by the ca" in refused(pki.check_own, root.pem, leaf.pem + root.pem + middle.pem, *check)
    expired = outside(root, last=NOW - HOUR)
    leaf = outside(expired)
    assert "expired" in refused(pki.check_own, root.pem, leaf.pem + expired.pem, leaf.key, "client", NOW)


def encrypted(key):
    key = serialization.load_pem_private_key(key.encode(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, secret).decode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda good, bad: {"ca_pem": ""}, "ca: is not a certificate"),
        (lambda good, bad: {"ca_pem": good["key_pem"]}, "ca: is not a certificate"),
        (lambda good, bad: {"certificate_pem": good["certificate_pem"][:200]}, "certificate: is not a certificate"),
        (lambda good, bad: {"certificate_pem": good["certificate_pem"].replace("A", "B")}, "certificate: is not a"),
        (lambda good, bad: {"key_pem": good["certificate_pem"]}, "key: is not a private key"),
        (lambda good, bad: {"key_pem": good["key_pem"].replace("A", "B")}, "key: is not a private key"),
        (lambda good, bad: {"key_pem": encrypted(good["key_pem"])}, "key: is encrypted"),
        (lambda good, bad: {"key_pem": encrypted(good["key_pem"])[:80]}, "key: is encrypted"),
        (lambda good, bad: {"key_pem": bad["key_pem"]}, "key: does not belong to the certificate"),
        (lambda good, bad: {"ca_pem": bad["ca_pem"]}, "certificate: is not signed by the ca"),
        (lambda good, bad: {"role": "server"}, "does not name a server"),
        (lambda good, bad: {"now": NOW + 11 * DAY}, "certificate: expired at "),
        (lambda good, bad: {"now": NOW - 2 * HOUR}, "certificate: is not valid before "),
    ],
)
def test_check_own_refuses(authority, change, reason):
    def arguments(authority):
        certificate, key = pki.issue(*authority, "alice", "client", NOW, 10)
        names = ("ca_pem", "certificate_pem", "key_pem", "role", "now")
        return dict(zip(names, (authority[0], certificate, key, "client", NOW)))

    good = arguments(authority)
    pki.check_own(**good)
    # The same names everywhere, so that only the signature tells the two authorities apart.
    changed = good | change(good, arguments(pki.create_authority("authority", NOW, 100)))
    message = refused(pki.check_own, *changed.values())
    assert reason in message
    assert good["key_pem"].splitlines()[1] not in message


def test_check_own_takes_a_file_with_everything_in_it(authority):
    certificate, key = pki.issue(*authority, "alice", "client", NOW, 10)
    everything = f"Subject: alice\n{certificate}{key}"
    assert pki.check_own(authority[0] + authority[1], everything, everything, "client", NOW)


def test_check_own_says_the_dates_and_doubts_the_clock(authority):
    certificate, key = pki.issue(*authority, "alice", "client", NOW, 10)
    message = refused(pki.check_own, authority[0], certificate, key, "client", NOW + 11 * DAY)
    for moment in (NOW + 10 * DAY, NOW + 11 * DAY):
        assert f"{moment:%Y-%m-%d %H:%M UTC}" in message
    assert "clock" in message


def test_check_own_refuses_an_authority_that_expired():
    ca = outside(last=NOW - HOUR)
    leaf = outside(ca)
    assert refused(pki.check_own, ca.pem, leaf.pem, leaf.key, "client", NOW).startswith("ca: expired")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl command")
def test_check_own_takes_what_openssl_makes(tmp_path):
    def openssl(command):
        subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True)

    # With EC PARAMETERS in front of the key, and the traditional form of an EC key.
    openssl("ecparam -name prime256v1 -genkey -out key")
    openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca -subj /CN=ca -days 2")
    openssl("req -new -key key -out request -subj /CN=alice")
    tmp_path.joinpath("extensions").write_text("subjectAltName=DNS:alice\nextendedKeyUsage=clientAuth\n")
    openssl("x509 -req -in request -CA ca -CAkey ca.key -CAcreateserial -extfile extensions -out certificate -days 1")
    texts = [tmp_path.joinpath(name).read_text() for name in ("ca", "certificate", "key")]
    assert "EC PARAMETERS" in texts[2]
    now = datetime.datetime.now(datetime.timezone.utc)
    assert now < pki.check_own(*texts, "client", now)["certificate"] <= now + 1 * DAY
