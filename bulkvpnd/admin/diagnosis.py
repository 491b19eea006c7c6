"""Is an instance well, and if not, why: what its own report says. `doctor` looks at the machine and the path too."""

import dataclasses

LOSS_MAX = 0.02
"""Part of the bytes that is sent again above which a path is called lossy (choice)."""
LOSS_BYTES_MIN = 1 << 20
"""Bytes that a connection must have sent before its losses say something (choice)."""
DELAY_MAX_MS = 100
"""Milliseconds above which what waits for a connection waits long (choice; queue-interval's default)."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """is_fault: traffic suffers; otherwise it is worth knowing. text: what it is. mend: what to do, or None."""

    is_fault: bool
    text: str
    mend: str | None = None


def findings(report):
    """Findings about the report of an instance, faults first."""
    found = [finding for check in _CHECKS for finding in check(report)]
    return sorted(found, key=lambda one: not one.is_fault)


def _session(report):
    if report["mode"] == "client" and not any(session["connections"] for session in report["sessions"]):
        why = f": {report['failure']}" if report.get("failure") else ""
        yield Finding(True, f"no connection to the server{why}", f"journalctl -u bulkvpnd@{report['instance']} -n 20")


def _workers(report):
    dead = [worker["index"] for worker in report["workers"] if not worker["alive"]]
    if dead:
        yield Finding(True, f"no answer from worker {', '.join(map(str, dead))}; it is replaced if it stays so")


def _connections(report):
    for session in report["sessions"]:
        agreed, live = session.get("agreed_connections", 0), len(session["connections"])
        if 0 < live < agreed:
            yield Finding(True, f"{live} of {agreed} connections of {session['identity']} are up",
                          f"journalctl -u bulkvpnd@{report['instance']} IDENTITY={session['identity']} -n 20")


def _paths(report):
    for session in report["sessions"]:
        sent = session.get("bytes_out", 0)
        lost = sum(one.get("bytes_retransmitted", 0) for one in session["connections"])
        if sent > LOSS_BYTES_MIN and lost > LOSS_MAX * sent:
            yield Finding(False, f"{100 * lost / sent:.0f} % of what goes to {session['identity']} is sent again: "
                                 "the path loses packets")
        delay = max((one.get("queue_delay_ms", 0) for one in session["connections"]), default=0)
        if delay > DELAY_MAX_MS:
            yield Finding(False, f"packets wait {delay:.0f} ms for {session['identity']}: more is offered than its "
                                 "path carries")


def _offload(report):
    if not report["offload"]:
        yield Finding(False, "no offload: packets go one by one, at a fraction of the speed",
                      "set offload = yes, or see the log of the start for why there is none")
        return
    for session in report["sessions"]:
        if session["connections"] and "tso" not in session["offload"]:
            yield Finding(False, f"{session['identity']} is without offload: packets go one by one, at a fraction of "
                                 "the speed")


_DROPS = {
    # cause: (is_fault, what it means, mend)
    "foreign_source": (True, "came from addresses that are not the sender's",
                       "give the client its networks in NAME.clients.d, or stop what sends them"),
    "tun_refused": (True, "were refused by the kernel's TUN device", "bulkvpnctl status --json; report it as a bug"),
    "stalled": (False, "waited for a connection that took nothing for a second", None),
    "queue_full": (False, "found the send queue full: more is offered than a connection carries", None),
}  # fmt: skip


def _drops(report):
    for cause, (is_fault, text, mend) in _DROPS.items():
        count = report["drops"].get(cause, 0)
        if count:
            yield Finding(is_fault, f"{count:,} packets {text} ({cause})", mend)


def _draining(report):
    if report.get("draining"):
        yield Finding(False, "new sessions are refused: it is drained", f"bulkvpnctl drain --off {report['instance']}")


_CHECKS = (_session, _draining, _workers, _connections, _paths, _offload, _drops)
