"""The kinds of event that matter to an administrator, by which journalctl(1) finds and explains them.

A line of the log that tells of one has its `id` as MESSAGE_ID. The text comes from a catalog, which `catalog` makes of
this table and the package installs: ``python3 -m bulkvpnd.events > debian/catalog/bulkvpnd.catalog``. Its format is
that of https://systemd.io/CATALOG/; @FIELD@ stands for a field of the line. An id is for ever: it is never used again.
"""

import dataclasses
import textwrap

DOCUMENTATION = "man:bulkvpnd(8)"


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """name: for the code. id: 128 bits, hexadecimal, made at random. subject: one line. text: what it means and what
    to do."""

    name: str
    id: str
    subject: str
    text: str


EVENTS = (
    Event("started", "1e5defc2da384246b5fccb4affe81e53",
          "An instance of the VPN daemon starts",
          "The configuration is good. What follows tells what was found on this machine, and at the end "
          "whether the tunnel is ready."),
    Event("stopped", "f740a7aa0c1943329cc94dcaf661aedf",
          "An instance of the VPN daemon has stopped",
          "It was asked to, and what it had changed on this machine is undone."),
    Event("failed", "032d2f0b8d1f4709922bdf29ddaf6c91",
          "An instance of the VPN daemon ends after a failure",
          "The reason is in the message. systemd starts it again after a second, unless it fails too "
          "often: bulkvpnd(8), SYSTEMD."),
    Event("certificate-expires", "11c35744ceee42d19e4ccea9c898bdf4",
          "The certificate of this end expires soon",
          "When it has expired no connection can be made any more. Make another with: bulkvpnctl pki "
          "renew NAME and put it in force with: systemctl reload bulkvpnd@@INSTANCE@"),
    Event("authority-expires", "91105edfb5944e859613a05c0c425ace",
          "The certificate of the authority expires soon",
          "When it has expired no end takes another's certificate any more. On the authority's machine "
          "bulkvpnctl pki list shows its name, and bulkvpnctl pki renew makes another certificate with the "
          "same key, which each end needs by then as its ca; then: systemctl reload bulkvpnd@@INSTANCE@"),
    Event("no-offload", "91b10ed47c2146989771d4a03ca4a3a6",
          "The kernel makes no super-packets for the tunnel",
          "The tunnel works, at a fraction of the speed. The reason is in the message; a newer kernel "
          "usually mends it."),
    Event("reloaded", "2b6b6058a1844c85bd47069f09d3461e",
          "Another configuration is in force",
          "Sessions and connections went on. The options that are named last wait for a restart: "
          "systemctl restart bulkvpnd@@INSTANCE@"),
    Event("not-reloaded", "58bf9b3124994fe6b43cc943ab9925e5",
          "A changed configuration was refused",
          "The former configuration stays in force, all of it. The message names the file, the line, "
          "the key and the mend; after that: systemctl reload bulkvpnd@@INSTANCE@"),
    Event("revocations-expired", "3f1988561ad343dd9b4a82fc46a127d4",
          "The revocation list has expired or does so soon",
          "A server whose list has expired refuses every new connection. Make another with: bulkvpnctl "
          "pki crl"),
    Event("client-connected", "272a8632af1f41749dec5d18606970f7",
          "The client @IDENTITY@ is connected",
          "Its first connection carries traffic. Connections beyond it are not logged, bulkvpnctl "
          "status shows them."),
    Event("client-silent", "cdecc867fe4348ea8bfe495c69539230",
          "The client @IDENTITY@ has no connection left",
          "Its session and its addresses wait for it for the grace time; it comes back by itself when "
          "it can."),
    Event("session-ended", "bac269429cf84b1f8131a0e154fd3cc2",
          "The session of the client @IDENTITY@ has ended",
          "It was silent for the grace time, or its certificate was revoked or has expired, or an "
          "administrator ended it or changed what it has in NAME.clients.d, see REASON. Its addresses stay "
          "leased to it."),
    Event("client-refused", "03a6946270154305b92ce9f05c9bbdb7",
          "The client @IDENTITY@ was refused",
          "Its certificate is good, but the server does not take it now: @REASON@. bulkvpn-protocol(7) "
          "explains the reason under REFUSE."),
    Event("turned-away", "4650ecbf99724776a5276e52dc79c7d9",
          "A connection from @PEER@ was turned away",
          "It did not show a good certificate in time: a scanner, a client of another authority, an "
          "expired or revoked certificate, or a clock that is wrong. If it should be one of yours, look "
          "at its own log."),
    Event("draining", "c78d18421ae24a6db8a5393d6d3b928a",
          "A server was told whether to accept new sessions",
          "bulkvpnctl drain has it refuse them, bulkvpnctl drain --off accept them again."),
    Event("connected", "0fb93c6e10d74e63b1d06edb245d53da",
          "The tunnel to the server is up",
          "The first connection carries traffic."),
    Event("disconnected", "4b34a90eb6744a45b179f451029bec95",
          "The tunnel to the server is down",
          "No connection is left, and the client tries again without end, with pauses of at most retry- "
          "max. What fails is in the lines that follow."),
    Event("connection-failed", "32588e22863e4a26986d4d7ed73d3a94",
          "A connection to the server @PEER@ cannot be made",
          "The reason is in the message. Is the port open (firewall), is the address right, are clock "
          "and certificate? bulkvpnctl status says what else there is."),
    Event("server-refused", "9f3e64805d374d349249fa8c9a4a7467",
          "The server refuses a connection",
          "The certificate is good, but the server does not take this client now: @REASON@. bulkvpn- "
          "protocol(7) explains the reason under REFUSE."),
    Event("rules-removed", "a3f3f842f57c4ceba2123901feeaaf2d",
          "Something else removed rules of the VPN daemon",
          "They are there again. Until then, some milliseconds, there was no kill switch, no NAT, and nothing "
          "that kept clients from each other in the kernel. What does so is mostly a start or a reload of "
          "nftables.service, whose file /etc/nftables.conf begins with flush ruleset; tables that are named "
          "there can be deleted one by one instead, which leaves those of others alone."),
    Event("device-down", "2759d68fb5504a8e840e8c738061e12f",
          "Something else took the device of a tunnel down",
          "Nothing passes the tunnel, and without a kill switch a full tunnel is none. ip link set DEVICE up "
          "mends it: addresses and routes are put back then."),
    Event("worker-lost", "6961587754bc47dabab59ff9d84e88f3",
          "A worker process has ended unexpectedly",
          "Another takes its place at once and its connections are made again; the other workers go on. "
          "If it happens again, please report it, with the lines before this one."),
)
ID = {event.name: event.id for event in EVENTS}


def catalog():
    """The catalog of all events, text."""
    entries = (
        f"-- {event.id}\nSubject: {event.subject}\nDefined-By: bulkvpnd\nDocumentation: {DOCUMENTATION}\n\n"
        f"{textwrap.fill(event.text, 78, break_long_words=False, break_on_hyphens=False)}\n"
        for event in EVENTS
    )
    return "\n".join(entries)


if __name__ == "__main__":
    print(catalog(), end="")
