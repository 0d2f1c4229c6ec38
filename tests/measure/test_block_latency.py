"""`BlockLatency`: each block is measured once, remembered on disk, exact on the grid and between its corners off it."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest

from cveff.errors import CveffError, EngineError
from cveff.measure import block_engines, calm, kernel_profile
from cveff.measure.block import Block
from cveff.measure.block_engines import measure_block
from cveff.measure.block_graph import UNARY, block_model
from cveff.measure.block_grid import grid_neighbours
from cveff.measure.block_latency import PROBE, BlockLatency
from cveff.measure.kernel_profile import Kernel, profile, profile_overhead, tiny_chain
from cveff.measure.threads import usable_cores
from cveff.progress import Silent

BLOCKS = {
    "conv": Block("conv", ((1, 24, 7, 7),), (40, 24, 3, 3), (1, 1), (1, 1), activation="relu"),
    "residual": Block("conv", ((1, 24, 7, 7), (1, 40, 7, 7)), (40, 24, 1, 1)),
    "strided": Block("conv", ((1, 8, 14, 14),), (16, 8, 3, 3), (2, 2), (1, 1), activation="hardswish"),
    "depthwise": Block("conv", ((1, 24, 7, 7),), (24, 1, 3, 3), (1, 1), (1, 1), 24, "relu6"),
    "grouped": Block("conv", ((1, 24, 7, 7),), (48, 8, 3, 3), (1, 1), (1, 1), 3),
    "dilated": Block("conv", ((1, 8, 9, 9),), (8, 8, 3, 3), dilation=(2, 2)),
    "linear": Block("linear", ((1, 10, 24),), (48, 24), activation="gelu"),
    "head": Block("linear", ((1, 24),), (10, 24)),
    "matmul": Block("matmul", ((1, 3, 10, 8), (1, 3, 8, 10))),
    "layer": Block("norm", ((1, 10, 24),), (24,), op="layer"),
    "batch": Block("norm", ((1, 24, 7, 7),), (24,), op="batch", activation="relu"),
    "group": Block("norm", ((1, 24, 7, 7),), (24,), op="group", groups=3),
    "add": Block("elementwise", ((1, 24, 7, 7), (1, 24, 1, 1)), op="add"),
    "scale": Block("elementwise", ((1, 10, 24),), (24,), op="mul"),
    "max": Block("pool", ((1, 24, 8, 8),), (2, 2), (2, 2), op="max"),
    "average": Block("pool", ((1, 24, 8, 8),), (3, 3), (2, 2), (1, 1), op="average"),
    "mean": Block("pool", ((1, 24, 7, 7),), op="mean"),
    "softmax": Block("softmax", ((1, 3, 10, 10),)),
    "transpose": Block("move", ((1, 3, 10, 8),), op="transpose:0,2,1,3"),
    "copy": Block("move", ((1, 24, 7, 7),), op="copy"),
    "resize": Block("move", ((1, 24, 7, 7),), op="resize"),
    "reorder": Block("reorder", ((1, 32, 28, 28),)),
    "input": Block("input", ((1, 32, 32, 3),)),
}


def volume(engine: str, block: Block, threads: int) -> float:
    """A measure for tests: linear in each width, and 0.5 for what is not at work on a network's values."""
    return 0.5 + float(np.prod(block.widths()))


def _check(block: Block) -> None:
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(block_model(block), strict_mode=True))


@pytest.mark.parametrize("name", BLOCKS)
def test_each_block_is_a_valid_model_that_engines_run(name: str) -> None:
    _check(BLOCKS[name])
    assert 0 < measure_block("onnxruntime", BLOCKS[name], 1) < 100


@pytest.mark.parametrize("activation", UNARY)
def test_each_function_is_computed_alone_and_behind_a_convolution(activation: str) -> None:
    for block in (
        Block("elementwise", ((1, 8, 9, 9),), op=activation),
        Block("conv", ((1, 8, 9, 9),), (8, 8, 1, 1), activation=activation),
    ):
        _check(block)


@pytest.mark.parametrize("name", ["conv", "linear", "layer", "softmax"])
def test_openvino_runs_them_too(name: str) -> None:
    pytest.importorskip("openvino")
    assert 0 <= measure_block("openvino", BLOCKS[name], 1) < 100
    assert measure_block("openvino", BLOCKS["reorder"], 1) == 0


