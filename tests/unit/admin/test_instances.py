"""bulkvpnctl init-instances: what it writes can be started together, and nothing is overwritten or left half done."""

import itertools
import os
import pathlib
import shutil

import pytest

from bulkvpnd import config
from bulkvpnd.config import values

EXAMPLE = pathlib.Path(__file__).parents[3] / "docs" / "examples" / "four-instances"
MULTIPATH = "10.2.0.0/16 weight 2 source 10.1.0.1"
FAR = "[client far]\nipv4 = 10.9.0.70\nnetworks = 10.2.0.0/16\n"


@pytest.fixture
def site(tmp_path, pki_ctl):
    """A directory with server.conf and client.conf as `bulkvpnctl pki` makes them, and a network behind the client."""
    pools = "--pool-ipv4", "10.9.0.0/24", "--pool-ipv6", "fd09::/64"
    remotes = "--remote", "192.0.2.1", "--remote", "[2001:db8::1]"
    assert pki_ctl("init", *pools, directory=tmp_path)[0] == 0
    assert pki_ctl("add", "far", *remotes, "--output", tmp_path / "client.conf", directory=tmp_path)[0] == 0
    (tmp_path / "server.clients.d").mkdir()
    (tmp_path / "server.clients.d" / "far.conf").write_text(FAR)
    return tmp_path


@pytest.fixture
def make(ctl, tmp_path):
    """Runs bulkvpnctl init-instances COUNT there, or in another directory."""

    def run(count, *arguments, directory=tmp_path):
        return ctl("init-instances", count, "--directory", directory, *arguments)

    return run


def loaded(directory, mode, count):
    return [config.load(["--config", str(directory / f"{mode}{number}.conf")])[0] for number in range(1, count + 1)]


def texts(directory, name=None):
    """{file: text} of the configurations below a directory. name: what it is called in them."""
    return {str(file.relative_to(directory)): file.read_text().replace(str(directory), name or str(directory))
            for file in directory.rglob("*.conf")}


@pytest.mark.parametrize("count", [2, 3, 4, 64])
def test_servers_share_no_port_no_address_and_no_device(site, count, make):
    status, said, _ = make(count, "--multipath", MULTIPATH)
    assert status == 0
    servers = loaded(site, "server", count)
    assert [one.listen for one in servers] == [((("::"), 7443 + number),) for number in range(count)]
    assert [one.device for one in servers] == [f"server{number}" for number in range(1, count + 1)]
    for name, whole in (("pool_ipv4", "10.9.0.0/24"), ("pool_ipv6", "fd09::/64")):
        pools = [getattr(one, name) for one in servers]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(pools, 2))
        assert all(str(pool.supernet(new_prefix=int(whole.partition("/")[2]))) == whole for pool in pools)
    single = config.load(["--config", str(site / "server.conf")])[0]
    for one in servers:
        assert one.multipath == (values.multipath(MULTIPATH),)
        assert (one.ca, one.certificate, one.key, one.crl) == (single.ca, single.certificate, single.key, single.crl)
        assert one.path.stat().st_mode & 0o777 == 0o600
    assert f"{site / 'server1.conf'}: made" in said and "systemctl disable --now bulkvpnd@server\n" in said


def test_clients_go_to_the_ports_of_the_servers(site, make):
    assert make(4)[0] == 0
    assert make(4, "--from", site / "client.conf")[0] == 0
    for server, client in zip(loaded(site, "server", 4), loaded(site, "client", 4)):
        port = server.listen[0][1]
        assert client.remote == (("192.0.2.1", port), ("2001:db8::1", port))
        assert not client.multipath


def test_the_client_of_a_directory_without_a_server(site, make):
    (site / "server.conf").unlink()
    assert make(2)[0] == 0
    assert [one.mode for one in loaded(site, "client", 2)] == ["client", "client"]


def test_what_the_administrator_wrote_stays(site, make):
    text = (site / "server.conf").read_text()
    more = "connections = 8\ndevice = office7\nmultipath = fd02::/48\nroutes = 10.1.0.0/16\nroutes = 10.3.0.0/16\n"
    (site / "server.conf").write_text(more + text)
    (site / "server.clients.d" / "far.conf").write_text(FAR + "networks = fd02::/48\n")
    assert make(2, "--multipath", MULTIPATH)[0] == 0
    for number, one in enumerate(loaded(site, "server", 2), 1):
        assert (one.connections, one.device) == (8, f"office{number}")
        assert list(map(str, one.multipath)) == ["fd02::/48 weight 1", MULTIPATH]
        assert len(one.routes) == 2


