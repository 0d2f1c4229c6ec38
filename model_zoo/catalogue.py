"""A card says what a model is, where its weights come from, and which committed result proves each figure."""

from __future__ import annotations

import difflib
import functools
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cveff.errors import CveffError, UnknownModelError
from cveff.runtime.input_spec import InputSpec

HERE = Path(__file__).parent


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Strict):
    """One measured number and its proof.

    Attributes:
        name: what was measured, in words.
        unit: "fraction", "points", "ms", "parameters", "crops", …
        result: file in `model_zoo/results/` that holds it.
        key: where in that file, object keys joined by "/".
        value: the number; None until the benchmark has been run.
        command: what made the result, as the result itself records it; None until it has been run.
    """

    name: str
    unit: str
    result: str
    key: str
    value: float | None = None
    command: str | None = None

    @field_validator("result")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if Path(value).name != value or not value.endswith(".json"):
            raise ValueError("give the name of a .json file in model_zoo/results")
        return value

    def proof(self) -> tuple[float, str] | None:
        """(value, command) as the committed result has them; None where that result does not exist yet.

        Raises:
            CveffError: the result exists but has no number at `key`, or no command.
        """
        path = HERE / "results" / self.result
        if not path.is_file():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        found: Any = values
        for part in self.key.split("/"):
            if not isinstance(found, Mapping) or part not in found:
                raise CveffError(
                    f"{path.name} has no {self.key!r} ({part!r} is missing); run the benchmark again"
                )
            found = found[part]
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise CveffError(f"{path.name}: {self.key!r} is {found!r}, not a number; correct the card's key")
        if not isinstance(values.get("command"), str):
            raise CveffError(f"{path.name} does not say which command made it; run the benchmark again")
        return float(found), values["command"]


class Weights(_Strict):
    """Where a model's weights are.

    Attributes:
        kind: "package": a state dict inside an installed package; "checkpoint": a folder `cveff.save` wrote.
        source: the package's name, or the folder, relative to `model_zoo`.
        licence: SPDX identifier.
        file: the state dict, relative to the package's import folder (kind "package").
        sha256: of the state dict; checked when it is loaded. None for a checkpoint still to be trained.
    """

    kind: Literal["package", "checkpoint"]
    source: str
    licence: str
    version: str | None = None
    file: str | None = None
    sha256: str | None = None
    url: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Weights:
        if self.kind == "package" and not (self.file and self.sha256 and self.version):
            raise ValueError("weights from a package need file, version and sha256")
        return self

    @property
    def checkpoint(self) -> Path:
        """Folder of a checkpoint."""
        return HERE / self.source

    @property
    def available(self) -> bool:
        """Whether the weights can be read here, without reading them."""
        if self.kind == "checkpoint":
            return (self.checkpoint / "weights.safetensors").is_file()
        from cveff.model_zoo.efficientnet_lite import package_folder

        return package_folder(self.source) is not None


class Training(_Strict):
    """How the weights were made: one of cveff's recipes (relative to `model_zoo`), or someone else's work."""

    recipe: str | None = None
    origin: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Training:
        if (self.recipe is None) == (self.origin is None):
            raise ValueError("give either recipe or origin")
        return self


class Card(_Strict):
    """A model of the zoo; see `Weights`, `Training` and `Figure` for the parts.

    Attributes:
        name: what `load` takes.
        data: the data set the labels come from.
        parameters: number of parameters; tests compare it with the network.
        input: an `InputSpec` as JSON values.
    """

    name: str
    description: str
    architecture: str
    task: Literal["classification"] = "classification"
    data: str
    num_classes: int = Field(gt=0)
    parameters: int = Field(gt=0)
    input: dict[str, Any]
    weights: Weights
    training: Training
    figures: tuple[Figure, ...] = ()

    @field_validator("input")
    @classmethod
    def _valid_input(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            InputSpec.from_json(value)
        except CveffError as error:
            raise ValueError(str(error)) from error
        return value

    @property
    def input_spec(self) -> InputSpec:
        """What the exported file takes."""
        return InputSpec.from_json(self.input)


def read(path: Path) -> Card:
    """Read and validate one card.

    Raises:
        CveffError: not TOML, an unknown or missing key, or a wrong value; the key's path is named.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        found = Card.model_validate(values)
    except tomllib.TOMLDecodeError as error:
        raise CveffError(f"{path}: not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CveffError(f"{path}: {key or 'card'}: {first['msg']}") from error
    if found.name != path.stem:
        raise CveffError(f"{path}: name is {found.name!r}; a card's name is its file's, {path.stem!r}")
    return found


@functools.cache
def _all() -> dict[str, Card]:
    return {path.stem: read(path) for path in sorted((HERE / "cards").glob("*.toml"))}


def cards() -> tuple[Card, ...]:
    """Every card, by name."""
    return tuple(_all().values())


def names() -> tuple[str, ...]:
    """Names that `card` and `load` take."""
    return tuple(_all())


def card(name: str) -> Card:
    """One card by name.

    Raises:
        UnknownModelError: no card has this name; the message lists close matches.
    """
    if name in _all():
        return _all()[name]
    close = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(close)}?" if close else f"the zoo has {', '.join(names())}."
    raise UnknownModelError(f"no model of the zoo is called {name!r}; {hint}")
