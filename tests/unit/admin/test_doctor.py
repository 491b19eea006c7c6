"""`bulkvpnctl doctor`: each check on a machine in memory, fine and not; tests/netns has the real one."""

import dataclasses
import datetime
import io
import ipaddress
import json
import os
import subprocess
import sys
import threading

import pytest
import rich.console
from reports import changed

from bulkvpnd import config, pki
from bulkvpnd.admin import checks, doctor
from bulkvpnd.admin.diagnosis import FINE, NOT_CHECKED, NOTE, PROBLEM, Verdict
from bulkvpnd.admin.machine import Greeting, Machine
from bulkvpnd.admin.status import StatusError
from bulkvpnd.host.firewall import FirewallError
from bulkvpnd.host.sysctl import Outcome
from bulkvpnd.host.tuning import Wish

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.timezone.utc)
WELL = changed(workers=[{"index": 0, "alive": True, "restarts": 0}], session__agreed_connections=2,
               addresses=["10.86.0.1/24"])
MASQUERADE = {"rule": {"family": "inet", "table": "bulkvpnd_x", "chain": "nat", "expr": [{"masquerade": None}]}}
SWITCH = {"mode": "client", "kill_switch": True}


def drop(name, *conditions, table="bulkvpnd_x", verdict="drop"):
    return {"rule": {"family": "inet", "table": table, "chain": name, "expr": [*conditions, {verdict: None}]}}


CLOSED = [drop("kill-switch-output"), drop("kill-switch-forward")]


def dport(right, *rest, op="==", family="inet"):
    left = {"payload": {"protocol": "tcp", "field": "dport"}}
    return {"rule": {"family": family, "table": "filter", "chain": "input", "handle": 7,
                     "expr": [{"match": {"op": op, "left": left, "right": right}}, *(rest or [{"accept": None}])]}}


def chain(hook, policy="drop", table="filter"):
    return {"chain": {"family": "inet", "table": table, "name": hook, "hook": hook, "policy": policy}}


class Double:
    """A machine that is well but for `answers`: method -> value, exception to raise, or function."""

    fine = {
        "check_files": None, "now": NOW, "report": WELL, "requirements": [("gevent", "22.10", "24.11.1+x")],
        "open_tun": None, "clock_is_kept": True, "resolve": [(2, ("192.0.2.1", 7443))],
        "greet": Greeting("done", None, "192.0.2.1:7443", name="server"), "towards": ["eth0"], "mtu": 1500,
        "ping": True, "listening": {7443}, "half_open": [], "ruleset": [], "forwarded": [4], "sysctl": "1",
        "tuned": [(Wish("congestion", "TCP_CONGESTION", "bbr", "exact"), Outcome("TCP_CONGESTION", "x", "bbr", "bbr"))],
        "routes": [(ipaddress.ip_network("192.0.2.0/24"), "eth0"), (ipaddress.ip_network("10.86.0.0/24"), "bulk0")],
        "dns_manager": "systemd-resolved", "name_servers": ["10.86.0.1"], "asks": True,
        "recorded": ["10.86.0.1"], "asked": ["10.86.0.1"],
        "hop": lambda name, address, distance: {1: "10.86.0.1", 3: "192.0.2.254"}.get(distance),
    }  # fmt: skip

    def __init__(self, texts=None, **answers):
        self.texts = texts or config.ConfigurationError("certificate: missing")
        self.answers = {**self.fine, **answers}

    def pem(self, name):
        if isinstance(self.texts, Exception):
            raise self.texts
        return self.texts[name]

    def __getattr__(self, name):
        answer = self.answers[name]

        def method(*arguments):
            if isinstance(answer, Exception):
                raise answer
            return answer(*arguments) if callable(answer) else answer

        return method


def options(mode, **fields):
    values = {option.field: config.value_of(option, None, "", None) for option in config.OPTIONS}
    values |= {"mode": mode, "remote": (("vpn.example.org", 7443),) if mode == "client" else (),
               "pool_ipv4": ipaddress.ip_network("10.86.0.0/24") if mode == "server" else None, **fields}
    return config.Configuration(name="x", path="/etc/bulkvpn/x.conf", **values)


def states(check, mode="client", machine=None, **fields):
    """What a check finds: {state: its texts and mends}."""
    subject = checks.examined(options(mode, **fields), machine or Double())
    look = next(one.look for one in checks.CHECKS if one.name == check)
    found = {}
    for verdict in look(subject):
        found[verdict.state] = found.get(verdict.state, "") + f"{verdict.text}|{verdict.mend}\n"
    return found