def test_what_the_profile_takes_is_taken_off_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [Kernel("Conv", 0.050), Kernel("ReorderOutput", 0.030), Kernel("Relu", 0.004)]
    monkeypatch.setattr(block_engines, "profile", lambda *given: kernels)
    monkeypatch.setattr(block_engines, "profile_overhead", lambda engine, threads: 0.01 * threads)
    convolution = measure_block("onnxruntime", BLOCKS["conv"], 1)
    assert convolution == pytest.approx(0.040 + 0.0004), "no kernel is free"
    assert measure_block("onnxruntime", BLOCKS["conv"], 2) == pytest.approx(0.030 + 0.0004)
    assert measure_block("onnxruntime", BLOCKS["reorder"], 1) == pytest.approx(0.020 / 2)


@pytest.mark.parametrize(("profiled", "expected"), [([0.004], 0.003), ([0.0005], 0.0), ([], 0.0)])
def test_what_the_profile_takes_is_what_a_chain_of_kernels_does_not(
    monkeypatch: pytest.MonkeyPatch, profiled: list[float], expected: float
) -> None:
    """36 products take 32 µs more than 4: a microsecond each. A kernel too short for the engine's clock is none."""
    calls = {len(tiny_chain(4)): 0.010, len(tiny_chain(36)): 0.042}
    monkeypatch.setattr(
        kernel_profile, "profile", lambda *given: [Kernel("MatMul", item) for item in profiled]
    )
    monkeypatch.setattr(kernel_profile, "_call", lambda engine, model, *given: calls[len(model)])
    profile_overhead.cache_clear()
    assert profile_overhead("onnxruntime", 1) == pytest.approx(expected)
    profile_overhead.cache_clear()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_keep_the_products_of_a_chain_apart(engine: str) -> None:
    pytest.importorskip(engine)
    inputs = {"x": np.ones((1, 512), np.float32)}
    found = profile(engine, tiny_chain(3, 512), inputs, 1)
    assert len(found) == 3 and all(kernel.milliseconds > 0 for kernel in found)


def test_work_takes_time() -> None:
    small, large = (Block("conv", ((1, c, 28, 28),), (c, c, 3, 3), (1, 1), (1, 1)) for c in (16, 96))
    assert measure_block("onnxruntime", large, 1) > 5 * measure_block("onnxruntime", small, 1)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_with_other_widths_is_one_an_engine_could_run(name: str) -> None:
    block = BLOCKS[name]
    wider = block.resized(tuple(2 * width for width in block.widths()))
    assert wider.widths() == tuple(2 * width for width in block.widths())
    _check(wider)
    assert wider.resized(block.widths()) == block
    assert len({item.key for item in BLOCKS.values()}) == len(BLOCKS)


def test_a_block_is_measured_once_and_then_read_from_the_file(tmp_path: Path) -> None:
    asked = []

    def counted(engine: str, block: Block, threads: int) -> float:
        if block == PROBE:
            return 1.0
        asked.append((engine, block.key, threads))
        return float(len(asked))

    blocks = [BLOCKS["conv"], BLOCKS["linear"], BLOCKS["conv"]]
    table = BlockLatency("onnxruntime", 1, tmp_path, measure=counted)
    assert table.milliseconds(blocks).tolist() == [1, 2, 1]
    assert table.milliseconds(blocks).tolist() == [1, 2, 1]
    again = BlockLatency("onnxruntime", 1, tmp_path, measure=counted)
    assert again.milliseconds(blocks).tolist() == [1, 2, 1]
    assert len(asked) == 2
    assert (table.num_measured, again.num_measured) == (2, 0)
    other = BlockLatency("onnxruntime", 2, tmp_path, measure=counted)  # other threads, other times
    assert other.milliseconds(blocks[:1]).tolist() == [3]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"] * 2


