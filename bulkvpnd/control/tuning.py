"""Finds out what is to be tuned for, and has it done: see host.tuning and host.conntrack."""

from bulkvpnd.host import conntrack, tuning


class Tuner:
    """Tunes the machine for an instance, as far as it lets itself be tuned; nothing here raises.

    device: name of the TUN device. changes: host.changes.Changes, which undoes it. refused: {key: why it could not be
    set}, as far as that was tried.
    """

    def __init__(self, configuration, device, changes):
        self._configuration = configuration
        self._device = device
        self._changes = changes
        self._addresses = set()
        self._outer = set()
        self._timeouts = conntrack.ConntrackTimeouts(configuration.name, changes.ledger)
        self._shortens = False
        self.refused = {}

    def start(self):
        """All but what takes the address of a server."""
        configuration, ledger = self._configuration, self._changes.ledger
        situation = tuning.situation(configuration, self._device, [], ledger)
        self._outer.update(situation.outer)
        if configuration.tuning:
            self._note(tuning.apply(configuration, situation, ledger))
        short = configuration.tuning and configuration.conntrack_timeouts == "short"
        # Without translation the kernel may have no reason to remember connections at all, and shall not get one.
        self._shortens = short and configuration.mode == "server" and configuration.nat
        self._changes.make(self._timeouts, self._device, wanted=self._shortens)

    def restore(self):
        """What is set by nftables, which was flushed."""
        if self._shortens:
            self._timeouts.apply(self._device)

    def know(self, addresses):
        """addresses: texts, of a server that is about to be connected to: the interface that leads there is tuned."""
        new = set(addresses) - self._addresses
        self._addresses |= new
        if not new or not self._configuration.tuning or self._configuration.wan_interface is not None:
            return
        situation = tuning.situation(self._configuration, self._device, sorted(new), self._changes.ledger)
        outer = tuple(one for one in situation.outer if one not in self._outer)
        self._outer.update(outer)
        self._note(tuning.apply(self._configuration, tuning.Situation(self._device, outer), self._changes.ledger,
                                only_outer=True))

    def _note(self, rows):
        self.refused.update({outcome.key: outcome.why_not for _, outcome in rows if outcome.why_not})
