"""What `emulated.py` runs on an emulated processor: one ONNX file in ONNX Runtime, on some images. numpy alone besides.

python emulated_child.py model.onnx inputs.npy logits.npy FIRST LAST
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime


def main() -> None:
    """Logits of inputs FIRST to LAST, one at a time, as one thread computes them."""
    model, inputs, outputs, first, last = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    images = np.load(inputs, mmap_mode="r")[int(first) : int(last)]
    found = [session.run(None, {name: np.array(image[None])})[0] for image in images]
    np.save(outputs, np.concatenate(found))


if __name__ == "__main__":
    main()
