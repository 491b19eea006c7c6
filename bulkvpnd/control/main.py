"""The main process from start to stop.

    configuration, certificates  --wrong?-->  exit 78, nothing touched
    TUN device, offload probe, link up        exit 77 without the privilege, 1 when the kernel refuses
    what is changed on the machine            what a crash left of it is removed first
    workers, status socket
    Server or Client                          READY=1 when the tunnel can carry traffic
    SIGHUP, bulkvpnctl reload                 another configuration comes into force, see control.current
    SIGTERM, SIGINT                           CLOSE to the peers, and back through all of this, exit 0

Each step puts its undo on one stack, so a failure or a stop in the middle of a start undoes what was done, no more.
"""

import contextlib
import datetime
import functools
import logging
import os
import signal
import socket
import sys
import time

import gevent
from gevent.event import Event

from bulkvpnd import __version__, config, events, hardening, service
from bulkvpnd.control import ciphers
from bulkvpnd.control.client import Client
from bulkvpnd.control.current import Current, check
from bulkvpnd.control.expiry import Expiry
from bulkvpnd.control.guard import Guard
from bulkvpnd.control.hooks import Hooks
from bulkvpnd.control.multipath import Multipath, literal_addresses
from bulkvpnd.control.server import Server
from bulkvpnd.control.status import Claim, CommandError, StatusSocket
from bulkvpnd.control.tuning import Tuner
from bulkvpnd.host import device, firewall, link, sysctl
from bulkvpnd.host.changes import Changes
from bulkvpnd.host.multipath import MultipathError
from bulkvpnd.host.tun import Tun, TunError

log = logging.getLogger(__name__)

STATUS_PERIOD = 5.0
"""Seconds between two STATUS= lines for systemd (choice)."""
_ROLES = {"server": Server, "client": Client}


def run(configuration, load, workers, stops, check_only=False):
    """Runs the daemon until it is stopped. Returns the exit status.

    load(text): as control.current.Current has it. workers: control.workers.Workers, launched, unless it only checks.
    stops: list of the stop signals that came so far; their handlers add to it.
    """
    try:
        configuration, revocations, expiries = check(configuration)
    except config.ConfigurationError as error:
        print(f"bulkvpnd: {error}", file=sys.stderr)
        return os.EX_CONFIG
    valid_until = f"{min(expiries.values()):%Y-%m-%d}"
    if check_only:
        print(f"{configuration.path}: good; the certificate is valid until {valid_until}")
        return os.EX_OK
    service.set_up_logging(configuration.name, configuration.log_level)
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, stop.set)
    if stops:
        stop.set()
    reload = Event()
    gevent.signal_handler(signal.SIGHUP, reload.set)
    if not hardening.hide_memory():
        log.warning("this process cannot hide its memory from others of its user")
    log.info("bulkvpnd %s, mode %s, certificate valid until %s", __version__, configuration.mode, valid_until,
             extra={"MESSAGE_ID": events.ID["started"]})
    try:
        return Main(Current(configuration, revocations, expiries, load), workers, stop, reload).run()
    except (TunError, firewall.FirewallError, link.LinkError, MultipathError, OSError) as error:
        log.error("%s", _said(error))
        return getattr(error, "exit_status", os.EX_NOPERM if isinstance(error, PermissionError) else 1)


def _said(error):
    """What an error says, without the number in front of which OSError puts its text."""
    text = getattr(error, "strerror", None)
    named = getattr(error, "filename", None)
    return f"{named}: {text}" if text and named else text or str(error)


def _now():
    return datetime.datetime.now(datetime.timezone.utc)


