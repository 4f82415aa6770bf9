"""The corners of the convex function that lies closest below a curve. Knows nothing of what the curve is."""

from __future__ import annotations

from collections.abc import Sequence


def hull_below(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Indices of the corners of the largest convex function below a curve through points.

    Args:
        x: ascending. As numbers of Python's own, which are several times faster one by one.
    """
    corners = [0]
    for i in range(1, len(x)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return corners
