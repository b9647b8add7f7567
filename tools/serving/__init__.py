"""Triton's own server on a model repository: started, queried by many clients at once, and stopped.

A repository that the compiler wrote goes in; what clients saw comes out. For `instantrt serve`, `load-test` and the
benchmarks; nothing here is part of what is served.
"""
