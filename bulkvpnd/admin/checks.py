"""The checks of `bulkvpnctl doctor`: one function for each, in one table, over what admin.machine sees.

A check returns or yields Verdicts. What keeps it from looking is "not checked", with the reason; it raises nothing that
the doctor would have to know.
"""

import concurrent.futures
import dataclasses
import functools
import ipaddress
from collections.abc import Callable

from bulkvpnd import config, pki
from bulkvpnd.admin import ruleset
from bulkvpnd.admin.diagnosis import FINE, NOT_CHECKED, NOTE, PROBLEM, Verdict, answer, journal, verdicts
from bulkvpnd.admin.status import StatusError
from bulkvpnd.host import firewall, gateway, tuning

SET_CLOCK = "apt install systemd-timesyncd; timedatectl set-ntp true"
PING_SIZE = 128
"""Bytes of a packet that any path carries (choice)."""
FAR = {4: "203.0.113.1", 6: "2001:db8:ffff::1"}
"""An address of each version that nobody has, and that routers take for any other (RFC 5737, RFC 3849)."""
HOPS_MAX = 4
"""Routers that are looked for, the server included: some never answer (choice)."""
MTU_MIN = 1280
"""Bytes: the least that the option wan-mtu takes, and that a path of IPv6 carries (RFC 8200 section 5)."""


@dataclasses.dataclass
class Subject:
    """What is examined. configuration: of the instance. machine: admin.machine.Machine, or a double. report: of the
    running instance, None while it does not run; `why_not` is then why."""

    configuration: object
    machine: object
    report: dict | None = None
    why_not: str = ""

    @property
    def unit(self):
        return f"bulkvpnd@{self.configuration.name}"

    @property
    def device(self):
        return self.report and self.report.get("device")

    def addresses(self):
        """Outer addresses of the server, texts; names that have none are left out."""
        found = []
        for remote in self.configuration.remote:
            try:
                found += [address[0].partition("%")[0] for _, address in self.machine.resolve(*remote)]
            except OSError:
                continue  # the check of the names says so
        return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Check:
    """name: as it is shown. look: Subject -> Verdicts. role: that it is for, None for both. seconds: it may take."""

    name: str
    look: Callable
    role: str | None = None
    seconds: float = 10.0


# This end


def _packages(subject):
    try:
        found = subject.machine.requirements()
    except LookupError as error:
        return [Verdict(NOT_CHECKED, str(error))]
    wrong = [f"{name} is {has or 'missing'}, {least} is needed" for name, least, has in found
             if has is None or _version(has) < _version(least)]
    if wrong:
        return [Verdict(PROBLEM, "; ".join(wrong), "apt install bulkvpnd, or: pip install --upgrade bulkvpnd")]
    return [Verdict(FINE, ", ".join(f"{name} {has}" for name, _, has in found))]


def _version(text):
    parts = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        parts.append(int(digits or 0))
    return (parts + [0, 0, 0])[:3]


def _tun(subject):
    try:
        subject.machine.open_tun()
    except PermissionError:
        return [Verdict(NOT_CHECKED, "/dev/net/tun: permission denied; run it as root, in a container let it have it")]
    except OSError as error:
        return [Verdict(PROBLEM, f"/dev/net/tun: {error.strerror}", "modprobe tun; in a container, give it the device")]
    return [Verdict(FINE, "/dev/net/tun can be opened")]


def _files(subject):
    try:
        subject.machine.check_files()
    except config.ConfigurationError as error:
        return [Verdict(PROBLEM, str(error), f"bulkvpnd --config {subject.configuration.path} --check")]
    return [Verdict(FINE, f"{subject.configuration.path}")]


DATES = {
    # words of pki about dates: subject -> what mends it
    "is not valid before": lambda subject: SET_CLOCK,
    "expired at": lambda subject: f"date; {_another(subject)}",
}


