"""Merging updates: the rules (one family a file), their table, and merge itself."""

from mergeprobe.compose.merge.methods import METHODS, Method
from mergeprobe.compose.merge.run import Certificate, Merged, check_options, merge

__all__ = ["METHODS", "Certificate", "Merged", "Method", "check_options", "merge"]
