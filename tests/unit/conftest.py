"""Hypothesis has a deadline of 200 ms for each example, which says more about the machine than about what is tested."""

from hypothesis import settings

settings.register_profile("unit", deadline=None)
settings.load_profile("unit")
