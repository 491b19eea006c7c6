"""What an instance has changed on the machine, in the order in which it was changed; undone in the reverse order.

A change is an object with apply(...) and undo(). Both may be called twice. undo() raises nothing, and it also removes
what a crashed run of the same instance left behind, which it knows by names of our own: a table, a protocol number, a
priority.
"""

import contextlib


class Changes(contextlib.ExitStack):
    """Leaving the context undoes everything.

    ledger: the sysctls, see host.sysctl.Ledger; theirs is undone last. firewall: the instance's table, see
    host.firewall.Firewall, to which several changes add their parts; it is undone just before.
    """

    def __init__(self, ledger, firewall):
        super().__init__()
        self.ledger = ledger
        self.firewall = firewall

    def __enter__(self):
        super().__enter__()
        self.ledger.recover()
        self.callback(self.ledger.restore)
        self.callback(self.firewall.undo)
        return self

    def make(self, change, *arguments, wanted=True, **options):
        """Removes what a crash left of `change`, then applies it, to be undone at the end. Returns what apply() does.

        wanted: without it only what a crash left is removed: an option may have been taken out since.
        """
        change.undo()
        if not wanted:
            return None
        self.callback(change.undo)
        return change.apply(*arguments, **options)
