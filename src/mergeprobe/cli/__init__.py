"""The command line: one verb tree. It prints; the library below only raises.

Nothing here imports torch until a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

GUARD = "MERGEPROBE_REEXECUTED"
# verbs that compute for minutes, or of hundreds of adapters nearly one; others do with --base
HEAVY = ("demo", "probe", "forecast", "plan", "signals")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its status: 0 done, 1 the user can put it right (one line on
    stderr says how), 2 wrong usage, 130 interrupted. arguments: default sys.argv."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a name that the terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
    if arguments is None:
        arguments = sys.argv[1:]
        keep_large_blocks(arguments)
    from mergeprobe.cli.app import app
    from mergeprobe.errors import MergeProbeError

    try:
        with warnings.catch_warnings():
            _only_our_warnings()
            app(args=list(arguments), prog_name="mergeprobe")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status == 130:
            say("interrupted; what is finished stays, the same command goes on")
        return status
    except KeyboardInterrupt:
        say("interrupted; what is finished stays, the same command goes on")
        return 130
    except MergeProbeError as problem:
        say(str(problem))
        return 1
    except OSError as problem:
        say(_plain(problem))
        return 1
    return 0


def say(message: str) -> None:
    """One line on stderr, whatever is in the message."""
    line = "".join(c if c.isprintable() else " " for c in message)
    print(f"mergeprobe: {line.strip()}", file=sys.stderr)


def keep_large_blocks(arguments: Sequence[str]) -> None:
    """Starts this process anew, once, with malloc settings that only a new process can have.

    Before long work on a CPU only; see bench/malloc.py for what it saves.
    """
    from mergeprobe.bench.malloc import malloc_matters, with_malloc_settings

    heavy = (arguments[:1] and arguments[0] in HEAVY) or any(
        a.startswith("--base") for a in arguments
    )
    if not heavy or "--help" in arguments or GUARD in os.environ or not malloc_matters():
        return
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, with_malloc_settings() | {GUARD: "1"})


def _plain(problem: OSError) -> str:
    """'path': what is wrong, without Python's error number."""
    where = f"'{problem.filename}': " if problem.filename is not None else ""
    return where + (problem.strerror or str(problem) or type(problem).__name__)


def _only_our_warnings() -> None:
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", message="mergeprobe: ")
    warnings.showwarning = lambda message, *rest, **more: say(
        f"warning: {str(message).removeprefix('mergeprobe: ')}"
    )