@pytest.mark.parametrize(
    ("site", "wishes"),
    [("site-a", ("10.2.0.0/16 source 10.1.0.1", "fd02::/48 source fd01::1")),
     ("site-b", ("10.1.0.0/16 source 10.2.0.1", "fd01::/48 source fd02::1"))],
)
def test_the_example_is_what_it_makes(tmp_path, pki_ctl, make, site, wishes):
    if not EXAMPLE.exists():
        pytest.skip("needs the source tree; the documents are not beside these tests")
    pki_ctl("init", directory=tmp_path / "pki")
    pki_ctl("add", "site-b", "--remote", "a", "--output", tmp_path / "pki" / "client.conf", directory=tmp_path / "pki")
    made = tmp_path / "made"
    # What it begins with, and the certificates and keys that an example cannot have.
    shutil.copytree(EXAMPLE / site, made, ignore=shutil.ignore_patterns("*[1-4].*"))
    (mode,) = (file.stem for file in made.glob("*.conf"))
    whole = config.load(["--config", str(tmp_path / "pki" / f"{mode}.conf")])[0]
    given = config.load(["--config", str(made / f"{mode}.conf")])[0]
    for name in ("ca", "certificate", "key", *(["crl"] if mode == "server" else [])):
        file = config.pem_path(given, name)
        file.write_text(config.pem_text(whole, name))
        file.chmod(0o600)
    assert make(4, *itertools.chain(*(("--multipath", wish) for wish in wishes)), directory=made)[0] == 0
    assert texts(made, "/etc/bulkvpn") == texts(EXAMPLE / site)


def test_networks_behind_clients_are_every_instance_s_and_fixed_addresses_one_s(site, make):
    (site / "server.clients.d" / "notes.txt").write_text("not read")
    assert make(4)[0] == 0
    for number in range(1, 5):
        made = site / f"server{number}.clients.d"
        assert [file.name for file in made.iterdir()] == ["far.conf"]
        text = (made / "far.conf").read_text()
        assert "\nnetworks = 10.2.0.0/16\n" in text
        assert ("\nipv4 = 10.9.0.70\n" in text) == (number == 2)
        assert ("\n# not of this instance's pool: ipv4 = 10.9.0.70\n" in text) == (number != 2)


