"""How a configuration is written: from text to raw strings, with the line that each stands on."""

import re
from collections import OrderedDict

import configargparse

from bulkvpnd.config.errors import ConfigurationError, shown_line
from bulkvpnd.config.files import read_secret_file
from bulkvpnd.config.options import BY_NAME


def read_items(file, text=None):
    """What a configuration says, option by option, raw and in its order.

    file: path. text: what it says, where it need not be read. Returns ({option: value, or list of values where it may
    be repeated}, {option: [line, ...]}). Raises ConfigurationError.
    """
    parser = FileParser()
    parser.name = file
    text = read_secret_file(file) if text is None else text
    return parser.parse(text.splitlines(keepends=True)), parser.lines


class FileParser(configargparse.ConfigFileParser):
    """``key = value`` lines, ``#`` comments, and PEM text between ``<key>`` and ``</key>`` lines.

    name: the file, for messages. Remembers in `lines` where each key stood, {key: [line, ...]}, so that every later
    error can say it.
    """

    def __init__(self):
        self.name = ""
        self.lines = {}

    def get_syntax_description(self):
        return "The file has lines of the form key = value; see bulkvpn.conf(5)."

    def parse(self, stream):
        """Returns {key: value or list of values}; raises ConfigurationError."""
        items = OrderedDict()
        lines = enumerate(stream, 1)
        for number, line in lines:
            where = f"{self.name}:{number}"
            line = line.strip()
            if not line or line.startswith(("#", ";")):
                continue
            tag = re.fullmatch(r"<([a-z0-9-]+)>", line)
            if tag:
                key, value = tag[1], self._block(number, tag[1], lines)
            else:
                key, equals, value = (part.strip() for part in line.partition("="))
                if not equals:
                    raise ConfigurationError(f"{where}: {shown_line(line)}: not understood; write key = value")
                if "-----BEGIN" in value:
                    raise ConfigurationError(f"{where}: PEM text goes on lines of its own, between <key> and </key>")
            option = BY_NAME.get(key)
            if option is None:
                raise ConfigurationError(f"{where}: {shown_line(key)}: unknown option{_similar(key)}")
            if key in items and not option.repeat:
                raise ConfigurationError(
                    f"{where}: {key}: given twice, first on line {self.lines[key][0]}; keep one of them"
                )
            self.lines.setdefault(key, []).append(number)
            if option.repeat:
                items.setdefault(key, []).append(value)
            else:
                items[key] = value
        return items

    def _block(self, first, key, lines):
        text = []
        for _, line in lines:
            if line.strip() == f"</{key}>":
                return "".join(text)
            text.append(line)
        raise ConfigurationError(f"{self.name}:{first}: <{key}>: never closed; end the block with a line </{key}>")


def _similar(key):
    import difflib

    near = difflib.get_close_matches(key, BY_NAME, n=1)
    return f"; did you mean {near[0]}?" if near else "; see bulkvpn.conf(5)"
