"""Whether a front ends only because the range that was searched does.

Knows records and the study file's section; says what a user would want to know next.
"""

from __future__ import annotations

from .front import ParetoFront, relative
from .result import accuracy_of, latency_of
from .sections import Choices, Range, SearchSection

#: Of the unpruned accuracy: what still has as much is no end of what the network can lose.
STILL_GOOD = 0.95
#: Of the range's width: as close to its end counts as its end, since plans come in steps.
CLOSE = 0.05


def range_end(front: ParetoFront, search: SearchSection) -> str | None:
    """A line for the user where the fastest point lies at the largest ratio and is nearly as accurate as the
    unpruned model: a larger ratio is likely to go further. None where that is not so.
    """
    if isinstance(search.ratio, Range):
        low, high = search.ratio.low, search.ratio.high
    elif isinstance(search.ratio, Choices):
        low, high = min(search.ratio.choices), max(search.ratio.choices)
    else:
        return None
    fastest = front.points[0]
    if fastest.trial == 0 or fastest.asked.ratio < high - CLOSE * (high - low):
        return None
    _, share = relative(latency_of(fastest), accuracy_of(fastest), front.baseline)
    if share < STILL_GOOD:
        return None
    return (
        f"{front.device}: trial {fastest.trial}, the fastest of the front, has {share:.0%} of the unpruned "
        f"accuracy at ratio {fastest.asked.ratio:.2f}, and search.ratio ends at {high:g}; "
        "a higher end is likely to bring faster models"
    )
