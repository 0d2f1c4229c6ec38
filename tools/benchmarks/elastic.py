"""One elastic training on Fashion-MNIST: its sub-nets against the same networks trained alone, what the training costs,
and evolution against random search at equal evaluations.

Every training and search is a cell of its own: stopped at any moment it goes on where it was.

python tools/benchmarks/elastic.py                  # three seeds
python tools/benchmarks/elastic.py --seeds 0        # one
python tools/benchmarks/elastic.py --quick          # digits, one epoch: that it works, not what it reaches
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
from distill import spread

import cveff
from cveff.compress.latency_goal import LatencyGoal
from cveff.data import Data
from cveff.data import load as load_data
from cveff.dynamic import Elastic, ExtractSubNet
from cveff.dynamic.elastic_space import Levels
from cveff.dynamic.extract import Candidates
from cveff.dynamic.sandwich import Sandwich
from cveff.dynamic.search import Evolution, Search
from cveff.dynamic.subnet_cost import SubNetCosts
from cveff.dynamic.supernet import Supernet
from cveff.export.timer import EngineTimer
from cveff.model import Model, build, load
from cveff.pipeline import create_for, evaluate
from cveff.recipe import read_recipe
from cveff.steps import Run
from cveff.target import load_target
from cveff.train import Train
from cveff.train.objective import CrossEntropy, Objective

WIDTHS = (1.0, 0.75, 0.5, 0.25)
MOST_POINTS, MOST_COST = 0.5, 2.0
SHARE = 0.5
"""Of the whole network's predicted time: what the searches may use."""
DRAWS = 2000
ROUNDS = 40


