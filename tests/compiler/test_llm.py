"""LLM on ONNX Runtime: what it generates alone, streamed, in batches that others join and leave; start to release."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantrt import LLM, load_artifact
from instantrt.compiler.artifact.manifest import read_manifest, write_manifest
from instantrt.compiler.backend.tensorrt.gpu import Gpu
from instantrt.compiler.compile import compile_model
from instantrt.compiler.llm import Completion, Generation
from instantrt.compiler.request import Request
from instantrt.compiler.serving.config import parameters
from instantrt.compiler.serving.runtime.onnx_engine import SharedEngine
from instantrt.compiler.serving.runtime.text import Text
from instantrt.passes.core.errors import UserError
from tests.commands import invoke
from tests.conftest import TINY

PROMPTS = ("Once upon a time", "The list of", "In the history of", "def main(", "The server é", "When 水 the water")
LENGTHS = (40, 7, 23, 31, 1, 16)


@pytest.fixture(scope="module")
def expected(tiny_compiled: Path) -> list[list[int]]:
    """The tokens of each prompt, by the engine alone, a row at a time; 0 is the end of text."""
    engine, text, found = SharedEngine(tiny_compiled / "x86" / "model.onnx", 1, 256), Text(TINY), []
    for prompt, count in zip(PROMPTS, LENGTHS, strict=True):
        tokens: list[int] = []
        step, done = text.encode(prompt), 0
        while len(tokens) < count:
            logits = engine.prefill(0, np.array(step), done)
            done, step = done + len(step), [int(logits[1:].argmax()) + 1]
            tokens += step
        found.append(tokens)
    return found


def exactly(llm: LLM, which: int) -> Completion:
    return llm.submit(PROMPTS[which], max_tokens=LENGTHS[which], min_tokens=LENGTHS[which]).result()


def test_alone_and_in_a_batch(tiny_compiled: Path, expected: list[list[int]]) -> None:
    with LLM(tiny_compiled) as llm:
        alone = [exactly(llm, i) for i in range(len(PROMPTS))]
        batch = llm.generate(PROMPTS[:3], max_tokens=7, min_tokens=7)
    assert [list(each.tokens) for each in alone] == expected
    assert [each.finish for each in alone] == ["length"] * len(PROMPTS)
    assert [list(each.tokens) for each in batch] == [tokens[:7] for tokens in expected[:3]]
    assert alone[0].prompt_tokens == 6


def test_pieces_are_whole_characters_and_make_the_text(tiny_compiled: Path) -> None:
    with LLM(tiny_compiled) as llm:
        whole = llm.generate(PROMPTS[5], max_tokens=60, min_tokens=60)
        pieces = list(llm.stream(PROMPTS[5], max_tokens=60, min_tokens=60))
        assert len(pieces) > 10
        assert "".join(pieces) == whole.text
        cut = llm.generate(PROMPTS[0], stop="e of the in")
        assert (cut.text, cut.finish) == (" the current tim", "stop")
        assert llm.generate(PROMPTS[0], stop="").text.startswith(cut.text + "e of the in")
        seeded = [llm.generate("The list of", temperature=1.0, top_p=0.9, seed=seed).tokens for seed in (1, 2, 1)]
        assert seeded[0] == seeded[2] != seeded[1]
        chat = [{"role": "user", "content": "Hello"}]
        rendered = llm.text.render(json.dumps(chat))
        assert llm.generate(chat, max_tokens=12).tokens == llm.generate([rendered], max_tokens=12)[0].tokens


def test_requests_join_and_leave_from_many_threads(tiny_compiled: Path, expected: list[list[int]]) -> None:
    """More than there are rows, each a little later than the one before; some listeners go away in the middle."""
    found: dict[int, list[int]] = {}
    left: list[Generation] = []

    def ask(llm: LLM, at: int) -> None:
        time.sleep(0.01 * at)
        if at % 4 == 3:
            long = llm.submit("The server", max_tokens=900, min_tokens=900)
            assert next(iter(long))
            left.append(long)
            return
        found[at] = list(exactly(llm, at % len(PROMPTS)).tokens)

    with LLM(tiny_compiled, max_batch=3) as llm:
        threads = [threading.Thread(target=ask, args=(llm, at)) for at in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert llm.scheduler is not None
        deadline = time.monotonic() + 20
        while llm.scheduler.busy() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not llm.scheduler.busy()
    assert [each.finish for each in left] == [""] * 6  # who stopped listening has left
    assert found == {at: expected[at % len(PROMPTS)] for at in range(24) if at % 4 != 3}


def test_stop_lets_what_runs_finish_and_start_goes_on(tiny_compiled: Path) -> None:
    llm = LLM(tiny_compiled, max_batch=2)
    running = [llm.submit("The server", max_tokens=100, min_tokens=100) for _ in range(5)]
    engine = llm.engine
    llm.stop()
    assert [len(each.result().tokens) for each in running] == [100] * 5
    with pytest.raises(UserError, match=r"the model was stopped\n(.|\n)*call start\(\)"):
        llm.generate("a")
    assert llm.start().generate("The list of", max_tokens=3).tokens
    assert llm.engine is engine
    llm.release()


def test_release_frees_and_later_use_is_refused(tiny_compiled: Path) -> None:
    llm = LLM(tiny_compiled).start()
    assert isinstance(llm.engine, SharedEngine)
    held = [weakref.ref(each) for each in (llm.engine, llm.engine.session, *llm.engine.cache.values())]
    long = llm.submit("The server", max_tokens=900, min_tokens=900)
    next(iter(long))
    llm.release()
    with pytest.raises(UserError, match="not finished"):
        long.result()
    gc.collect()
    assert [each() for each in held] == [None] * len(held)
    for use in (lambda: llm.generate("a"), llm.start, lambda: next(llm.stream("a")), llm.__enter__):
        with pytest.raises(UserError, match=r"the model was released\n(.|\n)*make another LLM"):
            use()
    llm.release()
    llm.stop()


def test_an_error_inside_with_does_not_wait_for_others(tiny_compiled: Path) -> None:
    llm = LLM(tiny_compiled)
    long = llm.submit("The server", max_tokens=900, min_tokens=900)
    with pytest.raises(ZeroDivisionError), llm:
        raise ZeroDivisionError
    with pytest.raises(UserError, match="unloaded"):
        long.result()


def test_limits_and_options_are_refused_in_words(tiny_compiled: Path) -> None:
    with LLM(tiny_compiled, max_length=64) as llm:
        assert len(llm.generate("The list of", max_tokens=1000, min_tokens=1000).tokens) == 64 - len(
            llm.encode("The list of")
        )
        for prompt, options, words in (
            ("", {}, "the prompt is empty"),
            ("a b " * 64, {}, "the prompt is too long\n.*at most 63 tokens"),
            ("a", {"max_tokens": 0}, "max_tokens: expected 1 or more, found 0"),
            ("a", {"top_p": 1.5}, "top_p: expected above 0, at most 1, found 1.5"),
            ([{"content": "who?"}], {}, "messages: expected a list such as"),
            ([{"role": "user"}], {}, "messages: expected a list such as"),
            *(("a", {name: 2.5}, name) for name in ("top_k", "seed", "max_tokens", "min_tokens")),
            *(("a", {"temperature": value}, "temperature: expected 0 or more") for value in ("1", None, True)),
            ("a", {"stop": ["a", 5]}, "stop has a value of another kind"),
            ("a", {"max_token": 5}, "no such option"),
            *((prompt, {}, "this is no prompt") for prompt in (5, None, [1, 2], b"a", {"role": "user"}, [["a"]])),
        ):
            with pytest.raises(UserError, match=words):
                llm.generate(prompt, **options)  # type: ignore[call-overload]
        assert llm.generate([]) == []


def test_an_artifact_of_a_given_length_takes_no_more(tmp_path: Path) -> None:
    """As where a rotary table is right up to a length only."""
    (artifact,) = compile_model(Request(TINY, ("x86",), tmp_path / "out", quant="a16w8", max_length=32))
    assert (artifact.limits["max_length"], parameters(artifact)["max_length"]) == (32, 32)
    with pytest.raises(UserError, match=r"max_length is more than the artifact can take\n.*at most 32\n.*33"):
        LLM(tmp_path / "out", max_length=33)
    with LLM(tmp_path / "out") as llm:
        with pytest.raises(UserError, match=r"the prompt is too long\n.*at most 31 tokens"):
            llm.generate("a b " * 64)
        done = llm.generate("The list of", max_tokens=1000, min_tokens=1000)
    assert len(done.tokens) + done.prompt_tokens == 32


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_length": 1025}, "max_length is more than the artifact can take\n.*at most 1024\n.*1025"),
        ({"max_batch": 0}, "rows: expected 1 or more, found 0"),
        ({"max_batch": "4"}, "max_batch has a value of another kind"),
        ({"max_length": 2.5}, "max_length has a value of another kind"),
        ({"threads": "2"}, "threads has a value of another kind"),
        ({"threads": -1}, "threads is out of range"),
        ({"spinning": "yes"}, "spinning has a value of another kind"),
    ],
)
def test_limits_that_it_cannot_have(tiny_compiled: Path, limits: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LLM(tiny_compiled, **limits)


def test_what_is_no_artifact_is_refused_in_words(tiny_compiled: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json"):
        LLM(tmp_path)
    with pytest.raises(UserError, match="no artifact for target sm89"):
        LLM(tiny_compiled, "sm89")
    out = tmp_path / "out"
    shutil.copytree(tiny_compiled, out)
    manifest = json.loads((out / "manifest.json").read_text())
    for changed, words in (
        (manifest | {"format": 1}, "a manifest of another version"),
        (edited(manifest, llm=None), "another model: see Embedder, Classifier, load_artifact"),
        (edited(manifest, kind="kit"), "a build kit is not a model yet"),
        (edited(manifest, path="../x86/model.onnx"), "leads out of the folder"),
    ):
        (out / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            LLM(out)
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "x86" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        LLM(out)


def test_the_only_artifact_of_several_that_runs_here_is_taken(
    tiny_compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_compiled, tmp_path, dirs_exist_ok=True)
    (cpu,) = read_manifest(tmp_path)
    record = {"builder": "tensorrt", "version": "10.15.1", "sm": 90, "options": {}}
    arm, kit = replace(cpu, target="armv9"), replace(cpu, target="sm89", kind="kit")
    engine = replace(cpu, target="sm90", kind="engine", engine=record, limits={"max_batch": 1, "cache": "concat"})
    write_manifest(tmp_path, [kit, cpu, engine, arm])
    assert LLM(tmp_path, "sm90").artifact == engine
    for machine, gpus, taken in (("aarch64", (), arm), ("x86_64", (), cpu), ("x86_64", (Gpu("H100", 90),), None)):
        monkeypatch.setattr("instantrt.compiler.here.gpus", lambda gpus=gpus: gpus)
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        if taken is not None:
            assert LLM(tmp_path).artifact == load_artifact(tmp_path).artifact == taken
        else:
            assert load_artifact(tmp_path).artifact == cpu
            with pytest.raises(UserError, match=r"which artifact\?\n  expected: one of x86, sm90\n"):
                LLM(tmp_path)
    monkeypatch.setattr("instantrt.compiler.here.gpus", tuple)
    said = invoke("generate", tmp_path, "--prompt", "a", "--max-tokens", "1")
    assert "taking x86, of sm89, x86, sm90, armv9 the only one that this machine can run\n" in said.stderr
    write_manifest(tmp_path, [kit, engine])
    with pytest.raises(UserError, match=r"no artifact of several runs here\n  expected: one of sm89, sm90\n"):
        load_artifact(tmp_path)


def edited(manifest: dict, **fields: object) -> dict:
    return {**manifest, "artifacts": [{**manifest["artifacts"][0], **fields}]}


def test_any_model_is_called_by_name(tiny_compiled: Path, tmp_path: Path) -> None:
    model = load_artifact(tiny_compiled)
    assert len(repr(model)) < 400
    with pytest.raises(
        UserError, match=r"inputs are missing\n[^$]*no attention_mask, position_ids, past_key_values.0.key"
    ):
        model(input_ids=[[1]])
    with pytest.raises(UserError, match=r"no such input\n[^$]*found: +ids"):
        model(**{spec.name: 0 for spec in model.artifact.inputs}, ids=0)
    ids = np.array([[5, 17, 3]])
    past = dict.fromkeys((s.name for s in model.artifact.inputs[3:]), np.zeros((1, 2, 0, 64), np.float32))
    found = model(input_ids=ids, attention_mask=np.ones_like(ids), position_ids=np.arange(3)[None], **past)
    assert list(found)[:2] == ["logits", "present.0.key"]
    assert found["logits"].shape == (1, 1, 4096)
    shutil.copytree(tiny_compiled, tmp_path / "out")
    with (tmp_path / "out/x86/model.onnx.data").open("r+b") as file:
        file.write(b"?")
    with pytest.raises(UserError, match="not what compile wrote"):
        load_artifact(tmp_path / "out")


@pytest.mark.parametrize("last", ["", "raise ValueError"])
def test_a_program_ends_as_it_would_while_a_request_runs(tiny_compiled: Path, last: str) -> None:
    program = (
        "import sys; from instantrt import LLM; llm = LLM(sys.argv[1])\n"
        f"pieces = llm.stream('The', max_tokens=900, min_tokens=900); next(pieces); kept = [pieces]\n{last}"
    )
    run = subprocess.run([sys.executable, "-c", program, tiny_compiled], capture_output=True, text=True, check=False)
    assert run.returncode == bool(last), run.stderr


def test_a_stream_that_nobody_listens_to_asks_for_nothing(tiny_compiled: Path) -> None:
    with LLM(tiny_compiled) as llm:
        llm.stream(PROMPTS[0], max_tokens=900, min_tokens=900)
        assert llm.scheduler is not None
        assert not llm.scheduler.busy()


def test_a_changed_model_is_not_loaded(tiny_compiled: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_compiled, tmp_path / "out")
    with (copy / "x86" / "model.onnx.data").open("r+b") as data:
        data.write(bytes(64))
    with pytest.raises(UserError, match="this is not what compile wrote"):
        LLM(copy).start()


def test_what_was_changed_explains_why_it_does_not_load(tiny_compiled: Path, tmp_path: Path) -> None:
    """Digests are compared while ONNX Runtime, and the tokenizer's library, stumble over the same files."""
    for name in ("model.onnx", "tokenizer.json"):
        copy = shutil.copytree(tiny_compiled, tmp_path / name)
        (copy / "x86" / name).write_bytes(b"{")
        with pytest.raises(UserError, match="this is not what compile wrote"):
            LLM(copy).start()
    with pytest.raises(UserError, match="this is not what compile wrote"):
        load_artifact(tmp_path / "model.onnx")


def test_what_runs_an_artifact_brings_no_compiler(tiny_compiled: Path) -> None:
    """Memory and time of imports count where a small model runs; nobody who sends no chat needs Jinja."""
    program = (
        "import sys; from instantrt import LLM\n"
        f"with LLM({str(tiny_compiled)!r}, threads=1, spinning=False) as llm: llm.generate('a', max_tokens=1)\n"
        "print([name for name in ('onnx', 'onnx_graphsurgeon', 'safetensors', 'jinja2') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"[]\n"