def test_paths_still_lead_where_they_did(site, tmp_path, make):
    text = (site / "client.conf").read_text()
    for name in ("ca", "certificate", "key"):
        block = text[text.index(f"<{name}>") : text.index(f"</{name}>") + len(name) + 4]
        text = text.replace(block, f"{name} = {name}.pem\n")
        (site / f"{name}.pem").write_text("".join(block.splitlines(keepends=True)[1:-1]))
        (site / f"{name}.pem").chmod(0o600)
    (site / "client.conf").write_text(text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert make(2, "--from", site / "client.conf")[0] == 0
    assert make(2, "--from", site / "client.conf", directory=elsewhere)[0] == 0
    assert loaded(site, "client", 1)[0].ca[0] == pathlib.Path("ca.pem")
    assert make(2, "--from", site / "server.conf", directory=elsewhere)[0] == 0
    assert loaded(elsewhere, "server", 2)[1].crl == (site / "crl.pem", None)
    for one in loaded(elsewhere, "client", 2):
        assert config.pem_text(one, "key") == (site / "key.pem").read_text()


@pytest.fixture
def refused(make, tmp_path):
    """Runs it, which fails and changes nothing. Returns what it says."""

    def run(*arguments):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        status, _, said = make(*arguments)
        assert status in (1, os.EX_CONFIG) and said.startswith("bulkvpnctl: ") and said.count("\n") == 1
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return said

    return run


def test_nothing_is_overwritten(site, refused):
    (site / "server3.conf").write_text("mine")
    assert f"{site / 'server3.conf'}: exists already" in refused(4)
    (site / "server3.conf").unlink()
    (site / "server2.clients.d").mkdir()
    (site / "server2.clients.d" / "far.conf").write_text("[client far]\n")
    assert f"{site / 'server2.clients.d'}: exists already" in refused(4)


@pytest.mark.parametrize(
    ("old", "new", "count", "expected"),
    [
        ("listen = [::]:7443", "listen = [::]:65535", 2, "listen: 2 instances need 2 ports from each of these on"),
        ("listen = [::]:7443", "listen = [::]:7443\nlisten = [::]:7444", 2, "listen: 2 instances need 2 ports"),
        ("mode = server", "mode = server\nmetrics = 127.0.0.1:65535", 2, "listen, metrics: 2 instances need 2 ports"),
        ("mode = server", "mode = server\nmetrics = 127.0.0.1:7444", 2, "listen, metrics: 2 instances need 2 ports"),
        ("10.9.0.0/24", "10.9.0.0/25", 64, "pool-ipv4 = 10.9.0.0/25: is too small to be shared by 64 instances"),
        ("fd09::/64", "fd09::/124", 8, "pool-ipv6 = fd09::/124: is too small to be shared by 8 instances"),
        ("mode = server", "mode = server\nstate-directory = /x", 2, "server.conf:7: state-directory: each instance"),
        ("mode = server", "mode = server\nmultipath = 10.2.0.0/16", 2, "multipath = 10.2.0.0/16: given twice"),
        ("mode = server", "mode = both", 2, "mode = both: should be one of"),
    ],
)
def test_what_cannot_work_is_said_and_leaves_nothing(site, old, new, count, expected, refused):
    file = site / "server.conf"
    file.write_text(file.read_text().replace(old, new))
    lines = file.read_text().splitlines()
    if "state-directory = /x" in lines:
        expected = expected.replace(":7:", f":{lines.index('state-directory = /x') + 1}:")
    assert expected in refused(count, "--multipath", MULTIPATH)


def test_metrics_have_a_port_in_each(site, make):
    for file in (site / "server.conf", site / "client.conf"):
        file.write_text("metrics = [::1]:9743\n" + file.read_text())
    assert make(3)[0] == make(3, "--from", site / "client.conf")[0] == 0
    for mode in ("server", "client"):
        assert [one.metrics for one in loaded(site, mode, 3)] == [("::1", 9743), ("::1", 9744), ("::1", 9745)]


def test_networks_behind_clients_are_carried_together_whether_asked_for_or_not(site, make):
    """Each instance would make a route of its own to them, and only the first would start."""
    with (site / "server.clients.d" / "far.conf").open("a") as file:
        file.write("networks = fd02::/48\n")
    status, said, _ = make(2, "--multipath", MULTIPATH)
    assert status == 0
    for one in loaded(site, "server", 2):
        assert list(map(str, one.multipath)) == [MULTIPATH, "fd02::/48 weight 1"]
    assert "fd02::/48: is behind a client" in said and "10.2.0.0/16: is behind" not in said


@pytest.mark.parametrize(
    ("prefix", "text", "expected"),
    [
        ("10.3.0.0/16", FAR, "server.conf: multipath = 10.3.0.0/16: is behind no client; write networks = "),
        ("10.2.0.0/16", FAR + "colour = red\n", "server.clients.d/far.conf:4: colour: unknown"),
        ("10.2.0.0/16", FAR.replace(".70", ".64"), "server2.clients.d/far.conf:2: ipv4 = 10.9.0.64: should be an"),
        ("10.2.0.0/16 weight 2", "[client far]\n", "server.conf: multipath = 10.2.0.0/16: is behind no client"),
    ],
)
def test_what_the_daemon_would_not_start_with_is_not_made(site, refused, prefix, text, expected):
    """--check of bulkvpnd(8) is asked, of the one that they come from and of those that would be made."""
    (site / "server.clients.d" / "far.conf").write_text(text)
    assert f"{site}/{expected}" in refused(4, "--multipath", prefix)


def test_a_certificate_that_does_not_fit_is_not_multiplied(site, refused):
    text = (site / "client.conf").read_text()
    block = text[text.index("<key>") : text.index("</key>")]
    other = (site / "server.conf").read_text()
    file = site / "server.conf"
    file.write_text(other.replace(other[other.index("<key>") : other.index("</key>")], block))
    assert f"{file}: key: " in refused(2)


def test_a_file_that_is_not_there(tmp_path, refused):
    assert f"{tmp_path / 'server.conf'}: cannot be read" in refused(2)


@pytest.mark.parametrize("arguments", [["1"], ["65"], ["four"], ["4", "--multipath", "10.2.0.1/16"]])
def test_wrong_arguments(arguments, ctl):
    status, _, error = ctl("init-instances", *arguments)
    assert status == 64 and "should be" in error


def test_a_directory_that_is_not_there(site, make):
    gone = site / "gone"
    status, _, error = make(2, "--from", site / "server.conf", directory=gone)
    assert status == 1 and "cannot be created" in error and not gone.exists()
