"""The systems that are compared, each started as its documentation says, with its defaults where it has any.

A system makes its configuration in the trial's private directory and starts its server and its clients in the
trial's hosts, in the foreground. Its devices and processes go with the hosts. Names of the command line:

    direct                                  no tunnel
    bulkvpnd[-OPTION-VALUE…][@DIR]          options of bulkvpn.conf(5) for both ends; DIR: another checkout
    bulkvpnd-instances-N[-OPTION-VALUE…]    N instances at both ends carry one network together
    wireguard-go[@PATH]                     PATH: another wireguard-go than the installed one
    openvpn-{tcp,udp}-{aes,chacha}, nebula, ocserv, tinc
"""

import contextlib
import dataclasses
import datetime
import functools
import pathlib
import re
import shutil
import textwrap

from benchmarks.trial import ROOT, TrialError
from bulkvpnd import config, pki
from bulkvpnd.admin import demo, namespaces

INNER_NETWORK, INNER_SERVER = "10.86.0.0", "10.86.0.1"
"""The /24 inside every tunnel (RFC 1918)."""


def inner_client(index):
    return f"10.86.0.{index + 2}"


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How bulkvpnd is run. python: interpreter. tree: checkout, or None for the installed package."""

    python: str
    tree: pathlib.Path | None


class System:
    """A system.

    commands: {command it needs: Debian package}. several_clients: whether the clients' tests have it. port: where its
    server takes TCP connections, if the flood's test has it. is_variant: of a system that is measured, too; it is left
    out where a measurement takes minutes, unless that is asked for.
    """

    commands = {}
    several_clients = False
    port = None
    is_variant = False

    def __init__(self, name):
        self.name = name

    def missing(self):
        """Why it cannot be measured here, one line, or None."""
        lacks = [f"{command} ({package})" for command, package in self.commands.items() if not shutil.which(command)]
        return f"not installed: {', '.join(lacks)}" if lacks else None

    def version(self):
        """As the report shows it."""
        return ""

    def start(self, trial):
        """Starts the server and every client. Returns the server's address inside. Raises TrialError."""
        raise NotImplementedError

    def settle(self, trial):
        """Waits for what the first ping does not show."""


class Direct(System):
    several_clients = True

    def start(self, trial):
        return trial.address


class Bulkvpnd(System):
    """options: {name: value} of bulkvpn.conf(5) for both ends."""

    several_clients = True
    port = config.DEFAULT_PORT

    def __init__(self, name, options, settings):
        super().__init__(name)
        self.is_variant = bool(options)
        self.options = options
        self.settings = settings
        if settings.tree is None:
            self.command = [shutil.which("bulkvpnd") or "bulkvpnd"]
        else:
            self.command = ["env", f"PYTHONPATH={settings.tree}", settings.python, "-m", "bulkvpnd"]

    def missing(self):
        if self.settings.tree is None:
            return None if shutil.which("bulkvpnd") else "not installed: bulkvpnd"
        if not (self.settings.tree / "bulkvpnd" / "__main__.py").exists():
            return f"{self.settings.tree}: not a checkout of bulkvpnd"
        return None

    def version(self):
        code = ("import platform, importlib.metadata as m; print('Python ' + platform.python_version(), *(f'{name} "
                "{m.version(name)}' for name in ('gevent', 'cryptography', 'pyroute2', 'ConfigArgParse')), sep=', ')")
        text = namespaces.execute([self.settings.python, "-c", code]).stdout.strip()
        which = (["git", "-C", str(self.settings.tree), "describe", "--always", "--dirty"] if self.settings.tree
                 else ["dpkg-query", "-W", "-f", "${Version}", "bulkvpnd"])
        revision = printed(*which)
        return f"{revision}, {text}" if revision else text

    def start(self, trial):
        certificates(trial)
        self._configure(trial, "server", "server", {"pool-ipv4": f"{INNER_NETWORK}/24"})
        self._daemons = [self._daemon(trial, "server", trial.server, "server")]
        self._await_ready(trial)
        for index, host in enumerate(trial.network.clients):
            self._configure(trial, f"client{index}", "client", {"remote": trial.address})
            self._daemons.append(self._daemon(trial, f"client{index}", host, "client"))
        self._await_ready(trial)
        return INNER_SERVER

    def settle(self, trial):
        # A client is ready with its first connection; the others follow at once.
        wanted = int(self.options.get("connections", config.BY_NAME["connections"].default))
        trial.wait(lambda: all(
            len(session["connections"]) >= wanted for session in self._daemons[0].status()["sessions"]
        ), 5)

    def _configure(self, trial, name, mode, settings, identity=None):
        end = identity or name
        lines = {"mode": mode, **settings, "ca": "ca.crt", "certificate": f"{end}.crt", "key": f"{end}.key"}
        file = trial.directory / f"{name}.conf"
        file.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
        file.chmod(0o600)

    def _daemon(self, trial, name, host, mode):
        flags = [f"--{key}={value}" for key, value in self.options.items()
                 if config.BY_NAME[key].role in (None, mode)]
        if len(trial.network.clients) > 1 and mode == "client" and "workers" not in self.options:
            flags.append("--workers=1")  # the clients of a test with many share this machine with their server
        daemon = demo.Daemon(name, host, trial.directory, self.command, flags)
        trial.adopt(host, daemon.process)
        return daemon

    def _await_ready(self, trial):
        for daemon in self._daemons:
            trial.await_or_fail(daemon.ready, 60, f"READY=1 of {daemon.role}")


