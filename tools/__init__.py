"""What people run: the command `instantrt`, its benchmarks, and the checks for a machine with a GPU.

Everything of this project may be imported here, and nothing imports this. What a tool computes that others could use
belongs in the compiler; here is what parses, measures, serves for a test, and prints.
"""
