"""Ground-truth boxes that the anchors of a detector reach, and anchors that reach more of them."""

from fastdet.engine.anchor_search.reach import best_overlaps, class_shares
from fastdet.engine.anchor_search.search import Found, search

__all__ = ["Found", "best_overlaps", "class_shares", "search"]
