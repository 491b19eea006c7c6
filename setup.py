"""Everything is in setup.cfg; this file lets `setup.py install`, which Debian's pybuild runs, find it."""

from setuptools import setup

setup()
