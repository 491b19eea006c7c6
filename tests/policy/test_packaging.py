"""The Debian package: its unit, its version and its dependencies."""

import configparser
import json
import pathlib
import re
import shutil
import subprocess

import pytest

import bulkvpnd
from bulkvpnd import config
from bulkvpnd.host import program, resolvconf, sysctl

ROOT = pathlib.Path(__file__).parents[2]
DEBIAN = ROOT / "debian"
UNIT = DEBIAN / "bulkvpnd@.service"
HELPER, HELPER_SOCKET = DEBIAN / "bulkvpnd@.bulkvpnd-resolvconf.service", DEBIAN / "bulkvpnd.bulkvpnd-resolvconf.socket"
"""dh_installsystemd --name=bulkvpnd-resolvconf gives them their names."""
EXPOSURE_MAX, HELPER_EXPOSURE_MAX = 2.0, 2.4
"""What `systemd-analyze security` may say of the units; lower is better (choice: OpenVPN's has 7.5). The helper's is
root."""

DEBIAN_PACKAGES = {
    # name in setup.cfg: Debian's name, as dh_python3 has it
    "ConfigArgParse": "python3-configargparse",
    "argcomplete": "python3-argcomplete",
    "cryptography": "python3-cryptography",
    "dnspython": "python3-dnspython",
    "gevent": "python3-gevent",
    "pyroute2": "python3-pyroute2",
    "prometheus-client": "python3-prometheus-client",
    "rich": "python3-rich",
    "segno": "python3-segno",
    "systemd-python": "python3-systemd",
}


def unit(text):
    """{section: {key: [value, ...]}} of a unit file: a key may stand several times."""
    found = {}
    for line in text.splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return found


@pytest.fixture(scope="module")
def service():
    return unit(UNIT.read_text())["Service"]


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("Type", ["notify"]),
        ("User", ["bulkvpnd"]),
        ("AmbientCapabilities", ["CAP_NET_ADMIN"]),
        ("CapabilityBoundingSet", ["CAP_NET_ADMIN"]),
        ("NoNewPrivileges", ["yes"]),
        # Only root can read the configuration, because it holds the private key.
        ("LoadCredential", ["%i.conf:/etc/bulkvpn/%i.conf"]),
        # config.load finds the credential by the file's name, and the directories by these variables.
        ("RuntimeDirectory", ["bulkvpnd/%i"]),
        ("StateDirectory", ["bulkvpnd/%i"]),
        # PrivateDevices= would hide the one device that is needed.
        ("DeviceAllow", ["/dev/net/tun rw"]),
        ("PrivateDevices", None),
        # Both would keep the daemon from net.* sysctls.
        ("ProtectKernelTunables", ["no"]),
        ("ProcSubset", None),
        # Workers are started by setpriv(1), which needs capset, and confine themselves with the others.
        ("SystemCallFilter", ["@system-service", "~@privileged @resources", "capset",
                              "landlock_create_ruleset landlock_add_rule landlock_restrict_self seccomp"]),
        ("WatchdogSec", ["30"]),
        ("Restart", ["on-failure"]),
        ("RestartPreventExitStatus", ["64 77 78"]),
        ("LimitCORE", ["0"]),
        ("MemorySwapMax", ["0"]),
        ("ExecReload", ["+/usr/bin/python3 -I /usr/sbin/bulkvpnctl reload %i"]),
        # What each of these holds alone is too little for test_unit_is_confined to miss it.
        ("UnsetEnvironment", ["SSLKEYLOGFILE GEVENT_LOOP"]),
        ("UMask", ["0077"]),
        ("StateDirectoryMode", ["0700"]),
        ("RuntimeDirectoryMode", ["0750"]),
        ("LogRateLimitIntervalSec", ["30"]),
        ("LogRateLimitBurst", ["1000"]),
        ("KeyringMode", ["private"]),
        ("DevicePolicy", ["closed"]),
        ("ProtectSystem", ["strict"]),
        ("ReadWritePaths", ["-/run/bulkvpn"]),
        ("ProtectHome", ["yes"]),
        ("PrivateTmp", ["yes"]),
        ("PrivateMounts", ["yes"]),
        ("ProtectProc", ["invisible"]),
        ("ProtectClock", ["yes"]),
        ("ProtectControlGroups", ["yes"]),
        ("ProtectHostname", ["yes"]),
        ("ProtectKernelLogs", ["yes"]),
        ("ProtectKernelModules", ["yes"]),
        ("LockPersonality", ["yes"]),
        ("MemoryDenyWriteExecute", ["yes"]),
        ("RemoveIPC", ["yes"]),
        ("RestrictAddressFamilies", ["AF_UNIX AF_NETLINK AF_INET AF_INET6"]),
        ("RestrictNamespaces", ["yes"]),
        ("RestrictRealtime", ["yes"]),
        ("RestrictSUIDSGID", ["yes"]),
        ("SystemCallArchitectures", ["native"]),
        ("SystemCallErrorNumber", ["EPERM"]),
    ],
)
def test_unit(service, key, values):
    assert service.get(key) == values