def _certificate(subject):
    """Owner and mode of the key file are checked where it is read."""
    try:
        texts = [subject.machine.pem(name) for name in ("ca", "certificate", "key")]
        now = subject.machine.now()
        expiries = pki.check_own(*texts, subject.configuration.mode, now)
        name = pki.describe(texts[1]).name
    except (config.ConfigurationError, pki.PKIError) as error:
        mend = next((mend(subject) for words, mend in DATES.items() if words in str(error)), None)
        return [Verdict(PROBLEM, str(error), mend)]
    text = f"{name}, valid until {min(expiries.values()):%Y-%m-%d}"
    mends = {"ca": "on the authority's machine: bulkvpnctl pki list says how to renew the authority, and then what it "
                   "signed",
             "certificate": _another(subject)}
    due = [mend for option, mend in mends.items() if expiries[option] - now < pki.WARNING_TIME]
    if due:
        return [Verdict(NOTE, text, due[0])]
    return [Verdict(FINE, text)]


def _revocations(subject):
    if subject.configuration.crl is None:
        return [Verdict(NOT_CHECKED, "crl is not given")]
    try:
        crl = pki.read_crl(subject.machine.pem("crl"), subject.machine.pem("ca"))
        pki.check_crl_dates(crl, subject.machine.now())
    except (config.ConfigurationError, pki.PKIError) as error:
        early = "is not valid before" in str(error)
        return [Verdict(PROBLEM, str(error), SET_CLOCK if early else "on the authority's machine: bulkvpnctl pki crl")]
    return [Verdict(FINE, f"{len(crl.revoked)} certificates revoked, valid until {crl.last:%Y-%m-%d}")]


def _clock(subject):
    now = f"{subject.machine.now():%Y-%m-%d %H:%M UTC}"
    if subject.machine.clock_is_kept():
        return [Verdict(FINE, f"{now}, kept right by a daemon")]
    return [Verdict(NOTE, f"{now}, and nothing keeps it right", SET_CLOCK)]


def _instance(subject):
    if subject.report is None:
        yield Verdict(NOTE, subject.why_not, f"systemctl start {subject.unit}; {journal(subject.configuration.name)}")
        return
    found = verdicts(subject.report)
    for one in found:
        # The doctor is here already.
        is_here = one.mend and one.mend.startswith("bulkvpnctl doctor")
        yield dataclasses.replace(one, mend=journal(subject.configuration.name)) if is_here else one
    restarts = sum(worker["restarts"] for worker in subject.report["workers"])
    if restarts:
        yield Verdict(NOTE, f"{restarts} restarts of workers", journal(subject.configuration.name, " -p warning"))
    if not found and not restarts:
        yield Verdict(FINE, "it runs and is well")


def _offload(subject):
    if subject.report is None:
        return [Verdict(NOT_CHECKED, "the instance does not run")]
    offload = subject.report["offload"]
    if not offload:
        return [Verdict(NOTE, "none: packets go one by one, at a fraction of the speed",
                        journal(subject.configuration.name, " -g offload"))]
    return [Verdict(FINE, ", ".join(offload))]


# The path to the server


def _names(subject):
    for host, port in subject.configuration.remote:
        try:
            addresses = [address[0] for _, address in subject.machine.resolve(host, port)]
        except OSError as error:
            yield Verdict(PROBLEM, f"{host}: {error.strerror or error}",
                          f"getent ahosts {host}; correct remote, or /etc/resolv.conf")
        else:
            yield Verdict(FINE, f"{host} is {', '.join(dict.fromkeys(addresses))}")


def _another(subject, verb="renew"):
    """What gives this end another certificate. verb: of bulkvpnctl pki, add or renew."""
    configuration = subject.configuration
    try:
        name = pki.describe(subject.machine.pem("certificate")).name
    except (config.ConfigurationError, pki.PKIError):
        name = "NAME"
    if configuration.mode == "server":
        return f"on the authority's machine: bulkvpnctl pki renew {name}; here: systemctl restart {subject.unit}"
    remotes = " ".join(f"--remote [{host}]:{port}" if ":" in host else f"--remote {host}:{port}"
                       for host, port in configuration.remote)
    instance = "" if configuration.name == "client" else f" --name {configuration.name}"
    return (f"on the authority's machine: bulkvpnctl pki {verb} {name} {remotes} --output {name}.conf; then here: "
            f"bulkvpnctl import {name}.conf{instance} --force --start")


