"""bulkvpnd.pki and bulkvpnctl pki: real files, and real TLS 1.3 handshakes in memory between what they make."""

import contextlib
import dataclasses
import datetime
import ipaddress
import json
import os
import resource
import shutil
import ssl
import stat
import subprocess
import sys

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


# create_authority, issue.


def test_authority_may_sign_ends_and_nothing_else(authority):
    certificate = x509.load_pem_x509_certificate(authority[0].encode())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical and constraints.value == x509.BasicConstraints(True, 0)
    assert usage.critical and usage.value.key_cert_sign and usage.value.crl_sign and not usage.value.digital_signature
    assert pki.validity(certificate) == (NOW - HOUR, NOW + 100 * DAY)
    assert certificate.public_key().curve.name == "secp256r1"


def test_issue_allows_for_a_slow_clock_and_does_not_outlive_the_authority(authority):
    for days, expected in ((10, 10), (100, 100), (1000, 100)):
        certificate = x509.load_pem_x509_certificate(pki.issue(*authority, "a", "client", NOW, days)[0].encode())
        assert pki.validity(certificate) == (NOW - HOUR, NOW + expected * DAY)


@pytest.mark.parametrize("kind", KEYS)
def test_issue_by_an_authority_from_elsewhere(kind):
    ca = outside(kind=kind)
    certificate, key = pki.issue(ca.pem, ca.key, "alice", "client", NOW, 9)
    assert pki.check_own(ca.pem, certificate, key, "client", NOW) == pki.validity(ca.certificate)[1]


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


def test_check_own_returns_the_first_expiry(authority):
    certificate, key = pki.issue(*authority, "alice", "client", NOW, 10)
    expiry = pki.check_own(authority[0], certificate, key, "client", NOW)
    assert expiry == NOW + 10 * DAY and expiry.utcoffset() == datetime.timedelta()
    ca = outside(last=NOW + 2 * DAY)
    leaf = outside(ca, last=NOW + 3 * DAY)
    assert pki.check_own(ca.pem, leaf.pem, leaf.key, "client", NOW) == NOW + 2 * DAY


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
    assert pki.check_own(other.pem + root.pem, leaf.pem + middle.pem, *check) == NOW + HOUR
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
    assert now < pki.check_own(*texts, "client", now) <= now + 1 * DAY


# The command.


@pytest.fixture
def ctl(tmp_path, capsys):
    """Runs bulkvpnctl pki with --directory tmp_path/site: returns (status, standard output, standard error)."""

    def run(command, *arguments, directory=tmp_path / "site"):
        try:
            status = cli.bulkvpnctl(["pki", command, "--directory", str(directory), *arguments])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def site(tmp_path, ctl):
    """The directory of a site for which `pki init` has run."""
    status, _, error = ctl("init")
    assert (status, error) == (0, "")
    return tmp_path / "site"


def tree(directory):
    """{path: (mode, content)} of everything below."""
    return {
        str(path.relative_to(directory)): (stat.S_IMODE(path.lstat().st_mode), path.is_file() and path.read_text())
        for path in directory.rglob("*")
    }


def one_line(error):
    assert error.startswith("bulkvpnctl: ") and error.count("\n") == 1, error
    return error


def loaded(file):
    """(Configuration, (ca, certificate, key))."""
    configuration, _ = config.load(["--config", str(file)])
    return configuration, tuple(config.pem_text(configuration, name) for name in ("ca", "certificate", "key"))


