"""What goes wrong, by name. The library raises these; only the command line prints them.

Every message is one line that names the thing, what it got, and what would do.
"""


class MergeProbeError(Exception):
    """Anything a user can put right; the command line ends with status 1."""

    def __init__(self, message: str = "") -> None:
        # names come out of files: a newline or a terminal's control code in one is shown, not sent
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class AdapterError(MergeProbeError):
    """An adapter folder that cannot be read, or holds something this version refuses."""


class AdapterMismatch(MergeProbeError):
    """Adapters that do not belong together: other base, other shapes, nothing in common."""


class BaseModelError(MergeProbeError):
    """A base model that cannot be found, loaded or verified."""


class ProbeError(MergeProbeError):
    """A probe file that is damaged, too new, or lacks what was asked of it."""


class PlanError(MergeProbeError):
    """A plan that is malformed, or was made for other adapters."""


class DataError(MergeProbeError):
    """A data file with a bad row; the message has the line number."""


class MergeError(MergeProbeError):
    """A merge rule that does not exist, or was given parameters it cannot take."""


class DeploymentError(MergeProbeError):
    """A deployment folder that is damaged, or asked for an adapter it does not serve."""


class ExportError(MergeProbeError):
    """What a server or tool does not take, or cannot say, of a deployment."""


class OutputExists(MergeProbeError):
    """An output that is already there; `--force` (or `force=True`) replaces it."""


class NotForecastable(MergeProbeError):
    """Something was asked that the measurements at hand cannot answer."""