def test_blocks_are_measured_again_while_the_machine_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calm, "EVERY", -1.0)  # look after every block
    slow = iter([1, 1, 3, 3, 1, 1])  # what other programs do to each look: at the start, and behind each time
    now = [1]

    def slowed(engine: str, block: Block, threads: int) -> float:
        if block == PROBE:
            now[0] = next(slow, 1)
        return now[0] * (5.0 if block == PROBE else volume(engine, block, threads))

    table = BlockLatency("onnxruntime", 1, tmp_path, measure=slowed)
    blocks = [BLOCKS["conv"], BLOCKS["linear"]]
    assert table.milliseconds(blocks).tolist() == [volume("", block, 1) for block in blocks]
    assert table.num_measured == 2
    assert next(slow, None) is None, "it looked until the machine was as fast as before"


def test_blocks_of_a_machine_that_never_rests_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calm, "EVERY", -1.0)
    looks = itertools.count()

    def busy(engine: str, block: Block, threads: int) -> float:
        return 1.0 + next(looks) if block == PROBE else volume(engine, block, threads)

    said: list[str] = []

    class Told(Silent):
        def message(self, text: str) -> None:
            said.append(text)

    table = BlockLatency("onnxruntime", 1, tmp_path, measure=busy)
    table.milliseconds([BLOCKS["conv"], BLOCKS["linear"]], progress=Told())
    assert len(said) == 1 and said[0].startswith("2 of 2 blocks were measured while other programs")
    assert str(table.path) in said[0], "what to delete to measure again"
    said.clear()
    quiet = BlockLatency("onnxruntime", 1, tmp_path / "quiet", measure=volume)
    quiet.milliseconds([BLOCKS["conv"], BLOCKS["linear"]], progress=Told())
    assert said == []


def test_a_block_that_takes_longer_than_a_wider_one_is_measured_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def disturbed(engine: str, block: Block, threads: int) -> float:
        asked.append(block.key)
        first = asked.count(block.key) == 1
        return volume(engine, block, threads) * (2 if first and block.widths() == (16, 24) else 1)

    narrow, wide = (BLOCKS["linear"].resized(widths) for widths in ((16, 24), (16, 32)))
    table = BlockLatency("onnxruntime", 1, tmp_path, measure=disturbed)
    assert table.milliseconds([narrow, wide]).tolist() == [volume("", block, 1) for block in (narrow, wide)]
    assert (asked.count(narrow.key), asked.count(wide.key)) == (2, 1)


def test_no_block_is_predicted_slower_than_a_wider_one(tmp_path: Path) -> None:
    def disturbed(engine: str, block: Block, threads: int) -> float:
        return volume(engine, block, threads) * (9 if block.widths() == (16, 24) else 1)

    narrow, wide, wider = (BLOCKS["linear"].resized((16, width)) for width in (24, 32, 40))
    table = BlockLatency("onnxruntime", 1, tmp_path, measure=disturbed)
    expected = table.milliseconds([wider, wide], interpolate=True)
    assert table.milliseconds([narrow], interpolate=True)[0] == expected[1] < expected[0]
    assert table.milliseconds([narrow])[0] == 9 * volume("", narrow, 1), (
        "as measured, where that is asked for"
    )


