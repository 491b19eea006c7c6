"""The configuration in force, and how another takes its place while the instance runs.

    start, SIGHUP, `bulkvpnctl reload` --> read --> checked as a whole --wrong--> an error; everything stays as it is
                                                        |
                     what can be applied live is in force, the rest is named and waits for a restart

What an option can do is in its row of config.OPTIONS. Sessions and connections survive all of it, but for those of
clients that get other addresses or networks: control.server.
"""

import dataclasses
import datetime

from bulkvpnd import config, pki
from bulkvpnd.control import clients, gateway, hooks, multipath
from bulkvpnd.control.revocation import Revocations

PEM_OPTIONS = ("ca", "certificate", "key", "crl")


def check(configuration):
    """What can be said about a configuration before anything is touched.

    Returns (Configuration with its clients, Revocations, expiries of pki.check_own). Raises ConfigurationError.
    """
    configuration = dataclasses.replace(configuration, clients=clients.load(configuration))
    gateway.check(configuration)
    hooks.check(configuration)
    multipath.check_configuration(configuration)
    texts = [config.pem_text(configuration, name) for name in ("ca", "certificate", "key")]
    now = datetime.datetime.now(datetime.timezone.utc)
    try:
        expiries = pki.check_own(*texts, configuration.mode, now)
    except pki.PKIError as error:
        raise config.ConfigurationError(f"{configuration.path}: {error}") from None
    return configuration, Revocations(configuration, now), expiries


class Current:
    """configuration, revocations, expiries: in force, as check() returned them.

    load(text): the Configuration that the file holds, or `text` in its place; raises ConfigurationError.
    """

    def __init__(self, configuration, revocations, expiries, load):
        self.configuration = configuration
        self.revocations = revocations
        self._expiries = expiries
        self._load = load

    @property
    def expiries(self):
        """{option: when what it holds expires, aware datetime} of certificate, ca and, if there is one, crl."""
        return self._expiries | ({"crl": self.revocations.expires} if self.revocations.expires else {})

    def replace(self, text, prepare):
        """Another configuration comes into force, as far as it can.

        text: of the file, None to read it. prepare(old, new): does what may still fail, and raises then.
        Returns ({what has changed, options and the clients' directory: when it takes effect, of config.RELOADS}, [what
        needs a restart]). Raises ConfigurationError, or what prepare() raises, and then nothing has changed.
        """
        old = self.configuration
        wanted = self._load(text)
        if wanted.mode != old.mode:
            raise config.ConfigurationError(f"{old.path}: mode = {wanted.mode}: this instance runs as a {old.mode}; "
                                            f"restart it, or leave mode = {old.mode}")
        wanted, revocations, expiries = check(wanted)
        live, restart = {}, []
        fields = {}
        for option in config.OPTIONS:
            value = getattr(wanted, option.field)
            when = option.reload_of(old.mode)
            if when != config.RESTART:
                # Also where the path is the same the file may have changed.
                fields[option.field] = value
            if option.name in PEM_OPTIONS:
                changed = self.revocations.texts.get(option.name) != revocations.texts.get(option.name)
            else:
                changed = value != getattr(old, option.field)
            if changed and when == config.RESTART:
                restart.append(option.name)
            elif changed:
                live[option.name] = when
        if wanted.clients != old.clients:
            directory = clients.directory_of(old).name
            # With other pools they were checked against those, which are not in force.
            if (wanted.pool_ipv4, wanted.pool_ipv6) == (old.pool_ipv4, old.pool_ipv6):
                fields["clients"], live[directory] = wanted.clients, config.NOW
            else:
                restart.append(directory)
        merged = dataclasses.replace(old, **fields)
        prepare(old, merged)
        self.configuration, self.revocations, self._expiries = merged, revocations, expiries
        return live, restart
