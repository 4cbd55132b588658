"use strict";
// Heat maps: the pair matrices as tables (their numbers can be read, selected and searched),
// the layers with plotly.

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const stops = () => [0, 1, 2, 3, 4, 5, 6].map((i) => css("--d" + i));

// position in [-1, 1] -> colour; 0 is neutral, below is orange, above is blue
function tint(position) {
  const at = (Math.max(-1, Math.min(1, position)) + 1) * 3, i = Math.min(5, Math.floor(at));
  const [a, b] = stops().slice(i, i + 2).map(rgb);
  return a.map((v, k) => Math.round(v + (b[k] - v) * (at - i)));
}

function inkOn(background) {
  const light = background.map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
  return luminance > 0.179 ? "#000000" : "#ffffff"; // at least 4.5 : 1 on any tint
}

// How a set of values is coloured: {place: value -> [-1, 1], low, high, diverging}
function scaleOf(values, center, unit) {
  const real = values.filter(known);
  const low = Math.min(...real), high = Math.max(...real);
  if (center === null && unit === "retention") center = 1;
  if (center === null && low < 0 && high > 0) center = 0;
  if (center === null) {
    // one sign only: from nothing (or the smallest) to the largest in one colour
    const from = low >= 0 ? Math.min(low, 0) : high, to = low >= 0 ? high : low;
    const span = to - from || 1;
    return { place: (v) => low >= 0 ? (v - from) / span : -(v - from) / span,
      low: Math.min(from, to), high: Math.max(from, to), diverging: false };
  }
  // retention has a fixed scale, so that forecast and measured can be compared by eye
  const span = unit === "retention" ? 0.5
    : Math.max(Math.abs(low - center), Math.abs(high - center)) || 1;
  return { place: (v) => (v - center) / span, low: center - span, high: center + span,
    diverging: true, beyond: unit === "retention" };
}

function digitsFor(values) {
  const top = Math.max(...values.filter(known).map(Math.abs));
  return top >= 100 ? 0 : top >= 10 ? 1 : top >= 0.1 || top === 0 ? 2 : top >= 0.01 ? 3 : 4;
}

const element = (tag, content, className) => {
  const made = document.createElement(tag);
  if (content !== undefined) made.textContent = content;
  if (className) made.className = className;
  return made;
};

function matrix(choice) {
  const { names, grid, unit } = choice, values = grid.flat();
  const scale = scaleOf(values, choice.center, unit), digits = digitsFor(values);
  const table = element("table", undefined, "matrix"), head = table.createTHead().insertRow();
  if (names.length > 10) table.classList.add("dense");
  if (names.length > 10 || narrow()) table.classList.add("upright");
  head.append(element("th", choice.symmetric ? "" : "acts ↓  on →", "corner"));
  for (const name of names) {
    const cell = element("th");
    cell.scope = "col";
    cell.append(element("span", short(name, 20)));
    head.append(cell);
  }
  const body = table.createTBody();
  names.forEach((a, i) => {
    const row = body.insertRow(), title = element("th", short(a, 20));
    title.scope = "row";
    row.append(title);
    names.forEach((b, j) => {
      const value = grid[i][j], cell = element("td", known(value) ? fixed(value, digits) : "");
      if (known(value)) {
        const background = tint(scale.place(value));
        cell.style.background = `rgb(${background})`;
        cell.style.color = inkOn(background);
        cell.title = `${a} ${choice.symmetric ? "and" : "→"} ${b}: ${value} ${unit}`;
      } else {
        cell.className = "none";
        cell.textContent = i === j ? "·" : "–";
      }
      row.append(cell);
    });
  });
  return [table, legend(scale, digits, unit)];
}

function legend(scale, digits, unit) {
  const line = element("p", undefined, "scale"), strip = element("i");
  const colours = [];
  for (let i = 0; i <= 20; i++) {
    colours.push(`rgb(${tint(scale.place(scale.low + (scale.high - scale.low) * i / 20))})`);
  }
  strip.style.background = `linear-gradient(to right, ${colours})`;
  line.append(element("span", (scale.beyond ? "≤ " : "") + fixed(scale.low, digits)), strip,
    element("span", (scale.beyond ? "≥ " : "") + fixed(scale.high, digits)
      + (unit ? ` (${unit})` : "")));
  return line;
}

function pairs() {
  for (const at of [0, 1]) showPair(document.getElementById("pairs-" + at),
    document.getElementById("switch-pairs-" + at));
}