class Main:
    """One running instance."""

    def __init__(self, current, workers, stop, reload):
        self._current = current
        self._workers = workers
        self._exporter = None
        self._expiry = Expiry()
        self._stop = stop
        self._reload = reload
        self._failure = None
        self._started = time.time()

    def run(self):
        with contextlib.ExitStack() as undo:
            try:
                self._start(undo)
                self._stop.wait()
            finally:
                service.notify(STOPPING=1)
        if self._failure:
            log.error("stopping: %s", self._failure, extra={"MESSAGE_ID": events.ID["failed"]})
            return 1
        log.info("stopped", extra={"MESSAGE_ID": events.ID["stopped"]})
        return os.EX_OK

    def _start(self, undo):
        """undo: the ExitStack that takes everything back."""
        configuration = self._current.configuration
        directory = sysctl.shared_directory(configuration.runtime_directory)
        ledger = undo.enter_context(sysctl.Ledger(directory, configuration.name))
        undo.enter_context(Claim(configuration.runtime_directory))
        workers = self._workers
        self._tun = Tun.open(configuration.device, len(workers))
        undo.callback(self._tun.close)
        link.bring_up(self._tun.name, configuration.mtu, configuration.txqueuelen, device.GROUPS[configuration.mode])
        self._probe_offload()
        changes = undo.enter_context(Changes(ledger, firewall.Firewall(configuration.name)))
        undo.callback(self._settle, changes)
        role = _ROLES[configuration.mode](configuration, self._current.revocations.context, self._tun,
                                          ciphers.offer(configuration), self._on_ready, self._on_failure)
        role.changes = changes
        role.prepare()
        tuner = Tuner(configuration, self._tun.name, changes)
        tuner.start()
        role.on_addresses = tuner.know
        self._guard = Guard(changes.firewall, self._tun.name, socket.if_nametoindex(self._tun.name), role, tuner)
        role.workers = workers
        undo.callback(workers.stop)
        workers.start(self._tun, configuration.frame_size, role)
        multipath = Multipath(configuration.multipath, self._tun.name, directory, role, changes.ledger)
        multipath.check(literal_addresses(configuration.remote))
        self._report = functools.partial(self._status, role, workers, multipath, tuner)
        reload = functools.partial(self._replace, role)
        status = StatusSocket(configuration.runtime_directory, self._report, {"reload": reload, **role.commands})
        undo.callback(status.stop)
        status.start()
        undo.callback(self._export, None)
        self._export(configuration.metrics)
        self._hooks = Hooks(configuration, self._tun.name)
        role.tell = self._hooks.tell
        undo.callback(self._hooks.stop)
        undo.callback(role.stop)
        role.start()
        changes.firewall.clean()
        undo.enter_context(self._guard)
        # Left before anything else ends, so that traffic has moved to other instances by then.
        undo.enter_context(multipath)
        gevent.spawn(self._watch, role, workers)

    def _settle(self, changes):
        """A stop that was asked for leaves nothing behind; after a failure a kill switch stays until the next start."""
        if self._stop.is_set() and not self._failure:
            changes.firewall.hold()

    def _export(self, address):
        """Serves metrics at `address` from now on, None for nowhere. Raises OSError, and then all is as before."""
        exporter = None
        if address:
            # Its library takes half a second to import, which nobody else need wait for.
            from bulkvpnd.control.exporter import Exporter

            exporter = Exporter(address, self._report)
            exporter.start()
        former, self._exporter = self._exporter, exporter
        if former:
            former.stop()

    def _replace(self, role, request):
        """Another configuration: the text in `request`, or what the file holds. Returns what became of it."""

        def prepare(old, new):
            if new.metrics != old.metrics:
                self._export(new.metrics)

        text = request.get("text")
        try:
            if not isinstance(text, str | None):
                raise config.ConfigurationError("reload: the text of a configuration is missing")
            live, restart = self._current.replace(text, prepare)
        except (config.ConfigurationError, OSError) as error:
            log.error("not reloaded, the former configuration stays in force: %s", _said(error),
                      extra={"MESSAGE_ID": events.ID["not-reloaded"]})
            raise CommandError(_said(error), getattr(error, "status", 1)) from None
        service.set_level(self._current.configuration.log_level)
        role.revoke(self._current.revocations.context, self._current.revocations.revoked)
        self._hooks.reconfigure(self._current.configuration)
        try:
            role.reconfigure(self._current.configuration)
            self._guard.restore()
        except (firewall.FirewallError, link.LinkError, OSError) as error:
            log.error("reloaded, but not all of it could be applied: %s", _said(error))
            raise CommandError(f"not all of it could be applied: {_said(error)}") from None
        log.info("reloaded: in force: %s; after a restart: %s", ", ".join(live) or "nothing new",
                 ", ".join(restart) or "nothing", extra={"MESSAGE_ID": events.ID["reloaded"]})
        return {"instance": self._current.configuration.name, "live": live, "restart": restart}

    def _on_hangup(self, role):
        if config.credential_of(self._current.configuration.path):
            # systemd's copy of the file is as old as the start: bulkvpnctl brings the text. The list is another file.
            self._check_revocations(role, force=True)
            return
        with contextlib.suppress(CommandError):  # it is in the log
            self._replace(role, {})

    def _check_revocations(self, role, force=False):
        revocations = self._current.revocations
        if revocations.check(_now(), force):
            role.revoke(revocations.context, revocations.revoked)

    def _probe_offload(self):
        if not self._current.configuration.offload:
            log.info("offload = no: packets go one by one, at a fraction of the speed")
            return
        why_not = self._tun.enable_offload()
        if why_not:
            log.warning("no offload, packets go one by one, at a fraction of the speed: %s", why_not,
                        extra={"MESSAGE_ID": events.ID["no-offload"]})
        else:
            log.info("device %s: offload %s", self._tun.name, ", ".join(self._tun.offloads))

    def _on_ready(self):
        service.notify(READY=1)

    def _on_failure(self, reason):
        self._failure = reason
        self._stop.set()

    def _watch(self, role, workers):
        """Signs of life: systemd's watchdog is fed only from a loop that runs and has its device."""
        period = service.watchdog_period() or STATUS_PERIOD
        shown = 0.0
        while not self._stop.is_set():
            now = time.monotonic()
            workers.kill_silent(now)
            if not self._tun.is_up():
                self._on_failure(f"the TUN device {self._tun.name} was removed")
                return
            if self._reload.is_set():
                self._reload.clear()
                self._on_hangup(role)
            self._check_revocations(role)
            role.expire(_now())
            self._expiry.check(self._current.expiries, _now())
            service.notify(WATCHDOG=1)
            if now - shown >= STATUS_PERIOD:
                service.notify(STATUS=role.summary())
                shown = now
            gevent.sleep(min(period, STATUS_PERIOD, 1.0))

    def _status(self, role, workers, multipath, tuner):
        """What `bulkvpnctl status` shows."""
        reported = workers.status()
        by_number = {
            connection["connection"]: connection for worker in reported.values() for connection in worker["connections"]
        }
        return {
            "instance": self._current.configuration.name,
            "version": __version__,
            "mode": self._current.configuration.mode,
            "pid": os.getpid(),
            "since": self._started,
            "device": self._tun.name,
            "offload": list(self._tun.offloads),
            "workers": [
                {name: value for name, value in worker.items() if name != "connections"} for worker in reported.values()
            ],
            "drops": {
                cause: sum(worker["drops"].get(cause, 0) for worker in reported.values())
                for cause in sorted({cause for worker in reported.values() for cause in worker["drops"]})
            },
            "multipath": multipath.status(),
            "not_tuned": tuner.refused,
            **role.status(by_number),
        }
