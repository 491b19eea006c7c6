"""bulkvpnctl pki revoke, renew, crl and list: what is on record afterwards, and what a crash in between leaves."""

import datetime
import json
import os
import stat

import pytest
from cryptography import x509

from bulkvpnd import config, pki
from bulkvpnd.admin import files
from bulkvpnd.admin.errors import CommandError

DAY = datetime.timedelta(days=1)


@pytest.fixture
def site(tmp_path, pki_ctl):
    """A site with the clients alice and bob."""
    assert pki_ctl("init")[0] == 0
    for name in ("alice", "bob"):
        assert pki_ctl("add", name, "--remote", "x")[0] == 0
    return tmp_path / "site"


def now():
    return datetime.datetime.now(datetime.timezone.utc)


def serial(site, name, place="issued"):
    return x509.load_pem_x509_certificate((site / "pki" / place / f"{name}.crt").read_bytes()).serial_number


def listed(site):
    """Serial numbers on the list, which must be the authority's."""
    crl = pki.read_crl((site / "crl.pem").read_text(), (site / "pki" / "ca.crt").read_text())
    pki.check_crl_dates(crl, now())
    return {serial for _, serial in crl.revoked}


def states(pki_ctl):
    return {(row["name"], row["state"]) for row in json.loads(pki_ctl("list", "--json")[1]) if row["role"] == "client"}


def test_init_makes_a_list_that_the_server_goes_by(site):
    assert listed(site) == set()
    server, _ = config.load(["--config", str(site / "server.conf")])
    assert config.pem_text(server, "crl") == (site / "crl.pem").read_text()


def test_revoke_puts_that_name_on_the_list_and_no_other(site, pki_ctl):
    alice, bob = serial(site, "alice"), serial(site, "bob")
    status, out, error = pki_ctl("revoke", "alice")
    assert (status, error) == (0, "") and out.startswith("alice: 1 revoked")
    assert listed(site) == {alice} and bob not in listed(site)
    assert states(pki_ctl) == {("alice", "revoked"), ("bob", "valid")}
    assert serial(site, f"{alice:x}", "revoked") == alice
    # Everybody may read it: the daemon, who is not root, does.
    assert stat.S_IMODE((site / "crl.pem").stat().st_mode) == 0o644

    status, _, error = pki_ctl("revoke", "alice")
    assert status == 1 and "alice: has no such certificate" in error
    assert pki_ctl("revoke", "bob")[0] == 0
    assert listed(site) == {alice, bob}


def test_a_revoked_name_can_be_given_again(site, pki_ctl):
    old = serial(site, "alice")
    pki_ctl("revoke", "alice")
    assert pki_ctl("add", "alice", "--remote", "x")[0] == 0
    assert listed(site) == {old} and serial(site, "alice") != old


def test_revoke_takes_what_was_renewed_too(site, pki_ctl):
    first = serial(site, "alice")
    assert pki_ctl("renew", "alice")[0] == 0
    second = serial(site, "alice")
    assert pki_ctl("revoke", "alice", "--replaced")[0] == 0
    assert listed(site) == {first}
    assert pki_ctl("renew", "alice")[0] == 0
    third = serial(site, "alice")
    assert pki_ctl("revoke", "alice")[1].startswith("alice: 2 revoked")
    assert listed(site) == {first, second, third}


def test_crl_goes_further_and_forgets_nobody(site, pki_ctl):
    alice = serial(site, "alice")
    pki_ctl("revoke", "alice")
    assert pki_ctl("crl", "--days", "10")[0] == 0
    first = pki.read_crl((site / "crl.pem").read_text(), (site / "pki" / "ca.crt").read_text())
    assert first.last <= now() + 10 * DAY and listed(site) == {alice}
    (site / "crl.pem").unlink()
    assert pki_ctl("crl")[0] == 0
    assert listed(site) == {alice}, "made again from what is on record"
    (site / "crl.pem").write_text("damaged")
    assert pki_ctl("crl")[0] == 0
    assert listed(site) == {alice}
    second = pki.read_crl((site / "crl.pem").read_text(), (site / "pki" / "ca.crt").read_text())
    assert second.last > now() + 3600 * DAY and second.number >= first.number


def test_a_revocation_that_was_cut_short_is_not_forgotten(site, pki_ctl, monkeypatch):
    alice = serial(site, "alice")

    def crash(*arguments):
        raise CommandError("the machine crashed")

    with monkeypatch.context() as patch:
        patch.setattr(files, "move", crash)
        assert pki_ctl("revoke", "alice")[0] == 1
    assert listed(site) == {alice} and serial(site, "alice") == alice
    assert pki_ctl("crl")[0] == 0
    assert listed(site) == {alice}
    assert pki_ctl("revoke", "alice")[0] == 0
    assert states(pki_ctl) == {("alice", "revoked"), ("bob", "valid")}


