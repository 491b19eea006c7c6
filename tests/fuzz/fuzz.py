#!/usr/bin/env python3
"""Fuzzes one target, coverage-guided: fuzz.py --target=TARGET [flag of libFuzzer | folder]...

Needs atheris (requirements.txt). A finding ends it with a status other than 0, and its input is left in crash-… in the
current folder: mend the parser, and put the input into the corpus and into the parser's unit tests. With -merge=1 TO
FROM the inputs of FROM that reach something new are copied to TO, so that a corpus stays small; for that, the virtual
environment has to be active, since libFuzzer starts this file again.
"""

import logging
import pathlib
import sys

sys.dont_write_bytecode = True
sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[2]), str(pathlib.Path(__file__).resolve().parent)]

import atheris  # noqa: E402

with atheris.instrument_imports(include=["bulkvpnd", "targets", "ipaddress"]):
    import targets

# What parsers say of bad input is not what is looked for, and it would be millions of lines.
logging.disable(logging.CRITICAL)
# libFuzzer passes over what begins with two hyphens, and hands it to the processes that it starts for -merge.
name = sys.argv[1].removeprefix("--target=")
atheris.Setup(sys.argv, targets.planted if name == "planted" else targets.TARGETS[name])
atheris.Fuzz()
