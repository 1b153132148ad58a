"""Times by size: what is said of other sizes by those that were measured.

Of a curve no size takes longer than a larger one: that was noise, which only makes measured times longer.
"""

import itertools
import math

import numpy as np

Curve = list[tuple[int, float]]  # (size, seconds)


def _rising(times: Curve) -> Curve:
    """By size, none longer than a larger one."""
    curve, least_s = [], math.inf
    for size, seconds in sorted(times, reverse=True):
        least_s = min(least_s, seconds)
        curve.insert(0, (size, least_s))
    return curve


def of_copy(times: Curve, nbytes: int) -> float:
    """Seconds of a copy, from those of others by their bytes.

    Between two sizes it is on the line through both, on logarithmic scales; what is larger than all takes its share of
    the largest one's time, what is smaller than all takes as long as the smallest.
    """
    curve = _rising(times)
    largest, longest_s = curve[-1]
    if nbytes >= largest:
        return longest_s * nbytes / largest
    for (below, below_s), (above, above_s) in itertools.pairwise(curve):
        if below <= nbytes < above:
            return below_s * (above_s / below_s) ** (math.log(nbytes / below) / math.log(above / below))
    return curve[0][1]


def of_segment(times: Curve, tokens: int | float) -> float:
    """Seconds that a segment adds to a layer's step, from those of others by their tokens.

    On the line through the nearest shorter and longer one, or through the two shortest or longest; what is shorter than
    all takes its share of the shortest one's time at least.
    """
    curve = _rising(times)
    if len(curve) == 1:
        return curve[0][1] * tokens / curve[0][0]
    pairs = [*itertools.pairwise(curve)]
    (below, below_s), (above, above_s) = next((pair for pair in pairs if tokens < pair[1][0]), pairs[-1])
    on_line_s = below_s + (above_s - below_s) * (tokens - below) / (above - below)
    return max(on_line_s, below_s * min(1.0, tokens / below))


def line(times: Curve) -> tuple[float, float]:
    """A time in seconds and a rate in bytes per second, from (bytes, seconds): the line of least squared relative
    errors. Neither is ever negative."""
    nbytes, seconds = np.array(times, np.float64).T
    copies, weighted = 1 / seconds, nbytes / seconds  # time · copies + seconds a byte · weighted should be 1
    per_copy, per_byte = 0.0, 0.0
    if len(times) > 1:
        per_copy, per_byte = np.linalg.lstsq(np.stack([copies, weighted], axis=1), np.ones(len(times)))[0]
    if per_copy < 0 or len(times) == 1:
        per_copy, per_byte = 0.0, _scale(weighted)
    elif per_byte <= 0:
        per_copy, per_byte = _scale(copies), 1e-15
    return float(per_copy), float(1 / per_byte)


def _scale(ratios: np.ndarray) -> float:
    """The m that brings m · ratio nearest to 1, by least squares."""
    return float(ratios.sum() / (ratios @ ratios))
