"""The loss of a large run, foretold from small ones: L = a + b · C^(-c).

As FLM-101B was planned (Li et al., arXiv:2309.03852, section 4.2), with the power law of Kaplan et al.
(arXiv:2001.08361) and the irreducible loss of Hoffmann et al. (arXiv:2203.15556).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student

from cveff.errors import CveffError

_STARTS = (0.05, 0.15, 0.3, 0.6, 1.0)


@dataclass(frozen=True)
class Prediction:
    """A loss that was foretold.

    Attributes:
        loss: the curve's value.
        low, high: of the interval in which a run's loss is expected, at `confidence`.
        confidence: a share, such as 0.95.
    """

    loss: float
    low: float
    high: float
    confidence: float

    def error(self, measured: float) -> float:
        """(foretold - measured) / measured."""
        return (self.loss - measured) / measured


@dataclass(frozen=True)
class LossCurve:
    """L = a + b · (C / scale)^(-c), with a ≥ 0, b > 0 and c > 0.

    Attributes:
        a, b, c: the fit.
        scale: the geometric mean of the runs' compute, in its unit.
        deviation: of the runs' losses around the curve, their number less three counted.
        covariance: of (a, b, c), 3 × 3.
        degrees: number of runs less three.
    """

    a: float
    b: float
    c: float
    scale: float
    deviation: float
    covariance: tuple[tuple[float, ...], ...]
    degrees: int

    def predict(self, compute: float, confidence: float = 0.95) -> Prediction:
        """The loss at `compute`, in the unit of the fit, with an interval of Student's t around a new run.

        Linear in the parameters' errors (the delta method), which is too narrow far from the runs.

        Raises:
            CveffError: `compute` or `confidence` out of range.
        """
        if not compute > 0 or not math.isfinite(compute):
            raise CveffError(f"compute is {compute!r}; give a positive number")
        if not 0 < confidence < 1:
            raise CveffError(f"confidence is {confidence!r}; give a share between 0 and 1")
        power = (compute / self.scale) ** -self.c
        slope = np.array([1.0, power, -self.b * power * math.log(compute / self.scale)])
        variance = float(slope @ np.array(self.covariance) @ slope) + self.deviation**2
        half = float(student.ppf(0.5 + confidence / 2, self.degrees)) * math.sqrt(variance)
        loss = self.a + self.b * power
        return Prediction(loss, loss - half, loss + half, confidence)


def fit_loss(compute: Sequence[float], loss: Sequence[float]) -> LossCurve:
    """Fit the curve to runs by least squares of the relative errors.

    Args:
        compute: of each run, such as its floating-point operations or its parameters; at least four, of which three
            differ.
        loss: at the end of each run.

    Raises:
        CveffError: too few runs, or values that are not positive and finite, or losses that do not fall.
    """
    given = np.asarray(compute, np.float64), np.asarray(loss, np.float64)
    c, y = given
    if c.shape != y.shape or c.ndim != 1:
        raise CveffError(f"{c.size} values of compute and {y.size} losses were given; give one of each a run")
    if len(c) < 4 or len(np.unique(c)) < 3:
        raise CveffError(
            f"{len(c)} runs of {len(np.unique(c))} sizes cannot fix three parameters and an error; give four or more"
        )
    if not (np.isfinite(c).all() and np.isfinite(y).all() and (c > 0).all() and (y > 0).all()):
        raise CveffError("compute and losses must be positive and finite; leave out runs that diverged")
    if np.polyfit(np.log(c), y, 1)[0] >= 0:
        raise CveffError(
            "losses do not fall with compute; tune the learning rate of the runs, or run larger ones"
        )
    scale = float(np.exp(np.log(c).mean()))
    x = c / scale

    def residuals(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = (values[0] + values[1] * x ** -values[2] - y) / y
        return found

    # Several starts: the exponent and the irreducible loss trade off, and one start may end in a poor place.
    fits = [
        least_squares(
            residuals,
            [0.5 * y.min(), 0.5 * y.mean(), start],
            bounds=([0, 1e-12, 1e-6], np.inf),
            x_scale="jac",
            max_nfev=5000,
        )
        for start in _STARTS
    ]
    best = min(fits, key=lambda fit: fit.cost)
    degrees = len(y) - 3
    relative = math.sqrt(2 * best.cost / degrees)
    covariance = np.linalg.pinv(best.jac.T @ best.jac) * relative**2
    a, b, exponent = map(float, best.x)
    return LossCurve(
        a, b, exponent, scale, relative * float(y.mean()), tuple(map(tuple, covariance.tolist())), degrees
    )