def main() -> None:
    arguments = _arguments()
    recipe = read_recipe("digits" if arguments.quick else "fashion-mnist")
    assert recipe.train is not None
    train = replace(recipe.train, keep="last")
    if arguments.quick:
        train = replace(train, epochs=1, warmup_epochs=0.0)
    elif arguments.epochs is not None:
        train = replace(train, epochs=arguments.epochs)
    evolution = Evolution(4, 2) if arguments.quick else Evolution(24, 9)
    settings = {
        "data": recipe.data.source,
        "epochs": train.epochs,
        "widths": list(WIDTHS),
        "num_random": arguments.num_random,
        "evaluations": evolution.evaluations,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    cells: dict[str, Any] = results.values.setdefault("cells", {})
    for seed in arguments.seeds:
        data = load_data(recipe.data.source, seed=seed)
        bench = Bench(data, recipe.model, train, seed, arguments.num_random, arguments.runs / f"seed-{seed}")
        work = {
            f"{seed} {width:g}": lambda width=width, bench=bench: bench.sub_net(width) for width in WIDTHS
        }
        work[f"{seed} cost"] = bench.cost
        for search in ("evolution", "random"):
            work[f"{seed} {search}"] = lambda search=search, bench=bench: bench.search(search, evolution)
        for name, make in work.items():
            if name not in cells:
                common.console.print(f"{time.strftime('%H:%M:%S')} {name}", highlight=False)
                cells[name] = make()
                results.save()
    results.values["bars"] = bars(cells, arguments.seeds)
    results.save()
    show(cells, arguments.seeds, results.values["bars"])


class Bench:
    """One seed's trainings, each in a folder that it resumes from."""

    def __init__(
        self, data: Data, model: Any, train: Train, seed: int, num_random: int, folder: Path
    ) -> None:
        self._data, self._settings, self._train, self._seed = data, model, train, seed
        self._num_random, self._folder = num_random, folder

    def elastic(self, vary: str) -> Model:
        """The network whose sub-nets share one width ("network"), or have each their own sizes ("layers")."""
        folder = self._folder / f"elastic-{vary}"
        if not (folder / "done" / "model.json").is_file():
            step = Elastic(
                widths=WIDTHS,
                depth=0 if vary == "network" else 1,
                vary=vary,  # type: ignore[arg-type]
                num_random=self._num_random,
                round_to=4,
                train=self._train,
            )
            model = cveff.apply(
                self._fresh(), step, data=self._data, seed=self._seed, folder=folder, resume=True
            )
            cveff.save(model, folder / "done")
        return load(folder / "done")

    def sub_net(self, width: float) -> dict[str, float]:
        """Test accuracy of the sub-net, and of the same network trained alone for as many epochs."""
        elastic = self.elastic("network")
        inside = cveff.apply(elastic, ExtractSubNet(width=width), data=self._data, seed=self._seed)
        torch.manual_seed(self._seed)
        alone = cveff.apply(
            build(inside.spec),
            self._train,
            data=self._data,
            seed=self._seed,
            folder=self._folder / f"alone-{width:g}",
            resume=True,
        )
        return {
            "elastic": evaluate(inside, self._data),
            "alone": evaluate(alone, self._data),
            "parameters": inside.num_parameters,
        }

    def cost(self) -> dict[str, float]:
        """Operations and seconds of a training step over those of the whole network's alone, steps taken in turns."""
        model = self._fresh()
        step = Elastic(widths=WIDTHS, depth=0, vary="network", num_random=self._num_random, round_to=4)
        supernet = step.prepare(model, Run())
        objectives = {"alone": CrossEntropy(), "elastic": Sandwich(supernet, self._num_random)}
        costs = SubNetCosts(supernet)
        whole = costs.macs(supernet.space.largest)
        torch.manual_seed(self._seed)
        drawn = [
            sum(costs.macs(subnet) for subnet in Sandwich(supernet, self._num_random).draw())
            for _ in range(DRAWS)
        ]
        spec = model.spec.input
        images = torch.randn(self._train.batch_size, spec.channels, *spec.size)
        # As training lays them out in memory.
        images = images.contiguous(memory_format=torch.channels_last)
        model.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        targets = torch.arange(len(images)) % len(model.spec.labels)
        optimizer = torch.optim.SGD(model.module.parameters(), lr=1e-6)
        model.module.train()
        ratios = []
        for _ in range(ROUNDS):
            seconds = {
                name: _seconds(objective, model, images, targets, optimizer)
                for name, objective in objectives.items()
            }
            ratios.append(seconds["elastic"] / seconds["alone"])
        return {"macs": 1 + statistics.mean(drawn) / whole, "seconds": statistics.median(ratios[2:])}

    def search(self, search: str, evolution: Evolution) -> dict[str, float]:
        """Accuracy of what a search finds under a limit of the device's table, by images that it saw and by others."""
        model = self.elastic("layers")
        supernet = Supernet.of(model)
        space, costs = supernet.space, SubNetCosts(supernet)
        candidates = Candidates(model, supernet, self._data, 2048, 512, self._seed)
        with EngineTimer(load_target("edge-cpu")) as timer:
            predictor = LatencyGoal.make_predictor(timer, candidates.calibrated(space.largest))
        limit = SHARE * costs.milliseconds(space.largest, predictor)

        def fits(levels: Levels) -> bool:
            return costs.milliseconds(space.subnet(levels), predictor) <= limit

        found = Search(
            space.alternatives,
            lambda levels: candidates.accuracy(space.subnet(levels)),
            fits,
            space.subnet,
            self._seed,
        )
        best = found.evolve(evolution) if search == "evolution" else found.at_random(evolution.evaluations)
        model = candidates.calibrated(space.subnet(best))
        return {
            "held_out": found.scores[best],
            "test": evaluate(model, self._data),
            "evaluations": len(found.scores),
            "share_of_time": costs.milliseconds(space.subnet(best), predictor) * SHARE / limit,
        }

    def _fresh(self) -> Model:
        return create_for(self._settings, self._data, seed=self._seed)


def _seconds(
    objective: Objective,
    model: Model,
    images: torch.Tensor,
    targets: torch.Tensor,
    optimizer: torch.optim.Optimizer,
) -> float:
    started = time.perf_counter()
    optimizer.zero_grad()
    (objective.loss(model.module, images, targets) / len(images)).backward()
    optimizer.step()
    return time.perf_counter() - started


def bars(cells: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """What was asked for, over the mean of the seeds, and whether it is met."""
    lost = {
        f"{width:g}": 100
        * statistics.mean(
            cells[f"{seed} {width:g}"]["alone"] - cells[f"{seed} {width:g}"]["elastic"] for seed in seeds
        )
        for width in WIDTHS
    }
    costs = {
        name: statistics.mean(cells[f"{seed} cost"][name] for seed in seeds) for name in ("macs", "seconds")
    }
    gained = 100 * statistics.mean(
        cells[f"{seed} evolution"]["held_out"] - cells[f"{seed} random"]["held_out"] for seed in seeds
    )
    return {
        "points_lost": {"found": lost, "most": MOST_POINTS, "passes": max(lost.values()) <= MOST_POINTS},
        "cost": {"found": costs, "most": MOST_COST, "passes": max(costs.values()) <= MOST_COST},
        "points_gained_by_evolution": {"found": gained, "passes": gained > 0},
    }


def show(cells: dict[str, Any], seeds: list[int], found: dict[str, Any]) -> None:
    """Tables, and what is missed."""
    rows = []
    for width in WIDTHS:
        of = [cells[f"{seed} {width:g}"] for seed in seeds]
        elastic, alone = ([100 * cell[name] for cell in of] for name in ("elastic", "alone"))
        rows.append(
            (
                f"{width:g}",
                of[0]["parameters"],
                statistics.mean(elastic),
                spread(elastic),
                statistics.mean(alone),
                spread(alone),
                found["points_lost"]["found"][f"{width:g}"],
            )
        )
    common.table(
        f"test accuracy %, {len(seeds)} seeds",
        ("width", "parameters", "elastic", "±", "alone", "±", "points lost"),
        rows,
        note="± is the standard deviation over seeds. Trained alone: the same epochs and settings.",
    )
    common.table(
        f"searches, {cells[f'{seeds[0]} random']['evaluations']} evaluations each",
        ("", "held out %", "test %"),
        [
            (
                name,
                *(
                    100 * statistics.mean(cells[f"{seed} {name}"][key] for seed in seeds)
                    for key in ("held_out", "test")
                ),
            )
            for name in ("evolution", "random")
        ],
        note=f"Sub-nets predicted to take no more than {SHARE:g} of the whole network's time.",
    )
    cost = found["cost"]["found"]
    common.console.print(
        f"a training step costs {cost['macs']:.2f} times the operations and {cost['seconds']:.2f} times the seconds of "
        "the whole network's alone"
    )
    for name, bar in found.items():
        if not bar["passes"]:
            common.console.print(f"MISSED {name}: {bar}", highlight=False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="by default the recipe's")
    parser.add_argument(
        "--num-random", type=int, default=1, help="sub-nets a step beside the largest and smallest"
    )
    parser.add_argument("--runs", type=Path, help="folder of trainings; by default runs/elastic")
    parser.add_argument("--quick", action="store_true", help="digits, one epoch, one seed, few evaluations")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/elastic.json")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    arguments.runs = arguments.runs or common.ROOT / "runs" / ("quick" if arguments.quick else "") / "elastic"
    arguments.out = arguments.out or common.output("elastic.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
