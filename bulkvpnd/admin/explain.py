"""``bulkvpnctl explain``: what the manual pages say of a word: an option, a cause of drops, a metric, a journal field.

    page in MANPATH, in the source tree, else where it is installed --> its entry --> mandoc or man --> standard output
    no page, or neither program: the help of the option table

The entries are items of mdoc(7) lists, so the pages are the only place where an explanation is written down.
"""

import difflib
import gzip
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

from bulkvpnd import config
from bulkvpnd.admin.errors import CommandError

PAGES = (
    # (name, section, macro of the items that are explained)
    ("bulkvpn.conf", 5, "Cm"),
    ("bulkvpnctl", 8, "Li"),
    ("bulkvpnd", 8, "Li"),
)
MAN_PATH = ("/usr/local/share/man", "/usr/share/man")
"""Where hier(7) has manual pages, unless MANPATH says otherwise."""
SOURCE = pathlib.Path(__file__).parents[2] / "man"
FORMATTERS = (("mandoc", "-T", "utf8"), ("man", "-P", "cat", "-E", "UTF-8", "-l", "-"))
"""Both read a page from standard input; mandoc(1) is there where somebody installed it, man(1) nearly everywhere."""
WIDTH = 78
"""Columns of what is printed, as mandoc(1) has it."""


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("key", metavar="KEY", help="an option, a cause of drops, a metric or a field of the journal"
                        ).completer = lambda **_: sorted(_known(_entries()))


def run(arguments):
    """Returns the exit status."""
    entries = _entries()
    key = arguments.key.lower() if arguments.key.lower() in _known(entries) else arguments.key
    if key not in _known(entries):
        raise CommandError(f"{config.escaped(key)}: {_nearest(key, _known(entries))}")
    text = (key in entries and _rendered(entries[key])) or (key in config.BY_NAME and _from_table(key))
    if not text:
        raise CommandError(f"{key}: neither mandoc nor man is here to print it; run: apt install mandoc")
    print(text, end="")
    return os.EX_OK


def entries(page, macro):
    """The items of a page of mdoc(7) that begin with a macro, {name: text of the item}. page: its text."""
    found, lines = {}, page.splitlines()
    for at, line in enumerate(lines):
        head = re.match(rf"\.It {macro} ([\w.%-]+(?: , [\w.%-]+)*)(?= |$)", line)
        if head:
            for name in head[1].split(" , "):
                found.setdefault(name, "\n".join(lines[at : _end(lines, at)]) + "\n")
    return found


def _end(lines, start):
    """Where an item ends: at the next one of its list, or with the list. Lists inside it belong to it."""
    depth = 0
    for at in range(start + 1, len(lines)):
        if lines[at].startswith(".Bl"):
            depth += 1
        elif lines[at].startswith(".El"):
            depth -= 1
        if depth < 0 or (depth == 0 and lines[at].startswith(".It")):
            return at
    return len(lines)


def _entries():
    """Of all pages; of a word that stands in two of them, the first counts."""
    found = {}
    for name, section, macro in PAGES:
        for word, text in entries(_page(name, section), macro).items():
            found.setdefault(word, (name, section, text))
    return found


def _known(entries):
    return {*entries, *config.BY_NAME}


def _page(name, section):
    """The text of a manual page; empty if it is not on this machine."""
    given = [one for one in os.environ.get("MANPATH", "").split(":") if one]
    parts = [[pathlib.Path(one) / f"man{section}" for one in path] for path in (given, MAN_PATH)]
    # The source tree comes before what may be installed of another version.
    for place in (*parts[0], SOURCE, *parts[1]):
        for file, opener in ((place / f"{name}.{section}.gz", gzip.open), (place / f"{name}.{section}", open)):
            try:
                with opener(file, "rt", encoding="utf-8") as stream:
                    return stream.read(config.MAX_FILE_SIZE)
            except (OSError, EOFError, UnicodeDecodeError):
                continue  # not there, or damaged: the next place may have it
    return ""


def _rendered(entry):
    """As text; None if nothing here can do that."""
    name, section, text = entry
    page = f".Dd $Mdocdate$\n.Dt {name.upper()} {section}\n.Os\n.Sh {name}({section})\n.Bl -tag -width Ds\n{text}.El\n"
    environment = {**os.environ, "MANWIDTH": str(WIDTH), "LC_ALL": "C.UTF-8"}
    for program, *arguments in FORMATTERS:
        if shutil.which(program):
            done = subprocess.run([program, *arguments], input=page.encode(), capture_output=True, env=environment,
                                  timeout=30)
            lines = done.stdout.decode("utf-8", "replace").strip("\n").splitlines()
            if len(lines) > 2:
                # Without the running head and foot.
                return _emphasised("\n".join(lines[1:-1]).strip("\n")) + "\n"
    return None


def _emphasised(text):
    """What a formatter struck twice, as the terminal shows it: bold and underlined; plain where there is none."""
    bold, underlined = ("\033[1m{}\033[m", "\033[4m{}\033[m") if sys.stdout.isatty() else ("{}", "{}")
    text = re.sub(r"\033\[[0-9;]*m", "", text)  # man's way, where it is not mandoc's
    text = re.sub(r"(?:_\x08[^_\x08])+", lambda run: underlined.format(run[0].replace("_\x08", "")), text)
    return re.sub(r"(?:(.)\x08\1)+", lambda run: bold.format(re.sub(r".\x08", "", run[0])), text)


def _from_table(name):
    option = config.BY_NAME[name]
    return textwrap.fill(f"{option.name} = {option.metavar}: {config.help_text(option)}", WIDTH) + "\n"


def _nearest(key, known):
    near = difflib.get_close_matches(key, known, n=3)
    return f"nothing of that name; did you mean {' or '.join(near)}?" if near else (
        "nothing of that name; bulkvpn.conf(5) has the options, bulkvpnctl(8) the causes of drops and the metrics, "
        "bulkvpnd(8) the fields of the journal"
    )