def _take_theirs(subject):
    return (f"in {subject.configuration.path}: take ca, certificate and key from the server's own bulkvpnctl pki add, "
            "or correct remote")


MENDS = {
    # words of diagnosis.ANSWERS: subject -> what mends it
    "connection refused": lambda subject: "on the server: bulkvpnctl doctor",
    "certificate revoked": lambda subject: _another(subject, "add"),
    "certificate expired": lambda subject: f"date, at both ends; {_another(subject)}",
    "unknown ca": _take_theirs,
    "self-signed certificate": _take_theirs,
    "unable to get local issuer": _take_theirs,
    "bad certificate": lambda subject: f"date, on the server; {journal('server')} there says more",
    "has expired": lambda subject: "date; on the authority's machine: bulkvpnctl pki renew server",
    "not yet valid": lambda subject: SET_CLOCK,
    "reset by peer": lambda subject: f"what failed before: bulkvpnctl status, and on the server: {journal('server')}",
}


def _port(subject):
    for host, port in subject.configuration.remote:
        try:
            greeting = subject.machine.greet((host, port))
        except (OSError, config.ConfigurationError) as error:
            yield Verdict(NOT_CHECKED, f"{host}: {getattr(error, 'strerror', None) or error}")
            continue
        if greeting is None:
            yield Verdict(NOT_CHECKED, f"{host}: no address")
        elif greeting.error is None and greeting.name.lower() != subject.configuration.server_name.lower():
            yield Verdict(PROBLEM, f"{greeting.address} has a certificate for {greeting.name}, and server-name is "
                                   f"{subject.configuration.server_name}",
                          f"in {subject.configuration.path}: server-name = {greeting.name}, or correct remote; then: "
                          f"systemctl restart {subject.unit}")
        elif greeting.error is None:
            yield Verdict(FINE, f"{greeting.address} lets this client in")
        else:
            yield _refused(subject, greeting, port)


def _refused(subject, greeting, port):
    words, meaning = answer(greeting.error)
    if words:
        return Verdict(PROBLEM, f"{greeting.address}: {meaning}", MENDS[words](subject))
    if greeting.stage == "connect":
        return Verdict(PROBLEM, f"{greeting.address} cannot be reached: {greeting.error}",
                       f"on the server: bulkvpnctl doctor; let TCP port {port} through what lies between")
    return Verdict(PROBLEM, f"{greeting.address}: {greeting.error}", f"on the server: {journal('server')}")


def _path_mtu(subject):
    for address in subject.addresses():
        try:
            name = next(iter(subject.machine.towards([address])), None)
            if name is None or name == subject.device:
                yield Verdict(NOT_CHECKED, f"{address}: no device of this machine leads there")
                continue
            mtu = subject.machine.mtu(name)
            if not subject.machine.ping(address, PING_SIZE):
                yield Verdict(NOT_CHECKED, f"{address} answers no ping")
                if mtu > tuning.USUAL_MTU:
                    yield _jumbo(name, mtu)
            elif subject.machine.ping(address, mtu):
                yield Verdict(FINE, f"{address} gets packets of {mtu} bytes")
            elif not subject.machine.ping(address, MTU_MIN):
                yield Verdict(PROBLEM, f"{address} gets no packets of {MTU_MIN} bytes, which any path has to carry",
                              f"tracepath -n {address}")
            else:
                yield Verdict(PROBLEM, f"{address} gets no packets of {mtu} bytes, the MTU of {name}",
                              f"set wan-mtu = {_largest(subject.machine, address, mtu)}")
        except FileNotFoundError:
            yield Verdict(NOT_CHECKED, "ping is missing; run: apt install iputils-ping")
        except OSError as error:
            yield Verdict(NOT_CHECKED, f"{address}: {error.strerror or error}")


def _largest(machine, address, too_large):
    """Bytes of the largest packet that `address` gets, which is one of MTU_MIN. A dozen pings at most."""
    size = MTU_MIN
    while too_large - size > 1:
        middle = (size + too_large) // 2
        if machine.ping(address, middle):
            size = middle
        else:
            too_large = middle
    return size


