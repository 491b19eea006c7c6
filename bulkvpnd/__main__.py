import sys

from bulkvpnd.cli import bulkvpnd

sys.exit(bulkvpnd())
