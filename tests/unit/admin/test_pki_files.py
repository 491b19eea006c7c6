"""bulkvpnctl pki init, add and list: what is in the files that they make, and what they leave alone."""

import datetime
import ipaddress
import json
import os
import resource
import shutil
import stat
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bulkvpnd import config, pki

DAY = datetime.timedelta(days=1)


@pytest.fixture
def site(tmp_path, pki_ctl):
    """The directory of a site for which `pki init` has run."""
    status, _, error = pki_ctl("init")
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


def test_init_and_add_make_configurations_that_fit(site, pki_ctl):
    server, server_pem = loaded(site / "server.conf")
    assert server.mode == "server" and server.listen == (("::", 7443),)
    assert server.pool_ipv4.subnet_of(ipaddress.ip_network("10.64.0.0/10")) and server.pool_ipv4.prefixlen == 24
    assert server.pool_ipv6.subnet_of(ipaddress.ip_network("fd00::/8")) and server.pool_ipv6.prefixlen == 64
    status, out, error = pki_ctl("add", "alice", "--remote", "vpn.example.org")
    assert (status, error) == (0, "")
    file = site / "client.conf"
    file.touch(0o600)
    file.write_text(out)
    client, client_pem = loaded(file)
    assert (client.mode, client.remote, client.server_name) == ("client", (("vpn.example.org", 7443),), "server")
    now = datetime.datetime.now(datetime.timezone.utc)
    for pem, role in ((server_pem, "server"), (client_pem, "client")):
        assert min(pki.check_own(*pem, role, now).values()) > now + 3649 * DAY
    assert (pki.describe(server_pem[1]).name, pki.describe(client_pem[1]).name) == ("server", "alice")


def test_init_takes_what_it_is_told(pki_ctl, site, tmp_path):
    other = tmp_path / "a" / "b"
    settings = "--name hub --days 5 --pool-ipv4 10.1.0.0/16 --pool-ipv6 fd01::/64 --listen 192.0.2.1:443".split()
    assert pki_ctl("init", *settings, directory=other)[0] == 0
    server, pem = loaded(other / "server.conf")
    assert (str(server.pool_ipv4), str(server.pool_ipv6)) == ("10.1.0.0/16", "fd01::/64")
    assert server.listen == (("192.0.2.1", 443),)
    assert pki.describe(pem[1]).name == "hub"
    assert pki.describe(pem[1]).expires <= datetime.datetime.now(datetime.timezone.utc) + 5 * DAY
    pki_ctl("add", "alice", "--remote", "x", "--output", str(tmp_path / "client.conf"), directory=other)
    client, _ = loaded(tmp_path / "client.conf")
    # The port that this server listens on, and the name that its certificate has.
    assert (client.remote, client.server_name) == ((("x", 443),), "hub")


def test_pools_and_authorities_of_two_sites_differ(pki_ctl, tmp_path):
    texts = set()
    for name in ("a", "b"):
        pki_ctl("init", directory=tmp_path / name)
        server, pem = loaded(tmp_path / name / "server.conf")
        issuer = x509.load_pem_x509_certificate(pem[0].encode()).subject.rfc4514_string()
        texts |= {str(server.pool_ipv6), issuer}
    assert len(texts) == 4


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_modes_whatever_the_umask(tmp_path, pki_ctl, umask):
    before = os.umask(umask)
    try:
        assert pki_ctl("init")[0] == 0
        assert pki_ctl("add", "alice", "--remote", "x", "--output", str(tmp_path / "site" / "client.conf"))[0] == 0
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
def test_init_overwrites_nothing(tmp_path, pki_ctl, name):
    file = tmp_path / "site" / name
    file.parent.mkdir(parents=True)
    for make in (lambda: file.write_text("precious"), lambda: file.symlink_to("nowhere")):
        make()
        before = tree(tmp_path)
        status, out, error = pki_ctl("init")
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


def test_init_where_a_directory_cannot_be(tmp_path, pki_ctl):
    (tmp_path / "file").touch()
    status, _, error = pki_ctl("init", directory=tmp_path / "file" / "site")
    assert status == 1 and "file" in one_line(error)
    status, _, error = pki_ctl("init", directory=tmp_path / "new\nline" / "\x1b" / ("x" * 300))
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
def test_add_remotes(pki_ctl, tmp_path, remote, expected):
    pki_ctl("init", "--listen", "[::]:1234")
    file = tmp_path / "client.conf"
    arguments = [word for one in remote for word in ("--remote", one)]
    assert pki_ctl("add", "alice", *arguments, "--connections", "7", "--output", str(file)) == (0, "", "")
    client, _ = loaded(file)
    assert (client.remote, client.connections) == (expected, 7)


