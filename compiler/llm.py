"""A compiled artifact in this process: `LLM` generates text on the runtime that Triton is given, too.

with LLM("build") as llm:
    print(llm.generate("Once upon a time", max_tokens=32).text)
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, overload

import numpy as np
import numpy.typing as npt

from instantrt.compiler.artifact.check import check_digests, inside, libraries_of
from instantrt.compiler.artifact.manifest import Artifact, find_artifact
from instantrt.compiler.backend.tensorrt.gpu import describe, gpus, no_rtx_here
from instantrt.compiler.here import runs_here, runs_on_cpu
from instantrt.compiler.kinds import check_kind
from instantrt.compiler.serving.config import KIT, parameters
from instantrt.compiler.serving.runtime.opening import open_engine
from instantrt.compiler.serving.runtime.sampling import Sampling
from instantrt.compiler.serving.runtime.scheduler import Engine, Failure, Job, RefusedError, Scheduler, SequenceLimits
from instantrt.compiler.serving.runtime.text import Text
from instantrt.passes.core.errors import FOUND, UserError, tried

if TYPE_CHECKING:
    import onnxruntime as ort

Array = npt.NDArray[Any]
Prompt = str | Sequence[Mapping[str, Any]]  # a text, or the messages of a chat: {"role": ..., "content": ...}
MAX_TOKENS = 64
HEAD_START = 0.02  # seconds


class Options(TypedDict, total=False):
    """How to go on from a prompt; what is left out changes nothing, and temperature 0 is greedy. See `Sampling`.

    max_tokens   64 if not given; a sequence that reaches the artifact's length ends earlier
    min_tokens   no end of text before so many
    stop         texts that end the generation; they are not part of it
    """

    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int


@dataclass(frozen=True)
class Completion:
    """What was generated; `finish` is stop (end of text, or a stop text) or length."""

    text: str
    tokens: tuple[int, ...]
    finish: str
    prompt_tokens: int


class Generation:
    """A request on its way: an iterator over its text in pieces of whole characters, or all of it at once."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.text, self.finish = "", ""
        self.tokens: list[int] = []
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None is the end
        self.times: list[tuple[float, int]] = []  # of each piece: time.monotonic(), tokens
        self.error: UserError | None = None
        self.ended = self.gone = False

    def __iter__(self) -> Iterator[str]:
        """Whoever stops listening cancels the request."""
        try:
            while not self.ended:
                piece = self.pieces.get()
                self.ended = piece is None
                if piece is not None:
                    yield piece
        finally:
            self.cancel()
        if self.error is not None:
            raise self.error

    def result(self) -> Completion:
        """Waits for the end."""
        for _ in self:
            pass
        return Completion(self.text, tuple(self.tokens), self.finish, self.prompt_tokens)

    def cancel(self) -> None:
        """Leaves the batch after the step in progress."""
        self.gone = True

    def piece(self, text: str, tokens: list[int], finish: str) -> None:
        """From the scheduler, as what follows."""
        self.text, self.tokens, self.finish = self.text + text, self.tokens + tokens, finish
        self.times.append((time.monotonic(), len(tokens)))
        if text:
            self.pieces.put(text)
        if finish:
            self.pieces.put(None)

    def fail(self, failure: Failure, message: str) -> None:
        self.error = UserError(f"the request was not finished: {failure.value}", found=message)
        self.pieces.put(None)

    def cancelled(self) -> bool:
        return self.gone


