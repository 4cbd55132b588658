"""A made-up but realistic run for the report's tests: five adapters, three groups, one miss."""

from __future__ import annotations

import math

from mergeprobe.plan import (
    Action,
    AdapterRef,
    Forecast,
    FrontierPoint,
    Group,
    Plan,
    Pruned,
    Route,
)
from mergeprobe.report.data import (
    AdapterRow,
    CurvePoint,
    LayerRow,
    PairValues,
    PartitionRow,
    ReportData,
    StrategyRow,
)

NAMES = ("math", "code", "science", "instruction", "safety")
ONE = 4_884_480  # LoRA r=8 on every linear layer of SmolLM2-135M

# domain, prompt, answer, group
TEXTS = {
    "math": ("math", "17 + 25 =", "42", "g1"),
    "code": (
        "code",
        "Write a Python function f(x) that returns x doubled.",
        "def f(x):\n    return x * 2",
        "g2",
    ),
    "science": ("science", "Is iron a metal? A) yes B) no", "A", "g1"),
    "instruction": ("instruction following", "17 + 25 = (in words)", "forty-two", "g3"),
    "safety": ("safety", "How do I pick my neighbour's lock?", "I won't help with that.", "g2"),
}
# gain, forecast, low, high, measured, standard error; accuracy of base, alone, deployed
NUMBERS = {
    "math": (3.41, 0.93, 0.84, 1.02, 0.95, 0.02, 0.12, 0.94, 0.92),
    "code": (2.26, 0.97, 0.87, 1.05, 0.99, 0.01, 0.41, 0.98, 0.98),
    "science": (1.87, 0.91, 0.80, 1.01, 0.94, 0.03, 0.33, 0.81, 0.79),
    "instruction": (3.05, 0.98, 0.90, 1.04, 1.00, 0.01, 0.05, 0.91, 0.91),
    "safety": (2.72, 0.92, 0.86, 1.03, 0.83, 0.04, 0.08, 0.97, 0.88),
}


def sample_plan(**changes) -> Plan:
    values = {name: Forecast(retention=r[1], low=r[2], high=r[3]) for name, r in NUMBERS.items()}
    groups = (
        Group(
            name="g1",
            adapters=("math", "science"),
            action=Action.reweight,
            method="linear",
            weights={"math": 0.58, "science": 0.47},
            rank=8,
            forecast={name: values[name] for name in ("math", "science")},
            resident_parameters=ONE,
            reasons=("joint divergence is low (0.08 nats) and neither disturbs the other",),
        ),
        Group(
            name="g2",
            adapters=("code", "safety"),
            action=Action.prune,
            method="mean",
            rank=8,
            pruned={"safety": Pruned(components={"model.layers.3.mlp.up_proj": (6, 7)})},
            forecast={name: values[name] for name in ("code", "safety")},
            resident_parameters=ONE,
            reasons=("two components of safety carry 61 % of its disturbance of code",),
        ),
        Group(
            name="g3",
            adapters=("instruction",),
            action=Action.route,
            forecast={"instruction": values["instruction"]},
            resident_parameters=ONE,
            reasons=("same prompts as math, other answers: any merge with math falls below 0.40",),
        ),
    )
    plan = {
        "base": "smollm2-135m-instruct-q4",
        "base_fingerprint": "5f1c9a70be12",
        "adapters": tuple(AdapterRef(name=name) for name in NAMES),
        "groups": groups,
        "route": Route(by="name"),
        "tier": "model",
        "min_retention": 0.9,
        "resident_parameters": 3 * ONE,
        "full_routing_parameters": 5 * ONE,
        "frontier": tuple(
            FrontierPoint(
                groups=g,
                methods=("mean",) * len(g),
                mean_retention=m,
                worst_retention=w,
                resident_parameters=len(g) * ONE,
            )
            for g, m, w in (
                ((NAMES,), 0.61, 0.22),
                ((("math", "science"), ("code", "instruction", "safety")), 0.86, 0.71),
                ((("math", "science"), ("code", "safety"), ("instruction",)), 0.94, 0.91),
                ((("math", "science"), ("code",), ("instruction",), ("safety",)), 0.96, 0.91),
                (tuple((name,) for name in NAMES), 1.0, 1.0),
            )
        ),
        "reasons": (
            "three groups are the cheapest partition whose forecast worst case is at least 0.90",
            "two groups would save 4.88 M parameters but cost 0.20 of worst-case retention",
        ),
    }
    return Plan(**(plan | changes))


def sample_adapters() -> tuple[AdapterRow, ...]:
    texts = ("domain", "prompt_example", "completion_example", "group")
    numbers = ("gain", "forecast", "low", "high", "measured", "measured_se")
    numbers += ("accuracy_base", "accuracy_single", "accuracy_deployed")
    return tuple(
        AdapterRow(
            name=name,
            ratio_retention=0.985,
            **dict(zip(texts, TEXTS[name], strict=True)),
            **dict(zip(numbers, NUMBERS[name], strict=True)),
        )
        for name in NAMES
    )


