"""export.json for programs and README.md for people: what was written and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergeprobe.artefact import MADE_BY

if TYPE_CHECKING:
    from mergeprobe.export.run import Export

SCHEMA = 1
WORDS = {True: "yes", False: "NO", None: "not told"}


def as_data(export: Export) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "schema": SCHEMA,
        "made_by": MADE_BY,
        "target": export.target,
        "base": export.base,
        "base_fingerprint": export.fingerprint,
        "dtype": export.dtype,
        "max_rank": export.rank,
        "names": dict(export.names),
        "lowered": list(export.lowered),
        "adapters": [asdict(shipped) for shipped in export.adapters],
        "losses": {name: asdict(loss) for name, loss in export.losses.items()},
        "files": sorted(export.launch),
    }


def readme(export: Export, title: str) -> str:
    verified = "recorded by every adapter" if export.fingerprint else "unverified"
    lines = [
        f"# Adapters for {title}",
        "",
        f"Base model: {export.base} (fingerprint {export.fingerprint or '-'}, {verified}).",
        "The server does not check it: serve these adapters on that model only.",
        "",
        *_command(export.launch),
        "## What to ask for",
        "",
        "| adapter | ask for |",
        "|---|---|",
        *(f"| {_cell(name)} | {_cell(asked)} |" for name, asked in export.names.items()),
        "",
        "## What was lowered",
        "",
        *([f"- {line}" for line in export.lowered] or ["Nothing of the deployment as a whole."]),
        "",
        "The error is ‖ΔW written − ΔW of the deployment‖ / ‖ΔW of the deployment‖, measured on",
        "the files; the deployment's own is that of its folder against the exact merge rule.",
        "",
        "| file | rank | error | worst module | deployment's own | lowered |",
        "|---|---|---|---|---|---|",
    ]
    for one in export.adapters:
        numbers = (one.error, one.worst_error, one.deployment_error)
        errors = " | ".join(f"{number:.2g}" for number in numbers)
        said = _cell("; ".join(one.lowered) or "nothing")
        lines.append(f"| {_cell(one.path)} | {one.rank} | {errors} | {said} |")
    if export.losses:
        lines += ["", *_losses(export)]
    lines += ["", "## Checks", "", "| file | check | ok | |", "|---|---|---|---|"]
    for one in export.adapters:
        for check in one.checks:
            row = (one.path, check.name, WORDS[check.ok], check.said)
            lines.append("| " + " | ".join(map(_cell, row)) + " |")
    return "\n".join([*lines, "", f"Made by {MADE_BY}.", ""])


def _command(launch: Mapping[str, str]) -> list[str]:
    lines = []
    for name, text in launch.items():
        if name.endswith((".sh", ".py")):
            kind = "sh" if name.endswith(".sh") else "python"
            lines += [f"## {name}", "", f"```{kind}", text.rstrip(), "```", ""]
    return lines


def _losses(export: Export) -> list[str]:
    lines = [
        "| adapter | items | loss, deployment | loss, exported | difference ± se |",
        "|---|---|---|---|---|",
    ]
    for name, loss in export.losses.items():
        numbers = (
            f"{loss.deployed:.4f} | {loss.exported:.4f} | {loss.difference:+.4f} ± {loss.se:.4f}"
        )
        lines.append(f"| {_cell(name)} | {loss.items} | {numbers} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
