"""PyTorch modules as predictors, thread pinning, sizes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from cveff.errors import CveffError, InputSizeError
from cveff.measure import module_bytes, module_predictor, pinned_threads, size_bytes, usable_cores
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(6, 5), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)


class Identity(nn.Module):
    """Returns its input as (N, C * H * W), and notes what it ran with."""

    threads = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Identity.threads = torch.get_num_threads()
        return x.flatten(1)


def test_images_are_scaled_and_normalised() -> None:
    logits = module_predictor(Identity(), SPEC, threads=1)(IMAGES)
    expected = (IMAGES / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)
    np.testing.assert_allclose(logits, expected.transpose(0, 3, 1, 2).reshape(3, -1), rtol=1e-5, atol=1e-6)
    assert logits.dtype == np.float32


def test_the_batch_does_not_matter() -> None:
    predictor = module_predictor(Identity(), SPEC, threads=1)
    np.testing.assert_array_equal(
        predictor(IMAGES), np.concatenate([predictor(image[None]) for image in IMAGES])
    )


def test_threads_are_used_inside_and_put_back() -> None:
    before = torch.get_num_threads()
    predictor = module_predictor(Identity(), SPEC, threads=before + 1)
    predictor(IMAGES)
    assert Identity.threads == before + 1 == predictor.threads
    assert torch.get_num_threads() == before


def test_the_module_is_in_evaluation_mode() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Flatten()).train()
    predictor = module_predictor(module, SPEC, threads=1)
    np.testing.assert_array_equal(predictor(IMAGES), predictor(IMAGES))


def test_half_precision_modules_give_float32() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(90, 4)).bfloat16()
    assert module_predictor(module, SPEC, threads=1)(IMAGES).dtype == np.float32


@pytest.mark.parametrize(
    "images", [IMAGES.astype(np.float32), IMAGES[0], IMAGES[:, :5], IMAGES.transpose(0, 3, 1, 2)]
)
def test_wrong_batches_are_refused(images: np.ndarray) -> None:
    with pytest.raises(InputSizeError, match=r"takes uint8 \(N, 6, 5, 3\)"):
        module_predictor(Identity(), SPEC, threads=1)(images)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no thread affinity")
def test_pinned_threads_holds_all_threads_and_lets_go() -> None:
    before, torch_before = os.sched_getaffinity(0), torch.get_num_threads()
    ready, stop = threading.Event(), threading.Event()
    seen: dict[str, set[int]] = {}

    def idle() -> None:
        ready.set()
        stop.wait()
        seen["after"] = os.sched_getaffinity(0)

    thread = threading.Thread(target=idle)
    thread.start()
    ready.wait()
    assert thread.native_id is not None
    with pinned_threads(1) as cores:
        assert len(cores) == 1
        assert os.sched_getaffinity(0) == set(cores)
        assert os.sched_getaffinity(thread.native_id) == set(cores)
        assert torch.get_num_threads() == 1
        assert usable_cores() == 1
    assert os.sched_getaffinity(0) == before
    assert torch.get_num_threads() == torch_before
    stop.set()
    thread.join()
    assert seen["after"] == before


def test_pinned_threads_lets_go_after_an_error() -> None:
    before = usable_cores(), torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        with pinned_threads(1):
            _ = 1 / 0
    assert (usable_cores(), torch.get_num_threads()) == before


def test_more_threads_than_cores_use_every_core() -> None:
    with pinned_threads(usable_cores() + 3) as cores:
        assert len(cores) in (0, usable_cores())
        assert torch.get_num_threads() == usable_cores() + 3


def test_no_threads_are_refused() -> None:
    with pytest.raises(CveffError, match="threads is 0"):
        with pinned_threads(0):
            pass


def test_measure_imports_no_torch() -> None:
    code = (
        "import sys, cveff.measure\n"
        "from cveff.measure import compare, predict, peak_memory, layer_parity, meaning_gap, pinned_threads\n"
        "with pinned_threads(1): pass\n"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules, sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_of_measure_exists() -> None:
    import cveff.measure

    for name in cveff.measure.__all__:
        assert callable(getattr(cveff.measure, name)), name


def test_sizes_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_bytes(b"x" * 10)
    with pytest.raises(CveffError, match=r"model\.bin, which does not exist"):
        size_bytes(tmp_path / "model.xml")
    (tmp_path / "model.bin").write_bytes(b"x" * 100)
    assert size_bytes(tmp_path / "model.xml") == 110
    assert size_bytes(tmp_path) == 110
    with pytest.raises(CveffError, match="does not exist"):
        size_bytes(tmp_path / "none.onnx")


def test_external_weights_count(graph_file: Callable[..., Path], tmp_path: Path) -> None:
    whole = graph_file()
    assert size_bytes(whole) == whole.stat().st_size
    model = onnx.load(str(whole))
    path = tmp_path / "split.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="weights.data", size_threshold=0)
    assert size_bytes(path) == path.stat().st_size + (tmp_path / "weights.data").stat().st_size
    (tmp_path / "weights.data").unlink()
    with pytest.raises(CveffError, match=r"weights\.data, which does not exist"):
        size_bytes(path)


def test_module_bytes_count_shared_weights_once() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    assert module_bytes(nn.Sequential(first, second)) == 72
    second.weight = first.weight
    assert module_bytes(nn.Sequential(first, second)) == 36


def test_read_only_images_are_predicted_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    frozen = IMAGES.copy()
    frozen.flags.writeable = False
    predictor = module_predictor(Identity(), SPEC, threads=1)
    np.testing.assert_array_equal(predictor(frozen), predictor(IMAGES))
    assert not recwarn.list
