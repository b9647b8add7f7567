"""An engine on this machine's GPU, where there is the one it was built for."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from instantrt.compiler.accuracy.engine_runner import EngineRunner
from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.backend.tensorrt.gpu import describe, gpus
from instantrt.compiler.smoke.names import past
from instantrt.compiler.smoke.process import Answers
from instantrt.compiler.smoke.steps import DECODES, PROMPT, Call


def why_not(artifact: Artifact) -> str:
    """Why the engine of an artifact cannot run here; "" where it can."""
    if artifact.engine is None:
        return f"no engine is built yet: {describe()}" if not gpus() else "no engine is built yet: this is a kit"
    if all(gpu.sm != artifact.engine["sm"] for gpu in gpus()):
        return f"the engine did not: it is for sm{artifact.engine['sm']}, and here is {describe()}"
    if importlib.util.find_spec(artifact.engine["builder"]) is None:
        return f"the engine did not: {artifact.engine['builder']} is not installed"
    if artifact.limits.get("cache") == "shared":
        return "the engine did not: its cache is one buffer, which the runtime alone has"
    if artifact.limits["max_length"] < PROMPT + DECODES:
        return f"the engine did not: it takes at most {artifact.limits['max_length']} tokens"
    return ""


def engine_answers(runner: EngineRunner, steps: Sequence[Call]) -> Answers:
    """Every step, each with the cache that the one before it left."""
    answers: Answers = {}
    with runner as engine:
        for step in steps:
            answers[step.name] = engine({**step.feeds, **past(answers.get(step.after, {}))})
    return answers
