"""bulkvpnd beside the systems that a user would pick instead, measured in one run: ``benchmarks/run``.

    client ── veth0 ═══ veth0 ── server      two network namespaces, see network.py
      └─ the system's device ══════ its device ─┘

1. __main__ reads the arguments, systems.py and tests.py say what there is to measure
2. runner.py goes through rounds, in a round through the systems, so that what drifts on the machine meets all of them
3. for each system and link it makes the hosts, starts the system on them (trial.py), runs the tests, removes all
4. report.py makes the medians, the table, the comparison with the floors, and the plots

Units: Mbit/s are 10^6 bits, GB 10^9 bytes, MB 10^6 bytes, all of it payload that arrived.
"""