class LLM:
    """A causal LM's artifact, on this CPU or on a GPU of this machine; its methods may be called from many threads.

    Requests join the running batch and leave it by themselves. `start` loads the model (the first request does, too);
    `stop` lets all requests finish and keeps the model for the next `start`; `release` frees its memory, for good.
    A `with` block starts and releases.

    target       which artifact; else the only one that this machine can run, `artifact` then
    max_batch    sequences that run together; if not given, as many as in Triton
    max_length   tokens of one, prompt included; if not given, as many as the artifact can take
    threads      CPU: 0 is one a core
    spinning     CPU: idle threads wait a tenth of a millisecond before they give their core up; if not given, where the
                 process may use as many CPUs as it has threads
    """

    def __init__(
        self,
        folder: Path | str,
        target: str | None = None,
        *,
        max_batch: int | None = None,
        max_length: int | None = None,
        threads: int = 0,
        spinning: bool | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_length", max_length)):
            check_kind(name, value, int, type(None))
        check_threads(threads, spinning)
        self.out = Path(folder)
        self.artifact = find_artifact(self.out, target, runs_here)
        path = inside(self.out, self.artifact.path)
        if self.artifact.llm is None or self.artifact.kind == "kit":
            raise UserError(
                "this generates no text",
                where=str(path),
                expected="a causal LM for a CPU, or its engine",
                found=KIT if self.artifact.kind == "kit" else "another model: see Embedder, Classifier, load_artifact",
            )
        if not (path.parent / "tokenizer.json").is_file():
            raise UserError("no tokenizer for the text", where=str(path.parent), expected="tokenizer.json")
        self.model = path
        self.given = parameters(self.artifact) | {"threads": threads, "spinning": spinning}
        longest = self.artifact.longest or self.given["max_length"]
        if max_length is not None and max_length > longest:
            most = f"at most {longest}"
            raise UserError("max_length is more than the artifact can take", expected=most, found=str(max_length))
        try:
            rows = self.given["max_batch"] if max_batch is None else max_batch
            length = longest if max_length is None else max_length
            self.limits = SequenceLimits(rows, length, sys.maxsize, whole=self.given.get("prompts") == "whole")
        except ValueError as error:
            raise UserError(f"max_batch or max_length: {error}") from None
        self.engine: Engine | None = None
        self.scheduler: Scheduler | None = None
        self.state = "new"  # started, stopped, released
        self.lock = threading.Lock()

    @cached_property
    def text(self) -> Text:
        """Read when it is first needed, or while the model loads."""
        with tried("reading the tokenizer", where=str(self.model.parent), fix="copy it again from the model"):
            return Text(self.model.parent)

    def start(self) -> Self:
        with self.lock:
            self.check("released")
            if self.state != "started":
                if self.scheduler is not None:  # a stop was interrupted
                    self.scheduler.close()
                self.engine = self.engine or self.load()
                self.scheduler, self.state = Scheduler(self.engine, self.text, self.limits), "started"
        return self

    def stop(self) -> None:
        """Takes no more requests, and returns when all are finished."""
        with self.lock:
            self.state = "released" if self.state == "released" else "stopped"
            if self.scheduler is not None:
                self.scheduler.close(finish=True)
            self.scheduler = None

    def release(self) -> None:
        """Requests that still run fail; `stop` before it lets them finish."""
        with self.lock:
            if self.scheduler is not None:
                self.scheduler.close()
            if self.engine is not None:
                self.engine.close()
            self.scheduler, self.engine, self.state = None, None, "released"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.stop()
        finally:
            self.release()

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self, prompt: Prompt, **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def generate(self, prompt: Sequence[Prompt], **options: Unpack[Options]) -> list[Completion]: ...
    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Unpack[Options]) -> Completion | list[Completion]:
        """What follows a text or a chat; of a list of them, all at once, in their order."""
        one = is_prompt(prompt) or not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping)
        running: list[Generation] = []
        try:
            for each in [prompt] if one else prompt:
                running.append(self.submit(each, **options))  # type: ignore[arg-type]  # it is a Prompt now
            found = [generation.result() for generation in running]
        except BaseException:
            for generation in running:
                generation.cancel()
            raise
        return found[0] if one else found

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[str]:
        """The text that follows, in pieces of whole characters as they come; asked for with the first of them."""
        yield from self.submit(prompt, **options)

    def submit(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Queues a request and returns at once."""
        if self.state == "new":
            self.start()
        given: dict[str, Any] = dict(options)
        if unknown := sorted(given.keys() - Options.__annotations__):
            raise UserError("no such option", expected=", ".join(Options.__annotations__), found=", ".join(unknown))
        max_tokens, min_tokens = given.pop("max_tokens", MAX_TOKENS), given.pop("min_tokens", 0)
        stop = given.pop("stop", ())
        check_kind("max_tokens", max_tokens, int)
        check_kind("min_tokens", min_tokens, int)
        check_kind("stop", stop, tuple[str, ...])
        stop = tuple(word for word in ((stop,) if isinstance(stop, str) else stop) if word)
        try:
            ids = self.encode(prompt)
            room = self.limits.length - len(ids)
            if room < 1:
                most = f"at most {self.limits.length - 1} tokens"
                raise UserError("the prompt is too long", expected=most, found=str(len(ids)))
            job = Job(tuple(ids), min(max_tokens, room), min_tokens, Sampling(**given), stop)
            reply = Generation(len(ids))
            with self.lock:
                self.check("stopped", "released")
                assert self.scheduler is not None
                self.scheduler.submit(job, reply)
        except (RefusedError, ValueError) as error:
            raise UserError(str(error)) from None
        return reply

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a text, or of a chat in the model's own form."""
        if not is_prompt(prompt):
            expected = 'a str, or the messages of a chat: [{"role": "user", "content": "..."}]'
            raise UserError("this is no prompt", expected=expected, found=repr(prompt)[:FOUND])
        return self.text.encode(prompt) if isinstance(prompt, str) else self.text.chat(json.dumps(list(prompt)))

    def check(self, *states: str) -> None:
        if self.state in states:
            fix = "call start()" if self.state == "stopped" else "make another LLM"
            raise UserError(f"the model was {self.state}", where=str(self.model), fix=fix)

    def load(self) -> Engine:
        """The model in memory; the tokenizer is read meanwhile."""
        if self.artifact.engine is not None:
            return self.load_engine(self.artifact.engine)
        import_module("onnxruntime")  # before the thread, which has to leave the interpreter
        with checked(self.out, self.artifact) as libraries, ThreadPoolExecutor(1) as beside:
            opened = beside.submit(self.open, libraries, 0)
            wait([opened], HEAD_START)  # until it has: the tokenizer's reader keeps the interpreter to itself
            self.text  # noqa: B018 -- reads it
        return opened.result()

    def load_engine(self, engine: Mapping[str, Any]) -> Engine:
        """Engines and plugins are code: nothing is loaded before its digest was compared."""
        from instantrt.compiler.check import check_header, check_runtime

        check_digests(self.out, self.artifact)
        fitting = [ordinal for ordinal, gpu in enumerate(gpus()) if gpu.sm == engine["sm"]]
        if not fitting:
            raise UserError(
                f"the engine was built for sm{engine['sm']}",
                where=str(self.model),
                found=f"this machine: {describe()}",
                fix=no_rtx_here() if engine["builder"] == "tensorrt_rtx" else "",
            )
        compatible = bool(engine["options"].get("version_compatible"))
        check_runtime(check_header(self.model, engine), self.model, compatible=compatible)
        return self.open([inside(self.out, name) for name in self.artifact.plugins], fitting[0])

    def open(self, libraries: Sequence[Path], gpu: int) -> Engine:
        how = {name: self.given[name] for name in ("runtime", "cache", "threads", "spinning")}
        try:
            with tried("loading the model", where=str(self.model)):
                return open_engine(self.model, libraries, self.limits, gpu=gpu, **how)
        except MemoryError as error:
            fix = "a smaller max_batch or max_length"
            raise UserError("no memory for the model", where=str(self.model), found=str(error), fix=fix) from None


def is_prompt(prompt: object) -> bool:
    """Is it a text or a chat, and no list of them?"""
    several = isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(each, Mapping) for each in prompt)
    return isinstance(prompt, str) or several