def _wan_mtu(subject):
    wan = subject.configuration.wan_interface
    try:
        names = [wan] if wan else subject.machine.towards(None)
        sizes = {name: subject.machine.mtu(name) for name in names if name != subject.device}
    except OSError as error:
        return [Verdict(NOT_CHECKED, error.strerror or str(error))]
    if not sizes:
        return [Verdict(NOT_CHECKED, "no device leads outside")]
    most = subject.configuration.wan_mtu or tuning.USUAL_MTU
    return [Verdict(FINE, f"{name} has {mtu} bytes") if mtu <= most else _jumbo(name, mtu)
            for name, mtu in sizes.items()]


def _jumbo(name, mtu):
    return Verdict(NOTE, f"{name} has {mtu} bytes, more than the usual {tuning.USUAL_MTU}",
                   f"if a path does not carry that, set wan-mtu = {tuning.USUAL_MTU}")


# The path beyond it


def _beyond(subject):
    """Whether a full tunnel leads anywhere: the server has to forward, and answers have to find the way back.

    No stranger is bothered: the name servers are those that are asked anyway, and a packet to an address that nobody
    has is answered by the router at which its hops are over."""
    report = subject.report
    if not subject.configuration.redirect_gateway:
        return [Verdict(NOT_CHECKED, "redirect-gateway = no")]
    if not (report and any(session["connections"] for session in report["sessions"])):
        return [Verdict(NOT_CHECKED, "there is no connection")]
    networks = [ipaddress.ip_interface(text).network for text in report["addresses"]]
    try:
        found = {network.version: _who_answers(subject, network) for network in networks}
    except FileNotFoundError:
        return [Verdict(NOT_CHECKED, "ping is missing; run: apt install iputils-ping")]
    except OSError as error:
        return [Verdict(NOT_CHECKED, error.strerror or str(error))]
    is_way = any(who for who, _ in found.values())
    return [
        Verdict(FINE, f"IPv{version}: {who} answers, beyond the server") if who else
        Verdict(PROBLEM if is_certain and not is_way else NOTE, f"IPv{version}: nothing beyond the server answers",
                "on the server: bulkvpnctl doctor; it has to forward, so set nat = yes there; "
                "systemctl restart bulkvpnd@server")
        for version, (who, is_certain) in found.items()
    ]


def _who_answers(subject, network):
    """(who answers beyond the server, whether it is certain that nobody does): routers may be silent. network: of the
    tunnel, of one version."""
    machine, device = subject.machine, subject.device
    asked = [one for one in _used(subject) if ipaddress.ip_address(one).version == network.version
             and ipaddress.ip_address(one) not in network]
    who = next((one for one in asked if machine.asks(one)), None)
    if who:
        return who, False
    with concurrent.futures.ThreadPoolExecutor(HOPS_MAX) as hopping:
        # At once: each waits its two seconds where nobody answers.
        look = functools.partial(machine.hop, device, FAR[network.version])
        forwards, *hops = hopping.map(look, range(1, HOPS_MAX + 1))
    who = next((one for one in hops if one and ipaddress.ip_address(one) not in network), None)
    return who, bool(asked) or not forwards


def _used(subject):
    """The name servers that this machine asks through a full tunnel."""
    machine, device = subject.machine, subject.device
    found = [*map(str, subject.configuration.dns), *machine.asked()]
    if machine.dns_manager() == "systemd-resolved":
        found += machine.name_servers(device) or []
    outside = [network for network, name in machine.routes() if name != device]
    return [one for one in dict.fromkeys(found) if not ipaddress.ip_address(one).is_loopback
            and not any(ipaddress.ip_address(one) in network for network in outside)]


