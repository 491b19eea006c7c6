"""A configuration, from the command line and the file that it names."""

import argparse
import dataclasses
import os
import pathlib

import configargparse

from bulkvpnd import __version__
from bulkvpnd.config.errors import ConfigurationError, escaped, shown_line
from bulkvpnd.config.files import read_secret_file
from bulkvpnd.config.options import BY_NAME, GROUPS, OPTIONS, help_text
from bulkvpnd.config.syntax import FileParser
from bulkvpnd.config.values import pem

CONFIGURATION_DIRECTORY = pathlib.Path("/etc/bulkvpn")
Configuration = dataclasses.make_dataclass(
    "Configuration",
    [("name", str), ("path", pathlib.Path), *((option.field, object) for option in OPTIONS), ("clients", tuple, ())],
    frozen=True,
    slots=True,
    repr=False,
)
Configuration.__doc__ = """Every option's value, with the instance's name and the file it came from.

clients: what is fixed for single clients, control.clients.Client; the main process reads that.
"""


def load(arguments, text=None):
    """Reads the command line and the file it names.

    arguments: list of str, without the program's name. text: what the file says, where it need not be read.
    Returns (Configuration, argparse.Namespace).
    Raises ConfigurationError; SystemExit for --help and --version.
    """
    if "--" in arguments:
        # ConfigArgParse would add the file's settings behind it, and argparse would then print them all, the key too.
        raise ConfigurationError("--: there is nothing but options; see bulkvpnd --help", on_command_line=True)
    parser, file_parser = build_parser()
    # Read here and not by ConfigArgParse so that a credential of systemd can stand in for the file, and so that the
    # owner and mode are checked on the descriptor that is read.
    name = _config_argument(arguments)
    file = file_parser.name = pathlib.Path(name or "")
    informs = {"-h", "--help", "--version"} & set(arguments)
    if text is None:
        text = read_secret_file(file) if name and not informs else ""
    namespace = parser.parse_args(arguments, config_file_contents=text, env_vars={})
    from_file = set()
    for source, settings in parser.get_source_to_settings_dict().items():
        if source.startswith("config_file"):
            from_file.update(settings)
    values = {}
    for option in OPTIONS:
        raw = getattr(namespace, option.field)
        lines = file_parser.lines.get(option.name) if option.name in from_file else None
        values[option.field] = value_of(option, raw, file, lines)
    configuration = Configuration(name=file.name.removesuffix(".conf"), path=file, **values)
    _check_together(configuration, file, file_parser.lines, from_file, namespace)
    return _with_directories(configuration), namespace


def _config_argument(args):
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("-c", "--config")
    try:
        return finder.parse_known_args(args)[0].config
    except argparse.ArgumentError:
        return None  # the parser proper says what is wrong


def build_parser():
    """The parser of bulkvpnd(8), from OPTIONS. Returns (parser, FileParser)."""
    parser = Parser(
        prog="bulkvpnd",
        description="Bulk VPN daemon: moves packets in bulk over parallel TCP connections.",
        epilog="The manual is bulkvpnd(8); every option can stand in the file too, see bulkvpn.conf(5).",
        config_file_parser_class=FileParser,
        add_config_file_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", metavar="FILE", required=True, is_config_file_arg=True,
                        help="configuration file, usually /etc/bulkvpn/NAME.conf")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--version", action="version", version=f"bulkvpnd {__version__}")
    for group in GROUPS:
        section = parser.add_argument_group(group)
        for option in (option for option in OPTIONS if option.group == group):
            section.add_argument(
                f"--{option.name}",
                metavar=option.metavar,
                action="append" if option.repeat else "store",
                help=help_text(option).replace("%", "%%"),
            )
    return parser, parser._config_file_parser  # the only way to reach the instance that remembers the lines


class Parser(configargparse.ArgumentParser):
    """ConfigArgParse's parser, with errors raised instead of printed."""

    def error(self, message):
        raise ConfigurationError(f"{message}; see bulkvpnd --help", on_command_line=True)


def value_of(option, raw, file, lines):
    """The option's value. raw: str or None, a list of them where it may be repeated. lines: where they stand in `file`,
    None for the command line. Raises ConfigurationError."""
    if raw is None:
        if option.default is None:
            return () if option.repeat else None
        raw = [option.default] if option.repeat else option.default
    parsed = []
    if option.repeat and len(raw) > option.most:
        where = f"{file}:{lines[option.most]}: {option.name}" if lines else f"--{option.name}"
        raise ConfigurationError(f"{where}: given {len(raw)} times; at most {option.most} are allowed",
                                 on_command_line=not lines)
    for at, one in enumerate(raw if option.repeat else [raw]):
        # What argparse makes of --, which it takes for the end of the options wherever it stands.
        one = "--" if one == [] else one
        try:
            parsed.append(option.parse(one))
        except ValueError as error:
            where = f"{file}:{lines[at]}: {option.name}" if lines else f"--{option.name}"
            hidden = option.secret or "PRIVATE KEY" in one
            # A key may have been pasted without its first line, and where a certificate belongs.
            shown = "" if hidden else f" = {shown_line(one) if option.parse is pem else escaped(one)}"
            raise ConfigurationError(f"{where}{shown}: should be {error}", on_command_line=not lines) from None
    return tuple(parsed) if option.repeat else parsed[0]


