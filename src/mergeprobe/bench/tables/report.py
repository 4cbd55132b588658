"""All tables at once: rows of a bank in, a folder of Markdown and SVG out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mergeprobe.artefact import atomic_file
from mergeprobe.bench.tables.ablations import ablations_page
from mergeprobe.bench.tables.audit import AUDIT, audit_alone
from mergeprobe.bench.tables.bank import Bank, open_bank
from mergeprobe.bench.tables.decision_tables import decisions_page
from mergeprobe.bench.tables.decisions import decide
from mergeprobe.bench.tables.figures import skill_figures
from mergeprobe.bench.tables.forecasters import (
    fitted,
    forecast_by,
    held_out_forecasters,
)
from mergeprobe.bench.tables.page import Figure, Needs, Page, Table, listed, number, percent
from mergeprobe.bench.tables.skill import Options, Slices, skill_page
from mergeprobe.bench.tables.transfer import transfer_page


def write_report(
    folders: Path | Sequence[Path],
    out: str | Path,
    *,
    held_out: Sequence[str] = (),
    runs: int = 500,
    seed: int = 0,
    shown: str = "DIR",
    say: Callable[[str], None] = lambda message: None,
) -> list[Path]:
    """Writes the pages and figures to `out` and returns their paths. held_out: cohorts to keep
    frozen, by default those whose name begins with "h". runs: bootstrap samples. shown: the rows'
    folder, as captions name it. Deterministic under its seed."""
    bank = open_bank(folders, held_out=held_out)
    command = f"mergeprobe bench report --rows {shown}"
    command += "".join(f" --held-out {name}" for name in held_out)
    command += f" --runs {runs}" if runs != Options("").runs else ""
    pages = report_pages(bank, Options(command, runs, seed), say)
    written = []
    for page in pages:
        figures = [part for part in page.parts if isinstance(part, Figure)]
        texts = [(page.name, page.markdown()), *((f.name, f.svg) for f in figures)]
        for name, text in texts:
            target = Path(out) / name
            with atomic_file(target) as temporary:
                temporary.write_text(text, "utf-8")
            written.append(target)
    return written


def report_pages(
    bank: Bank, options: Options, say: Callable[[str], None] = lambda message: None
) -> list[Page]:
    fold = bank.held_out_fold()
    found = models = decided = None
    if fold is not None:
        say("forecasters, fitted without the held-out cohorts")
        fitters = held_out_forecasters(options.seed)
        if bank.audits is not None:
            fitters = fitters | {AUDIT: audit_alone(bank.audits)}
        models = fitted(bank.rows, fold, fitters)
        found = forecast_by(bank.rows, fold.test, models)
    say("skill on held-out cohorts")
    slices = Slices(bank, found, options) if found is not None else None
    skill = skill_page(slices)
    if slices is not None:
        first, *rest = skill.parts
        skill = replace(skill, parts=(first, *skill_figures(slices), *rest))
    transfer = transfer_page(bank, found, options, say)
    say("ablations")
    ablations = ablations_page(bank, options)
    say("decisions")
    if models is not None:
        decided = decide(bank, models)
    decisions = decisions_page(bank, decided, options)
    pages = [skill, transfer, ablations, decisions]
    return [front_page(bank, pages, options), *pages]


def front_page(bank: Bank, pages: Sequence[Page], options: Options) -> Page:
    """What there is, what each page says, and everything that could not be computed."""
    intro = (
        f"Made from committed rows by `{options.command}`; the same rows and seed give the same "
        "pages. Retention is the share of an adapter's own gain in loss that a merge leaves, "
        "clipped to [−1, 1.2].\n\n" + "\n".join(f"- [{page.title}]({page.name})" for page in pages)
    )
    lacking = [
        [f"{page.title}: {part.title}", part.needs]
        for page in pages
        for part in page.parts
        if isinstance(part, Needs)
    ]
    parts: list[Table | Figure | Needs] = [cohorts_table(bank, options)]
    if lacking:
        caption = f"`{options.command}`, seed {options.seed}. Places in the pages that stay empty."
        parts.append(Table("What could not be computed", caption, ("table", "needs"), lacking))
    return Page("README.md", "Results", intro, parts)


def cohorts_table(bank: Bank, options: Options) -> Table:
    rows = []
    for name in sorted(bank.tables["adapters"]["cohort"].unique().to_list()):
        cohort = bank.cohort(name)
        mine = bank.rows.cohort == name
        role = "held out" if name in bank.held_out else "trained on"
        if role == "trained on" and name not in bank.trained:
            role = "transfer only"
        target = bank.rows.target[mine]
        rows.append(
            [
                name,
                role,
                listed(sorted(cohort["adapters"]["base"].unique().to_list())),
                listed(sorted(cohort["adapters"]["family"].unique().to_list())),
                ", ".join(percent(p) for p in sorted(cohort["pairs"]["point"].unique().to_list())),
                str(cohort["outcomes"].height),
                number(float((target < 0.8).mean()) if len(target) else float("nan")),
            ]
        )
    dropped = "; ".join(f"{count} {why}" for why, count in bank.rows.dropped.items())
    caption = (
        f"`{options.command}`. One run (seed) an adapter. Outcome rows without a retention are "
        f"left out of every score: {dropped or 'none'}. No SD or SE: counts."
    )
    columns = ("cohort", "role", "base", "families", "points", "outcome rows", "share of ρ < 0.8")
    return Table("Cohorts", caption, columns, rows)
