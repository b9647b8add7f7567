"""What a compilation leaves on disk: the manifest, staging that lets all appear at once, digests and their check.

Artifacts go in as paths and values, and come back from manifest.json as `Artifact`s. This is the lowest layer of
compiler: nothing here imports a backend, the serving or the accuracy. `digest.py` is the only code that hashes files;
it needs the standard library alone, because a model repository gets it, too.
"""