def test_two_processes_keep_each_others_blocks(tmp_path: Path) -> None:
    one, two = (BlockLatency("onnxruntime", 1, tmp_path, measure=volume) for _ in range(2))
    one.milliseconds([BLOCKS["conv"]])
    two.milliseconds([BLOCKS["linear"]])
    three = BlockLatency("onnxruntime", 1, tmp_path, measure=volume)
    three.milliseconds([BLOCKS["conv"], BLOCKS["linear"]])
    assert three.num_measured == 0


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path) -> None:
    def fails(engine: str, block: Block, threads: int) -> float:
        if block.kind == "linear":
            raise EngineError("no")
        return 1.0

    with pytest.raises(EngineError, match="no"):
        BlockLatency("onnxruntime", 1, tmp_path, measure=fails).milliseconds(
            [BLOCKS["conv"], BLOCKS["linear"]]
        )
    again = BlockLatency("onnxruntime", 1, tmp_path, measure=fails)
    assert again.milliseconds([BLOCKS["conv"]]).tolist() == [1]
    assert again.num_measured == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:40], "is not used"),
        (lambda text: text.replace('"schema": 2', '"schema": 99'), "its schema is not 2"),
        (lambda text: text.replace('"threads": 1', '"threads": 7'), "it was measured on"),
        (lambda text: text.replace("576.5", "-3"), "no time"),
        (lambda text: text.replace("576.5", "NaN"), "no time"),
        (lambda text: text.replace("576.5", '"fast"'), "no number"),
        (lambda text: json.dumps([text]), "schema"),
    ],
)
def test_a_damaged_file_is_measured_again_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage, message: str
) -> None:
    head = BLOCKS["linear"].resized((24, 24))  # 24 · 24 + 0.5
    table = BlockLatency("onnxruntime", 1, tmp_path, measure=volume)
    assert table.milliseconds([head]).tolist() == [576.5]
    table.path.write_text(damage(table.path.read_text(encoding="utf-8")), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        again = BlockLatency("onnxruntime", 1, tmp_path, measure=volume)
        assert again.milliseconds([head]).tolist() == [576.5]
    assert again.num_measured == 1
    assert message in caplog.text
    assert BlockLatency("onnxruntime", 1, tmp_path, measure=volume).milliseconds([head]).tolist() == [576.5]


def test_the_grid() -> None:
    points = [width for width in range(1, 2049) if grid_neighbours(width)[0] == width]
    assert points[:16] == [*range(1, 9), 16, 24, 32, 40, 48, 56, 64, 72]
    above = np.array([point for point in points if point >= 64])
    assert (above % 8 == 0).all()
    assert (above[1:] / above[:-1] < 1.13 + 8 / above[:-1]).all()
    for width in range(9, 2049):
        low, high = grid_neighbours(width)
        assert low <= width <= high
        assert grid_neighbours(low) == (low, low)
        assert grid_neighbours(high) == (high, high)


@pytest.mark.parametrize("name", ["conv", "residual", "linear", "depthwise", "grouped", "add", "mean"])
def test_interpolation_is_exact_on_the_grid_and_linear_between(tmp_path: Path, name: str) -> None:
    block = BLOCKS[name]
    table = BlockLatency("onnxruntime", 1, tmp_path, measure=volume)
    count = len(block.widths())
    for widths in [(64, 72), (16, 40)]:
        on_grid = block.resized(widths[:count])
        exact = volume("", on_grid, 1)
        assert table.milliseconds([on_grid], interpolate=True)[0] == exact
    measured = table.num_measured
    between = block.resized((67, 250)[:count])
    # The stand-in is linear in each width, so that bilinear interpolation is exact.
    expected = volume("", between, 1)
    assert table.milliseconds([between], interpolate=True)[0] == pytest.approx(expected)
    assert table.num_measured <= measured + 2**count
    narrow = [block.resized((width, 80)[:count]) for width in range(65, 72)]
    times = table.milliseconds(narrow, interpolate=True)
    assert (np.diff(times) > 0).all()


def test_steps_stay_within_their_corners(tmp_path: Path) -> None:
    def steps(engine: str, block: Block, threads: int) -> float:
        return float(-(-block.widths()[0] // 48))

    table = BlockLatency("onnxruntime", 1, tmp_path, measure=steps)
    for width in range(9, 400):
        block = BLOCKS["depthwise"].resized((width,))
        low, high = (steps("", BLOCKS["depthwise"].resized((side,)), 1) for side in grid_neighbours(width))
        assert low <= table.milliseconds([block], interpolate=True)[0] <= high


def test_bad_requests_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="engine 'abacus' is unknown; known: onnxruntime"):
        BlockLatency("abacus", 1, tmp_path)
    with pytest.raises(CveffError, match="threads is -1"):
        BlockLatency("onnxruntime", -1, tmp_path)
    assert BlockLatency("onnxruntime", 0, tmp_path).threads == usable_cores()
    table = BlockLatency("onnxruntime", 1, tmp_path)
    with pytest.raises(CveffError, match="block kind 'lstm' is unknown"):
        table.milliseconds([Block("lstm", ((1, 2),))])
    with pytest.raises(CveffError, match="activation 'mish' is unknown"):
        table.milliseconds([Block("elementwise", ((1, 2),), op="mish")])
    wrong = Block("conv", ((1, 24, 7, 7),), (40, 16, 3, 3))
    with pytest.raises(EngineError, match="cannot run the block 'conv 1x24x7x7 w40x16x3x3'"):
        table.milliseconds([wrong])
