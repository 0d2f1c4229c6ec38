"""Every `config.pbtxt` is a model configuration by Triton's own definition, and says what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cveff.export.bundle import write_bundle
from cveff.export.triton import SERVED, config, model_name, write_triton
from cveff.runtime.manifest import ModelFile
from cveff.target import Target, TensorRT, load_target

text_format = pytest.importorskip("google.protobuf.text_format")
model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")

Maker = Callable[..., dict[str, Any]]
GPU = load_target("server-gpu")


def parsed(text: str) -> Any:
    """Strictly: an unknown field or value raises."""
    return text_format.Parse(text, model_config.ModelConfig())


def made(manifest: dict[str, Any], engine: str, file: str = "model.onnx", **settings: Any) -> Any:
    return parsed(config(manifest, "net", ModelFile(engine, file, 2, **settings)))


@pytest.mark.parametrize("engine", SERVED)
@pytest.mark.parametrize("options", [{}, {"graph_optimizations": False}, {"inference_precision": "bf16"}])
def test_every_engine_has_a_valid_configuration(
    manifest_maker: Maker, engine: str, options: dict[str, Any]
) -> None:
    found = made(manifest_maker(target=GPU.to_json()), engine, options=options)
    (image,), (logits,) = found.input, found.output
    batch = [-1] if engine == "openvino" else []
    assert (found.name, image.name, logits.name) == ("net", "images", "logits")
    assert [*image.dims] == [*batch, 32, 40, 3] and [*logits.dims] == [*batch, 5]
    assert (image.data_type, logits.data_type) == (model_config.TYPE_UINT8, model_config.TYPE_FP32)
    (group,) = found.instance_group
    is_on_gpu = engine not in ("onnxruntime", "openvino")
    kinds = model_config.ModelInstanceGroup
    assert group.kind == (kinds.KIND_GPU if is_on_gpu else kinds.KIND_CPU)
    assert bool(found.model_warmup) == is_on_gpu


def test_a_plan_is_batched_as_it_was_built(manifest_maker: Maker) -> None:
    found = made(manifest_maker(target=GPU.to_json()), "tensorrt", "model.plan")
    assert (found.platform, found.backend, found.max_batch_size) == ("tensorrt_plan", "tensorrt", 128)
    assert [*found.dynamic_batching.preferred_batch_size] == [32, 128]
    assert [call.batch_size for call in found.model_warmup] == [1, 32, 128]
    (images,) = {call.inputs["images"].SerializeToString() for call in found.model_warmup}
    assert [*found.model_warmup[0].inputs["images"].dims] == [32, 40, 3] and images


def test_a_plan_without_a_record_of_its_batches_takes_single_images(manifest_maker: Maker) -> None:
    found = made(manifest_maker(), "tensorrt", "model.plan")
    assert found.max_batch_size == 1 and not found.dynamic_batching.preferred_batch_size


def test_a_version_compatible_plan_says_how_to_start_the_server(manifest_maker: Maker) -> None:
    target = replace(GPU, tensorrt=replace(GPU.tensorrt, version_compatible=True))
    text = config(manifest_maker(target=target.to_json()), "net", ModelFile("tensorrt", "model.plan", 1))
    assert "--backend-config=tensorrt,version-compatible=true" in text and parsed(text)


def test_onnx_runtime_hands_over_to_tensorrt(manifest_maker: Maker) -> None:
    target = replace(GPU, tensorrt=replace(GPU.tensorrt, workspace_mb=2))
    found = made(manifest_maker(target=target.to_json()), "onnxruntime-tensorrt")
    (accelerator,) = found.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt" and dict(accelerator.parameters) == {
        "max_workspace_size_bytes": "2097152"
    }
    plain = made(manifest_maker(target=GPU.to_json()), "onnxruntime-cuda")
    assert not plain.optimization.execution_accelerators.gpu_execution_accelerator


def test_threads_and_graph_level_are_those_measured(manifest_maker: Maker) -> None:
    found = made(manifest_maker(), "onnxruntime", options={"graph_optimizations": False})
    assert found.parameters["intra_op_thread_count"].string_value == "2"
    assert found.optimization.graph.level == 2


def test_what_triton_cannot_run_has_no_repository(tmp_path: Path, manifest_maker: Maker) -> None:
    def written(engine: str, target: Target) -> bool:
        chosen = {"name": engine, "file": "model.bin", "threads": 1, "options": {}}
        write_triton(tmp_path / "triton", manifest_maker(engine=chosen, target=target.to_json()), {})
        return (tmp_path / "triton").exists()

    assert not written("aot-inductor", GPU)
    assert not written("onnxruntime-qnn", GPU)
    assert not written("tensorrt", replace(GPU, tensorrt=replace(GPU.tensorrt, strip_weights=True)))


def test_a_plan_gets_the_name_that_its_backend_looks_for(tmp_path: Path, manifest_maker: Maker) -> None:
    plan = tmp_path / "a"
    plan.write_bytes(b"plan")
    chosen = {"name": "tensorrt", "file": "model.fp16.plan", "threads": 1, "options": {}}
    write_triton(
        tmp_path / "triton", manifest_maker(engine=chosen, target=GPU.to_json()), {"model.fp16.plan": plan}
    )
    assert (tmp_path / "triton/tiny_net/1/model.plan").read_bytes() == b"plan"


def test_a_bundles_configurations_are_valid(
    tmp_path: Path, tiny_onnx: Path, tiny_bundle: Path, manifest_maker: Maker
) -> None:
    target = Target(
        "jetson", "", (("tensorrt", "fp16"), ("onnxruntime", "fp32")), tensorrt=TensorRT(version=10)
    )
    prepared = {"name": "tensorrt", "precision": "fp32", "file": "model.onnx", "threads": 1, "options": {}}
    out = write_bundle(
        tmp_path / "b",
        manifest=manifest_maker(target=target.to_json(), alternatives=[prepared]),
        files={"model.onnx": tiny_onnx},
        report_html="",
    )
    for bundle in (out, tiny_bundle):
        (path,) = bundle.rglob("config.pbtxt")
        assert parsed(path.read_text(encoding="utf-8")).name == path.parent.name
    commands = (out / "tensorrt" / "commands.sh").read_text(encoding="utf-8")
    assert "--onnx=model.onnx --stronglyTyped" in " ".join(commands.replace("\\\n", " ").split())
    assert not (tiny_bundle / "tensorrt").exists()


def test_triton_serves_the_chosen_file_with_the_measured_settings(
    tiny_bundle: Path, tmp_path: Path, tiny_xml: Path, manifest_maker: Maker
) -> None:
    served = (tiny_bundle / "triton" / "tiny_net" / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in served
    assert "dynamic_batching" in served
    assert 'name: "images" data_type: TYPE_UINT8 dims: [32, 40, 3]' in served
    assert 'key: "intra_op_thread_count" value: { string_value: "1" }' in served
    assert (tiny_bundle / "triton" / "tiny_net" / "labels.txt").read_text().split() == [
        *("cat", "dog", "bird", "fish", "tree")
    ]
    engine = {"name": "openvino", "file": "net.xml", "threads": 2, "options": {"inference_precision": "bf16"}}
    bundle = write_bundle(
        tmp_path / "b",
        manifest=manifest_maker(engine=engine),
        files={"net.xml": tiny_xml, "net.bin": tiny_xml.with_suffix(".bin")},
        report_html="",
    )
    folder = bundle / "triton" / "tiny_net"
    assert sorted(path.name for path in (folder / "1").iterdir()) == ["model.bin", "model.xml"]
    text = (folder / "config.pbtxt").read_text()
    assert 'backend: "openvino"' in text
    assert "max_batch_size: 0" in text
    assert "dims: [-1, 32, 40, 3]" in text
    assert 'key: "INFERENCE_NUM_THREADS" value: { string_value: "2" }' in text
    assert 'key: "HINT_BF16" value: { string_value: "YES" }' in text
    assert "default_model_filename" not in text


def test_triton_is_told_when_openvino_reads_onnx(
    tmp_path: Path, tiny_onnx: Path, manifest_maker: Maker
) -> None:
    engine = {"name": "openvino", "file": "m.onnx", "threads": 0, "options": {}}
    bundle = write_bundle(
        tmp_path / "b", manifest=manifest_maker(engine=engine), files={"m.onnx": tiny_onnx}, report_html=""
    )
    text = (bundle / "triton/tiny_net/config.pbtxt").read_text()
    assert 'default_model_filename: "model.onnx"' in text
    assert "INFERENCE_NUM_THREADS" not in text
    assert sorted(path.name for path in (bundle / "triton/tiny_net/1").iterdir()) == ["model.onnx"]


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        ("onnxruntime", {}, ["KIND_CPU"]),
        ("onnxruntime-cuda", {}, ['backend: "onnxruntime"', "KIND_GPU"]),
        ("onnxruntime-tensorrt", {}, ["KIND_GPU", 'gpu_execution_accelerator : [ { name: "tensorrt" } ]']),
        ("openvino", {}, ['"LATENCY"', 'key: "NUM_STREAMS" value: { string_value: "1" }']),
        (
            "openvino",
            {"performance_hint": "throughput", "streams": 4},
            ['"THROUGHPUT"', 'key: "NUM_STREAMS" value: { string_value: "4" }'],
        ),
    ],
)
def test_triton_is_told_what_the_engine_was(
    engine: str, options: dict[str, Any], words: list[str], manifest_maker: Maker
) -> None:
    text = config(manifest_maker(), "net", ModelFile(engine, "model.onnx", 2, options))
    assert all(word in text for word in words)
    assert ("KIND_GPU" in text) == (engine in ("onnxruntime-cuda", "onnxruntime-tensorrt"))


def test_triton_runs_an_unoptimised_file_unoptimised(
    tmp_path: Path, tiny_onnx: Path, manifest_maker: Maker
) -> None:
    engine = {
        "name": "onnxruntime",
        "file": "m.onnx",
        "threads": 2,
        "options": {"graph_optimizations": False},
    }
    bundle = write_bundle(
        tmp_path / "b", manifest=manifest_maker(engine=engine), files={"m.onnx": tiny_onnx}, report_html=""
    )
    assert "optimization { graph { level: 2 } }" in (bundle / "triton/tiny_net/config.pbtxt").read_text()
    assert sorted(path.name for path in (bundle / "triton/tiny_net/1").iterdir()) == ["model.onnx"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("hf-hub:timm/x y", "hf-hub_timm_x_y"),
        ("../..", "model"),
        ("猫", "model"),
    ],
)
def test_triton_names_are_safe(name: str, expected: str) -> None:
    assert model_name({"model": {"name": name}}) == expected
