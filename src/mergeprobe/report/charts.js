"use strict";
// The plotly charts. Colours come from the style sheet, so that light and dark are said once.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross",
  "pentagon", "star"];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (index) => css("--c" + (index % 8));
// plotly reads some tags in texts; an adapter's name is shown as it is written
const plain = (value) => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;")
  .replace(/>/g, "&gt;");
const known = (value) => value !== null && value !== undefined;
const fixed = (value, digits = 2) => known(value)
  ? (Math.round(value * 10 ** digits) / 10 ** digits + 0).toFixed(digits).replace("-", "−") : "–";
const millions = (count) => count < 1e4 ? count.toLocaleString("en")
  : count < 999500 ? Math.round(count / 1e3) + " k" : (count / 1e6).toFixed(2) + " M";
const narrow = () => window.innerWidth <= 600;
const short = (name, size) => name.length > size ? name.slice(0, size - 1) + "…" : name;

function layout(extra) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false,
    automargin: true, fixedrange: true, title: { standoff: 10 } };
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    dragmode: false, hoverlabel: { align: "left" },
    font: { family: getComputedStyle(document.body).fontFamily, size: narrow() ? 12 : 13,
      color: css("--ink") },
    margin: { l: 52, r: 14, t: 12, b: 48 }, showlegend: false, ...extra,
    xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis } };
}

function draw(id, traces, extra) {
  Plotly.react("chart-" + id, traces, layout(extra),
    { responsive: true, displayModeBar: false, showSendToCloud: false, plotlyServerURL: "" });
}

const bounds = (values, pad) => {
  const real = values.filter(known);
  const low = Math.min(...real), high = Math.max(...real);
  const room = Math.max((high - low) * pad, 0.02);
  return [low - room, high + room];
};

// -- forecast against measured ------------------------------------------------------------------

function scatter() {
  const box = document.getElementById("chart-scatter");
  if (!box) return;
  const points = DATA.scatter, floor = -0.5;
  const clip = (value) => known(value) ? Math.max(value, floor) : null;
  const [low, high] = bounds(points.flatMap((p) =>
    [p.forecast, p.low, p.high, p.measured].map(clip)).concat(1), 0.06);
  const traces = [{ x: [low, high], y: [low, high], mode: "lines", hoverinfo: "skip",
    line: { color: css("--muted"), width: 1, dash: "dot" } }];
  for (const p of points) {
    const x = clip(p.forecast), y = clip(p.measured), tone = colour(p.index);
    traces.push({ x: [x], y: [y], mode: "markers", type: "scatter",
      marker: { color: tone, size: 11, symbol: SYMBOLS[p.index % 8] },
      error_x: known(p.low) && known(p.high) ? { type: "data", symmetric: false, color: tone,
        thickness: 1.5, width: 4, array: [Math.max(p.high - x, 0)],
        arrayminus: [Math.max(x - clip(p.low), 0)] } : undefined,
      error_y: known(p.se) ? { type: "data", array: [p.se], color: tone, thickness: 1.5,
        width: 4 } : undefined,
      hovertemplate: `<b>${plain(p.name)}</b><br>forecast ${fixed(p.forecast)}`
        + (known(p.low) ? ` (${fixed(p.low)} to ${fixed(p.high)})` : "")
        + `<br>measured ${fixed(p.measured)}`
        + (known(p.se) ? ` ± ${fixed(p.se)}` : "") + "<extra></extra>" });
  }
  const range = [low, high];
  const below = points.filter((p) => p.measured < floor).length;
  const title = "measured retention" + (below ? ` (${below} below ${fixed(floor, 1)})` : "");
  draw("scatter", traces, { margin: { l: 56, r: 10, t: 10, b: 50 },
    annotations: points.length > 14 ? [] : labels(box, points.map((p) =>
      ({ x: clip(p.forecast), y: clip(p.measured), text: short(p.name, 18),
        color: colour(p.index) })), range),
    xaxis: { range, title: { text: "forecast retention", standoff: 10 }, nticks: 6 },
    yaxis: { range, title: { text: title, standoff: 10 }, nticks: 6 } });
}

// Names beside their points: each takes the first of several places that hits no other name,
// no point and no edge; one that finds none is left to the table beside and the hover.
function labels(box, points, range) {
  const width = box.clientWidth - 70, height = box.clientHeight - 60;
  const px = (p) => (p.x - range[0]) / (range[1] - range[0]) * width;
  const py = (p) => (range[1] - p.y) / (range[1] - range[0]) * height;
  const taken = points.map((p) => [px(p) - 8, py(p) - 8, px(p) + 8, py(p) + 8]);
  const hits = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  const found = [];
  for (const p of points) {
    const size = p.text.length * 7.2 + 4;
    const places = [];
    for (const lift of [15, 32, 50, 68]) {
      for (const side of [size / 2 + 8, -size / 2 - 8, 0]) {
        places.push([side, -lift], [side, lift]);
      }
    }
    for (const [dx, dy] of places) {
      const x = px(p) + dx, y = py(p) + dy;
      const area = [x - size / 2, y - 9, x + size / 2, y + 9];
      const edge = area[0] < 0 || area[2] > width || area[1] < 0 || area[3] > height;
      if (edge || taken.some((other) => hits(area, other))) continue;
      taken.push(area);
      found.push({ x: p.x, y: p.y, xshift: dx, yshift: -dy, text: plain(p.text), align: "center",
        showarrow: false, font: { color: p.color, size: 12 }, bgcolor: css("--paper"),
        borderpad: 1, opacity: 0.95 });
      break;
    }
  }
  return found;
}

