"""The script that measures a GPU: it runs on a CPU, without optional packages, and its arithmetic is right."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
# What a bare GPU machine lacks of cveff's dependencies.
ABSENT = "onnxslim onnxscript onnx_ir rich typer pydantic sklearn scipy matplotlib jsonschema openvino nncf tensorrt"
BARE = """
import runpy, sys
from pathlib import Path
sys.modules.update(dict.fromkeys({absent!r}.split()))
sys.path.insert(0, str(Path("tools").resolve()))
sys.argv = ["gpu_check.py", *{arguments!r}]
runpy.run_path("tools/gpu_check.py", run_name="__main__")
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("gpu_check")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = BARE.format(absent=ABSENT, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_runs_on_a_cpu_with_torch_and_timm_alone_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = ("--device", "cpu", "--quick", "--ways", "eager", "--out", str(out))
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "eager fp32" in done.stdout
    found = json.loads(out.read_text())
    assert found["command"].startswith("python tools/gpu_check.py") and str(tmp_path) not in found["command"]
    assert "torch" in found["versions"] and "cpu" in found["machine"]
    assert set(found["matrix_rate"]) == {"fp32", "bf16", "fp16"}
    kernels = found["kernels"]
    assert len(kernels["cells"]) == 9 and all(cell["ms"] > 0 for cell in kernels["cells"].values())
    cell = kernels["cells"]["gather_mlp 64x128, batch 1, 0.5 kept"]
    assert cell["bytes"] == 3 * 64 * 64 * 2
    assert cell["of_memory"] == pytest.approx(
        cell["bytes"] / cell["ms"] / 1e6 / kernels["copy_gb_per_second"]
    )
    cells = found["networks"]["small_resnet_s/8"]["batches"]
    assert list(cells) == ["1", "4"]
    assert len(cells["4"]) == 4  # formats
    for name, cell in cells["4"].items():
        assert cell["images_per_second"] == pytest.approx(4000 / cell["ms"])
        assert cell["rounds"] >= 7
        # Logits that hardly depend on the image would agree in any arithmetic.
        assert cell["relative_difference"] < (1e-5 if "fp32" in name else 0.1)
    assert cells["4"]["eager bf16 channels_last"]["relative_difference"] > 1e-4
    found["networks"]["small_resnet_s/8"]["batches"] = {}
    out.write_text(json.dumps(found))
    assert run(*arguments).returncode == 0
    assert json.loads(out.read_text())["networks"]["small_resnet_s/8"]["batches"] == {}


def test_a_share_of_the_matrix_rate_is_products_over_products(check: ModuleType) -> None:
    call = torch.nn.Flatten()
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    options = check._options(["--device", "cpu", "--quick", "--ways", "eager"])
    reference = lambda batch: torch.ones(len(batch), 3)  # noqa: E731
    found = check.one_batch({"eager fp32": call}, reference, images[..., :1], 10**6, {"fp32": 2.0}, options)
    assert "error" in found["eager fp32"]  # other logits than the reference's shape are no figure
    ones = {"eager fp32": reference}
    cell = check.one_batch(ones, reference, images, 10**6, {"fp32": 2.0}, options)["eager fp32"]
    assert cell["relative_difference"] == 0
    assert cell["of_matrix_rate"] == pytest.approx(1e6 * cell["images_per_second"] / 2e12)
    assert check._rate("fp32 channels_last", {"fp32": 1.0, "tf32": 8.0}) == "tf32"
    assert check._rate("bf16 channels_last", {"bf16": 9.0, "tf32": 8.0}) == "bf16"


def test_a_way_that_fails_is_recorded_and_stops_no_other(check: ModuleType) -> None:
    def full(_: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    options = check._options(["--device", "cpu", "--quick"])
    ways = {"eager fp32": full, "torch.compile fp32": lambda batch: torch.ones(len(batch), 3)}
    found = check.one_batch(ways, ways["torch.compile fp32"], images, 1, {"fp32": 1.0}, options)
    assert "out of memory" in found["eager fp32"]["error"]
    assert "ms" in found["torch.compile fp32"]


def test_the_bar_compares_batch_64(check: ModuleType) -> None:
    def cells(eager: float, ours: float) -> dict[str, object]:
        ways = {"eager fp32": {"ms": eager}, "AOTInductor + CUDA graph bf16 channels_last": {"ms": ours}}
        return {"batches": {"64": ways}}

    found = check.bar({"resnet50": cells(10, 4), "vit_small_patch16_224": cells(10, 6)})
    assert found["resnet50"] == {"ratio": 2.5, "at_least": 2.0, "passes": True}
    assert not found["vit_small_patch16_224"]["passes"]
    assert check.bar({"resnet50": {"batches": {}}}) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batches", "0"], "give positive integers"),
        (["--ways", "magic"], "invalid choice"),
        (["--networks", "resnet5000", "--device", "cpu"], "'resnet5000' is unknown; known: resnet50"),
    ],
)
def test_wrong_options(
    check: ModuleType, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        check.main(arguments)
    assert words in capsys.readouterr().err + str(stop.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_says_what_can_be_run(check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--device", "cuda"])
    assert "--device cpu runs everything but CUDA graphs" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_ways_answer_as_eager_does(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    ways = ("--ways", "compile", "aot", "--formats", "fp32")
    done = run("--device", "cpu", "--quick", *ways, "--out", str(out))
    assert done.returncode == 0, done.stderr
    network = json.loads(out.read_text())["networks"]["small_resnet_s/8"]
    assert network["errors"] == {}
    for cells in network["batches"].values():
        assert list(cells) == ["torch.compile fp32", "AOTInductor fp32"]
        assert all(cell["relative_difference"] < 1e-4 and "ms" in cell for cell in cells.values())