def _tuning(subject):
    if not subject.configuration.tuning:
        return [Verdict(NOT_CHECKED, "tuning = no")]
    if subject.report is None:
        return [Verdict(NOT_CHECKED, "the instance does not run, which is what tunes")]
    refused = subject.report.get("not_tuned", {})
    rows = [outcome for wish, outcome in subject.machine.tuned(subject.device, subject.addresses(), refused)
            if wish.value is not None and wish.key != "TCP_CONGESTION"]
    missed = [str(one) for one in rows if one.why_not]
    if missed:
        mend = f"bulkvpnctl tune show --config {subject.configuration.path}"
        return [Verdict(NOTE, one, mend if one is missed[-1] else None) for one in missed]
    return [Verdict(FINE, f"{len(rows)} settings are as wanted")]


def _congestion(subject):
    for wish, outcome in subject.machine.tuned(None, [], {}):
        if wish.key == "TCP_CONGESTION":
            if outcome.why_not:
                name = "bbr" if wish.value == "auto" else wish.value
                return [Verdict(NOTE, f"{name} cannot be had: {outcome.why_not}; {outcome.set} is used",
                                f"modprobe tcp_{name}")]
            return [Verdict(FINE, "auto: cubic, or bbr where the path is long" if outcome.set == "auto" else
                            outcome.set)]
    return [Verdict(NOT_CHECKED, "the kernel does not say")]


def _routes(subject):
    try:
        present = subject.machine.routes()
    except OSError as error:
        return [Verdict(NOT_CHECKED, error.strerror or str(error))]
    configuration, found = subject.configuration, []
    wanted = {network for network, name in present if name == subject.device}
    if configuration.mode == "server":
        wanted |= {network for network in (configuration.pool_ipv4, configuration.pool_ipv6) if network}
    else:
        wanted |= set(configuration.routes)
    if subject.report:
        wanted |= {ipaddress.ip_interface(text).network for text in subject.report["addresses"]}
    for network in sorted(wanted, key=str):
        for other, name in present:
            if name != subject.device and other.version == network.version and other.overlaps(network):
                # Of a larger one only the tunnel's part is taken away.
                text = f"{network} of the tunnel overlaps {other}, which {name} has"
                found.append(
                    Verdict(PROBLEM, f"{text}: what goes to {other} does not go through the tunnel",
                            f"ip route delete {other} dev {name}; or give the tunnel another range")
                    if other.subnet_of(network) else Verdict(NOTE, text, f"ip route show {other}")
                )
    far = {"server": subject.machine.half_open,
           "client": lambda: () if configuration.redirect_gateway else subject.addresses()}[configuration.mode]()
    for text in far:
        address = ipaddress.ip_address(text)
        # The longest prefix decides; a route of the tunnel's own that is no longer than another's leads nowhere.
        best = max(((network.prefixlen, name) for network, name in present
                    if network.version == address.version and address in network), default=(0, None))
        if subject.device and best[1] == subject.device:
            found.append(
                Verdict(PROBLEM, f"the route to the server, {text}, leads into the tunnel",
                        f"ip route get {text}; take that network out of routes and accept-routes")
                if configuration.mode == "client" else
                Verdict(PROBLEM, f"{text} begins to connect, and the answer goes into the tunnel",
                        f"ip route get {text}; take the network with that address from its client")
            )
    return found or [Verdict(FINE, f"{', '.join(sorted(map(str, wanted))) or 'nothing yet'}: nobody else's")]


# The server as a gateway


def _listening(subject):
    ports = subject.machine.listening()
    for host, port in subject.configuration.listen:
        if subject.report is None:
            yield (Verdict(PROBLEM, f"port {port} is another program's", f"ss -ltnp 'sport = :{port}'") if port in ports
                   else Verdict(NOT_CHECKED, "the instance does not run"))
        elif port in ports:
            yield Verdict(FINE, f"port {port}")
        else:
            yield Verdict(PROBLEM, f"nothing listens on port {port}", f"systemctl restart {subject.unit}")


def _objects(subject):
    """(objects of the ruleset, None), or (None, Verdict)."""
    try:
        return subject.machine.ruleset(), None
    except (OSError, firewall.FirewallError) as error:
        return None, Verdict(NOT_CHECKED, getattr(error, "strerror", None) or str(error))


