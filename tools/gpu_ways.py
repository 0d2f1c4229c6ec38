"""The ways a network can run on a GPU, each as a call on uint8 images that lie there; used by `gpu_check.py`."""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cveff

FORMATS: Mapping[str, tuple[torch.dtype, torch.memory_format]] = {
    "fp32": (torch.float32, torch.contiguous_format),
    "fp32 channels_last": (torch.float32, torch.channels_last),
    "bf16 channels_last": (torch.bfloat16, torch.channels_last),
    "fp16 channels_last": (torch.float16, torch.channels_last),
}
COMPILED = ("fp32", "bf16 channels_last", "fp16 channels_last")
"""Formats that are compiled: Inductor chooses its own layout for float32."""
EAGER, COMPILE, AOT, TENSORRT = "eager", "torch.compile", "AOTInductor", "TensorRT"
GRAPH = " + CUDA graph"
WAYS = {"eager": EAGER, "compile": COMPILE, "aot": AOT, "graph": GRAPH, "tensorrt": TENSORRT}
Call = Callable[[torch.Tensor], torch.Tensor]


class Deployed(nn.Module):
    """uint8 (N, H, W, C) -> float32 logits (N, classes): normalisation in float32, the network in `dtype`."""

    offset: torch.Tensor
    scale: torch.Tensor

    def __init__(self, model: cveff.Model, dtype: torch.dtype, layout: torch.memory_format) -> None:
        super().__init__()
        spec = model.spec.input
        self.network = copy.deepcopy(model.module).to(dtype).to(memory_format=layout)
        self.dtype, self.layout = dtype, layout
        self.register_buffer("offset", 255 * torch.tensor(spec.mean))
        self.register_buffer("scale", 1 / (255 * torch.tensor(spec.std)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (N, H, W, C) uint8."""
        pixels = ((images.float() - self.offset) * self.scale).permute(0, 3, 1, 2)
        return self.network(pixels.to(self.dtype).contiguous(memory_format=self.layout)).float()


class Graphed:
    """A call captured as a CUDA graph for one batch size."""

    def __init__(self, call: Call, images: torch.Tensor) -> None:
        self._images = images.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(self._images)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = call(self._images)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits; the next call writes into them."""
        self._images.copy_(images)
        self._graph.replay()
        return self._logits


def built(way: str, module: Deployed, sample: torch.Tensor, folder: Path, most: int) -> Call:
    """What runs the module in one way, at any batch size up to `most`."""
    if way == EAGER:
        return module
    if way == COMPILE:
        compiled = torch.compile(module, dynamic=True)
        compiled(sample)
        return compiled
    dynamic = ({0: torch.export.Dim("batch", min=1, max=max(2, most))},)
    if way == TENSORRT:
        return tensorrt_call(module, sample, dynamic, folder, most)
    inductor: Any = importlib.import_module("torch._inductor")
    program = torch.export.export(module, (sample,), dynamic_shapes=dynamic, strict=False)
    path = inductor.aoti_compile_and_package(
        program,
        package_path=str(Path(tempfile.mkdtemp(dir=folder)) / "model.pt2"),
        inductor_configs={"freezing": True},
    )
    # Its own synchronisation would be captured in a CUDA graph.
    return inductor.aoti_load_package(path, run_single_threaded=True)


def tensorrt_call(module: nn.Module, sample: torch.Tensor, dynamic: Any, folder: Path, most: int) -> Call:
    """A plan built from the exported graph, strongly typed, on PyTorch's memory and stream."""
    trt: Any = importlib.import_module("tensorrt")
    path = Path(tempfile.mkdtemp(dir=folder)) / "model.onnx"
    program = torch.onnx.export(
        module,
        (sample,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=dynamic,
    )
    assert program is not None
    program.save(str(path))
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError(parser.get_error(0).desc())
    profile = builder.create_optimization_profile()
    shape = tuple(sample.shape[1:])
    profile.set_shape("images", (1, *shape), (min(most, 64), *shape), (most, *shape))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT built no plan")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    num_classes = module(sample).shape[1]

    def call(images: torch.Tensor) -> torch.Tensor:
        logits = torch.empty((len(images), num_classes), device=images.device)
        context.set_input_shape("images", tuple(images.shape))
        context.set_tensor_address("images", images.data_ptr())
        context.set_tensor_address("logits", logits.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return logits

    return call