class Instances(Bulkvpnd):
    """`count` servers and clients that carry an address at each end together, see multipath in bulkvpn.conf(5)."""

    several_clients = False
    SERVER, CLIENT = "10.87.0.1", "10.88.0.1"

    def __init__(self, name, count, options, settings):
        super().__init__(name, options, settings)
        self.is_variant = True
        self.count = count

    def start(self, trial):
        certificates(trial)
        for host, address in ((trial.server, self.SERVER), (trial.client, self.CLIENT)):
            host.ip("address", "add", address, "dev", "lo")
        numbers = range(self.count)
        self._daemons = []
        for number in numbers:
            port = config.DEFAULT_PORT + number
            self._configure(trial, f"server-{number}", "server", {
                "listen": f"[::]:{port}", "pool-ipv4": f"10.86.{number}.0/24", "device": f"bulk{number}",
                "multipath": f"{self.CLIENT}/32 source {self.SERVER}",
            }, "server")
            clients = trial.directory / f"server-{number}.clients.d"
            clients.mkdir()
            (clients / "client0.conf").write_text(f"[client client0]\nnetworks = {self.CLIENT}/32\n")
            self._daemons.append(self._daemon(trial, f"server-{number}", trial.server, "server"))
        self._await_ready(trial)
        for number in numbers:
            self._configure(trial, f"client-{number}", "client", {
                "remote": f"{trial.address}:{config.DEFAULT_PORT + number}", "device": f"bulk{number}",
                "multipath": f"{self.SERVER}/32 source {self.CLIENT}",
            }, "client0")
            self._daemons.append(self._daemon(trial, f"client-{number}", trial.client, "client"))
        self._await_ready(trial)
        return self.SERVER

    def settle(self, trial):
        trial.wait(lambda: all(
            len(wish["members"]) == self.count for daemon in self._daemons for wish in daemon.status()["multipath"]
        ), 10)