def test_unit_starts_the_installed_command_on_the_instance_file(service):
    assert service["ExecStart"] == [
        f"/usr/bin/python3 -I /usr/sbin/bulkvpnd --config {config.CONFIGURATION_DIRECTORY}/%i.conf"
    ]


def test_unit_reads_the_configuration_through_the_credential(service, tmp_path, monkeypatch):
    """The daemon cannot read root's file, so what it is given has to be found under the name that the unit gives it."""
    name = service["LoadCredential"][0].partition(":")[0].replace("%i", "server")
    (tmp_path / name).write_text("mode = client\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    file = config.CONFIGURATION_DIRECTORY / "server.conf"
    assert config.read_secret_file(file) == "mode = client\n"


def test_restart_is_prevented_only_for_what_the_manual_says(service):
    manual = (ROOT / "man" / "bulkvpnd.8").read_text()
    for status in service["RestartPreventExitStatus"][0].split():
        assert f"\n.It {status}\n" in manual


def test_a_restart_of_the_target_reaches_the_instances():
    assert unit(UNIT.read_text())["Unit"]["PartOf"] == ["bulkvpnd.target"]
    assert unit((DEBIAN / "bulkvpnd.target").read_text())["Install"]["WantedBy"] == ["multi-user.target"]


def test_user_is_made_by_the_package(service):
    assert (DEBIAN / "bulkvpnd.sysusers").read_text().split()[:2] == ["u", service["User"][0]]


def test_what_instances_share_is_made_by_the_package_and_can_be_written(service):
    lines = (DEBIAN / "bulkvpnd.tmpfiles").read_text().splitlines()
    kind, path, mode, *owner = [line.split() for line in lines if not line.startswith("#")][0][:5]
    assert (kind, path, owner) == ("d", str(sysctl.SHARED_DIRECTORY), service["User"] * 2)
    assert mode == "0750", "who can open it, can lock it"
    assert service["ReadWritePaths"] == [f"-{sysctl.SHARED_DIRECTORY}"]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("ExecStart", ["/usr/bin/python3 -I -m bulkvpnd.host.resolvconf"]),
        ("StandardInput", ["socket"]),
        # Of the streams, the connection is one; the others would be the same.
        ("StandardOutput", ["journal"]),
        ("StandardError", ["journal"]),
        ("UMask", ["0022"]),
        ("CapabilityBoundingSet", ["CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_KILL"]),
        ("NoNewPrivileges", ["yes"]),
        ("KeyringMode", ["private"]),
        # openresolv writes /etc/resolv.conf.
        ("ProtectSystem", ["yes"]),
        ("ProtectHome", ["yes"]),
        ("PrivateTmp", ["yes"]),
        ("PrivateDevices", ["yes"]),
        ("PrivateMounts", ["yes"]),
        ("ProtectClock", ["yes"]),
        ("ProtectControlGroups", ["yes"]),
        ("ProtectHostname", ["yes"]),
        ("ProtectKernelLogs", ["yes"]),
        ("ProtectKernelModules", ["yes"]),
        ("ProtectKernelTunables", ["yes"]),
        ("RestrictAddressFamilies", ["AF_UNIX AF_NETLINK AF_INET AF_INET6"]),
        ("IPAddressDeny", ["any"]),
        ("IPAddressAllow", ["localhost"]),
        ("LockPersonality", ["yes"]),
        ("MemoryDenyWriteExecute", ["yes"]),
        ("RestrictNamespaces", ["yes"]),
        ("RestrictRealtime", ["yes"]),
        ("RestrictSUIDSGID", ["yes"]),
        ("SystemCallArchitectures", ["native"]),
        ("SystemCallFilter", ["@system-service", "~@privileged @resources", "@chown"]),
        ("SystemCallErrorNumber", ["EPERM"]),
        ("LimitCORE", ["0"]),
    ],
)
def test_helper(key, values):
    assert unit(HELPER.read_text())["Service"].get(key) == values


