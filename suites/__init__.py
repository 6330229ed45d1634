"""The evaluations, chosen by marker: ``pytest --pyargs kvsuite.suites -m throughput``."""