class OpenVPN(System):
    """The user-space data path of OpenVPN 2.6. protocol: tcp or udp. cipher: of --data-ciphers."""

    commands = {"openvpn": "openvpn"}
    several_clients = True

    def __init__(self, name, protocol, cipher):
        super().__init__(name)
        self.is_variant = cipher != "AES-256-GCM"
        self.protocol = protocol
        self.cipher = cipher

    def version(self):
        return printed("openvpn", "--version").split(" [")[0]

    def start(self, trial):
        certificates(trial)
        common = ["openvpn", "--dev", "tun", "--data-ciphers", self.cipher, "--ca", "ca.crt", "--verb", "1",
                  "--disable-dco"]
        trial.spawn(trial.server, [*common, "--proto", {"tcp": "tcp-server"}.get(self.protocol, "udp"),
                                   "--server", INNER_NETWORK, "255.255.255.0", "--topology", "subnet", "--dh", "none",
                                   "--cert", "server.crt", "--key", "server.key"])
        for index, host in enumerate(trial.network.clients):
            trial.spawn(host, [*common, "--proto", {"tcp": "tcp-client"}.get(self.protocol, "udp"), "--client",
                               "--nobind", "--remote", trial.address, "1194", "--remote-cert-tls", "server",
                               "--connect-retry", "1",
                               "--cert", f"client{index}.crt", "--key", f"client{index}.key"])
        return INNER_SERVER


class WireGuardGo(System):
    """The user-space WireGuard over TUN. program: command or path."""

    commands = {"wireguard-go": "wireguard-go", "wg": "wireguard-tools"}
    PORT = 51820

    def __init__(self, name, program="wireguard-go"):
        super().__init__(name)
        self.program = program
        self.commands = {program: "wireguard-go", "wg": "wireguard-tools"}

    def version(self):
        first = printed(self.program, "--version")
        # Debian's builds name the version 0.0.20220316 by its upstream text only in the package.
        package = printed("dpkg-query", "-W", "-f", "${Version}", "wireguard-go")
        return f"{first} ({package})" if self.program == "wireguard-go" and package else first

    def start(self, trial):
        keys = {end: self._keys() for end in ("server", "client")}
        # Its control sockets are in one directory of the machine, whatever the namespace: the names must differ.
        for host, end, other, address, peer in (
            (trial.server, "server", "client", INNER_SERVER, f"AllowedIPs = {inner_client(0)}/32"),
            (trial.client, "client", "server", inner_client(0),
             f"AllowedIPs = {INNER_NETWORK}/24\nEndpoint = {trial.address}:{self.PORT}"),
        ):
            device = f"bm{end[0]}{trial.server.name.rpartition('-')[2]}"
            file = trial.directory / f"{end}.wg"
            file.write_text(f"[Interface]\nPrivateKey = {keys[end][0]}\n"
                            f"{f'ListenPort = {self.PORT}' if end == 'server' else ''}\n"
                            f"[Peer]\nPublicKey = {keys[other][1]}\n{peer}\n")
            trial.spawn(host, ["env", "LOG_LEVEL=error", "WG_PROCESS_FOREGROUND=1", self.program, "-f", device])
            trial.await_or_fail(lambda: host.run(["wg", "show", device], check=False).returncode == 0, 10, device)
            host.run(["wg", "setconf", device, file])
            host.ip("address", "add", f"{address}/24", "dev", device)
            # wg-quick(8) takes 80 bytes from the link's 1500.
            host.ip("link", "set", device, "mtu", 1420, "up")
        return INNER_SERVER

    @staticmethod
    def _keys():
        private = namespaces.execute(["wg", "genkey"]).stdout.strip()
        return private, namespaces.execute(["wg", "pubkey"], stdin=None, input=private).stdout.strip()


