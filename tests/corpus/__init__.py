"""Odd checkpoints and graphs, each with what must come of it: the right numbers, or a refusal in these words.

A row makes its input from a tiny configuration. `rows_of_*` modules hold them by kind; `test_corpus.py` runs each, and
`table.py` makes the table in docs/odd-inputs.md.
"""
