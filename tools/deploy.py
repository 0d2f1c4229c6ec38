"""Quantize and deploy in one script, by the public Python API: the same job as `cveff deploy`.

python tools/deploy.py --model mobilenetv4_conv_small --data PATH --target edge-cpu --max-accuracy-drop 1.0 \\
    --out my.bundle
python tools/deploy.py --model mobilenetv4_conv_small --weights FILE --calibration DIR --out my.bundle
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cveff.cli.deploy import show_deployment
from cveff.console import configure_logging, working
from cveff.errors import CveffError
from cveff.recipe import DataSettings, DeploySettings, ModelSettings
from cveff.shortcut import deploy_subject


def main() -> int:
    options = _parser().parse_args()
    configure_logging()
    try:
        with working() as progress:
            deployment = deploy_subject(
                options.model,
                DeploySettings(
                    target=options.target,
                    max_accuracy_drop=options.max_accuracy_drop,
                    calibration=options.calibration,
                    num_calibration=options.num_calibration,
                    out=options.out,
                ),
                data=None if options.data is None else DataSettings(options.data, options.on_bad_image),
                start=ModelSettings(
                    weights=options.weights,
                    image_size=options.image_size,
                    channels=options.channels,
                    pretrained=options.pretrained,
                ),
                labels=options.labels,
                epochs=options.epochs,
                run_folder=options.run,
                resume=options.resume,
                overwrite=options.overwrite,
                seed=options.seed,
                progress=progress,
            )
    except CveffError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing is half-written", file=sys.stderr)
        return 130
    show_deployment(deployment)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help="a saved model or run, a zoo card's name, or an architecture's name")
    add("--data", help="data set to train and to measure on: a name, a folder, or shards")
    add("--calibration", type=Path, help="folder of unlabelled images for int8")
    add("--target", default="edge-cpu", help="device profile, or a .toml file")
    add("--max-accuracy-drop", type=float, default=1.0, help="points of accuracy the shipped file may lose")
    add("--out", type=Path, help="the bundle's folder (default MODEL.bundle)")
    add("--num-calibration", type=int, default=256, help="images int8 is calibrated on")
    add("--weights", type=Path, help="a .safetensors or .pth state dict for an architecture")
    add("--labels", type=Path, help="a text file with one class name a line, for an architecture")
    add("--image-size", type=int, help="side of the input in pixels, for an architecture")
    add("--channels", type=int, choices=(1, 3), help="1 (grey) or 3 (RGB), for an architecture")
    add("--pretrained", action="store_true", help="start training from timm's weights (needs a network)")
    add(
        "--epochs", type=int, help="train this long first (default: 30 without weights, 10 with --pretrained)"
    )
    add("--run", type=Path, help="where training keeps its state (default runs/MODEL)")
    add("--resume", action="store_true", help="continue a run that stopped; begin where there is none")
    add("--overwrite", action="store_true", help="remove an earlier run and begin again")
    add("--on-bad-image", choices=("error", "skip"), default="error", help="what to do with unreadable files")
    add("--seed", type=int, default=0, help="all randomness derives from it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