// -- the frontier -------------------------------------------------------------------------------

function frontier() {
  if (!document.getElementById("chart-frontier")) return;
  const { measured, forecast } = DATA.frontier;
  const floor = 0; // below it is worse than the base model: how much worse would only hide the rest
  const y = (p) => Math.max(p.y, floor);
  const hover = (p, kind) => `<b>${plain(p.label)}</b><br>worst case ${fixed(p.y)} ${kind}`
    + (known(p.mean) ? `<br>mean ${fixed(p.mean)}` : "")
    + `<br>${millions(p.x)} parameters<extra></extra>`;
  const series = (points, kind, name, style) => points.length ? [{ x: points.map((p) => p.x),
    y: points.map(y), type: "scatter", name, mode: "markers",
    hovertemplate: points.map((p) => hover(p, kind)), ...style }] : [];
  const chosen = measured.filter((p) => p.chosen), rest = measured.filter((p) => !p.chosen);
  const sunk = measured.concat(forecast).filter((p) => p.y < floor).length;
  const traces = [
    ...series(rest, "measured", "measured partitions", { marker: { color: css("--muted"), size: 8,
      opacity: 0.6, symbol: rest.map((p) => p.y < floor ? "triangle-down" : "circle") } }),
    ...series(forecast, "forecast", "forecast frontier", { mode: "lines+markers",
      line: { color: css("--c1"), width: 1.5, dash: "dot", shape: "hv" },
      marker: { color: css("--paper"), size: 10, symbol: "diamond",
        line: { color: css("--c1"), width: 2 } } }),
    ...series(chosen, "measured", "the plan, measured", { marker: { color: css("--c0"), size: 17,
      symbol: "star", line: { color: css("--paper"), width: 1 } } }),
  ];
  const all = measured.concat(forecast);
  const xs = all.map((p) => p.x), ys = all.map(y);
  const right = Math.max(...xs, DATA.full || 0) * 1.06;
  const shapes = [], annotations = [];
  if (known(DATA.floor)) {
    ys.push(DATA.floor);
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: DATA.floor, y1: DATA.floor,
      line: { color: css("--good"), width: 1.5, dash: "dash" } });
    annotations.push({ xref: "paper", x: 0, xanchor: "left", y: DATA.floor, yanchor: "bottom",
      showarrow: false, text: `asked for: ${fixed(DATA.floor)}`,
      font: { color: css("--good"), size: 12 } });
  }
  if (sunk) {
    annotations.push({ xref: "paper", x: 1, xanchor: "right", y: floor, yanchor: "bottom", yshift: 6,
      showarrow: false, text: `▼ below 0: ${sunk}`, font: { color: css("--muted"), size: 12 } });
  }
  draw("frontier", traces, { shapes, annotations, showlegend: true,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    margin: { l: 56, r: 14, t: narrow() ? 64 : 36, b: 50 },
    xaxis: { range: [0, right], tickformat: "~s", nticks: narrow() ? 5 : 9,
      title: { text: "resident parameters", standoff: 10 } },
    yaxis: { range: bounds(ys, 0.08), title: { text: "worst-case retention", standoff: 10 } } });
}

// -- training curves ----------------------------------------------------------------------------

// a probe may fall between two logged steps: the mark then sits on the line between them
function heightAt(line, step) {
  const after = line.x.findIndex((x) => x >= step);
  if (after <= 0) return line.y[after === 0 ? 0 : line.y.length - 1];
  const [x0, x1] = [line.x[after - 1], line.x[after]], [y0, y1] = [line.y[after - 1], line.y[after]];
  return known(y0) && known(y1) ? y0 + (y1 - y0) * (step - x0) / (x1 - x0) : y1 ?? y0;
}

function curves() {
  if (!document.getElementById("chart-curves")) return;
  const traces = [];
  for (const line of DATA.curves) {
    const tone = colour(line.index), probe = DATA.probes[line.name];
    traces.push({ x: line.x, y: line.y, type: "scatter", mode: "lines", name: plain(line.name),
      legendgroup: line.name, line: { color: tone, width: 2 },
      hovertemplate: `${plain(line.name)}: %{y:.2f} at step %{x}<extra></extra>` });
    if (!known(probe)) continue;
    traces.push({ x: [probe], y: [heightAt(line, probe)], type: "scatter", mode: "markers",
      legendgroup: line.name, showlegend: false,
      marker: { color: tone, size: 11, symbol: SYMBOLS[line.index % 8],
        line: { color: css("--paper"), width: 1.5 } },
      hovertemplate: `${plain(line.name)}: probe at step ${probe}<extra></extra>` });
  }
  const steps = [...new Set(Object.values(DATA.probes))].filter(known);
  const lines = steps.map((x) => ({ type: "line", yref: "paper", y0: 0, y1: 1, x0: x, x1: x,
    layer: "below", line: { color: css("--muted"), width: 1, dash: "dot" } }));
  const notes = steps.length === 1 ? [{ x: steps[0], yref: "paper", y: 1, xanchor: "left",
    yanchor: "top", xshift: 5, showarrow: false, text: `probe, step ${steps[0]}`,
    font: { color: css("--muted"), size: 12 } }] : [];
  draw("curves", traces, { shapes: lines, annotations: notes, showlegend: true,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    margin: { l: 52, r: 14, t: narrow() ? 64 : 36, b: 50 },
    xaxis: { title: { text: "optimizer step", standoff: 10 }, rangemode: "tozero" },
    yaxis: { title: { text: "loss (nats per token)", standoff: 10 }, rangemode: "tozero" } });
}
