"""The generate model's TensorRT driver against a stand-in for TensorRT and the GPU.

What a GPU does with what it is given is for the `trt` ring.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from instantrt.compiler.cache_type import with_cache
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.serving.runtime import cuda, tensorrt_engine
from instantrt.compiler.serving.runtime.onnx_engine import ConcatEngine
from instantrt.compiler.serving.runtime.scheduler import Job, Scheduler, SequenceLimits
from instantrt.compiler.serving.runtime.tensorrt_engine import DECODE, PAST, PREFILL, open_engine, widened
from instantrt.compiler.serving.runtime.text import Text
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.tensorrt.kv_in_place import kv_in_place
from tests.compiler.listener import Listener, wait
from tests.compiler.tensorrt_stand_in import LENGTH, ROWS, Context, Engine, HostDevice, Plan, stand_in
from tests.conftest import TINY
from tests.plugins.kernels import cuda_headers

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def concat(tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan(tiny_float.graph.copy(), tmp_path_factory.mktemp("concat"))


@pytest.fixture(scope="module")
def in_place(tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    graph = run(tiny_float.graph.copy(), kv_in_place(LENGTH), PassLog())
    return Plan(graph, tmp_path_factory.mktemp("in_place"))


def rows_that_come_and_go(engine: Any) -> list[Array]:
    """Prompts in one piece and in two, steps of two rows and of all, one that leaves, a row that is taken again."""
    texts = np.random.default_rng(0).integers(1, 4000, (ROWS, 50))
    done = np.zeros(ROWS, np.int64)
    order = list(range(ROWS))  # which text is in which row
    out: list[Array] = []

    def prefill(row: int, count: int) -> None:
        text = texts[order[row]]
        out.append(engine.prefill(row, text[done[row] : done[row] + count], int(done[row])))
        done[row] += count

    def decode(rows: int) -> None:
        ids = np.array([texts[order[row]][done[row]] for row in range(rows)])
        out.extend(engine.decode(ids, done[:rows].copy()))
        done[:rows] += 1

    prefill(0, 9)
    prefill(1, 20)
    prefill(1, 5)
    for _ in range(3):
        decode(2)
    prefill(2, 2)
    decode(2)  # while row 2 joins
    prefill(2, 3)
    prefill(3, 1)  # a prompt of one token
    for _ in range(2):
        decode(ROWS)
    engine.move(3, 0, int(done[3]))
    order[0], done[0] = order[3], done[3]
    for _ in range(4):
        decode(3)
    order[3], done[3] = 0, 0
    prefill(3, 4)
    decode(ROWS)
    return out


@pytest.fixture(scope="module")
def expected(concat: Plan) -> Array:
    """The same steps on ONNX Runtime, each sequence alone."""
    return np.array(rows_that_come_and_go(ConcatEngine(concat.onnx, ROWS, LENGTH)))


def near(got: Array, want: Array) -> None:
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


def test_rows_with_caches_that_grow(concat: Plan, expected: Array) -> None:
    subject = concat.open()
    np.testing.assert_array_equal(np.array(rows_that_come_and_go(subject.engine)), expected)
    caches = ROWS * 2 * 8
    assert len(subject.device.driver.blocks) == caches + 4  # rows x (past, present) x parts; three inputs, the logits
    decoded = [shapes for profile, shapes in subject.behind.ran if profile == DECODE]
    assert {shapes["input_ids"] for shapes in decoded} == {(1, 1)}
    assert all(shapes[f"{PAST}0.key"][2] >= 1 for shapes in decoded)


def test_rows_with_caches_of_int8(tiny_float: FloatModel, tmp_path: Path) -> None:
    plan = Plan(with_cache(tiny_float.graph.copy(), "int8", tiny_float, 0, PassLog()), tmp_path)
    subject = plan.open()
    want = rows_that_come_and_go(ConcatEngine(plan.onnx, ROWS, LENGTH))
    np.testing.assert_array_equal(np.array(rows_that_come_and_go(subject.engine)), np.array(want))
    sizes = {len(block) for block in subject.device.driver.blocks.values()}
    assert LENGTH * 2 * 64 in sizes, "a byte for each number of a row's cache"


@pytest.mark.parametrize(
    ("how", "launches"),
    [({}, 11 - 3), ({"captures": False}, 0), ({"rtx": True}, 0)],
    ids=["graphs", "what cannot be captured", "rtx"],
)
def test_rows_with_caches_in_place(in_place: Plan, expected: Array, how: dict[str, bool], launches: int) -> None:
    """Steps of 2, 3 and 4 rows: each is run as it is once, then recorded, in shapes that never change."""
    subject = in_place.open(**how)
    near(np.array(rows_that_come_and_go(subject.engine)), expected)
    assert subject.device.driver.launches == launches
    assert subject.behind.recording == (3 if "rtx" in how else 0)
    decoded = [shapes for profile, shapes in subject.behind.ran if profile == DECODE]
    assert [len(decoded), {shapes["input_ids"] for shapes in decoded}] == [11, {(2, 1), (3, 1), (4, 1)}]
    for shapes in decoded:
        rows = shapes["input_ids"][0]
        assert shapes["attention_mask"] == (rows, LENGTH)
        assert shapes[f"{PAST}3.value"] == (rows, 2, LENGTH, 64)
    assert {shapes["input_ids"][0] for profile, shapes in subject.behind.ran if profile == PREFILL} == {1}


def test_a_row_owes_nothing_to_the_one_before(in_place: Plan) -> None:
    """A sequence whose numbers ran over leaves NaN behind; the next one in its row does not see them."""
    subject, fresh = in_place.open(), in_place.open()
    ids = np.arange(5, 12)
    for block in subject.device.driver.blocks.values():
        if len(block) == ROWS * 2 * LENGTH * 64 * 4:
            block[...] = 0xFF
    want = fresh.engine.prefill(0, ids, 0)
    np.testing.assert_array_equal(subject.engine.prefill(1, ids, 0), want)
    subject.engine.move(1, 0, len(ids))
    step = np.array([3]), np.array([len(ids)])
    np.testing.assert_array_equal(subject.engine.decode(*step), fresh.engine.decode(*step))


def prompts() -> list[tuple[int, ...]]:
    random = np.random.default_rng(1)
    return [tuple(random.integers(1, 4000, n).tolist()) for n in (3, 17, 1, 30, 8, 12, 5, 22)]


def generate(engine: Any, jobs: list[Job]) -> list[list[int]]:
    """The tokens of each job, all submitted at once to the scheduler that serves them."""
    listeners = [Listener() for _ in jobs]
    scheduler = Scheduler(engine, Text(TINY), SequenceLimits(ROWS, LENGTH))
    for job, listener in zip(jobs, listeners, strict=True):
        scheduler.submit(job, listener)
    wait(*listeners)
    scheduler.close()
    assert [listener.failure for listener in listeners] == [None] * len(jobs)
    return [listener.tokens for listener in listeners]


@pytest.mark.parametrize("plan", ["in_place", "concat"])
def test_requests_in_a_batch_get_the_tokens_they_get_alone(plan: str, request: pytest.FixtureRequest) -> None:
    """Twice as many requests as rows, of many lengths, so that rows are joined, left and moved."""
    found: Plan = request.getfixturevalue(plan)
    jobs = [Job(prompt, 6 + 3 * i, 6 + 3 * i) for i, prompt in enumerate(prompts())]
    subject = found.open()
    together = generate(subject.engine, jobs)
    alone = [generate(found.open().engine, [job])[0] for job in jobs]
    assert together == alone
    assert [len(tokens) for tokens in together] == [job.max_tokens for job in jobs]
    batches = {shapes["input_ids"][0] for profile, shapes in subject.behind.ran if profile == DECODE}
    assert batches == (set(range(1, ROWS + 1)) if plan == "in_place" else {1})


def test_what_the_engine_was_not_built_for_is_refused(in_place: Plan, concat: Plan) -> None:
    with pytest.raises(RuntimeError, match="max_batch: expected at most 4, which the engine was built for, found 5"):
        in_place.open(rows=5)
    for plan in (in_place, concat):
        with pytest.raises(RuntimeError, match=r"max_length: expected at most 64, .*, or compile with --max-length 65"):
            plan.open(length=65)
    with pytest.raises(RuntimeError, match=r"the engine was not built for input_ids of shape \(1, 70\)"):
        in_place.open().engine.prefill(0, np.arange(1, 71), 0)


def test_a_cache_that_does_not_fit_says_so(in_place: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice()
    device.driver.room = 1 << 19
    monkeypatch.setattr("tests.compiler.tensorrt_stand_in.HostDevice", lambda: device)
    with pytest.raises(RuntimeError, match=r"no 131072 bytes left \(CUDA error 2\): lower max_batch or max_length"):
        in_place.open()


def test_rows_that_would_not_be_aligned_are_refused(in_place: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instantrt.compiler.serving.runtime.tensorrt_engine.ALIGNMENT", 3 * 256)
    with pytest.raises(RuntimeError, match="have 32768 bytes, expected a multiple of 768"):
        in_place.open()
    assert in_place.open(rows=1)


def test_an_engine_of_another_version_is_refused(in_place: Plan, tmp_path: Path) -> None:
    (tmp_path / "model.engine").write_bytes(b"other")
    device = HostDevice()
    trt = stand_in(Engine(in_place.session, device.driver, in_place.profiles))
    with pytest.raises(RuntimeError, match="cannot read the engine"):
        open_engine(tmp_path / "model.engine", (), trt, device, ROWS, LENGTH)


def test_bfloat16_logits_become_float32() -> None:
    values = np.array([1.0, -2.5, 3.140625], np.float32)
    assert widened((values.view(np.uint32) >> 16).astype(np.uint16)).tolist() == values.tolist()
    assert widened(np.array([0.5], np.float16)).dtype == np.float32


def names(pattern: str, module: Any) -> set[str]:
    return set(re.findall(pattern, Path(module.__file__).read_text("utf-8")))


def test_tensorrt_has_what_is_asked_of_it() -> None:
    """The stand-in has methods of TensorRT's alone, and the driver asks for nothing else."""
    trt = pytest.importorskip("tensorrt_rtx")
    for mine, real in ((Engine, trt.ICudaEngine), (Context, trt.IExecutionContext)):
        own = {name for name, value in vars(mine).items() if callable(value) and name[0] != "_"}
        assert own
        assert not [name for name in own if not hasattr(real, name)]
    for name in names(r"trt\.([A-Z]\w+(?:\.[A-Z_]+)?)", tensorrt_engine):
        found = trt
        for part in name.split("."):
            found = getattr(found, part)
    assert {"cuda_graph_strategy", "set_execution_context_allocation_strategy"} <= set(dir(trt.IRuntimeConfig))


def test_the_driver_has_what_is_asked_of_it() -> None:
    header = cuda_headers() / "cuda.h"
    if not header.is_file():
        pytest.skip("these CUDA headers have no cuda.h: install a CUDA toolkit")
    known = header.read_text("utf-8", "replace")
    called = names(r"\b(cu[A-Z]\w+)", cuda)
    assert len(called) > 10
    assert not [name for name in called if not re.search(rf"\b{name}\b", known)]