class Nebula(System):
    commands = {"nebula": "nebula", "nebula-cert": "nebula"}

    def version(self):
        return printed("nebula", "-version").replace("Version:", "Nebula")

    def start(self, trial):
        namespaces.execute(["nebula-cert", "ca", "-name", "benchmark"], cwd=trial.directory)
        for end, address in (("server", INNER_SERVER), ("client", inner_client(0))):
            namespaces.execute(["nebula-cert", "sign", "-name", end, "-ip", f"{address}/24"], cwd=trial.directory)
            (trial.directory / f"{end}.yml").write_text(textwrap.dedent(f"""\
                pki: {{ca: ca.crt, cert: {end}.crt, key: {end}.key}}
                static_host_map: {{"{INNER_SERVER}": ["{trial.address}:4242"]}}
                lighthouse: {{am_lighthouse: {str(end == "server").lower()}, hosts: [{
                    f'"{INNER_SERVER}"' if end == "client" else ""}]}}
                listen: {{host: 0.0.0.0, port: {4242 if end == "server" else 0}}}
                tun: {{dev: nebula0}}
                firewall:
                  outbound: [{{port: any, proto: any, host: any}}]
                  inbound: [{{port: any, proto: any, host: any}}]
                """))
        for host, end in ((trial.server, "server"), (trial.client, "client")):
            trial.spawn(host, ["nebula", "-config", f"{end}.yml"])
        return INNER_SERVER


class Ocserv(System):
    """ocserv with openconnect as its client, over DTLS where both agree on it."""

    commands = {"ocserv": "ocserv", "openconnect": "openconnect"}
    PORT = 4443

    def version(self):
        return "; ".join(printed(command, "--version") for command in ("ocserv", "openconnect"))

    def start(self, trial):
        certificates(trial)
        (trial.directory / "ocserv.conf").write_text(textwrap.dedent(f"""\
            auth = "certificate"
            tcp-port = {self.PORT}
            udp-port = {self.PORT}
            socket-file = {trial.directory}/ocserv.socket
            server-cert = {trial.directory}/server.crt
            server-key = {trial.directory}/server.key
            ca-cert = {trial.directory}/ca.crt
            cert-user-oid = 2.5.4.3
            device = vpns
            ipv4-network = {INNER_NETWORK}
            ipv4-netmask = 255.255.255.0
            try-mtu-discovery = true
            max-clients = 4
            use-occtl = false
            keepalive = 300
            """))
        script = trial.directory / "openconnect.script"
        script.write_text(textwrap.dedent(f"""\
            #!/bin/sh
            [ "$reason" = connect ] || exit 0
            ip link set dev "$TUNDEV" up mtu "$INTERNAL_IP4_MTU"
            ip address add "$INTERNAL_IP4_ADDRESS/32" dev "$TUNDEV"
            ip route replace {INNER_NETWORK}/24 dev "$TUNDEV"
            """))
        script.chmod(0o700)
        trial.spawn(trial.server, ["ocserv", "--foreground", "--config", "ocserv.conf"])
        trial.await_or_fail(lambda: trial.server.listening(self.PORT), 20, "ocserv listens")
        trial.spawn(trial.client, ["openconnect", "--non-inter", "--cafile", "ca.crt", "--certificate", "client0.crt",
                                   "--sslkey", "client0.key", "--script", script, "--resolve",
                                   f"server:{trial.address}", f"https://server:{self.PORT}"])
        return INNER_SERVER


class Tinc(System):
    commands = {"tincd": "tinc"}

    def version(self):
        return printed("tincd", "--version").split(" (")[0]

    def start(self, trial):
        ends = (("server", trial.server, INNER_SERVER), ("client", trial.client, inner_client(0)))
        for end, _, address in ends:
            directory = trial.directory / end
            (directory / "hosts").mkdir(parents=True)
            connect = "ConnectTo = server\n" if end == "client" else ""
            (directory / "tinc.conf").write_text(f"Name = {end}\nInterface = tinc0\n{connect}")
            remote = f"Address = {trial.address}\n" if end == "server" else ""
            (directory / "hosts" / end).write_text(f"{remote}Subnet = {address}/32\n")
            up = directory / "tinc-up"
            up.write_text(f"#!/bin/sh\nip link set tinc0 up\nip address add {address}/24 dev tinc0\n")
            up.chmod(0o700)
            namespaces.execute(["tincd", "--config", str(directory), "--generate-keys=2048"])
        for end, _, _ in ends:
            other = {"server": "client", "client": "server"}[end]
            shutil.copy(trial.directory / end / "hosts" / end, trial.directory / other / "hosts" / end)
        for end, host, _ in ends:
            trial.spawn(host, ["tincd", "--config", trial.directory / end, "--no-detach",
                               "--pidfile", trial.directory / f"{end}.pid"])
        return INNER_SERVER


