"""Contextual sparsity: a language model that writes token by token computes only the neurons each token needs."""

from cveff.sparsity.attach import Sparse, Usage, attach
from cveff.sparsity.baselines import HotNeurons, Oracle, RandomNeurons
from cveff.sparsity.cats import CATS
from cveff.sparsity.fitted import Fitted, fit, load
from cveff.sparsity.heads import HeadPredictor
from cveff.sparsity.predictor import Predictor
from cveff.sparsity.quality import Quality, quality
from cveff.sparsity.structure import Mlp, find_mlps
from cveff.sparsity.teal import TEAL

__all__ = [
    "CATS",
    "TEAL",
    "Fitted",
    "HeadPredictor",
    "HotNeurons",
    "Mlp",
    "Oracle",
    "Predictor",
    "Quality",
    "RandomNeurons",
    "Sparse",
    "Usage",
    "attach",
    "find_mlps",
    "fit",
    "load",
    "quality",
]
