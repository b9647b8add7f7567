"""compile_model(request): the one road from a checkpoint to artifacts, their reports and their Triton repository."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from instantrt.compiler.artifact.hashing import Hashing
from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.artifact.staging import Staging, artifacts_kept, check_out, check_writable
from instantrt.compiler.frontend.own_names import own_names
from instantrt.compiler.kinds import check_kind
from instantrt.compiler.plan import Plan, plan
from instantrt.compiler.request import Request, check_options
from instantrt.compiler.serving.repository import check_folder, plan_repository, stage_repository
from instantrt.compiler.smoke.memory import check_memory
from instantrt.compiler.smoke.process import Child, standby
from instantrt.compiler.target import Backend
from instantrt.compiler.watch import SILENT, Watch
from instantrt.compiler.write import outline, stage_artifacts
from instantrt.passes.core.collector import settled
from instantrt.passes.core.errors import UserError, reworded

if TYPE_CHECKING:
    from instantrt.compiler.accuracy.data import Data
    from instantrt.compiler.accuracy.verify import Verdict

REPORT = "report"  # the folder in `request.out`


class VerificationError(UserError):
    """The artifacts are written, with a report for each, and a verdict did not pass. No repository was written."""

    def __init__(self, artifacts: list[Artifact], verdicts: list[Verdict], triton: Path | None) -> None:
        self.artifacts, self.verdicts = artifacts, verdicts
        failed = [f"{verdict.target}: {first}" for verdict in verdicts for first in verdict.violations[:1]]
        super().__init__(
            "the artifacts are written, but they are not what they should be",
            found="; ".join([*failed, *([f"{triton} is as it was"] if triton is not None else [])]),
        )


def compile_model(
    request: Request, *, verify: bool = False, triton: Path | str | None = None, watch: Watch = SILENT
) -> list[Artifact]:
    """Compiles and writes `request.out`: `<target>/model.onnx`, model.engine or a build kit, and manifest.json.

    verify   runs the artifacts against the float model: `report/<target>/` beside them, or a VerificationError
    triton   folder for a Triton model repository of all that `request.out` then holds

    Everything appears at once, and only when all of it is complete and has run (`request.smoke`).
    """
    if not isinstance(request, Request):
        raise TypeError(f"compile_model takes a Request, not {type(request).__name__}")
    check_kind("triton", triton, Path, type(None))
    triton = Path(triton) if triton is not None else None
    check_places(request, verify=verify, triton=triton)
    on_cpu = any(target.backend is Backend.ONNXRUNTIME for target in request.resolved_targets())
    with ExitStack() as stack:
        staging, hashing = stack.enter_context(Staging()), stack.enter_context(Hashing())
        take = stack.enter_context(standby(needed=request.smoke and on_cpu))
        planned = plan(request, watch.say, hashing.begin)
        stack.enter_context(reworded(own_names(planned.model.held, request.model)))
        watch.planned(planned)
        data = None
        if verify:
            from instantrt.compiler.accuracy.data import load_data

            watch.say("reading the text to verify with")
            data = load_data(planned.model, request.text, longest=request.max_length)
        check_plan(planned, request, triton)
        with settled():
            artifacts = stage_artifacts(request, planned, staging, hashing, watch)
            if request.smoke:
                run_once(planned, request, artifacts, staging, take, watch)
        verdicts = stage_reports(planned, request, artifacts, data, staging, watch) if data is not None else []
        passed = all(verdict.passed for verdict in verdicts)
        if triton is not None and passed:
            watch.say("staging the Triton repository")
            watch.served(stage_repository(staging.staged(request.out), triton, staging))
    if not passed:
        raise VerificationError(artifacts, verdicts, triton)
    return artifacts


def check_places(request: Request, *, verify: bool = False, triton: Path | None = None) -> None:
    """What a user can have wrong and is known at once: options without use, and folders that hold something else."""
    check_options(request)
    targets = request.resolved_targets()
    read = (request.model, *request.adapter, *([request.base] if request.base is not None else []))
    written = (each for each in (triton, request.dump_passes, request.cache) if each is not None)
    check_out(request.out, targets, [*read, *written])
    if triton is not None:
        if request.out.resolve().is_relative_to(triton.resolve()):  # a second run would find what is no model of it
            raise UserError(
                "the artifacts would lie in the Triton repository",
                where=str(request.out),
                found=f"triton {triton}",
                fix="name another folder for --triton, one in the output folder say",
            )
        check_folder(triton)
    if request.dump_passes is not None:
        check_writable(request.dump_passes, "name another for --dump-passes")
    if request.timing_cache is not None and request.timing_cache.is_dir():
        raise UserError("timing_cache is a file", where=str(request.timing_cache), found="a folder")
    if request.min_cosine is not None and not verify:
        raise UserError("min_cosine does nothing without --verify", fix="--verify --text FILE")
    if request.text is not None and not verify and not request.has_budget:
        raise UserError("text does nothing by itself", expected="with --verify, --max-kl or --max-ppl-increase")
    if verify:
        from instantrt.compiler.accuracy.run import check_reports

        check_reports(request.out / REPORT, targets)


def check_plan(planned: Plan, request: Request, triton: Path | None) -> None:
    """What can be known to fail before a byte is written."""
    if triton is not None:
        targets = request.resolved_targets()
        plan_repository([*artifacts_kept(request.out, targets), *(outline(request, planned, t) for t in targets)])
    if request.smoke:
        check_memory({target: planned.size(target) for target in planned.lowered if target not in planned.builders})


def run_once(
    planned: Plan,
    request: Request,
    artifacts: list[Artifact],
    staging: Staging,
    take: Callable[[], Child],
    watch: Watch,
) -> None:
    """Runs the artifacts where they are staged, against their twins; SmokeError for one that is wrong."""
    from instantrt.compiler.smoke.run import smoke

    watch.say("running each artifact once")
    for ran in smoke(planned, replace(request, out=staging.staged(request.out)), artifacts, take, watch.say):
        watch.ran(ran)


def stage_reports(
    planned: Plan, request: Request, artifacts: list[Artifact], data: Data, staging: Staging, watch: Watch
) -> list[Verdict]:
    """Verifies the artifacts where they are staged, and leaves a report for each beside them."""
    from instantrt.compiler.accuracy.forms import Budget
    from instantrt.compiler.accuracy.run import check_artifacts

    staged, folder = replace(request, out=staging.staged(request.out)), request.out / REPORT
    budget = Budget(request.max_kl, request.max_ppl_increase, request.min_cosine)
    verdicts = check_artifacts(planned, staged, artifacts, data, budget, folder, staging, say=watch.say)
    watch.verdicts(verdicts)
    return verdicts
