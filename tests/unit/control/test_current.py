"""control.current: another configuration comes into force, or nothing changes."""

import dataclasses

import pytest
from doubles import DAY, NOW, Authority, configuration

from bulkvpnd import config, pki
from bulkvpnd.control.current import Current, check


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def site(tmp_path, authority):
    return Site(tmp_path, authority.issue("server", "server"))


class Site:
    """A server's configuration in force, and how it is replaced by another."""

    def __init__(self, directory, end, mode="server", **options):
        self.directory, self.end, self.mode, self.options = directory, end, mode, options
        self.calls = []
        self.current = Current(*check(self.written()), lambda text: text or self.written())

    def written(self, **options):
        end = options.pop("end", self.end)
        return configuration(self.directory, options.pop("mode", self.mode), end, **{**self.options, **options})

    def replace(self, prepare=None, **options):
        prepare = prepare or (lambda old, new: self.calls.append((old, new)))
        return self.current.replace(self.written(**options), prepare)


def test_nothing_new(site):
    before = site.current.configuration
    assert site.replace() == ({}, [])
    assert site.current.configuration == before


def test_what_is_live_is_in_force_and_the_rest_waits(site):
    live, restart = site.replace(grace="77", routes="192.168.7.0/24", keepalive="3", mtu="1400", nat=None, workers="3")
    assert live == {"grace": config.NOW, "routes": config.SESSIONS, "keepalive": config.CONNECTIONS}
    assert restart == ["mtu", "workers"]
    now = site.current.configuration
    assert (now.grace, now.keepalive, str(now.routes[0])) == (77, 3, "192.168.7.0/24")
    assert (now.mtu, now.workers) == (1500, None), "as it runs"
    (old, new), = site.calls
    assert old.grace == 30 and new is now
    # Until then it is said each time.
    assert site.replace(mtu="1400")[1] == ["mtu"]
    assert site.replace() == ({}, [])


PEM = {"ca", "certificate", "key", "crl"}
"""Compared by their texts, below."""
CHECKED = {"mode", "nat", "multipath"} | PEM
"""What is looked at before it is in force, so any value will not do."""


@pytest.mark.parametrize("role", ["server", "client"])
def test_every_option_does_what_its_row_says(role, tmp_path, authority):
    options = {} if role == "server" else {"remote": "127.0.0.1"}
    for option in config.OPTIONS:
        if option.role not in (None, role) or option.name in CHECKED:
            continue
        site = Site(tmp_path, authority.issue("server" if role == "server" else "alice", role), role, **options)
        before = getattr(site.current.configuration, option.field)
        other = "/usr/bin/true" if option.group == "Hooks" else "other"
        wanted = dataclasses.replace(site.current.configuration, **{option.field: other})
        live, restart = site.current.replace(wanted, lambda old, new: None)
        in_force = getattr(site.current.configuration, option.field)
        when = option.reload_of(role)
        if when == config.RESTART:
            assert (live, restart, in_force) == ({}, [option.name], before)
        else:
            assert (live, restart, in_force) == ({option.name: when}, [], other)


def test_another_certificate_is_another_context(site, authority):
    before = site.current.revocations.context
    live, restart = site.replace(end=authority.issue("server", "server"))
    assert (set(live), restart) == ({"certificate", "key"}, [])
    assert site.current.revocations.context is not before


def test_what_is_in_force_says_when_it_expires(site, authority):
    """Of another authority's certificate and list too, once they are in force and not before."""
    assert site.current.expiries == {"certificate": NOW + 10 * DAY, "ca": NOW + 100 * DAY}
    other = Authority("other")
    other.pem = pki.renew_authority(other.pem, other.key, NOW, 200)
    certificate = pki.issue(other.pem, other.key, "server", "server", NOW, 20)
    (site.directory / "crl.pem").write_text(pki.create_crl(other.pem, other.key, {}, 1, NOW, 30))
    with pytest.raises(config.ConfigurationError):
        site.replace(end=(authority.pem, *certificate))
    assert site.current.expiries["ca"] == NOW + 100 * DAY
    site.replace(end=(other.pem, *certificate), crl="crl.pem")
    assert site.current.expiries == {
        "certificate": NOW + 20 * DAY, "ca": NOW + 200 * DAY, "crl": NOW + 30 * DAY
    }


