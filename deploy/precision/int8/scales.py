"""From the range of every activation to its scale, shared or of its own."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

from deploy.precision.codes import Codes
from deploy.precision.int8.placement import Placement

logger = logging.getLogger(__name__)

_NAMED = 10


class Scales(NamedTuple):
    """The scale of every tensor for the layers that read it, and, where there are any, those in a Concat.

    What they are: `deploy.precision.int8.rewrite.ToCodes`.
    """

    own: dict[str, float]
    joint: dict[str, float]


def scales_of(placement: Placement, ranges: Mapping[str, float], codes: Codes) -> Scales:
    """ranges: the largest magnitude to hold, by tensor.

    Within a group, all tensors have the scale of the widest, unless their own is less than half of it: then a bit would be lost.
    """
    amax = dict(ranges)
    branches = {name for name, uses in placement.edges.items() if any(node in placement.joints for node, _ in uses)}
    joint: dict[str, float] = {}
    for group in placement.groups:
        widest = max(amax[name] for name in group)
        for name in group:
            if amax[name] >= widest / 2 or name in placement.joints.values():
                amax[name] = widest
            elif name in branches:
                joint[name] = codes.scale_of(widest)
    if dead := [name for name, value in amax.items() if value == 0]:
        logger.warning("always 0 on the calibration data: %s", ", ".join(dead[:_NAMED]) + ("..." if len(dead) > _NAMED else ""))
    return Scales({name: codes.scale_of(value) for name, value in amax.items()}, joint)