def test_a_list_that_nobody_goes_by_is_told_of(site, pki_ctl):
    file = site / "server.conf"
    file.write_text(file.read_text().replace("crl = crl.pem\n", ""))
    status, _, error = pki_ctl("revoke", "alice")
    assert status == 0 and "add the line crl = crl.pem" in error


# renew


def loaded(file):
    configuration, _ = config.load(["--config", str(file)])
    return configuration, [config.pem_text(configuration, name) for name in ("ca", "certificate", "key")]


def test_renew_a_client_with_a_whole_configuration(site, pki_ctl, tmp_path):
    old, file = serial(site, "alice"), tmp_path / "client.conf"
    assert pki_ctl("renew", "alice", "--remote", "vpn.example.org", "--output", str(file)) == (0, "", "")
    configuration, pem = loaded(file)
    assert configuration.remote == (("vpn.example.org", 7443),) and configuration.server_name == "server"
    assert pki.check_own(*pem, "client", now())
    described = pki.describe(pem[1])
    assert (described.name, described.serial) == ("alice", serial(site, "alice")) and described.serial != old
    assert serial(site, f"{old:x}", "replaced") == old
    assert listed(site) == set(), "until the new one is in place the old one must work"
    assert states(pki_ctl) == {("alice", "replaced"), ("alice", "valid"), ("bob", "valid")}


def test_renew_a_client_prints_the_blocks_to_put_in_place(site, pki_ctl, tmp_path):
    status, out, _ = pki_ctl("renew", "alice")
    file = tmp_path / "client.conf"
    file.touch(0o600)
    file.write_text("mode = client\nremote = x\n" + out)
    assert status == 0 and pki.check_own(*loaded(file)[1], "client", now())


def test_renew_the_server_in_place(site, pki_ctl):
    file = site / "server.conf"
    file.write_text("# mine\nmtu = 1400\n" + file.read_text())
    before, old = loaded(file), serial(site, "server")
    status, out, error = pki_ctl("renew", "server")
    assert (status, error) == (0, "") and "systemctl reload" in out
    configuration, pem = loaded(file)
    assert configuration.mtu == 1400 and file.read_text().startswith("# mine\n")
    assert (configuration.pool_ipv4, configuration.crl) == (before[0].pool_ipv4, before[0].crl)
    assert pem[0] == before[1][0] and pem[2] != before[1][2] and pki.check_own(*pem, "server", now())
    assert pki.describe(pem[1]).serial == serial(site, "server") != old
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert pki_ctl("add", "carol", "--remote", "x")[0] == 0, "one server is in use, and not two"


def test_renew_a_server_whose_configuration_names_files(site, pki_ctl, tmp_path):
    (site / "server.conf").write_text("mode = server\n")
    before = (site / "server.conf").read_text()
    status, out, _ = pki_ctl("renew", "server")
    assert status == 0 and "<key>" in out and (site / "server.conf").read_text() == before


def authority_name(pki_ctl):
    return next(row["name"] for row in json.loads(pki_ctl("list", "--json")[1]) if row["role"] == "authority")


def test_renew_the_authority(site, pki_ctl, tmp_path):
    """Both ends' certificates and the revocation list stay as they are, and go with it."""
    file, ca_file = site / "server.conf", site / "pki" / "ca.crt"
    file.write_text("# mine\n" + file.read_text())
    pki_ctl("revoke", "bob")
    (_, before), old, crl = loaded(file), ca_file.read_text(), (site / "crl.pem").read_text()
    alice = (site / "pki" / "issued" / "alice.crt").read_text()
    status, out, error = pki_ctl("renew", authority_name(pki_ctl), "--days", "7000")
    assert (status, error) == (0, "") and "systemctl reload" in out and out.count("\n") == 2
    new = ca_file.read_text()
    assert new != old and pki.describe_authority(new)[2] > now() + 6999 * DAY
    _, after = loaded(file)
    assert after == [new.strip() + "\n" * before[0].endswith("\n"), *before[1:]]
    assert file.read_text().startswith("# mine\n") and pki.check_own(*after, "server", now())
    assert [stat.S_IMODE(one.stat().st_mode) for one in (file, ca_file)] == [0o600, 0o644]
    assert (site / "pki" / "issued" / "alice.crt").read_text() == alice
    assert (site / "crl.pem").read_text() == crl and len(listed(site)) == 1
    # The next client gets it.
    assert pki_ctl("add", "carol", "--remote", "x", "--output", str(tmp_path / "client.conf"))[0] == 0
    assert loaded(tmp_path / "client.conf")[1][0].strip() == new.strip()


