"""Benchmarks of pyconv against its peers: `python -m benchmarks --help`, README.md of this folder.

Data flow: `suites` (which cells) -> `bench_*.py` (pytest-benchmark) -> `peers` (what runs) -> `timing`
(interleaved rounds, ratios) -> JSON (`schema.json`) -> `goals`, `report_terminal`, `report_html` and `gate`.
"""