function showPair(box, select) {
  if (!box) return;
  const choice = DATA.pairs[select.selectedIndex];
  const scroll = element("div", undefined, "scroll");
  const [table, scale] = matrix(choice);
  scroll.append(table);
  box.replaceChildren(scroll, scale, element("p", (choice.symmetric
    ? "The same in both directions. " : "") + choice.summary, "caption"));
}

// -- interference by layer ----------------------------------------------------------------------

function layerChoices() {
  const found = [...new Set(DATA.layers.map(([a, b]) => JSON.stringify([a, b])))];
  return [null, ...found.map((key) => JSON.parse(key))];
}

const mean = (values) => values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;

function layers() {
  if (!document.getElementById("chart-layers")) return;
  const choice = layerChoices()[document.getElementById("switch-layers").selectedIndex];
  const rows = choice ? DATA.layers.filter((r) => r[0] === choice[0] && r[1] === choice[1])
    : DATA.layers;
  const size = narrow() ? 9 : 16;
  const rowOf = choice ? (r) => r[3] || "all modules"
    : (r) => `${short(r[0], size)} → ${short(r[1], size)}`;
  const cells = new Map();
  for (const row of rows) {
    const name = rowOf(row), line = cells.get(name) || new Map();
    if (known(row[4])) line.set(row[2], (line.get(row[2]) || []).concat(row[4]));
    cells.set(name, line);
  }
  const steps = [...new Set(rows.map((r) => r[2]))].sort((a, b) => a - b);
  const grid = [...cells].map(([name, line]) =>
    ({ name, line: steps.map((x) => mean(line.get(x) || [])) }));
  if (!choice) grid.sort((a, b) => mean(b.line.filter(known)) - mean(a.line.filter(known)));
  grid.reverse(); // plotly draws the first row at the bottom
  // one loud layer must not pale all others: the strongest twentieth shares the last colour
  const z = grid.map((row) => row.line), values = z.flat().filter(known).sort((a, b) => a - b);
  const top = values[Math.floor(0.95 * (values.length - 1))];
  const scale = scaleOf(values.map((v) => Math.min(v, top)), null, "");
  const ends = [];
  for (let i = 0; i <= 20; i++) {
    const value = scale.low + (scale.high - scale.low) * i / 20;
    ends.push([i / 20, `rgb(${tint(scale.place(value))})`]);
  }
  const box = document.getElementById("chart-layers");
  box.style.height = Math.max(190, 110 + grid.length * (narrow() ? 22 : 26)) + "px";
  draw("layers", [{ type: "heatmap", x: steps, y: grid.map((_, i) => i), z, colorscale: ends,
    zmin: scale.low, zmax: scale.high, xgap: 1, ygap: 2, text: grid.map((row) =>
      steps.map(() => plain(row.name))),
    hovertemplate: "%{text}<br>layer %{x}: %{z:.3g}<extra></extra>",
    colorbar: { orientation: "h", thickness: 10, len: narrow() ? 0.6 : 0.3, lenmode: "fraction",
      x: 1, xanchor: "right", y: 1, yanchor: "bottom", ypad: 4, outlinewidth: 0, nticks: narrow() ? 3 : 5,
      tickfont: { color: css("--muted") } } }], {
    margin: { l: 20, r: 14, t: 40, b: 54 },
    xaxis: { title: { text: "layer", standoff: 14 }, showgrid: false, nticks: narrow() ? 6 : 16 },
    yaxis: { showgrid: false, tickvals: grid.map((_, i) => i), ticks: "",
      ticktext: grid.map((row) => plain(row.name)), tickfont: { size: narrow() ? 11 : 13 } } });
}

// -- start --------------------------------------------------------------------------------------

function fill(id, texts, changed) {
  const select = document.getElementById("switch-" + id);
  if (!select) return;
  for (const words of texts) select.append(element("option", words));
  select.addEventListener("change", changed);
}

function drawAll() {
  for (const part of [scatter, pairs, frontier, layers, curves]) part();
}

for (const at of [0, 1]) {
  fill("pairs-" + at, DATA.pairs.map((choice) => choice.label), pairs);
  const select = document.getElementById("switch-pairs-" + at);
  if (select) select.selectedIndex = at; // the second starts on the second matrix
}
fill("layers", layerChoices().map((ends) => ends ? `${ends[0]} → ${ends[1]}, by kind of module`
  : `all pairs: ${DATA.layersLabel}`), layers);
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  drawAll();
});
