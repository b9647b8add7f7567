"""A pytest plugin, `-p instantrt.tools.gpu.progress`: the events that tools.gpu.watch reads, and an end for a lost GPU.

An error inside a kernel leaves a CUDA context in which every later call fails. The process ends after the test that did
it, so that only that test is blamed; the watcher runs the others in a new one.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

OUT = os.fdopen(os.dup(1), "w")  # pytest itself captures descriptor 1 while a test runs
LOST_GPU = 3


def emit(**event: Any) -> None:
    OUT.write("\n" + json.dumps(event) + "\n")
    OUT.flush()


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        emit(collected=[item.nodeid for item in session.items])


def pytest_runtest_logstart(nodeid: str) -> None:
    emit(start=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)  # what was raised, before where: one line is printed of it
        said = f"{crash.message}\n{report.longreprtext[-1500:]}" if crash else report.longreprtext[-1500:]
        message = report.longrepr[-1] if isinstance(report.longrepr, tuple) else said
        lost = report.outcome == "failed" and gpu_lost()
        emit(end=report.nodeid, outcome="crashed" if lost else report.outcome, message=message)
        if lost:
            os._exit(LOST_GPU)


def gpu_lost() -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