def _input(subject):
    objects, why_not = _objects(subject)
    if why_not:
        yield why_not
        return
    for _, port in subject.configuration.listen:
        found = [_kept_out(fate, port) for fate in ruleset.fates(objects, port)]
        yield from filter(None, found)
        if not any(found):
            yield Verdict(FINE, f"no rule keeps new connections from port {port}")


def _kept_out(fate, port):
    """A Verdict if a chain does not let everybody pass to this port; None if it does, or a rule about the port says
    whom."""
    if fate.does == ruleset.DROPS_SOME:
        return Verdict(NOTE, f"nftables, chain {fate.chain}: the rule {fate.rule} drops some of what comes to port "
                             f"{port}", f"nft --handle list chain {fate.chain}")
    if fate.does == ruleset.UNKNOWN:
        return Verdict(NOT_CHECKED, f"nftables, chain {fate.chain} has rules of iptables; see: iptables -S")
    if fate.does == ruleset.DROPS:
        by = f"the rule {fate.rule}" if fate.rule else "its policy, since no rule lets it pass,"
        return Verdict(PROBLEM, f"nftables, chain {fate.chain}: {by} drops what comes to port {port}",
                       f"nft insert rule {fate.chain} tcp dport {port} accept")
    return None


def _is_gateway(configuration):
    return configuration.nat or configuration.client_to_client or bool(configuration.routes)


def _forwarding(subject):
    try:
        versions = subject.machine.forwarded()
    except config.ConfigurationError as error:
        return [Verdict(NOT_CHECKED, str(error))]
    if not versions:
        return [Verdict(NOT_CHECKED, "this server forwards nothing: no nat, client-to-client, routes or networks of "
                                     "clients")]
    if subject.report is None:
        return [Verdict(NOT_CHECKED, "the instance does not run, which is what turns it on")]
    found = []
    for version in versions:
        key = gateway.FORWARDING[version]
        try:
            is_on = subject.machine.sysctl(key) != "0"
        except OSError as error:
            found.append(Verdict(NOT_CHECKED, f"{key}: {error.strerror}"))
            continue
        found.append(Verdict(FINE, f"{key} is on") if is_on else
                     Verdict(PROBLEM, f"{key} is 0: the kernel forwards nothing", f"sysctl -w {key}=1"))
    objects, why_not = _objects(subject)
    if why_not:
        return [*found, why_not]
    return found + [
        Verdict(NOTE, f"table {one['family']} {one['table']}, chain {one['name']} drops what is forwarded unless a "
                      "rule lets it pass",
                f"let it pass with a rule for iifname {subject.device} and one for oifname {subject.device}")
        for one in firewall.base_chains(objects, "forward") if one.get("policy") == "drop"
    ]


RULES = (
    # (who has them, the option, the value that asks for them, both as text, chains in the instance's table)
    ("client", "kill_switch", True, "kill-switch = yes", ("kill-switch-output", "kill-switch-forward")),
    ("server", "client_to_client", False, "client-to-client = no", ("hairpin",)),
)


def _rules(subject):
    configuration = subject.configuration
    wanted = [(text, chains) for mode, option, value, text, chains in RULES
              if mode == configuration.mode and getattr(configuration, option) == value]
    if not wanted:
        return [Verdict(NOT_CHECKED, "none is asked for")]
    if subject.report is None:
        return [Verdict(NOT_CHECKED, "the instance does not run")]
    objects, why_not = _objects(subject)
    if why_not:
        return [why_not]
    table = firewall.table_name(configuration.name)
    dropping = {one["rule"]["chain"] for one in objects
                if "rule" in one and one["rule"]["table"] == table and {"drop": None} in one["rule"]["expr"]}
    return [
        Verdict(FINE, f"{text}: table {firewall.FAMILY} {table}") if dropping.issuperset(chains) else
        Verdict(PROBLEM, f"{text}, but table {firewall.FAMILY} {table} lacks its rules: it counts from a restart on, "
                         "or somebody removed them", f"systemctl restart {subject.unit}")
        for text, chains in wanted
    ]