def test_a_file_that_changed_under_the_same_name_is_read_again(tmp_path, authority):
    files = {}
    for name, text in zip(("ca", "certificate", "key"), authority.issue("server", "server"), strict=True):
        files[name] = tmp_path / f"{name}.pem"
        files[name].touch(0o600)
        files[name].write_text(text)
    path = tmp_path / "server.conf"
    path.write_text("mode = server\npool-ipv4 = 10.86.0.0/24\n"
                    + "".join(f"{name} = {file}\n" for name, file in files.items()))
    made = check(config.load(["--config", str(path)])[0])
    current = Current(*made, lambda text: config.load(["--config", str(path)], text)[0])
    assert current.replace(None, lambda old, new: None) == ({}, [])
    for name, text in zip(("ca", "certificate", "key"), authority.issue("server", "server"), strict=True):
        files[name].write_text(text)
    assert set(current.replace(None, lambda old, new: None)[0]) == {"certificate", "key"}


@pytest.fixture
def clients(site):
    """Where the files of clients are."""
    directory = site.directory / "server.clients.d"
    directory.mkdir()
    return directory


def named(site):
    return [client.name for client in site.current.configuration.clients]


def test_clients_of_the_directory_are_read_again(site, clients):
    (clients / "a.conf").write_text("[client alice]\nipv4 = 10.86.0.9\n")
    assert site.replace() == ({"server.clients.d": config.NOW}, [])
    assert named(site) == ["alice"] and site.replace() == ({}, [])
    (clients / "b.conf").write_text("[client bob]\nnetworks = 192.168.7.0/24\n")
    (clients / "a.conf").unlink()
    assert site.replace() == ({"server.clients.d": config.NOW}, [])
    assert named(site) == ["bob"]


def test_a_wrong_file_of_clients_changes_nothing(site, clients):
    (clients / "a.conf").write_text("[client alice]\nipv4 = 10.86.0.9\n")
    site.replace()
    before = site.current.configuration
    (clients / "b.conf").write_text("[client bob]\nipv4 = 10.86.0.9\n")
    with pytest.raises(config.ConfigurationError, match="b.conf:2: ipv4 = 10.86.0.9: given twice, first at .*a.conf:2"):
        site.replace(grace="77")
    assert site.current.configuration is before


def test_clients_of_another_pool_wait_with_it(site, clients):
    (clients / "a.conf").write_text("[client alice]\nipv4 = 10.99.0.9\n")
    assert site.replace(pool_ipv4="10.99.0.0/24") == ({}, ["pool-ipv4", "server.clients.d"])
    assert named(site) == []


def test_what_is_wrong_changes_nothing(site, authority):
    before = (site.current.configuration, site.current.revocations)

    def failing(old, new):
        raise OSError("metrics = 192.0.2.9:1: cannot assign")

    with pytest.raises(OSError, match="metrics"):
        site.replace(failing, grace="77")
    with pytest.raises(config.ConfigurationError, match="certificate"):
        site.replace(end=authority.issue("server", "client"), grace="77")
    with pytest.raises(config.ConfigurationError, match="missing.pem: cannot be read"):
        site.replace(crl="missing.pem", grace="77")
    with pytest.raises(config.ConfigurationError, match="on-up = /no/such: No such file"):
        site.replace(on_up="/no/such", grace="77")
    client = configuration(site.directory, "client", authority.issue("alice"), remote="127.0.0.1")
    with pytest.raises(config.ConfigurationError, match="mode = client: this instance runs as a server"):
        site.current.replace(client, lambda old, new: None)
    assert (site.current.configuration, site.current.revocations) == before
