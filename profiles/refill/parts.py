"""Even parts of a tensor's channels, as halves of a layer's output, when there are more or fewer channels.

That the parts of an even split stay even is how groups are pruned, see `search.groups.ChannelGroups.tied`.
"""

from __future__ import annotations

AXIS = 1  # of channels
Bounds = tuple[int, ...]


def scaled_slice(start: int, end: int, width: int, now: int) -> Bounds | None:
    """Where the same part begins and ends among `now` channels; None where it was no even part of `width`, or
    is none of `now`.
    """
    if now == width:
        return start, end
    last = min(end, width)
    size = last - start
    if start < 0 or size <= 0 or start % size or width % size or size * now % width:
        return None
    # A very large end means "to the end", of any width.
    return start * now // width, end if end > width else last * now // width


def scaled_split(sizes: Bounds, now: int) -> Bounds | None:
    """Sizes of as many parts of `now` channels; None where the parts were or would be uneven."""
    if now == sum(sizes):
        return sizes
    if len(set(sizes)) > 1 or now % len(sizes):
        return None
    return (now // len(sizes),) * len(sizes)
