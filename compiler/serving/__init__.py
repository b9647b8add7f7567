"""Artifacts as a Triton model repository: what it holds (repository), its configurations (config), its README (readme).

Manifest entries go in; folders that Triton loads come out. runtime/ is what the generate model runs: it is copied as it
is, so that nothing in it imports this project, and a link stands there for what it shares with the compiler.
"""
