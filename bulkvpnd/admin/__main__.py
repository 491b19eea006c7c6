import sys

from bulkvpnd.cli import bulkvpnctl

sys.exit(bulkvpnctl())