def test_helper_has_time_to_end():
    """It may be in the middle of adding its record, which it removes then."""
    stop = int(unit(HELPER.read_text())["Service"]["TimeoutStopSec"][0])
    assert stop > 2 * program.TIMEOUT


def test_only_the_daemon_reaches_the_helper(service):
    assert unit(HELPER_SOCKET.read_text())["Socket"] == {
        "ListenSequentialPacket": [str(resolvconf.SOCKET)], "Accept": ["yes"], "SocketGroup": service["User"],
        "SocketMode": ["0660"], "RemoveOnStop": ["yes"],
    }  # fmt: skip


def test_only_an_instance_starts_the_helper():
    socket = unit(HELPER_SOCKET.read_text())
    assert "Install" not in socket and socket["Unit"]["StopWhenUnneeded"] == ["yes"]
    for key in ("Wants", "After"):
        assert "bulkvpnd-resolvconf.socket" in unit(UNIT.read_text())["Unit"][key][0].split()


RESOLVE = "org.freedesktop.resolve1."
ACTIONS = ("set-dns-servers", "set-domains", "set-default-route", "revert")
POLKIT = """
const polkit = {Result: {YES: "yes"}, addRule: (rule) => { polkit.rule = rule; }};
%s
console.log(JSON.stringify(%s.map(([user, id]) => polkit.rule({id: id}, {user: user}) || "no")));
"""


def test_polkit_lets_the_daemon_s_user_set_name_servers_and_nobody_else(service):
    """By its text, which is all that can be seen without an interpreter; the next test runs it."""
    text = " ".join((DEBIAN / "polkit" / "bulkvpnd.rules").read_text().split())
    assert f'if (subject.user == "{service["User"][0]}" && actions.indexOf(action.id) >= 0) {{ return' in text
    assert re.findall(r'"(org\.[^"]+)"', text) == [f"{RESOLVE}{action}" for action in ACTIONS]
    assert text.count("polkit.Result.") == text.count("return ") == 1


def test_polkit_s_rule_says_yes_to_these_and_nothing_of_others(service):
    node = shutil.which("node")
    if not node:
        pytest.skip("needs node, to run the rule")
    (user,) = service["User"]
    actions = [f"{RESOLVE}{action}" for action in (*ACTIONS, "register-service")]
    asked = [(who, action) for who in (user, "root", "alice", "") for action in actions]
    rule = (DEBIAN / "polkit" / "bulkvpnd.rules").read_text()
    done = subprocess.run([node, "-e", POLKIT % (rule, json.dumps(asked))], capture_output=True, text=True, check=True)
    wanted = ["yes" if who == user and action != actions[-1] else "no" for who, action in asked]
    assert json.loads(done.stdout) == wanted


def test_a_purge_removes_the_directory_of_the_helper():
    assert str(resolvconf.SOCKET.parent) in (DEBIAN / "bulkvpnd.postrm").read_text().split()


def exposure(file):
    """The overall number of `systemd-analyze security` for a unit file."""
    program = shutil.which("systemd-analyze")
    if not program:
        pytest.skip("needs systemd-analyze")
    result = subprocess.run([program, "security", "--offline=true", "--no-pager", file], capture_output=True, text=True)
    match = re.search(r"Overall exposure level for .*: ([0-9.]+)", result.stdout)
    if not match:
        pytest.skip(f"systemd-analyze does not work here: {result.stderr.strip()}")
    return float(match[1])


