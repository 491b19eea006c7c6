"""``bulkvpnctl example``: a commented configuration with every option, made from the table of options.

The files ``etc/bulkvpn/*.conf.example`` are this output; a test holds them equal.
"""

import textwrap

from bulkvpnd import config

WIDTH = 100
"""Columns of a comment line (choice)."""

HEADS = {
    "server": """\
        Configuration of a bulkvpnd server. Copy it to /etc/bulkvpn/NAME.conf, let only root read it
        (chmod 600), and start it with: systemctl enable --now bulkvpnd@NAME
        "bulkvpnctl pki init" writes a shorter one that is complete, with certificate and key inside.
        """,
    "client": """\
        Configuration of a bulkvpnd client. Copy it to /etc/bulkvpn/NAME.conf, let only root read it
        (chmod 600), and start it with: systemctl enable --now bulkvpnd@NAME
        "bulkvpnctl pki add" on the server writes a shorter one that is complete, with certificate and
        key inside.
        """,
}
EXAMPLES = {
    "wan-mtu": "1500",
    # What a line shows where the table has no default.
    "remote": "vpn.example.org:7443",
    "pool-ipv4": "10.86.0.0/24",
    "pool-ipv6": "fd86:1:2:3::/64",
    "routes": "192.168.7.0/24",
    "local-networks": "192.168.1.0/24",
    "metrics": "127.0.0.1:9743",
    "dns": "10.86.0.1",
    "dns-search": "example.org",
    "multipath": "10.2.0.0/16 weight 1",
    "ca": "ca.crt",
    "certificate": "{role}.crt",
    "key": "{role}.key",
    "crl": "crl.pem",
    "on-up": "/etc/bulkvpn/on-up",
    "on-down": "/etc/bulkvpn/on-down",
    "on-client-connect": "/etc/bulkvpn/on-client-connect",
    "on-client-disconnect": "/etc/bulkvpn/on-client-disconnect",
    "runtime-directory": "/run/bulkvpnd/{role}",
    "state-directory": "/var/lib/bulkvpnd/{role}",
}


def add_arguments(parser):
    parser.add_argument("role", choices=sorted(HEADS), help="the mode that the example is for")


def run(arguments):
    print(example(arguments.role), end="")
    return 0


def example(role):
    """The text of a configuration file for `role`, server or client: only the mode is not commented out."""
    lines = ["# " + line for line in textwrap.dedent(HEADS[role]).splitlines()]
    lines += ["#", "# A line that is commented out shows the default, or an example where there is none.",
              "# The manual is bulkvpn.conf(5)."]
    for group in config.GROUPS:
        lines += ["", "", f"## {group}"]
        for option in config.OPTIONS:
            if option.group == group and option.role in (None, role):
                lines += ["", *_entry(option, role)]
    return "\n".join(lines) + "\n"


def _entry(option, role):
    yield from textwrap.wrap(config.help_text(option), WIDTH, initial_indent="# ", subsequent_indent="# ",
                             break_on_hyphens=False)
    if option.name == "mode":
        yield f"mode = {role}"
    elif option.default is not None:
        yield f"#{option.name} = {option.default}"
    else:
        yield f"#{option.name} = {EXAMPLES[option.name].format(role=role)}"
