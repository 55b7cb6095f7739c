"""How the tags of exchanges are divided up. The smallest upper bound that the MPI standard grants is 32767.

Negotiated exchanges take ``[0, FIRST_TAG)`` in turn. Then each lane takes LANE_TAGS of its own in turn.
"""

from __future__ import annotations

__all__ = ["FIRST_TAG", "LANES", "LANE_TAGS", "MAPPING_TAG"]

FIRST_TAG = 8192

#: Launches of one lane that are under way together, at most, and lanes with tags of their own.
LANE_TAGS = 512
LANES = 32

#: That with which the members find out, once, whether they can map each other's GPU memory.
MAPPING_TAG = FIRST_TAG + LANES * LANE_TAGS