def check_threads(threads: int, spinning: bool | None) -> None:
    """Refuses what no session of ONNX Runtime can be opened with."""
    check_kind("threads", threads, int)
    check_kind("spinning", spinning, bool, type(None))
    if threads < 0:
        raise UserError("threads is out of range", expected="0 or more; 0 is one a core", found=str(threads))


@contextmanager
def checked(out: Path, artifact: Artifact) -> Iterator[list[Path]]:
    """The libraries of a CPU artifact: code, so its digests are compared first; those of others beside the block."""
    if artifact.plugins:
        yield libraries_of(out, artifact)
        return
    with ThreadPoolExecutor(1) as beside:
        digests = beside.submit(check_digests, out, artifact)
        try:
            yield []
        finally:
            digests.result()  # a changed file explains the block's errors


@dataclass(frozen=True)
class LoadedModel:
    """A model for ONNX Runtime that is called with its inputs by name, and returns its outputs by name."""

    artifact: Artifact
    session: ort.InferenceSession = field(repr=False)

    def __call__(self, **feeds: Array) -> dict[str, Array]:
        takes, names = ([spec.name for spec in specs] for specs in (self.artifact.inputs, self.artifact.outputs))
        if missing := [name for name in takes if name not in feeds]:
            raise UserError("inputs are missing", expected=", ".join(takes), found=f"no {', '.join(missing)}")
        if unknown := [name for name in feeds if name not in takes]:
            raise UserError("no such input", expected=", ".join(takes), found=", ".join(unknown))
        given = {name: np.asarray(value) for name, value in feeds.items()}
        return dict(zip(names, self.session.run(names, given), strict=True))


def load_artifact(
    folder: Path | str, target: str | None = None, *, threads: int = 0, spinning: bool | None = None
) -> LoadedModel:
    """The artifact for a CPU in `folder`, an encoder's or any other model's; `threads` and `spinning` as in `LLM`."""
    check_threads(threads, spinning)
    out = Path(folder)
    artifact = find_artifact(out, target, runs_on_cpu)
    if artifact.kind != "onnx":
        raise UserError(
            "not a model for ONNX Runtime",
            where=str(out / artifact.path),
            found=artifact.kind,
            fix="LLM runs a causal LM's engine, Triton any engine",
        )
    from instantrt.compiler.serving.runtime.onnx_engine import open_session

    with checked(out, artifact) as libraries, tried("loading it into ONNX Runtime", where=str(out / artifact.path)):
        return LoadedModel(artifact, open_session(inside(out, artifact.path), threads, spinning, libraries))