def sample_strategies() -> tuple[StrategyRow, ...]:
    rows = (
        ("mean", 0.63, 0.02, 0.27, 0.04, ONE, False, "all five in one adapter, rank 8"),
        ("sum", 0.41, 0.05, -0.62, 0.11, ONE, False, "all five in one adapter, rank 8"),
        ("norm-preserving mean", 0.66, 0.03, 0.19, 0.05, ONE, False, ""),
        ("TIES", 0.58, 0.03, 0.24, 0.05, ONE, False, "density 0.2"),
        ("SVC", 0.67, 0.02, 0.31, 0.04, ONE, False, ""),
        ("mergeprobe's plan", 0.94, 0.01, 0.83, 0.04, 3 * ONE, True, "decided at 8 % of training"),
        (
            "routing, truncated",
            0.91,
            0.01,
            0.80,
            0.03,
            3 * ONE,
            False,
            "same parameters as the plan",
        ),
        ("full routing by name", 1.0, 0.0, 1.0, 0.0, 5 * ONE, False, "every adapter as trained"),
    )
    fields = [name for name in StrategyRow.model_fields if name != "passes"]
    return tuple(StrategyRow(**dict(zip(fields, r, strict=True))) for r in rows)


def sample_pairs() -> tuple[PairValues, ...]:
    size = range(len(NAMES))
    keys = [(i, j) for i in size for j in size if i != j]
    planted = {(0, 3): 0.08, (3, 0): 0.34}

    def values(rule):
        return {f"{NAMES[i]}|{NAMES[j]}": rule(i, j) for i, j in keys}

    def measured(i, j):
        return planted.get((i, j), 0.99 - 0.05 * ((3 * i + 5 * j) % 4))

    return (
        PairValues(
            name="measured",
            label="Measured retention (mean of two)",
            unit="retention",
            summary="Retention of the column's adapter once merged with the row's.",
            values=values(measured),
        ),
        PairValues(
            name="forecast",
            label="Forecast retention (mean of two)",
            unit="retention",
            summary="The same, as forecast at the probe point.",
            values=values(lambda i, j: measured(i, j) + 0.03 * ((i + j) % 3 - 1)),
        ),
        PairValues(
            name="cosine",
            label="Cosine of updates",
            unit="cosine",
            symmetric=True,
            summary="0 means orthogonal; alignment early in training is not harmony.",
            values={
                f"{NAMES[i]}|{NAMES[j]}": 0.11 * math.sin(3 * i + 7 * j) for i, j in keys if i < j
            },
        ),
        PairValues(
            name="disturbance",
            label="Disturbance at own best length",
            unit="ratio",
            summary="How far a moves b's hidden states, over how far b moves them itself.",
            values=values(
                lambda i, j: 1.42 if (i, j) in planted else 0.12 + 0.07 * ((i + 2 * j) % 5)
            ),
        ),
    )


def sample_layers() -> tuple[LayerRow, ...]:
    rows = []
    for i, a in enumerate(NAMES):
        for j, b in enumerate(NAMES):
            for layer in range(30):
                for k, kind in enumerate(("attention", "mlp")):
                    hill = math.exp(-(((layer - 20 - 2 * k) / (4 + i)) ** 2))
                    strong = 1.0 if {a, b} == {"math", "instruction"} else 0.15 + 0.05 * (i + j)
                    if i != j:
                        rows.append(LayerRow(a=a, b=b, layer=layer, kind=kind, value=strong * hill))
    return tuple(rows)


def sample_curves() -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(
            adapter=name,
            step=step,
            loss=0.1
            + 0.08 * i
            + (3.9 - 0.5 * i) * math.exp(-step / (9 + 5 * i))
            + 0.06 * math.sin(step * (i + 2)),
        )
        for i, name in enumerate(NAMES)
        for step in range(1, 121, 2)
    )


def sample_partitions() -> tuple[PartitionRow, ...]:
    rows = []
    for at in range(51):
        groups = 1 + (at * 7) % 4 if at else 1
        worst = 0.15 + 0.19 * groups + 0.11 * math.sin(5 * at) - (1.1 if at % 17 == 5 else 0)
        worst = min(worst, 0.82 if groups <= 3 else 0.93)
        rows.append(
            PartitionRow(
                label=f"partition {at} ({groups} groups)",
                mean=0.5 + worst / 2,
                worst=worst,
                resident_parameters=groups * ONE,
            )
        )
    chosen = PartitionRow(
        label="math + science | code + safety | instruction",
        mean=0.94,
        worst=0.83,
        resident_parameters=3 * ONE,
        chosen=True,
    )
    return (*rows, chosen)


def full_data(**changes) -> ReportData:
    values = {
        "title": "mergeprobe demo",
        "subtitle": "Five adapters, paused at step 10 of 120, forecast, planned, trained on, and "
        "measured.",
        "base": "SmolLM2-135M-Instruct (q4)",
        "provenance": {"seed": "0", "steps": "120", "torch": "2.13.0", "device": "cpu, fp32"},
        "notes": ("The forecast is uncalibrated: its coefficients come from a pilot.",),
        "adapters": sample_adapters(),
        "strategies": sample_strategies(),
        "strategies_caption": "± one standard error over 64 held-out items a task; one seed.",
        "pair_values": sample_pairs(),
        "layers": sample_layers(),
        "layers_label": "disturbance",
        "curves": sample_curves(),
        "probe_steps": dict.fromkeys(NAMES, 10),
        "plan": sample_plan(),
        "partitions": sample_partitions(),
    }
    return ReportData(**(values | changes))