def test_add_without_a_server_configuration_uses_the_default_port(pki_ctl, site):
    (site / "server.conf").unlink()
    assert "\nremote = x:7443\n" in pki_ctl("add", "alice", "--remote", "x")[1]


def test_add_does_not_guess_the_port_from_a_broken_file(pki_ctl, site):
    (site / "server.conf").write_text("nonsense\n")
    before = tree(site)
    status, out, error = pki_ctl("add", "alice", "--remote", "x")
    assert (status, out) == (1, "") and "server.conf:1:" in one_line(error) and "--remote x:PORT" in error
    assert tree(site) == before
    assert pki_ctl("add", "alice", "--remote", "x:1")[0] == 0


def test_add_issues_a_name_once(pki_ctl, site):
    assert pki_ctl("add", "alice", "--remote", "x")[0] == 0
    before = tree(site)
    for name, again in (("alice", "renew alice --remote x;"), ("server", "renew server;")):
        status, out, error = pki_ctl("add", name, "--remote", "x")
        assert (status, out) == (1, "") and f"{name}.crt: exists" in one_line(error)
        assert f"bulkvpnctl pki {again}" in error and f"bulkvpnctl pki revoke {name};" in error
        assert "move it away" not in error, "what is away cannot be revoked"
    assert tree(site) == before
    # Nor where somebody moved it to another name, by which revoke still finds it.
    (site / "pki" / "issued" / "alice.crt").rename(site / "pki" / "issued" / "old.crt")
    assert "old.crt: exists" in one_line(pki_ctl("add", "alice", "--remote", "x")[2])


def test_add_does_not_overwrite_its_output_nor_keep_the_name(pki_ctl, site):
    file = site / "client.conf"
    file.write_text("precious")
    before = tree(site)
    status, _, error = pki_ctl("add", "alice", "--remote", "x", "--output", str(file))
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


def test_add_needs_exactly_one_server(pki_ctl, site):
    record = site / "pki" / "issued" / "server.crt"
    shutil.copy(record, record.with_name("second.crt"))
    status, _, error = pki_ctl("add", "alice", "--remote", "x")
    assert status == 1 and "2 server certificates" in one_line(error)


def test_add_names_the_file_of_a_key_that_others_can_read(pki_ctl, site):
    (site / "pki" / "ca.key").chmod(0o644)
    status, _, error = pki_ctl("add", "alice", "--remote", "x")
    assert status == os.EX_CONFIG and "ca.key" in one_line(error) and "chmod 600" in error


def test_add_names_the_directory_of_a_bad_authority(pki_ctl, site, tmp_path):
    pki_ctl("init", directory=tmp_path / "other")
    shutil.copy(tmp_path / "other" / "pki" / "ca.key", site / "pki" / "ca.key")
    status, _, error = pki_ctl("add", "alice", "--remote", "x")
    assert status == 1 and f"{site}/pki: ca.key: is not the key" in one_line(error)


@pytest.mark.parametrize("command", [("add", "alice", "--remote", "x"), ("list",)])
def test_before_init(pki_ctl, command):
    status, _, error = pki_ctl(*command)
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
def test_wrong_usage(pki_ctl, tmp_path, command):
    status, out, error = pki_ctl(*command)
    assert (status, out) == (os.EX_USAGE, "") and error.startswith("usage: ")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("command", [("init",), ("add", "alice", "--remote", "x"), ("list",)])
def test_without_permission(pki_ctl, site, tmp_path, unprivileged, command):
    before = tree(site)
    for directory in (site, tmp_path / "new"):
        with unprivileged():
            status, out, error = pki_ctl(*command, directory=directory)
        assert (status, out) == (os.EX_NOPERM, "") and "run it as root" in one_line(error)
    assert tree(site) == before


def test_list(pki_ctl, site):
    pki_ctl("add", ".hidden", "--remote", "x")
    pki_ctl("add", "a-much-longer-name", "--remote", "x")
    status, out, error = pki_ctl("list", "--json")
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

    lines = pki_ctl("list")[1].splitlines()
    assert [line.split() for line in lines[1:]] == [
        [row["name"], row["role"], row["state"], row["expires"][:10], row["serial"]] for row in rows
    ]
    assert len({line.index(word) for line, word in zip(lines, ("ROLE", "client", "client"))}) == 1


def certificate(extension):
    """One with this extension alone, in PEM."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bad")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + DAY)
    made = builder.add_extension(extension, False).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize("content", [
    "nonsense", certificate(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])),
    certificate(x509.SubjectAlternativeName([x509.DNSName("bad")])),
], ids=["nonsense", "no name", "no role"])
def test_list_names_a_record_it_cannot_use(pki_ctl, site, content):
    (site / "pki" / "issued" / "bad.crt").write_text(content)
    status, _, error = pki_ctl("list")
    assert status == 1 and "issued/bad.crt: certificate: " in one_line(error)
