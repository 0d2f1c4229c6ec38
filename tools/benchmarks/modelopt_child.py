"""What `modelopt_peer.py` runs in the environment that has `nvidia-modelopt[onnx]`: one file, its documented defaults.

python modelopt_child.py version
python modelopt_child.py quantize float.onnx int8.onnx calibration.npy fp16|fp32
python modelopt_child.py autocast float.onnx fp16.onnx calibration.npz
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time


def main() -> None:
    """Do what the command line says; errors end the process with their trace."""
    if sys.argv[1] == "version":
        names = ("nvidia-modelopt", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy")
        installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
        sys.stdout.write(json.dumps({name: installed[name] for name in names if name in installed}))
        return
    if sys.argv[1] == "autocast":
        import onnx
        from modelopt.onnx.autocast import convert_to_mixed_precision

        source, destination, calibration = sys.argv[2:]
        started = time.perf_counter()
        # Its conversion of inputs and outputs would turn images of bytes into float16 ones.
        found = convert_to_mixed_precision(source, "fp16", keep_io_types=True, calibration_data=calibration)
        onnx.save(found, destination)
        sys.stdout.write(f"\n{time.perf_counter() - started}\n")
        return
    import numpy as np
    from modelopt.onnx.quantization import quantize

    source, destination, calibration, others = sys.argv[2:]
    quantize(
        source,
        quantize_mode="int8",
        calibration_data=np.load(calibration),
        # The others it would try, "cuda:0" and "trt", are looked for and not found on a machine without a GPU.
        calibration_eps=["cpu"],
        high_precision_dtype=others,
        output_path=destination,
    )


if __name__ == "__main__":
    main()
