"""Whether decode steps keep the pace that was predicted for them."""

import collections
import statistics

STEPS = 32  # compared together: their lower median passes over a flush, or a moment's work of another process
SLOW = 1.5  # times the prediction: a miss
SLOW_S = 4e-3  # and so much longer: less is the host's own, which no plan can change


class Pace:
    """Compares steps with their predictions and says when they are too slow for long.

    Only slowness counts. Steps that seem fast may belong to a slow reader of their tokens: copies go on while it reads.
    """

    def __init__(self) -> None:
        self.steps: collections.deque[tuple[float, float]] = collections.deque(maxlen=STEPS)

    def lasting_miss(self, step_s: float, predicted_s: float) -> float | None:
        """Take note of one step.

        Returns:
            How many times the prediction the last `STEPS` steps took, in the median, where that is a miss; counting
            begins anew then. Otherwise None.
        """
        self.steps.append((step_s, predicted_s))
        if len(self.steps) < STEPS:
            return None
        times = statistics.median_low(measured / predicted for measured, predicted in self.steps)
        if times <= SLOW or (times - 1) * predicted_s < SLOW_S:
            return None
        self.steps.clear()
        return times
