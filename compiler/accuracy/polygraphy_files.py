"""What NVIDIA's tool needs to repeat a comparison alone: inputs, results, its own verdict, and the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import perf_counter

import numpy as np
from polygraphy.comparator import AccuracyResults, Comparator, L2CompareFunc, RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from instantrt.compiler.accuracy.bounds import bound_of
from instantrt.compiler.accuracy.data import Data, llm_feeds
from instantrt.compiler.accuracy.forms import AGAINST, Subject, model_bound
from instantrt.compiler.accuracy.runners import Runner, cut

G_LOGGER.module_severity = {"": G_LOGGER.ERROR}  # its progress lines would drown ours
TWIN = "twin.json"
REPEATED = 32  # tokens of the run that is saved: small files, and enough to repeat a comparison


def polygraphy_files(
    subject: Subject,
    data: Data,
    runners: Mapping[str, Runner],
    folder: Path,
    final: Callable[[Path], Path],
    held: Iterable[str],
) -> tuple[str, list[str]]:
    """Writes inputs.json, run_results.json, twin.json and accuracy_results.json. Returns the command that repeats the
    comparison, where `final` says that each path will be, and what Polygraphy's L2 comparator objects to.

    held   the forms whose bound is on the size of their difference
    """
    llm = subject.model.llm
    feeds = llm_feeds(data.batches[0][:1, :REPEATED], llm) if llm is not None else data.feeds[0]
    outputs, seconds = {}, {}
    for form, runner in runners.items():
        started = perf_counter()
        outputs[form] = runner(feeds)
        seconds[form] = perf_counter() - started
    smallest = min(outputs.values(), key=lambda each: sum(value.size for value in each.values()))
    if subject.logits == "last":  # what the command below will be given
        smallest = {name: value[:, -1:] for name, value in smallest.items()}
    results = RunResults()
    for form, each in outputs.items():
        rows = {name: np.ascontiguousarray(value) for name, value in cut(each, smallest).items()}  # it takes no other
        results.add([rows], runtime=seconds[form], runner_name=form)
    save_json([dict(feeds)], str(folder / "inputs.json"))
    results.save(str(folder / "run_results.json"))
    for form in {"twin"} & set(runners):  # alone: the tool compares everything that it loads with one bound
        only = RunResults()
        only.append((form, results[form]))
        only.save(str(folder / TWIN))
    accuracy = AccuracyResults()
    names = list(runners)
    for form in names:
        reference, kind = AGAINST.get(form, ("", ""))
        bound = model_bound(subject, kind) if kind else None
        if bound is None or reference not in names or form not in held:
            continue
        limits = {name: bound.model * float(np.linalg.norm(v)) for name, v in results[reference][0].items()}
        func = L2CompareFunc(l2_threshold={"": 0.0, **limits}, check_shapes=False)
        pairs = [(names.index(form), names.index(reference))]
        accuracy.extend(Comparator.compare_accuracy(results, compare_func=func, comparisons=pairs))
    accuracy.save(str(folder / "accuracy_results.json"))
    objections = [
        f"Polygraphy: {form} and {reference} differ"
        for each in accuracy
        for (form, reference), runs in each.items()
        if not all(bool(same) for run in runs for same in run.values())
    ]
    return repeat_command(subject, results, folder, final), objections


def repeat_command(subject: Subject, results: RunResults, folder: Path, final: Callable[[Path], Path]) -> str:
    """`polygraphy run` on the artifact against the saved twin; empty where there is no file that it can run."""
    if subject.file is None or "twin" not in results.keys():  # noqa: SIM118  (a list of pairs)
        return ""
    backend = "--onnxrt" if subject.file.suffix == ".onnx" else "--trt"
    bound = bound_of(subject.lowered.nodes, subject.dtype)
    limit = bound.model * max(float(np.linalg.norm(v)) for v in results["twin"][0].values())
    return (
        f"polygraphy run {final(subject.file)} {backend} --load-inputs {final(folder / 'inputs.json')} "
        f"--load-outputs {final(folder / TWIN)} --compare l2 --l2-threshold {limit:.6g}"
    )