def _check_together(configuration, file, lines, from_file, namespace):
    """What single values cannot tell: the mode's needs, and pairs that contradict each other."""
    mode = configuration.mode
    if mode is None:
        raise ConfigurationError(f"{file}: mode: missing; write mode = server or mode = client")
    for option in OPTIONS:
        if option.role not in (None, mode) and getattr(namespace, option.field) is not None:
            in_file = option.name in from_file
            where = f"{file}:{lines[option.name][0]}: {option.name}" if in_file else f"--{option.name}"
            raise ConfigurationError(
                f"{where}: is for mode = {option.role}, and this is mode = {mode}; take it out",
                on_command_line=not in_file,
            )
    needed = {"server": ("ca", "certificate", "key"), "client": ("remote", "ca", "certificate", "key")}[mode]
    for name in needed:
        if not getattr(configuration, BY_NAME[name].field):
            raise ConfigurationError(f"{file}: {name}: missing; mode = {mode} needs it, see bulkvpn.conf(5)")
    if mode == "server" and not (configuration.pool_ipv4 or configuration.pool_ipv6):
        raise ConfigurationError(f"{file}: pool-ipv4: missing; give pool-ipv4, pool-ipv6 or both")
    _check_multipath(configuration, file, lines.get("multipath") if "multipath" in from_file else None)
    if configuration.kill_switch and not configuration.redirect_gateway:
        raise ConfigurationError(
            f"{file}: kill-switch = yes: without a full tunnel it would cut this machine off; "
            "add redirect-gateway = yes"
        )
    if mode == "server" and configuration.keepalive_timeout <= configuration.keepalive:
        raise ConfigurationError(
            f"{file}: keepalive-timeout = {configuration.keepalive_timeout}: should be longer than "
            f"keepalive = {configuration.keepalive}"
        )


def _check_multipath(configuration, file, lines):
    """lines: where the values stand in the file, None for the command line."""
    pools = {"pool-ipv4": configuration.pool_ipv4, "pool-ipv6": configuration.pool_ipv6}
    seen = set()
    for at, wish in enumerate(configuration.multipath):
        where = f"{file}:{lines[at]}: multipath" if lines else "--multipath"
        if wish.prefix in seen:
            raise ConfigurationError(f"{where} = {wish.prefix}: given twice; keep one of them", not lines)
        seen.add(wish.prefix)
        for name, pool in pools.items():
            if pool and pool.version == wish.prefix.version and wish.prefix.subnet_of(pool):
                raise ConfigurationError(
                    f"{where} = {wish.prefix}: is inside {name} = {pool}, which is this instance's alone; "
                    "give a network behind the tunnel", not lines
                )


def _with_directories(configuration):
    def directory(value, variable, parent):
        # systemd joins several directories with a colon; the unit gives one.
        given = os.environ.get(variable, "").partition(":")[0]
        return value or pathlib.Path(given or f"{parent}/{configuration.name}")

    return dataclasses.replace(
        configuration,
        runtime_directory=directory(configuration.runtime_directory, "RUNTIME_DIRECTORY", "/run/bulkvpnd"),
        state_directory=directory(configuration.state_directory, "STATE_DIRECTORY", "/var/lib/bulkvpnd"),
    )


def pem_path(configuration, name):
    """The file that the option `name` (ca, certificate, key or crl) stands for; None if it is inline or not given.

    A relative path counts from the configuration's directory.
    """
    file, _ = getattr(configuration, BY_NAME[name].field) or (None, None)
    return file and configuration.path.parent / file


def pem_text(configuration, name):
    """PEM text of the option `name` (ca, certificate, key or crl), read from its file where it is not inline.

    Raises ConfigurationError.
    """
    _, text = getattr(configuration, BY_NAME[name].field)
    if text is not None:
        return text
    file = pem_path(configuration, name)
    text = read_secret_file(file)
    if "-----BEGIN" not in text:
        raise ConfigurationError(f"{configuration.path}: {name} = {file}: has no PEM text; it begins with "
                                 "-----BEGIN")
    return text