def printed(*argv):
    """The first line that a command prints, but not its error; "" where there is none, or no such command."""
    with contextlib.suppress(namespaces.CommandError, IndexError):
        done = namespaces.execute(list(argv), check=False)
        # openvpn gives its version with status 1, ocserv gives it on standard error.
        return (done.stdout or (done.stderr if done.returncode == 0 else "")).strip().splitlines()[0]
    return ""


def certificates(trial):
    """Makes ca.crt and a certificate and key for the server and for every client in the trial's directory."""
    now = datetime.datetime.now(datetime.timezone.utc)
    ca, ca_key = pki.create_authority("benchmark", now, 2)
    files = {"ca.crt": ca}
    for name in ("server", *(f"client{index}" for index in range(len(trial.network.clients)))):
        files[f"{name}.crt"], files[f"{name}.key"] = pki.issue(ca, ca_key, name, name.rstrip("0123456789"), now, 1)
    for name, text in files.items():
        file = trial.directory / name
        file.touch(mode=0o600)
        file.write_text(text)


SYSTEMS = {
    "direct": Direct,
    "openvpn-tcp-aes": functools.partial(OpenVPN, protocol="tcp", cipher="AES-256-GCM"),
    "openvpn-tcp-chacha": functools.partial(OpenVPN, protocol="tcp", cipher="CHACHA20-POLY1305"),
    "openvpn-udp-aes": functools.partial(OpenVPN, protocol="udp", cipher="AES-256-GCM"),
    "openvpn-udp-chacha": functools.partial(OpenVPN, protocol="udp", cipher="CHACHA20-POLY1305"),
    "wireguard-go": WireGuardGo,
    "nebula": Nebula,
    "ocserv": Ocserv,
    "tinc": Tinc,
}
DEFAULT = (
    "direct", "bulkvpnd", "bulkvpnd-connections-1", "bulkvpnd-workers-1", "bulkvpnd-offload-no",
    "bulkvpnd-instances-1", "bulkvpnd-instances-2", "bulkvpnd-instances-4", "openvpn-tcp-aes", "openvpn-tcp-chacha",
    "openvpn-udp-aes", "openvpn-udp-chacha", "wireguard-go", "nebula", "ocserv", "tinc",
)  # fmt: skip
_OPTION = re.compile("-(" + "|".join(config.BY_NAME) + ")-([A-Za-z0-9]+(?:-[0-9]+-gcm|-poly1305)?)")


def system(name, settings):
    """The system called `name`. settings: Settings. Raises ValueError that says what there is."""
    base, _, other = name.partition("@")
    tree = pathlib.Path(other).absolute() if other else settings.tree
    match = re.fullmatch(r"bulkvpnd(?:-instances-([1-9][0-9]?))?(.*)", base)
    options = dict(_OPTION.findall(match[2])) if match else {}
    if match and match[2] == "".join(f"-{option}-{value}" for option, value in options.items()):
        settings = dataclasses.replace(settings, tree=tree)
        return Instances(name, int(match[1]), options, settings) if match[1] else Bulkvpnd(name, options, settings)
    if base == "wireguard-go" and other:
        return WireGuardGo(name, other)
    if name in SYSTEMS:
        return SYSTEMS[name](name)
    raise ValueError(f"{name}: no such system; there are {', '.join(SYSTEMS)}, and "
                     "bulkvpnd[-instances-N][-OPTION-VALUE…][@DIR]")


__all__ = ["DEFAULT", "ROOT", "SYSTEMS", "Settings", "System", "TrialError", "system"]
