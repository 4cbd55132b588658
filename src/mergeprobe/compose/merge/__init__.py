"""Merging updates: the rules (one family a file), their table, and merge itself."""

from mergeprobe.compose.merge.export import merge_into_base
from mergeprobe.compose.merge.methods import METHODS, Method
from mergeprobe.compose.merge.recipe import check_options
from mergeprobe.compose.merge.run import Certificate, Merged, merge
from mergeprobe.compose.merge.stream import Written, merge_folders

__all__ = [
    "METHODS",
    "Certificate",
    "Merged",
    "Method",
    "Written",
    "check_options",
    "merge",
    "merge_folders",
    "merge_into_base",
]
