"""The data behind the interactive parts, as plain JSON; page scripts draw it."""

from __future__ import annotations

import json
from typing import Any

from mergeprobe.errors import DataError
from mergeprobe.report.data import PairValues, ReportData, adapter_names, forecasts


def payload(data: ReportData) -> dict[str, Any]:
    """Everything the scripts need; a part without data is empty."""
    plan = data.plan
    return {
        "names": adapter_names(data),
        "scatter": _scatter(data),
        "pairs": _pairs(data),
        "frontier": _frontier(data),
        "floor": plan.min_retention if plan else None,
        "full": plan.full_routing_parameters if plan else None,
        "layers": [[r.a, r.b, r.layer, r.kind, r.value] for r in data.layers],
        "layersLabel": data.layers_label,
        "curves": _curves(data),
        "probes": data.probe_steps,
    }


def as_script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    plain = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        plain = plain.replace(sign, f"\\u{ord(sign):04x}")
    return plain


def _scatter(data: ReportData) -> list[dict[str, Any]]:
    known, names = forecasts(data), adapter_names(data)
    return [
        {
            "index": names.index(row.name),
            "name": row.name,
            "forecast": known[row.name][0],
            "low": known[row.name][1],
            "high": known[row.name][2],
            "measured": row.measured,
            "se": row.measured_se,
        }
        for row in data.adapters
        if row.measured is not None and row.name in known
    ]


def _frontier(data: ReportData) -> dict[str, Any]:
    points = data.plan.frontier if data.plan else ()
    return {
        "measured": [
            {
                "x": row.resident_parameters,
                "y": row.worst,
                "mean": row.mean,
                "label": row.label,
                "chosen": row.chosen,
            }
            for row in data.partitions
            if row.worst is not None and row.resident_parameters is not None
        ],
        "forecast": [
            {
                "x": point.resident_parameters,
                "y": point.worst_retention,
                "mean": point.mean_retention,
                "label": " | ".join(" + ".join(group) for group in point.groups),
            }
            for point in sorted(points, key=lambda point: point.resident_parameters)
        ],
    }


def _curves(data: ReportData) -> list[dict[str, Any]]:
    lines: dict[str, list[tuple[int, float | None]]] = {}
    for point in data.curves:
        lines.setdefault(point.adapter, []).append((point.step, point.loss))
    names = adapter_names(data)
    result = []
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        steps, losses = zip(*points, strict=True)
        result.append({"index": names.index(name), "name": name, "x": steps, "y": losses})
    return result


def _pairs(data: ReportData) -> list[dict[str, Any]]:
    return [_matrix(pairs, adapter_names(data)) for pairs in data.pair_values if pairs.values]


def _matrix(pairs: PairValues, known: list[str]) -> dict[str, Any]:
    found = {_ends(key, known, pairs.name): value for key, value in pairs.values.items()}
    names = list(dict.fromkeys([*known, *(name for ends in found for name in ends)]))
    names = [name for name in names if any(name in ends for ends in found)]
    grid = [[found.get((a, b)) for b in names] for a in names]
    if pairs.symmetric:
        size = range(len(names))
        grid = [[grid[j][i] if grid[i][j] is None else grid[i][j] for j in size] for i in size]
    return {
        "label": pairs.label or pairs.name,
        "unit": pairs.unit,
        "summary": pairs.summary,
        "symmetric": pairs.symmetric,
        "center": pairs.center,
        "names": names,
        "index": [known.index(name) if name in known else None for name in names],
        "grid": grid,
    }


def _ends(key: str, known: list[str], matrix: str) -> tuple[str, str]:
    """The two adapters of "a|b"; names may hold "|" themselves as long as they are known."""
    cuts = [(key[:at], key[at + 1 :]) for at, sign in enumerate(key) if sign == "|"]
    named = [cut for cut in cuts if cut[0] in known and cut[1] in known]
    if len(named) == 1:
        return named[0]
    if len(cuts) == 1:
        return cuts[0]
    raise DataError(
        f"pair matrix '{matrix}' has the key {key!r}; expected 'a|b' with two adapters' names"
    )