def _nat(subject):
    if subject.report is None:
        return [Verdict(NOT_CHECKED, "the instance does not run")]
    objects, why_not = _objects(subject)
    if why_not:
        return [why_not]
    table = firewall.table_name(subject.configuration.name)
    masquerades = {one["rule"]["table"] for one in objects if "rule" in one
                   and any("masquerade" in part or "snat" in part for part in one["rule"]["expr"])}
    if subject.configuration.nat:
        if table in masquerades:
            return [Verdict(FINE, f"table {firewall.FAMILY} {table}")]
        return [Verdict(PROBLEM, f"nat = yes, but no table {firewall.FAMILY} {table} translates: it counts from a "
                                 "restart on, or somebody removed it", f"systemctl restart {subject.unit}")]
    if masquerades:
        return [Verdict(FINE, f"not by this instance; by table {', '.join(sorted(masquerades))}")]
    if _is_gateway(subject.configuration) or subject.configuration.dns:
        return [Verdict(NOTE, "nat = no and nothing else translates: what lies behind this server must know the way "
                              "back to the pool", f"set nat = yes; systemctl restart {subject.unit}")]
    return [Verdict(NOTE, "nat = no and nothing is forwarded: clients reach this server and nothing beyond, those with "
                          "redirect-gateway = yes too",
                    f"if they are to: set nat = yes; systemctl restart {subject.unit}")]


# Names in the tunnel


def _dns(subject):
    configuration, found = subject.configuration, []
    servers = [str(one) for one in configuration.dns]
    if configuration.mode == "client":
        manager = subject.machine.dns_manager()
        pushed = (subject.report or {}).get("pushed_dns", ()) if configuration.accept_dns else ()
        wanted = servers or pushed
        if manager is None and wanted:
            found.append(Verdict(NOTE, f"nothing here takes name servers of the tunnel, {', '.join(wanted)}",
                                 "apt install systemd-resolved polkitd"))
        if subject.device and manager == "systemd-resolved":
            given = subject.machine.name_servers(subject.device)
            if given is None:
                found.append(Verdict(PROBLEM, "systemd-resolved does not answer",
                                     f"systemctl restart systemd-resolved; systemctl reload {subject.unit}"))
            servers += given or []
        elif manager == "resolvconf":
            given, asked = subject.machine.recorded(), subject.machine.asked()
            # A name server of this machine asks whom resolvconf tells it.
            if given and not any(one in given or ipaddress.ip_address(one).is_loopback for one in asked):
                found.append(Verdict(PROBLEM, f"resolvconf was given {', '.join(given)}, and /etc/resolv.conf has none "
                                              "of them: another program writes it", "dpkg-reconfigure resolvconf"))
            servers += given
    if subject.report is None:
        return [*found, Verdict(NOT_CHECKED, "the instance does not run")]
    for server in dict.fromkeys(servers):
        found.append(Verdict(FINE, f"{server} answers") if subject.machine.asks(server) else
                     Verdict(PROBLEM, f"the name server {server} does not answer",
                             f"dig @{server} . NS; correct dns at the server"))
    return found or [Verdict(NOT_CHECKED, "the tunnel has no name server")]


CHECKS = (
    Check("packages", _packages),
    Check("TUN", _tun),
    Check("configuration", _files),
    Check("certificate", _certificate),
    Check("revocations", _revocations),
    Check("clock", _clock),
    Check("instance", _instance),
    Check("offload", _offload),
    Check("names", _names, "client", 15),
    Check("server", _port, "client", 40),
    Check("path MTU", _path_mtu, "client", 40),
    Check("WAN MTU", _wan_mtu, "server"),
    Check("beyond", _beyond, "client", 60),
    Check("congestion", _congestion),
    Check("tuning", _tuning),
    Check("routes", _routes),
    Check("listening", _listening, "server"),
    Check("firewall", _input, "server"),
    Check("rules", _rules),
    Check("forwarding", _forwarding, "server"),
    Check("NAT", _nat, "server"),
    Check("DNS", _dns, None, 20),
)


def examined(configuration, machine):
    """A Subject, with the report of the instance if it runs."""
    try:
        return Subject(configuration, machine, machine.report())
    except StatusError as error:
        return Subject(configuration, machine, None, error.what)