def test_unit_is_confined():
    assert exposure(UNIT) <= EXPOSURE_MAX


def test_helper_is_confined(tmp_path):
    file = tmp_path / "bulkvpnd-resolvconf@.service"
    file.write_text(HELPER.read_text())
    assert exposure(file) <= HELPER_EXPOSURE_MAX


def test_a_unit_that_is_less_confined_is_noticed(tmp_path):
    file = tmp_path / UNIT.name
    file.write_text(UNIT.read_text().replace("User=bulkvpnd\n", ""))
    assert exposure(file) > EXPOSURE_MAX


def test_no_instance_can_be_started_from_a_shipped_file():
    assert [file.name for file in (ROOT / "etc" / "bulkvpn").iterdir() if file.name.endswith(".conf")] == []


def test_version_is_the_same_everywhere(setup):
    first = (DEBIAN / "changelog").read_text().partition("\n")[0]
    assert re.match(r"bulkvpnd \(([^)]+)\) ", first)[1] == bulkvpnd.__version__
    assert setup["metadata"]["version"] == "attr: bulkvpnd.__version__"


def requirements(setup):
    lines = setup["options"]["install_requires"].split()
    return [re.match(r"[A-Za-z0-9-]+", line)[0] for line in lines]


def test_every_dependency_is_in_debian_and_tested_at_build_time(setup):
    names = requirements(setup)
    assert set(names) == set(DEBIAN_PACKAGES)
    source = (DEBIAN / "control").read_text().partition("\nPackage:")[0]
    for name in names:
        assert re.search(rf"^ {DEBIAN_PACKAGES[name]} <!nocheck>,$", source, re.MULTILINE)


@pytest.mark.parametrize("script", ["tests/run", "benchmarks/run"])
def test_scripts_install_what_the_daemon_needs(script):
    """They run the daemon from the checkout, on a machine that may never have had the package."""
    installed = set((ROOT / script).read_text().replace('"', " ").split())
    missing = {"python3-nftables", "python3-seccomp", *DEBIAN_PACKAGES.values()} - installed
    assert not missing


def test_dependencies_of_the_package_come_from_setup_cfg():
    binary = (DEBIAN / "control").read_text().partition("\nPackage:")[2]
    depends = re.search(r"^Depends:\n((?: .*\n)+)", binary, re.MULTILINE)[1]
    # The bindings of nftables and libseccomp are no packages of PyPI.
    assert depends.split() == ["python3-nftables,", "python3-seccomp,", "${misc:Depends},", "${python3:Depends},"]


def test_debhelper_has_the_same_names(setup):
    table = pathlib.Path("/usr/share/dh-python/dist/cpython3_fallback")
    if not table.exists():
        pytest.skip("needs dh-python")
    known = dict(line.split()[:2] for line in table.read_text().splitlines() if len(line.split()) >= 2)
    known = {re.sub("[-.]", "_", name).lower(): package for name, package in known.items()}
    for name in requirements(setup):
        # A package that is installed is found without the table.
        assert known.get(name.replace("-", "_").lower(), DEBIAN_PACKAGES[name]) == DEBIAN_PACKAGES[name]


def test_both_commands_are_installed_for_the_administrator(setup):
    lines = setup["options.entry_points"]["console_scripts"].split("\n")
    assert sorted(filter(None, lines)) == ["bulkvpnctl = bulkvpnd.cli:bulkvpnctl", "bulkvpnd = bulkvpnd.cli:bulkvpnd"]
    assert "--install-scripts=/usr/sbin" in (DEBIAN / "rules").read_text()


def test_licence_is_the_same_in_both_files():
    text = " ".join((ROOT / "LICENSE").read_text().partition("\n\nPermission")[2].split())
    copyright_file = (DEBIAN / "copyright").read_text().partition("\nLicense: Expat\n Permission")[2]
    assert text == " ".join(copyright_file.replace("\n .\n", "\n").split())
