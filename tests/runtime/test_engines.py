"""Both engines: same numbers, same checks, same errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cveff.errors import EngineError, InputSizeError
from cveff.runtime import engines, machine, openvino_session
from cveff.runtime.engines import available_engines, open_file
from cveff.runtime.onnx_providers import PROVIDERS
from cveff.runtime.session import Session

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 32, 40, 3), dtype=np.uint8)


@pytest.fixture(params=["onnxruntime .onnx", "openvino .onnx", "openvino .xml"])
def session(request: pytest.FixtureRequest, tiny_onnx: Path, tiny_xml: Path) -> Session:
    engine, suffix = request.param.split()
    return open_file(engine, tiny_onnx if suffix == ".onnx" else tiny_xml, threads=1)


def test_what_a_session_tells(session: Session) -> None:
    assert session.engine in available_engines()
    assert (session.threads, session.size, session.channels) == (1, (32, 40), 3)
    assert (session.batch, session.num_classes) == (None, 5)


def test_logits_equal_the_definition(session: Session, tiny_onnx: Path) -> None:
    import onnx.reference

    expected = onnx.reference.ReferenceEvaluator(str(tiny_onnx)).run(None, {"images": IMAGES})[0]
    logits = session(IMAGES)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_an_image_gets_the_same_logits_alone_and_in_a_batch(session: Session) -> None:
    together = session(IMAGES)
    alone = np.concatenate([session(image[None]) for image in IMAGES])
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-6)


def test_results_are_not_overwritten_by_the_next_call(session: Session) -> None:
    first = session(IMAGES[:2])
    kept = first.copy()
    session(IMAGES[2:4])
    np.testing.assert_array_equal(first, kept)


def test_an_empty_batch_has_no_rows(session: Session) -> None:
    logits = session(IMAGES[:0])
    assert (logits.shape, logits.dtype) == ((0, 5), np.float32)


def test_arrays_that_are_not_contiguous(session: Session) -> None:
    turned = IMAGES[:, ::-1, ::-1]
    np.testing.assert_array_equal(session(turned), session(np.ascontiguousarray(turned)))
    assert not IMAGES.flags.writeable or session(IMAGES).shape == (5, 5)
    frozen = IMAGES.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(session(frozen), session(IMAGES))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (IMAGES.astype(np.float32), "is float32, the model takes uint8"),
        (IMAGES.astype(np.float32) / 255, "scaling and normalisation happen inside"),
        (IMAGES.astype(np.int64), "is int64"),
        (IMAGES[0], r"images\[None\]"),
        (IMAGES.transpose(0, 3, 1, 2), r"transpose\(0, 2, 3, 1\)"),
        (IMAGES[:, :31], r"\(5, 31, 40, 3\), the model takes \(N, 32, 40, 3\).*preprocess"),
        (IMAGES[..., :1], "the model takes"),
        (IMAGES[None], "the model takes"),
        (IMAGES.tolist(), "a list was given"),
        (None, "a NoneType was given"),
    ],
)
def test_wrong_batches_teach(session: Session, images: Any, words: str) -> None:
    with pytest.raises(InputSizeError, match=words):
        session(images)


def test_a_closed_session_says_so(session: Session) -> None:
    session.close()
    session.close()
    with pytest.raises(EngineError, match="was closed"):
        session(IMAGES)


def test_calls_from_several_threads_do_not_mix(session: Session) -> None:
    expected = [session(image[None]) for image in IMAGES]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(30):
            if not np.array_equal(session(IMAGES[index][None]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(IMAGES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_fixed_batch_is_respected(engine: str, tmp_path: Path, onnx_maker: Callable[..., Path]) -> None:
    with open_file(engine, onnx_maker(tmp_path / "two.onnx", batch=2), threads=1) as session:
        assert session.batch == 2
        assert session(IMAGES[:2]).shape == (2, 5)
        assert session(IMAGES[:0]).shape == (0, 5)
        with pytest.raises(InputSizeError, match="batches of exactly 2"):
            session(IMAGES[:3])


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_other_graphs_are_refused(engine: str, tmp_path: Path, onnx_maker: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match="one uint8 input"):
        open_file(engine, onnx_maker(tmp_path / "float.onnx", dtype="INT32"), threads=1)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_damaged_files(engine: str, tmp_path: Path, tiny_onnx: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"not a model at all" * 10)
    (tmp_path / "cut.onnx").write_bytes(tiny_onnx.read_bytes()[:700])
    (tmp_path / "empty.onnx").touch()
    for name in ("garbage.onnx", "cut.onnx", "empty.onnx"):
        with pytest.raises(EngineError, match=name):
            open_file(engine, tmp_path / name, threads=1)


def test_files_and_settings_that_do_not_fit(tmp_path: Path, tiny_onnx: Path, tiny_xml: Path) -> None:
    with pytest.raises(EngineError, match=r"none\.onnx does not exist"):
        open_file("onnxruntime", tmp_path / "none.onnx", threads=1)
    with pytest.raises(EngineError, match=r"opens \.onnx files, not model\.xml"):
        open_file("onnxruntime", tiny_xml, threads=1)
    with pytest.raises(EngineError, match="'tensorflow' is unknown; known: onnxruntime, openvino"):
        open_file("tensorflow", tiny_onnx, threads=1)
    for threads in (-1, 1.5, "2"):
        with pytest.raises(EngineError, match="threads is"):
            open_file("onnxruntime", tiny_onnx, threads=threads)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="no option 'speed'; known: graph_optimizations"):
        open_file("onnxruntime", tiny_onnx, threads=1, options={"speed": 9})
    with pytest.raises(EngineError, match="inference_precision of openvino is 'int4'"):
        open_file("openvino", tiny_onnx, threads=1, options={"inference_precision": "int4"})


def test_zero_threads_means_every_usable_core(tiny_onnx: Path) -> None:
    with open_file("onnxruntime", tiny_onnx, threads=0) as session:
        assert session.threads == machine.usable_cores()


def test_graph_optimisations_can_be_turned_off(tiny_onnx: Path) -> None:
    with open_file("onnxruntime", tiny_onnx, threads=1, options={"graph_optimizations": False}) as plain:
        with open_file("onnxruntime", tiny_onnx, threads=1) as fast:
            np.testing.assert_allclose(plain(IMAGES), fast(IMAGES), rtol=1e-5, atol=1e-6)


def test_openvino_is_told_every_setting(tiny_xml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone it would pick bfloat16 where the processor has it, and a thread a core."""
    for precision, name in (("f32", "f32"), ("bf16", "bf16")):
        options = {} if precision == "f32" else {"inference_precision": precision}
        session = openvino_session.OpenVinoSession(tiny_xml, 1, options)
        session(IMAGES[:1])
        compiled = session._requests[1][0].get_compiled_model()
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert compiled.get_property("NUM_STREAMS") == 1
        assert str(compiled.get_property("PERFORMANCE_HINT")).endswith("LATENCY")
        if name == "f32" or "avx512_bf16" in machine.isa():
            assert name in str(compiled.get_property("INFERENCE_PRECISION_HINT")).replace(
                "float32", "f32"
            ).replace("bfloat16", "bf16")