@pytest.fixture(scope="module")
def texts():
    """name: PEM; the client's certificate is good in 2026."""
    begin = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    ca, ca_key = pki.create_authority("authority", begin, 3650)
    certificate, key = pki.issue(ca, ca_key, "laptop", "client", begin, 365)
    crl = pki.create_crl(ca, ca_key, {7: begin}, 1, begin, 365)
    return {"ca": ca, "certificate": certificate, "key": key, "crl": crl}


OTHER = [(ipaddress.ip_network("10.86.0.128/25"), "eth1")]
LARGER = [(ipaddress.ip_network("10.0.0.0/8"), "eth1")]
XT = {"rule": {"family": "inet", "table": "filter", "chain": "input", "handle": 3, "expr": [{"xt": None}]}}
DROP, LIMITED = {"drop": None}, {"limit": {"rate": 10, "per": "second"}}
GATEWAY = {"mode": "server", "nat": True}
FULL = {"redirect_gateway": True}
SILENT = {"hop": lambda name, address, distance: "10.86.0.1"}
"""The server forwards, and no router behind it answers."""
REFUSED = Outcome("net.x", "1", "2", "1", "refused")
STOPPED = StatusError("instance x is not running")
CASES = [
    # check, state that is found, what else is in it; the double's answers; the configuration
    ("packages", PROBLEM, "gevent is 21.1", {"requirements": [("gevent", "22.10", "21.1")]}, {}),
    ("packages", PROBLEM, "gevent is missing", {"requirements": [("gevent", "22.10", None)]}, {}),
    ("packages", NOT_CHECKED, "source", {"requirements": LookupError("source tree")}, {}),
    ("TUN", PROBLEM, "modprobe tun", {"open_tun": FileNotFoundError(2, "No such file")}, {}),
    ("TUN", NOT_CHECKED, "root", {"open_tun": PermissionError(13, "no")}, {}),
    ("configuration", PROBLEM, "--check", {"check_files": config.ConfigurationError("bad.conf: bad")}, {}),
    ("clock", NOTE, "timedatectl", {"clock_is_kept": False}, {}),
    ("instance", NOTE, "systemctl start bulkvpnd@x", {"report": STOPPED}, {}),
    ("instance", NOTE, "1 restarts", {"report": changed(session__agreed_connections=2)}, {}),
    ("instance", PROBLEM, "no connection", {"report": changed(mode="client", sessions=[])}, {}),
    ("offload", NOTE, "fraction", {"report": changed(offload=[])}, {}),
    ("offload", NOT_CHECKED, "not run", {"report": STOPPED}, {}),
    ("names", PROBLEM, "getent ahosts vpn.example.org", {"resolve": OSError(1, "no such name")}, {}),
    ("server", PROBLEM, "let TCP port 7443", {"greet": Greeting("connect", "refused", "192.0.2.1:7443")}, {}),
    ("server", PROBLEM, "certificate is revoked|on the authority's machine: bulkvpnctl pki add NAME --remote "
     "vpn.example.org:7443 --output NAME.conf; then here: bulkvpnctl import NAME.conf --name x --force --start",
     {"greet": Greeting("tls", "TLS: SSLV3_ALERT_CERTIFICATE_REVOKED", "a")}, {}),
    ("server", PROBLEM, "nothing listens there, or a firewall turns it away|on the server: bulkvpnctl doctor",
     {"greet": Greeting("connect", "Connection refused", "192.0.2.1:7443")}, {}),
    ("server", PROBLEM, "has expired", {"greet": Greeting("tls", "TLS: SSLV3_ALERT_CERTIFICATE_EXPIRED", "a")}, {}),
    ("server", PROBLEM, "clock is behind", {"greet": Greeting("tls", "certificate is not yet valid", "a")}, {}),
    ("server", PROBLEM, "bulkvpnctl status", {"greet": Greeting("connect", "Connection reset by peer", "a")}, {}),
    ("server", PROBLEM, "certificate for gate, and server-name is server|in /etc/bulkvpn/x.conf: server-name = gate,",
     {"greet": Greeting("done", None, "192.0.2.1:7443", name="gate")}, {}),
    ("server", PROBLEM, "authority that this client does not know|in /etc/bulkvpn/x.conf: take ca,",
     {"greet": Greeting("tls", "the peer's certificate: self-signed certificate in certificate chain", "a")}, {}),
    ("server", PROBLEM, "authority that this client does not know|in /etc/bulkvpn/x.conf: take ca,",
     {"greet": Greeting("tls", "the peer's certificate: unable to get local issuer certificate", "a")}, {}),
    ("server", PROBLEM, "something else", {"greet": Greeting("tls", "something else", "a")}, {}),
    ("server", NOT_CHECKED, "no such name", {"greet": OSError(1, "no such name")}, {}),
    ("server", NOT_CHECKED, "no address", {"greet": None}, {}),
    ("path MTU", NOT_CHECKED, "no route", {"towards": OSError(1, "no route")}, {}),
    ("WAN MTU", NOT_CHECKED, "no route", {"towards": OSError(1, "no route")}, {"mode": "server"}),
    ("forwarding", NOT_CHECKED, "net.ipv4.ip_forward: no such", {"sysctl": OSError(2, "no such")}, GATEWAY),
    ("DNS", NOT_CHECKED, "no name server", {"name_servers": []}, {}),
    ("DNS", PROBLEM, "systemd-resolved does not answer", {"name_servers": None}, {}),
    ("NAT", NOTE, "set nat = yes", {}, {"mode": "server", "dns": ("10.86.0.1",)}),
    ("path MTU", PROBLEM, "gets no packets of 1500 bytes, the MTU of eth0|set wan-mtu = 1300\n",
     {"ping": lambda address, size: size <= 1300}, {}),
    ("path MTU", PROBLEM, "set wan-mtu = 1300\n", {"ping": lambda address, size: size <= 1300, "mtu": 1400}, {}),
    ("path MTU", PROBLEM, "set wan-mtu = 1500\n", {"ping": lambda address, size: size <= 1500, "mtu": 9000}, {}),
    ("path MTU", PROBLEM, "set wan-mtu = 1280\n", {"ping": lambda address, size: size <= 1280}, {}),
    ("path MTU", PROBLEM, "no packets of 1280 bytes, which any path has to carry|tracepath -n 192.0.2.1",
     {"ping": lambda address, size: size < 1280}, {}),
    ("path MTU", NOT_CHECKED, "answers no ping", {"ping": False}, {}),
    ("path MTU", NOTE, "eth0 has 9000", {"ping": False, "mtu": 9000}, {}),
    ("path MTU", NOT_CHECKED, "iputils-ping", {"ping": FileNotFoundError(2, "ping")}, {}),
    ("path MTU", NOT_CHECKED, "no device", {"towards": []}, {}),
    ("WAN MTU", NOTE, "eth0 has 9000", {"mtu": 9000}, {"mode": "server"}),
    ("WAN MTU", NOT_CHECKED, "no device", {"towards": []}, {"mode": "server"}),
    ("beyond", NOT_CHECKED, "redirect-gateway = no", {}, {}),
    ("beyond", NOT_CHECKED, "no connection", {"report": STOPPED}, FULL),
    ("beyond", NOT_CHECKED, "no connection", {"report": changed(session__connections=[])}, FULL),
    ("beyond", NOT_CHECKED, "iputils-ping", {"hop": FileNotFoundError(2, "ping")}, FULL),
    ("beyond", NOT_CHECKED, "no netlink", {"routes": OSError(1, "no netlink")}, FULL),
    # The server forwards nothing; or it does, no answer comes back, and names cannot be asked for, whoever has them.
    ("beyond", PROBLEM, "IPv4: nothing beyond the server answers|on the server: bulkvpnctl doctor; it has to",
     {"hop": None}, FULL),
    ("beyond", PROBLEM, "nothing beyond", {**SILENT, "asks": False, "asked": ["198.51.100.53"]}, FULL),
    ("beyond", PROBLEM, "nothing beyond", {**SILENT, "asks": False, "name_servers": ["198.51.100.53"]}, FULL),
    ("beyond", PROBLEM, "nothing beyond", {**SILENT, "asks": False},
     {**FULL, "dns": ("198.51.100.53",)}),
    # No name server is beyond it: routers may be silent. Nor does one help that is reached outside, or by itself.
    ("beyond", NOTE, "nothing beyond the server answers", SILENT, FULL),
    ("beyond", NOTE, "nothing beyond", {**SILENT, "asked": ["192.0.2.53", "127.0.0.1"]}, FULL),
    ("beyond", NOTE, "IPv6: nothing beyond the server answers",
     {"report": changed(session__agreed_connections=2, addresses=["10.86.0.2/24", "fd86::2/64"]),
      "hop": lambda name, address, distance: None if ":" in address else f"198.51.100.{distance}"}, FULL),
    ("congestion", NOTE, "modprobe tcp_bbr",
     {"tuned": [(Wish("congestion", "TCP_CONGESTION", "bbr", "exact"),
                 Outcome("TCP_CONGESTION", "cubic", "bbr", "cubic", "no such file"))]}, {}),
    ("congestion", NOT_CHECKED, "not say", {"tuned": []}, {}),
    ("tuning", NOTE, "net.x: is 1, not 2", {"tuned": [(Wish("o", "net.x", "2", "exact"), REFUSED)]}, {}),
    ("tuning", NOTE, "net.x: is 1, not 2: Permission denied",
     {"report": changed(not_tuned={"net.x": "Permission denied"}),
      "tuned": lambda name, addresses, refused: [(Wish("o", "net.x", "2", "exact"),
                                                  Outcome("net.x", "1", "2", "1", refused["net.x"]))]}, {}),
    ("tuning", NOT_CHECKED, "not run", {"report": STOPPED}, {}),
    ("tuning", NOT_CHECKED, "tuning = no", {}, {"tuning": False}),
    ("routes", PROBLEM, "10.86.0.0/24 of the tunnel overlaps 10.86.0.128/25", {"routes": OTHER}, {}),
    ("routes", PROBLEM, "|ip route delete 10.86.0.128/25 dev eth1", {"routes": OTHER}, {}),
    ("routes", PROBLEM, "overlaps 10.86.0.128/25", {"routes": OTHER, "report": STOPPED}, {"mode": "server"}),
    ("routes", NOTE, "overlaps 10.0.0.0/8, which eth1 has|ip route show", {"routes": LARGER}, {}),
    ("routes", PROBLEM, "leads into the tunnel",
     {"routes": [(ipaddress.ip_network("192.0.2.0/24"), "bulk0")]}, {}),
    ("routes", PROBLEM, "198.51.100.7 begins to connect, and the answer goes into the tunnel|ip route get 198.51.100.7",
     {"half_open": ["203.0.113.9", "198.51.100.7"], "routes": [(ipaddress.ip_network("198.51.100.0/24"), "bulk0")]},
     {"mode": "server"}),
    ("routes", NOT_CHECKED, "no netlink", {"routes": OSError(1, "no netlink")}, {}),
    ("listening", PROBLEM, "nothing listens", {"listening": set()}, {"mode": "server"}),
    ("listening", PROBLEM, "another program", {"report": STOPPED}, {"mode": "server"}),
    ("listening", NOT_CHECKED, "not run", {"report": STOPPED, "listening": set()}, {"mode": "server"}),
    ("firewall", PROBLEM, "nft insert rule inet filter input tcp dport 7443 accept",
     {"ruleset": [chain("input"), dport(22)]}, {"mode": "server"}),
    ("firewall", PROBLEM, "its policy, since no rule lets it pass, drops what comes to port 7443",
     {"ruleset": [chain("input"), dport(22)]}, {"mode": "server"}),
    ("firewall", PROBLEM, "the rule input handle 7 drops what comes to port 7443",
     {"ruleset": [chain("input", "accept"), dport(7443, DROP)]}, {"mode": "server"}),
    ("firewall", NOTE, "the rule input handle 7 drops some of what comes to port 7443|nft --handle list chain inet",
     {"ruleset": [chain("input", "accept"), dport(7443, LIMITED, DROP)]}, {"mode": "server"}),
    ("firewall", NOT_CHECKED, "iptables", {"ruleset": [chain("input"), XT]}, {"mode": "server"}),
    ("firewall", NOT_CHECKED, "no binding", {"ruleset": FirewallError("no binding")}, {"mode": "server"}),
    ("forwarding", PROBLEM, "sysctl -w net.ipv4.ip_forward=1", {"sysctl": "0"}, GATEWAY),
    ("forwarding", NOTE, "drops what is forwarded", {"ruleset": [chain("forward")]}, GATEWAY),
    ("forwarding", NOT_CHECKED, "forwards nothing", {"forwarded": []}, {"mode": "server"}),
    ("forwarding", NOT_CHECKED, "bad.conf", {"forwarded": config.ConfigurationError("bad.conf: bad")}, GATEWAY),
    ("forwarding", NOT_CHECKED, "not run", {"report": STOPPED}, GATEWAY),
    ("rules", PROBLEM, "kill-switch = yes, but table inet bulkvpnd_x lacks its rules: it counts from a restart on, or "
     "somebody removed them|systemctl restart bulkvpnd@x", {}, SWITCH),
    ("rules", PROBLEM, "kill-switch = yes, but", {"ruleset": CLOSED[:1]}, SWITCH),
    ("rules", PROBLEM, "lacks its rules", {"ruleset": [CLOSED[0], drop("kill-switch-forward", verdict="accept")]},
     SWITCH),
    ("rules", PROBLEM, "lacks its rules", {"ruleset": [drop("kill-switch-output", table="bulkvpnd_y"), CLOSED[1]]},
     SWITCH),
    ("rules", PROBLEM, "client-to-client = no, but table inet bulkvpnd_x", {}, {"mode": "server"}),
    ("rules", NOT_CHECKED, "none is asked for", {}, {"mode": "server", "client_to_client": True}),
    ("rules", NOT_CHECKED, "none is asked for", {}, {}),
    ("rules", NOT_CHECKED, "not run", {"report": STOPPED}, SWITCH),
    ("rules", NOT_CHECKED, "no binding", {"ruleset": FirewallError("no binding")}, SWITCH),
    ("NAT", PROBLEM, "no table inet bulkvpnd_x translates: it counts from a restart on, or", {}, GATEWAY),
    ("NAT", NOTE, "set nat = yes", {}, {"mode": "server", "client_to_client": True}),
    ("NAT", NOTE, "those with redirect-gateway = yes too|if they are to: set nat = yes; systemctl restart bulkvpnd@x",
     {}, {"mode": "server"}),
    ("NAT", NOT_CHECKED, "not run", {"report": STOPPED}, GATEWAY),
    ("DNS", PROBLEM, "10.86.0.1 does not answer", {"asks": False}, {}),
    ("DNS", NOTE, "of the tunnel, 10.86.0.1|apt install systemd-resolved",
     {"dns_manager": None, "report": changed(pushed_dns=["10.86.0.1"])}, {}),
    ("DNS", NOTE, "of the tunnel, 10.86.0.53|apt install systemd-resolved", {"dns_manager": None},
     {"dns": ("10.86.0.53",)}),
    ("DNS", NOT_CHECKED, "no name server", {"dns_manager": None}, {}),
    ("DNS", NOT_CHECKED, "no name server", {"dns_manager": None, "report": changed(pushed_dns=["10.86.0.1"])},
     {"accept_dns": False}),
    ("DNS", PROBLEM, "/etc/resolv.conf has none", {"dns_manager": "resolvconf", "asked": ["192.0.2.53"]}, {}),
    ("DNS", PROBLEM, "10.86.0.1 does not answer", {"dns_manager": "resolvconf", "asks": False}, {}),
    ("DNS", NOT_CHECKED, "no name server", {"dns_manager": "resolvconf", "recorded": []}, {}),
    ("DNS", NOT_CHECKED, "not run", {"report": STOPPED}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("check", "state", "words", "answers", "fields"), CASES)
def test_what_is_wrong_is_found(check, state, words, answers, fields):
    fields = {"mode": "client", **fields}
    assert words in states(check, machine=Double(**answers), **fields)[state]


@pytest.mark.parametrize(("check", "answers", "fields"), [
    *((check, {}, {}) for check in ("packages", "TUN", "configuration", "clock", "instance", "offload", "names",
                                    "server", "path MTU", "congestion", "tuning", "routes", "DNS")),
    *((check, {}, {"mode": "server"}) for check in ("WAN MTU", "listening", "firewall", "routes")),
    ("routes", {"half_open": ["192.0.2.7"]}, {"mode": "server"}),
    ("beyond", {}, FULL),
    ("beyond", {"hop": None, "asked": ["198.51.100.53"]}, FULL),
    ("DNS", {"dns_manager": "resolvconf"}, {}),
    ("DNS", {"dns_manager": "resolvconf", "asked": ["127.0.0.1"]}, {}),
    ("firewall", {"ruleset": [chain("input"), dport(7443)]}, {"mode": "server"}),
    ("firewall", {"ruleset": [chain("input"), dport(7443, LIMITED, {"accept": None})]}, {"mode": "server"}),
    ("firewall", {"ruleset": [chain("input", "accept"), chain("forward")]}, {"mode": "server"}),
    ("firewall", {"ruleset": [chain("input", "accept", table="bulkvpnd_y")]}, {"mode": "server"}),
    ("forwarding", {}, GATEWAY),
    ("rules", {"ruleset": CLOSED}, SWITCH),
    ("rules", {"ruleset": [drop("hairpin")]}, {"mode": "server"}),
    ("NAT", {"ruleset": [MASQUERADE]}, GATEWAY),
    ("NAT", {"ruleset": [MASQUERADE]}, {"mode": "server", "client_to_client": True}),
    ("WAN MTU", {"mtu": 1492}, {"mode": "server"}),
    ("WAN MTU", {"mtu": 9000}, {"mode": "server", "wan_mtu": 9000}),
    ("path MTU", {"mtu": 1492}, {}),
    ("path MTU", {"mtu": 9000}, {}),
])  # fmt: skip
def test_what_is_right_is_fine(check, answers, fields):
    assert set(states(check, machine=Double(**answers), **{"mode": "client", **fields})) == {FINE}


@pytest.mark.parametrize(("days", "state", "words"), [
    (0, FINE, "laptop, valid until 2027-01-01"), (400, PROBLEM, "expired at"),
    (200, NOTE, "|on the authority's machine: bulkvpnctl pki renew laptop --remote vpn.example.org:7443 --output "
                "laptop.conf; then here: bulkvpnctl import laptop.conf --name x --force --start"),
    (400, PROBLEM, "|date; on the authority's machine: bulkvpnctl pki renew laptop --remote vpn.example.org:7443"),
    (-300, PROBLEM, "|apt install systemd-timesyncd; timedatectl set-ntp true"),
])  # fmt: skip
def test_dates_of_the_certificate(texts, days, state, words):
    found = states("certificate", machine=Double(texts, now=NOW + datetime.timedelta(days)))
    assert set(found) == {state} and words in found[state]


def test_an_authority_that_ends_with_its_certificates(texts):
    """A certificate that is renewed before the authority would end as soon."""
    begin = datetime.datetime(2026, 5, 1, tzinfo=datetime.timezone.utc)
    ca, ca_key = pki.create_authority("authority", begin, 50)
    certificate, key = pki.issue(ca, ca_key, "laptop", "client", begin, 365)
    found = states("certificate", machine=Double({"ca": ca, "certificate": certificate, "key": key}))
    assert set(found) == {NOTE} and "renew the authority" in found[NOTE] and "valid until 2026-06-20" in found[NOTE]


def test_a_ping_that_could_not_be_marked_says_nothing_of_the_path(tmp_path, monkeypatch):
    """As iputils does for who has no CAP_NET_ADMIN: a warning, and an answer through the tunnel."""
    ping = tmp_path / "ping"
    ping.write_text("#!/bin/sh\ncase \"$*\" in *' -m '*) echo 'ping: WARNING: failed to set mark: 7443: x' >&2; esac\n")
    ping.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert Machine(options("client")).ping("192.0.2.1", 1500)
    machine = Double(ping=Machine(options("client", **FULL)).ping)
    assert "run it as root" in states("path MTU", machine=machine)[NOT_CHECKED]


@pytest.mark.parametrize(("text", "fields", "versions"), [
    ("", {}, []), ("", {"nat": True}, [4]), ("[client a]\nnetworks = fd00:7::/64\n", {}, [4, 6]),
    ("[client a]\nipv4 = 10.86.0.9\n", {}, []),
])  # fmt: skip
def test_what_this_server_forwards(tmp_path, text, fields, versions):
    (tmp_path / "x.clients.d").mkdir()
    (tmp_path / "x.clients.d" / "a.conf").write_text(text)
    configuration = dataclasses.replace(options("server", **fields), path=tmp_path / "x.conf")
    assert Machine(configuration).forwarded() == versions


def test_a_key_that_others_can_read(texts):
    error = config.ConfigurationError("key.pem: holds a private key and has mode 0644; run: chmod 600 key.pem")
    assert "chmod 600" in states("certificate", machine=Double(error))[PROBLEM]


def test_a_server_s_certificate_is_renewed_in_its_place():
    begin = datetime.datetime(2025, 1, 1, tzinfo=datetime.timezone.utc)
    ca, ca_key = pki.create_authority("authority", begin, 3650)
    certificate, key = pki.issue(ca, ca_key, "gate", "server", begin, 365)
    machine = Double({"ca": ca, "certificate": certificate, "key": key})
    mend = "|date; on the authority's machine: bulkvpnctl pki renew gate; here: systemctl restart bulkvpnd@x"
    assert mend in states("certificate", "server", machine)[PROBLEM]


def test_revocation_list(texts):
    given = {"crl": ("crl.pem", None)}
    assert "not given" in states("revocations")[NOT_CHECKED]
    assert "1 certificates revoked" in states("revocations", machine=Double(texts), **given)[FINE]
    late = Double(texts, now=NOW + datetime.timedelta(400))
    assert "bulkvpnctl pki crl" in states("revocations", machine=late, **given)[PROBLEM]
    early = states("revocations", machine=Double(texts, now=NOW - datetime.timedelta(400)), **given)[PROBLEM]
    assert "|apt install systemd-timesyncd" in early and "pki crl" not in early


# The command


def test_a_check_that_hangs_or_breaks_hides_no_other():
    release = threading.Event()
    try:
        hangs = checks.Check("hangs", lambda subject: release.wait() and [], seconds=0.05)
        breaks = checks.Check("breaks", lambda subject: 1 / 0)
        assert [one.state for one in doctor.bounded(hangs, None)] == [NOT_CHECKED]
        assert [one.state for one in doctor.bounded(breaks, None)] == [NOT_CHECKED]
    finally:
        release.set()


def test_a_configuration_that_is_wrong_is_the_only_problem(tmp_path, ctl):
    file = tmp_path / "client.conf"
    file.write_text("mode = nonsense\n")
    code, out, _ = ctl("doctor", "--config", file, "--json")
    (row,) = json.loads(out)
    assert code == 1
    assert row["instance"] == "client" and row["state"] == PROBLEM and f"{file}:1: mode" in row["text"]
    code, out, _ = ctl("doctor", "--config", file)
    assert code == 1 and "1 problem" in out


def test_where_nothing_is(ctl, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CONFIGURATION_DIRECTORY", tmp_path / "etc")
    for arguments in ([], ["laptop"], [], ["laptop"]):
        code, out, error = ctl("doctor", *arguments)
        assert code and not out and error.count("\n") == 1
        assert "bulkvpnctl pki init" in error and "bulkvpnctl import FILE" in error and "as root" not in error
        (tmp_path / "etc").mkdir(exist_ok=True)
    (tmp_path / "etc" / "office.conf").touch()
    assert "laptop.conf: cannot be read: No such file or directory; " in (said := ctl("doctor", "laptop")[2])
    assert said.endswith("; there is: office\n")
    assert "name a file that is there" in ctl("doctor", "--config", tmp_path / "x.conf")[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_who_may_not_read_it_is_to_be_root(tmp_path):
    file = tmp_path / "x.conf"
    file.touch(0o600)
    done = subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-m", "bulkvpnd.admin",
                           "doctor", "--config", file], capture_output=True, text=True)
    assert done.returncode == os.EX_NOPERM and "Permission denied; run it as root" in done.stderr


def test_a_name_that_is_none(ctl):
    code, _, error = ctl("doctor", "../x")
    assert code == 64 and "not the name" in error


def test_roles_have_their_checks(tmp_path):
    file = tmp_path / "client.conf"
    pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    blocks = [f"<{name}>\n{pem}</{name}>\n" for name in ("ca", "certificate", "key")]
    file.write_text("mode = client\nremote = 192.0.2.1\n" + "".join(blocks))
    file.chmod(0o600)
    seen = []
    table = [checks.Check(str(role), lambda subject, role=role: seen.append(role) or [], role)
             for role in (None, "client", "server")]
    console = rich.console.Console(file=io.StringIO(), force_terminal=True)
    list(doctor.examine(["--config", str(file)], console, lambda configuration: Double(), table))
    assert seen == [None, "client"]


def test_what_others_say_stays_on_its_line():
    console = rich.console.Console(file=io.StringIO(), width=200)
    doctor._show(console, "server", Verdict(PROBLEM, "[red]a\x1b[2Jb\nc", "d\re"))
    shown = console.file.getvalue()
    assert shown.count("\n") == 2 and "\x1b" not in shown and "[red]a" in shown
