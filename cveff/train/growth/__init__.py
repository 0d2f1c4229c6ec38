"""Growth: training that begins with a small network and enlarges it on the way, without changing what it computes.

MSG (Yao et al., arXiv:2305.02869), as FLM-101B was trained with (Li et al., arXiv:2309.03852).
"""

from __future__ import annotations

from cveff.train.growth.event import Growth

__all__ = ["Growth"]