def test_openvino_compiles_for_sizes_that_come_again_and_answers_the_same(tiny_xml: Path) -> None:
    images = RNG.integers(0, 256, (12, 32, 40, 3), dtype=np.uint8)
    with openvino_session.OpenVinoSession(tiny_xml, 1) as session:
        expected = np.concatenate([session(image[None]) for image in images])
    with openvino_session.OpenVinoSession(tiny_xml, 1) as session:
        for size in [4, 11, 3, 3, 4, 5, 5, 6, 6, 7, 7, 12, 2, 2]:
            np.testing.assert_array_equal(session(images[:size]), expected[:size])
        assert list(session._requests) == [4, 1, 3, 5]  # 6, 7 and 2 found no room
        assert session._parts(12) == [5, 5, 1, 1]


def test_openvino_weights_cut_short(tmp_path: Path, tiny_xml: Path) -> None:
    (tmp_path / "m.xml").write_bytes(tiny_xml.read_bytes())
    weights = tiny_xml.with_suffix(".bin").read_bytes()
    for content in (weights[:100], b""):
        (tmp_path / "m.bin").write_bytes(content)
        with pytest.raises(EngineError, match=r"m\.xml"):
            open_file("openvino", tmp_path / "m.xml", threads=1)
    (tmp_path / "m.bin").unlink()
    with pytest.raises(EngineError, match=r"m\.xml"):
        open_file("openvino", tmp_path / "m.xml", threads=1)


def test_opening_writes_nothing_beside_the_file(tiny_xml: Path) -> None:
    before = sorted(tiny_xml.parent.iterdir())
    with open_file("openvino", tiny_xml, threads=1) as session:
        session(IMAGES)
    assert sorted(tiny_xml.parent.iterdir()) == before


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_missing_engine_says_how_to_install_it(
    engine: str, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, engine, None)
    with pytest.raises(EngineError, match=f"not installed.*pip install {engine}"):
        open_file(engine, tiny_onnx, threads=1)


def test_available_engines_are_those_that_open(tiny_onnx: Path) -> None:
    assert set(available_engines()) <= set(engines.ENGINES)
    for name in available_engines():
        if engines.opens(name, tiny_onnx):
            open_file(name, tiny_onnx, threads=1).close()


def test_a_provider_is_an_engine_only_where_onnx_runtime_was_built_with_it() -> None:
    import onnxruntime

    for name, provider in PROVIDERS.items():
        assert (name in available_engines()) == (provider.name in onnxruntime.get_available_providers())


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_openvino_streams_divide_a_batch_and_answer_the_same(tiny_xml: Path, streams: int) -> None:
    images = RNG.integers(0, 256, (12, 32, 40, 3), dtype=np.uint8)
    with openvino_session.OpenVinoSession(tiny_xml, 2) as session:
        expected = np.concatenate([session(image[None]) for image in images])
    options = {"performance_hint": "throughput", "streams": streams}
    with openvino_session.OpenVinoSession(tiny_xml, 2, options) as session:
        for size in [12, 7, 7, 1, 2, 5, 11]:
            np.testing.assert_array_equal(session(images[:size]), expected[:size])
        used = min(streams, 2)  # there are two threads
        # OpenVINO itself takes no more streams than it finds cores, which are fewer beside other tests.
        assert session._settings["NUM_STREAMS"] == str(used)
        assert len(session._requests[12 // used]) == used


def test_openvino_streams_want_the_throughput_hint_and_are_one_a_thread(
    tiny_xml: Path, tmp_path: Path, onnx_maker: Callable[..., Path]
) -> None:
    with pytest.raises(EngineError, match='streams of openvino goes with performance_hint "throughput"'):
        open_file("openvino", tiny_xml, threads=1, options={"streams": 2})
    with pytest.raises(EngineError, match="streams of openvino is 0; give an integer from 1 to 1024"):
        open_file("openvino", tiny_xml, threads=1, options={"performance_hint": "throughput", "streams": 0})
    options = {"performance_hint": "throughput"}
    with open_file(
        "openvino", onnx_maker(tmp_path / "two.onnx", batch=2), threads=2, options=options
    ) as fixed:
        assert fixed(IMAGES[:2]).shape == (2, 5)
    with openvino_session.OpenVinoSession(tiny_xml, 2, options) as session:
        session(IMAGES[:4])
        assert len(session._requests[2]) == 2
