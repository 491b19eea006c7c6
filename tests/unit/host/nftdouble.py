"""In place of the kernel's nftables: tables in memory, and a transaction is done whole or not at all."""

import copy
import errno
import os


class Nft:
    """Call it as host.firewall.run. tables: {(family, name): [{kind: fields}, ...]}. refuses: errno, or None."""

    def __init__(self):
        self.tables = {}
        self.refuses = None
        self.transactions = 0

    def __call__(self, commands):
        if self.refuses is not None:
            raise OSError(self.refuses, os.strerror(self.refuses))
        tables, listed = copy.deepcopy(self.tables), []
        for command in commands:
            ((verb, what),) = command.items()
            ((kind, fields),) = what.items()
            listed += getattr(self, f"_{verb}")(tables, kind, fields) or ()
        self.tables = tables
        self.transactions += 1
        return listed

    def _add(self, tables, kind, fields):
        if kind == "table":
            tables.setdefault((fields["family"], fields["name"]), [])
        else:
            self._known(tables, (fields["family"], fields["table"])).append({kind: fields})

    def _delete(self, tables, kind, fields):
        assert kind == "table"
        key = (fields["family"], fields["name"])
        self._known(tables, key)
        del tables[key]

    def _list(self, tables, kind, fields):
        if kind == "table":
            return [{"table": fields}, *self._known(tables, (fields["family"], fields["name"]))]
        assert (kind, fields) == ("chains", None)
        return [one for content in tables.values() for one in content if "chain" in one]

    @staticmethod
    def _known(tables, key):
        if key not in tables:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return tables[key]

    def chains(self, name):
        """The names of the chains of an instance's table, None if it has none."""
        content = self.tables.get(("inet", name))
        return content and [one["chain"]["name"] for one in content if "chain" in one]
