"""Measurements of this compiler that are kept in benchmarks/: `instantrt bench NAME`, one module each.

They compile and run as a user would; each writes JSON, and most a table of it. Machines are shared: contestants are
timed alternately, and ratios are kept.
"""
