"""Merging updates: the rules (one family a file), their table, and merge itself."""

from mergeprobe.compose.merge.methods import METHODS, Method
from mergeprobe.compose.merge.recipe import check_options
from mergeprobe.compose.merge.run import Certificate, Merged, merge

__all__ = ["METHODS", "Certificate", "Merged", "Method", "check_options", "merge"]
