"""A card's figures are those of the committed results it cites, and its facts are those of the network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import cveff
from cveff import model_zoo
from cveff.errors import CheckpointError, CveffError, UnknownModelError
from cveff.model_zoo import catalogue

ROOT = Path(model_zoo.__file__).parent
CARDS = {card.name: card for card in model_zoo.cards()}


@pytest.mark.parametrize("name", CARDS)
def test_every_figure_equals_the_committed_result(name: str) -> None:
    for figure in CARDS[name].figures:
        proof = figure.proof()
        if proof is None:
            assert figure.value is None, f"{figure.name}: a value without {figure.result}"
        else:
            assert (figure.value, figure.command) == proof, figure.name


@pytest.mark.parametrize("name", CARDS)
def test_card_describes_the_network(name: str) -> None:
    card = CARDS[name]
    arguments = {"num_classes": card.num_classes, "input": card.input_spec}
    assert cveff.create(card.architecture, **arguments).num_parameters == card.parameters


@pytest.mark.parametrize("name", CARDS)
def test_recipe_is_committed(name: str) -> None:
    recipe = CARDS[name].training.recipe
    assert recipe is None or (ROOT / recipe).is_file()


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.weights.kind == "checkpoint"])
def test_trained_weights_load_and_fit_their_card(name: str) -> None:
    card = CARDS[name]
    if not card.weights.available:
        assert card.weights.sha256 is None
        with pytest.raises(CheckpointError, match="cveff train"):
            model_zoo.load(name)
        return
    assert card.weights.sha256 is not None
    model = model_zoo.load(name)
    assert (model.spec.architecture, model.spec.input) == (card.architecture, card.input_spec)
    assert len(model.spec.labels) == card.num_classes


def test_unknown_name_lists_close_ones() -> None:
    with pytest.raises(UnknownModelError, match="did you mean efficientnet-lite"):
        model_zoo.load("efficientnet-lite-0")
    with pytest.raises(UnknownModelError, match="the zoo has"):
        model_zoo.card("zzz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_classes = 1000", 'num_classes = "many"'), "num_classes"),
        (('task = "classification"', 'task = "poetry"'), "task"),
        (("[training]", "[training]\nrecipe = 'x.toml'"), "either recipe or origin"),
        (("crop = 0.875", "crop = 2.0"), r"input\.crop is 2\.0"),
        (('data = "imagenet-1k"', 'dataset = "imagenet-1k"'), "data"),
        (('file = "models', 'path = "models'), "weights"),
        (("[training]", "[training"), "not valid TOML"),
        (('name = "efficientnet-lite0"', 'name = "other"'), "name is 'other'"),
        (
            (
                "[training]",
                '[[figures]]\nname = "x"\nunit = "ms"\nresult = "../x.json"\nkey = "a"\n[training]',
            ),
            "model_zoo",
        ),
    ],
)
def test_bad_card_names_the_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = (ROOT / "cards" / "efficientnet-lite0.toml").read_text(encoding="utf-8")
    assert change[0] in text
    path = tmp_path / "efficientnet-lite0.toml"
    path.write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(CveffError, match=message):
        catalogue.read(path)


def test_figure_finds_its_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "HERE", tmp_path)
    figure = model_zoo.Figure(name="x", unit="fraction", result="r.json", key="a/b.c")
    assert figure.proof() is None
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "r.json"
    path.write_text(json.dumps({"command": "python x.py", "a": {"b.c": 0.5}}))
    assert figure.proof() == (0.5, "python x.py")
    for broken, message in (
        ({"command": "x", "a": {}}, "is missing"),
        ({"command": "x", "a": {"b.c": "fast"}}, "not a number"),
        ({"a": {"b.c": 1}}, "which command"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(CveffError, match=message):
            figure.proof()


def test_update_cards_writes_values_once_and_then_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    update_cards = __import__("update_cards")
    monkeypatch.setattr(catalogue, "HERE", tmp_path)
    (tmp_path / "cards").mkdir()
    (tmp_path / "results").mkdir()
    path = tmp_path / "cards" / "efficientnet-lite0.toml"
    shutil.copy(ROOT / "cards" / "efficientnet-lite0.toml", path)
    before = catalogue.read(path)
    bare = path.read_text(encoding="utf-8").split("[[figures]]")[0]
    path.write_text(
        bare + '\n[[figures]]\nname = "x"\nunit = "ms"\nresult = "r.json"\nkey = "a"\n'
        '\n[[figures]]\nname = "y"\nunit = "ms"\nresult = "none.json"\nkey = "a"\n'
        'value = 3.0\ncommand = "old"\n'
    )
    (tmp_path / "results" / "r.json").write_text(json.dumps({"command": 'say "x"', "a": 1.25}))
    assert update_cards.update(path) is True
    after = catalogue.read(path)
    assert (after.figures[0].value, after.figures[0].command) == (1.25, 'say "x"')
    assert (after.figures[1].value, after.figures[1].command) == (None, None)
    assert after.weights == before.weights
    assert update_cards.update(path) is False
    sys.modules.pop("update_cards")
