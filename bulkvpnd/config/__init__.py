"""The configuration: one table of options, and what is made from it.

    file, command line --> ConfigArgParse --> raw strings --> Option.parse --> Configuration (frozen)

    errors           ConfigurationError, and how a message shows what somebody wrote
    values           kinds of value: a raw string becomes a value
    options          the table
    files            how files are opened and read that may hold a private key
    syntax           how a file is written: its text becomes raw strings, with their lines
    configuration    all of it together: load() and the Configuration that it makes

An error names file, line, key and value and says what would be right; the callers end with exit status 78 (EX_CONFIG
of sysexits.h(3)) for the file and 64 (EX_USAGE) for the command line, before anything on the machine is touched.

What the rest of the package uses is here.
"""

from bulkvpnd.config.configuration import (
    CONFIGURATION_DIRECTORY, Configuration, build_parser, load, pem_path, pem_text, value_of,
)  # fmt: skip
from bulkvpnd.config.errors import ConfigurationError, escaped
from bulkvpnd.config.files import MAX_FILE_SIZE, bounded_text, credential_of, open_regular, read_secret_file
from bulkvpnd.config.options import (
    BY_NAME, CONNECTIONS, GROUPS, NOW, OPTIONS, RELOADS, RESTART, SESSIONS, help_text,
)  # fmt: skip
from bulkvpnd.config.syntax import FileParser, read_items
from bulkvpnd.config.values import (
    DEFAULT_PORT, NAME, PRIVATE, Multipath, certificate_name, endpoint_text, integer, pushed_network,
)  # fmt: skip