def test_renew_an_authority_that_the_servers_configuration_names_as_a_file(site, pki_ctl):
    (site / "server.conf").write_text("mode = server\nca = ca.pem\n")
    status, out, _ = pki_ctl("renew", authority_name(pki_ctl))
    assert status == 0 and "server.conf: does not have the former one inside" in out
    assert (site / "server.conf").read_text() == "mode = server\nca = ca.pem\n"


def test_renew_an_authority_without_a_servers_configuration_beside_it(site, pki_ctl):
    (site / "server.conf").unlink()
    status, out, _ = pki_ctl("renew", authority_name(pki_ctl))
    assert status == 0 and out.count("\n") == 1 and not (site / "server.conf").exists()


def test_renew_an_authority_whose_configuration_cannot_be_written_changes_nothing(site, pki_ctl, monkeypatch):
    name, old = authority_name(pki_ctl), (site / "pki" / "ca.crt").read_text()
    replace = files.replace

    def full(file, *arguments):
        if file.name == "server.conf":
            raise CommandError("the disk is full")
        replace(file, *arguments)

    monkeypatch.setattr(files, "replace", full)
    assert pki_ctl("renew", name) == (1, "", "bulkvpnctl: the disk is full\n")
    assert (site / "pki" / "ca.crt").read_text() == old


@pytest.mark.parametrize("flag", ["--remote=x", "--output=/nowhere/file"])
def test_renew_an_authority_makes_no_configuration(site, pki_ctl, flag):
    old = (site / "pki" / "ca.crt").read_text()
    status, out, error = pki_ctl("renew", authority_name(pki_ctl), flag)
    assert (status, out) == (os.EX_USAGE, "") and "is the authority" in error
    assert (site / "pki" / "ca.crt").read_text() == old


@pytest.mark.parametrize("command", [("renew", "carol"), ("renew", "server", "--remote", "x"), ("renew", "a\nb"),
                                     ("renew", "alice", "--output", "/nowhere/file")])  # fmt: skip
def test_renew_that_cannot_be_changes_nothing(site, pki_ctl, command):
    def tree():
        return {path: path.is_file() and path.read_text() for path in site.rglob("*")}

    before = tree()
    status, out, error = pki_ctl(*command)
    assert status in (1, os.EX_USAGE) and out == "" and error.count("\n") == 1
    assert tree() == before


# list


def test_list_warns_ahead_of_time(site, pki_ctl):
    assert pki_ctl("list")[0] == 0
    assert pki_ctl("add", "carol", "--remote", "x", "--days", "31")[0] == 0
    assert pki_ctl("list")[0] == 0
    assert pki_ctl("add", "dave", "--remote", "x", "--days", "30")[0] == 0
    status, out, error = pki_ctl("list")
    assert status == 2 and error.count("\n") == 1 and "client dave expires on " in error and "pki renew dave" in error
    assert "expiring" in out
    rows = {row["name"]: row for row in json.loads(pki_ctl("list", "--json")[1])}
    assert rows["dave"]["state"] == "expiring" and rows["dave"]["days"] == 29 and rows["carol"]["state"] == "valid"
    # One that is not in use any more is nobody's worry.
    assert pki_ctl("renew", "dave")[0] == 0
    assert pki_ctl("list")[::2] == (0, "")


def test_list_warns_of_the_authority_first(tmp_path, pki_ctl):
    """What it signed ends with it, and so would what is signed before it is renewed."""
    assert pki_ctl("init", "--days", "20")[0] == 0
    name = authority_name(pki_ctl)
    status, _, error = pki_ctl("list")
    assert status == 2 and [line.split()[1] for line in error.splitlines()] == ["authority", "server", "crl"]
    assert f"authority {name} expires on " in error and f"make another with: bulkvpnctl pki renew {name}\n" in error
    for command in (("renew", name), ("renew", "server"), ("crl",)):
        assert pki_ctl("list")[0] == 2 and pki_ctl(*command)[0] == 0
    assert pki_ctl("list")[::2] == (0, "")


def test_list_warns_of_the_revocation_list(site, pki_ctl):
    pki_ctl("crl", "--days", "5")
    status, _, error = pki_ctl("list")
    assert status == 2 and "crl crl.pem expires on " in error and "bulkvpnctl pki crl" in error