def separate(*command, **settings):
    """bulkvpnctl pki in its own process, for what belongs to a process."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 60, **settings}
    return subprocess.run([sys.executable, "-m", "bulkvpnd.admin", "pki", *map(str, command)], **settings)


def test_init_and_add_make_configurations_that_connect(site, ctl):
    server, server_pem = loaded(site / "server.conf")
    assert server.mode == "server" and server.listen == (("::", 7443),)
    assert server.pool_ipv4.subnet_of(ipaddress.ip_network("10.64.0.0/10")) and server.pool_ipv4.prefixlen == 24
    assert server.pool_ipv6.subnet_of(ipaddress.ip_network("fd00::/8")) and server.pool_ipv6.prefixlen == 64

    status, out, error = ctl("add", "alice", "--remote", "vpn.example.org")
    assert (status, error) == (0, "")
    file = site / "client.conf"
    file.touch(0o600)
    file.write_text(out)
    client, client_pem = loaded(file)
    assert (client.mode, client.remote, client.server_name) == ("client", (("vpn.example.org", 7443),), "server")

    for pem, role in ((server_pem, "server"), (client_pem, "client")):
        assert pki.check_own(*pem, role, NOW + HOUR) > NOW + 3649 * DAY
    seen_by_server, seen_by_client = handshake(server_pem, client_pem, client.server_name)
    assert pki.identity(seen_by_server, "client") == "alice"
    assert pki.identity(seen_by_client, "server") == "server"


def test_init_takes_what_it_is_told(ctl, site, tmp_path):
    other = tmp_path / "a" / "b"
    settings = "--name hub --days 5 --pool-ipv4 10.1.0.0/16 --pool-ipv6 fd01::/64 --listen 192.0.2.1:443".split()
    assert ctl("init", *settings, directory=other)[0] == 0
    server, pem = loaded(other / "server.conf")
    assert (str(server.pool_ipv4), str(server.pool_ipv6)) == ("10.1.0.0/16", "fd01::/64")
    assert server.listen == (("192.0.2.1", 443),)
    assert pki.describe(pem[1]).name == "hub"
    assert pki.describe(pem[1]).expires <= datetime.datetime.now(datetime.timezone.utc) + 5 * DAY
    ctl("add", "alice", "--remote", "x", "--output", str(tmp_path / "client.conf"), directory=other)
    client, _ = loaded(tmp_path / "client.conf")
    # The port that this server listens on, and the name that its certificate has.
    assert (client.remote, client.server_name) == ((("x", 443),), "hub")


def test_pools_and_authorities_of_two_sites_differ(ctl, tmp_path):
    texts = set()
    for name in ("a", "b"):
        ctl("init", directory=tmp_path / name)
        server, pem = loaded(tmp_path / name / "server.conf")
        issuer = x509.load_pem_x509_certificate(pem[0].encode()).subject.rfc4514_string()
        texts |= {str(server.pool_ipv6), issuer}
    assert len(texts) == 4


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_modes_whatever_the_umask(tmp_path, ctl, umask):
    before = os.umask(umask)
    try:
        assert ctl("init")[0] == 0
        assert ctl("add", "alice", "--remote", "x", "--output", str(tmp_path / "site" / "client.conf"))[0] == 0
    finally:
        os.umask(before)
    site = tmp_path / "site"
    assert stat.S_IMODE(site.stat().st_mode) == 0o755
    assert {name: mode for name, (mode, _) in tree(site).items()} == {
        "server.conf": 0o600,
        "client.conf": 0o600,
        "crl.pem": 0o644,
        "pki": 0o700,
        "pki/ca.key": 0o600,
        "pki/ca.crt": 0o644,
        "pki/issued": 0o700,
        "pki/issued/server.crt": 0o644,
        "pki/issued/alice.crt": 0o644,
    }


@pytest.mark.parametrize("name", ["pki/ca.key", "pki/ca.crt", "pki/issued/server.crt", "crl.pem", "server.conf"])
def test_init_overwrites_nothing(tmp_path, ctl, name):
    file = tmp_path / "site" / name
    file.parent.mkdir(parents=True)
    for make in (lambda: file.write_text("precious"), lambda: file.symlink_to("nowhere")):
        make()
        before = tree(tmp_path)
        status, out, error = ctl("init")
        assert (status, out) == (1, "") and str(file) in one_line(error) and "--directory" in error
        assert tree(tmp_path) == before
        file.unlink()


def test_init_that_fails_half_way_leaves_nothing(tmp_path):
    def small_files():
        # ca.key and ca.crt fit, server.conf does not. Python ignores SIGXFSZ, so write(2) fails with EFBIG.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    result = separate("init", "--directory", tmp_path / "a" / "site", preexec_fn=small_files)
    assert result.returncode == 1 and "server.conf" in one_line(result.stderr)
    assert tree(tmp_path) == {}
    (tmp_path / "pki").mkdir(mode=0o700)
    assert separate("init", "--directory", tmp_path, preexec_fn=small_files).returncode == 1
    assert list(tree(tmp_path)) == ["pki"]


def test_init_where_a_directory_cannot_be(tmp_path, ctl):
    (tmp_path / "file").touch()
    status, _, error = ctl("init", directory=tmp_path / "file" / "site")
    assert status == 1 and "file" in one_line(error)
    status, _, error = ctl("init", directory=tmp_path / "new\nline" / "\x1b" / ("x" * 300))
    assert status == 1 and r"new\nline/\x1b/" in one_line(error)
    assert list(tree(tmp_path)) == ["file"]


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        (["vpn.example.org:99"], (("vpn.example.org", 99),)),
        (["192.0.2.1"], (("192.0.2.1", 1234),)),
        (["[2001:db8::1]"], (("2001:db8::1", 1234),)),
        (["[2001:db8::1]:99", "b"], (("2001:db8::1", 99), ("b", 1234))),
    ],
)
def test_add_remotes(ctl, tmp_path, remote, expected):
    ctl("init", "--listen", "[::]:1234")
    file = tmp_path / "client.conf"
    arguments = [word for one in remote for word in ("--remote", one)]
    assert ctl("add", "alice", *arguments, "--connections", "7", "--output", str(file)) == (0, "", "")
    client, _ = loaded(file)
    assert (client.remote, client.connections) == (expected, 7)


def test_add_without_a_server_configuration_uses_the_default_port(ctl, site):
    (site / "server.conf").unlink()
    assert "\nremote = x:7443\n" in ctl("add", "alice", "--remote", "x")[1]


def test_add_does_not_guess_the_port_from_a_broken_file(ctl, site):
    (site / "server.conf").write_text("nonsense\n")
    before = tree(site)
    status, out, error = ctl("add", "alice", "--remote", "x")
    assert (status, out) == (1, "") and "server.conf:1:" in one_line(error) and "--remote x:PORT" in error
    assert tree(site) == before
    assert ctl("add", "alice", "--remote", "x:1")[0] == 0


def test_add_issues_a_name_once(ctl, site):
    assert ctl("add", "alice", "--remote", "x")[0] == 0
    before = tree(site)
    for name in ("alice", "server"):
        status, out, error = ctl("add", name, "--remote", "x")
        assert (status, out) == (1, "") and f"{name}.crt" in one_line(error) and "exists" in error
    assert tree(site) == before


def test_add_does_not_overwrite_its_output_nor_keep_the_name(ctl, site):
    file = site / "client.conf"
    file.write_text("precious")
    before = tree(site)
    status, _, error = ctl("add", "alice", "--remote", "x", "--output", str(file))
    assert status == 1 and str(file) in one_line(error)
    assert tree(site) == before


def test_add_whose_output_is_lost_does_not_keep_the_name(site):
    before = tree(site)
    with open("/dev/full", "w") as full:
        result = separate("add", "alice", "--remote", "x", "--directory", site, stdout=full)
    assert result.returncode == 1 and "standard output" in result.stderr.splitlines()[0]
    assert tree(site) == before


def test_add_whose_output_nobody_reads_does_not_keep_the_name(site):
    before = tree(site)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = separate("add", "alice", "--remote", "x", "--directory", site, stdout=writing)
    finally:
        os.close(writing)
    assert (result.returncode, result.stderr) == (1, "")
    assert tree(site) == before


def test_add_on_a_terminal_says_how_to_keep_the_key(site):
    terminal, other_side = os.openpty()
    try:
        result = separate("add", "alice", "--remote", "x", "--directory", site, stdout=other_side)
    finally:
        os.close(other_side)
        os.close(terminal)
    assert result.returncode == 0
    assert "umask 077" in one_line(result.stderr) and "--output" in result.stderr


def test_add_needs_exactly_one_server(ctl, site):
    record = site / "pki" / "issued" / "server.crt"
    shutil.copy(record, record.with_name("second.crt"))
    status, _, error = ctl("add", "alice", "--remote", "x")
    assert status == 1 and "2 server certificates" in one_line(error)


def test_add_names_the_file_of_a_key_that_others_can_read(ctl, site):
    (site / "pki" / "ca.key").chmod(0o644)
    status, _, error = ctl("add", "alice", "--remote", "x")
    assert status == 1 and "ca.key" in one_line(error) and "chmod 600" in error


def test_add_names_the_directory_of_a_bad_authority(ctl, site, tmp_path):
    ctl("init", directory=tmp_path / "other")
    shutil.copy(tmp_path / "other" / "pki" / "ca.key", site / "pki" / "ca.key")
    status, _, error = ctl("add", "alice", "--remote", "x")
    assert status == 1 and f"{site}/pki: ca.key: is not the key" in one_line(error)


@pytest.mark.parametrize("command", [("add", "alice", "--remote", "x"), ("list",)])
def test_before_init(ctl, command):
    status, _, error = ctl(*command)
    assert status == 1 and "run bulkvpnctl pki init first" in one_line(error)


@pytest.mark.parametrize(
    "command",
    [
        ("init", "--name", "a/b"),
        ("init", "--days", "0"),
        ("init", "--days", "1e3"),
        ("init", "--pool-ipv4", "10.0.0.1/24"),
        ("init", "--pool-ipv6", "10.0.0.0/24"),
        ("init", "--listen", "2001:db8::1"),
        ("add", "../alice", "--remote", "x"),
        ("add", "alice"),
        ("add", "alice", "--remote", "x\nkey = /etc/shadow"),
        ("add", "alice", "--remote", "x", "--connections", "0"),
    ],
)
def test_wrong_usage(ctl, tmp_path, command):
    status, out, error = ctl(*command)
    assert (status, out) == (os.EX_USAGE, "") and error.startswith("usage: ")
    assert tree(tmp_path) == {}


@pytest.fixture
def unprivileged():
    """As a user who owns nothing here. A context manager, because root sets up and looks at the result."""

    @contextlib.contextmanager
    def drop():
        if os.geteuid() != 0:
            pytest.skip("needs root, to become somebody else")
        try:
            os.seteuid(1234)
        except OSError as error:
            pytest.skip(f"this namespace has no user 1234: {error}")
        try:
            yield
        finally:
            os.seteuid(0)

    return drop


@pytest.mark.parametrize("command", [("init",), ("add", "alice", "--remote", "x"), ("list",)])
def test_without_permission(ctl, site, tmp_path, unprivileged, command):
    before = tree(site)
    for directory in (site, tmp_path / "new"):
        with unprivileged():
            status, out, error = ctl(*command, directory=directory)
        assert (status, out) == (os.EX_NOPERM, "") and "run it as root" in one_line(error)
    assert tree(site) == before


def test_list(ctl, site):
    ctl("add", ".hidden", "--remote", "x")
    ctl("add", "a-much-longer-name", "--remote", "x")
    status, out, error = ctl("list", "--json")
    rows = json.loads(out)
    assert (status, error) == (0, "")
    assert [(row["name"], row["role"]) for row in rows[:3]] == [
        (".hidden", "client"),
        ("a-much-longer-name", "client"),
        ("server", "server"),
    ]
    assert [row["role"] for row in rows[3:]] == ["authority", "crl"]
    assert {row["state"] for row in rows} == {"valid"} and all(3640 < row["days"] <= 3650 for row in rows)
    record = x509.load_pem_x509_certificate((site / "pki" / "issued" / "server.crt").read_bytes())
    assert int(rows[2]["serial"], 16) == record.serial_number
    assert datetime.datetime.fromisoformat(rows[2]["expires"]) == pki.validity(record)[1]

    lines = ctl("list")[1].splitlines()
    assert [line.split() for line in lines[1:]] == [
        [row["name"], row["role"], row["state"], row["expires"][:10], row["serial"]] for row in rows
    ]
    assert len({line.index(word) for line, word in zip(lines, ("ROLE", "client", "client"))}) == 1


@pytest.mark.parametrize("content", ["nonsense", outside(names=None).pem, outside(usages=None).pem])
def test_list_names_a_record_it_cannot_use(ctl, site, content):
    (site / "pki" / "issued" / "bad.crt").write_text(content)
    status, _, error = ctl("list")
    assert status == 1 and "issued/bad.crt: certificate: " in one_line(error)
