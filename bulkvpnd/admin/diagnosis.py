"""Is an instance well, and if not, why: what its own report says. `doctor` looks at the machine and the path too."""

import dataclasses

LOSS_MAX = 0.02
"""Part of the bytes that is sent again above which a path is called lossy (choice)."""
LOSS_BYTES_MIN = 1 << 20
"""Bytes that a connection must have sent before its losses say something (choice)."""
DELAY_MAX_MS = 100
"""Milliseconds above which what waits for a connection waits long (choice; queue-interval's default)."""

PROBLEM, NOTE, FINE, NOT_CHECKED = "problem", "note", "fine", "not checked"
"""A fault, from which traffic suffers or will; worth knowing; nothing to mend; what could not be looked at."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """state: of the four above. text: one line. mend: the command, or what to do, None if there is nothing to mend."""

    state: str
    text: str
    mend: str | None = None


def journal(instance, what=""):
    """The command that shows what an instance has logged. what: more arguments, with a space in front.

    A pager would cut the lines where the terminal ends.
    """
    return f"journalctl --no-pager -n 20 -u bulkvpnd@{instance}{what}"


ANSWERS = (
    # words with which a connection failed, what they mean
    ("connection refused", "nothing listens there, or a firewall turns it away"),
    ("certificate revoked", "the server says that this client's certificate is revoked"),
    ("certificate expired", "the server says that a certificate has expired: this client's own, or the server's clock "
                            "is wrong"),
    ("unknown ca", "the server does not know the authority that signed this client's certificate"),
    ("bad certificate", "the server does not take this client's certificate; its clock may be wrong"),
    ("has expired", "the server's certificate has expired, or this machine's clock is wrong"),
    ("hostname mismatch", "the server's certificate carries another name than server-name"),
    ("self-signed certificate", "the server's certificate is of an authority that this client does not know"),
    ("unable to get local issuer", "the server's certificate is of an authority that this client does not know"),
    ("not yet valid", "the server's certificate is not valid yet: this machine's clock is behind"),
    ("reset by peer", "the connection is ended at once, as a server does for some seconds with who has failed before"),
)  # fmt: skip


def answer(error):
    """(words of ANSWERS, what they mean) of the text with which a connection failed; (None, None) of others."""
    said = error.replace("_", " ").lower()
    return next((one for one in ANSWERS if one[0] in said), (None, None))


def verdicts(report):
    """Verdicts about the report of an instance: its problems, then what is worth knowing; none if it is well."""
    found = [verdict for check in _CHECKS for verdict in check(report)]
    return sorted(found, key=lambda one: one.state != PROBLEM)


def _session(report):
    if report["mode"] == "client" and not any(session["connections"] for session in report["sessions"]):
        failure = report.get("failure")
        why = ": ".join(filter(None, ("no connection to the server", failure, answer(failure or "")[1])))
        yield Verdict(PROBLEM, why, f"bulkvpnctl doctor {report['instance']}")


def _workers(report):
    dead = [worker["index"] for worker in report["workers"] if not worker["alive"]]
    if dead:
        yield Verdict(PROBLEM, f"no answer from worker {', '.join(map(str, dead))}; it is replaced if it stays so")


def _connections(report):
    for session in report["sessions"]:
        agreed, live = session.get("agreed_connections", 0), len(session["connections"])
        if 0 < live < agreed:
            yield Verdict(PROBLEM, f"{live} of {agreed} connections of {session['identity']} are up",
                          journal(report["instance"], f" IDENTITY={session['identity']}"))


def _paths(report):
    for session in report["sessions"]:
        sent = session.get("bytes_out", 0)
        lost = sum(one.get("bytes_retransmitted", 0) for one in session["connections"])
        if sent > LOSS_BYTES_MIN and lost > LOSS_MAX * sent:
            yield Verdict(NOTE, f"{100 * lost / sent:.0f} % of what goes to {session['identity']} is sent again: "
                                "the path loses packets")
        delay = max((one.get("queue_delay_ms", 0) for one in session["connections"]), default=0)
        if delay > DELAY_MAX_MS:
            yield Verdict(NOTE, f"packets wait {delay:.0f} ms for {session['identity']}: more is offered than its "
                                "path carries")


def _offload(report):
    if not report["offload"]:
        yield Verdict(NOTE, "no offload: packets go one by one, at a fraction of the speed",
                      "set offload = yes, or see the log of the start for why there is none")
        return
    for session in report["sessions"]:
        if session["connections"] and "tso" not in session["offload"]:
            yield Verdict(NOTE, f"{session['identity']} is without offload: packets go one by one, at a fraction of "
                                "the speed")


_DROPS = {
    # cause: (state, what it means, mend)
    "foreign_source": (PROBLEM, "came from addresses that are not the sender's",
                       "give the client its networks in NAME.clients.d, or stop what sends them"),
    "tun_refused": (PROBLEM, "could not be written to the TUN device", "bulkvpnctl status --json; report it as a bug"),
    "stalled": (NOTE, "waited for a connection that took nothing for a second", None),
    "queue_full": (NOTE, "found the send queue full: more is offered than a connection carries", None),
}  # fmt: skip


def _drops(report):
    for cause, (state, text, mend) in _DROPS.items():
        count = report["drops"].get(cause, 0)
        if count:
            yield Verdict(state, f"{count:,} packet{'s' if count > 1 else ''} {text} ({cause})", mend)


def _draining(report):
    if report.get("draining"):
        yield Verdict(NOTE, "new sessions are refused: it is drained", f"bulkvpnctl drain --off {report['instance']}")


_CHECKS = (_session, _draining, _workers, _connections, _paths, _offload, _drops)
