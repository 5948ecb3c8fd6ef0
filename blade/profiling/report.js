// The page: what was measured, decoded, and its charts, which show one step and one head.

const report = JSON.parse(byId("report-data").textContent);
const arrays = Object.fromEntries(
  Object.entries(report.arrays).map(([name, array]) => [name, array && decoded(array)]),
);
const [groups, layers, heads] = arrays.assignment.shape;
const cells = arrays.maps.shape.at(-1);
const shown = { step: 0, layer: 0, head: 0, kind: null };

/** An array as { values, shape, at(...indices), from(...indices) }; `from` gives the place of a row or a picture. */
function decoded({ type, shape, data }) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const kinds = { uint8: Uint8Array, uint16: Uint16Array, float32: Float32Array };
  const values = new kinds[type](bytes.buffer);
  const from = (...indices) =>
    shape.reduce((place, size, axis) => place * size + (indices[axis] ?? 0), 0);
  return { values, shape, from, at: (...indices) => values[from(...indices)] };
}

const kindLetter = (kind) => kind[0].toUpperCase();
const groupOf = (step) => report.group_starts.findLastIndex((start) => start <= step);
const groupEnd = (group) => (report.group_starts[group + 1] ?? report.steps) - 1;
const candidateOf = (step, layer, head) => report.candidates[arrays.assignment.at(groupOf(step), layer, head)];
const errorOf = (step, layer, head) => arrays.head_error.at(groupOf(step), layer, head);

/** Stripes are kept only of the heads that have them: where each head's begin. */
const stripePlaces = new Map();
if (arrays.stripes) {
  arrays.assignment.values.forEach((candidate, item) => {
    if (report.candidates[candidate].kind === "vertical") stripePlaces.set(item, stripePlaces.size);
  });
}

/** The share of a patch's pairs that the shown head's pattern keeps. */
function keptShare(row, column) {
  const item = arrays.assignment.from(groupOf(shown.step), shown.layer, shown.head);
  const kept = stripePlaces.has(item)
    ? arrays.stripes.at(stripePlaces.get(item), column)
    : arrays.masks.at(arrays.assignment.values[item], row, column);
  return kept / 255;
}

/** The square roots of some queries' attention weights, as shares of the strongest one's; none if not sampled. */
function attentionRoots(row) {
  const part = Math.floor((shown.step * arrays.maps.shape[0]) / report.steps);
  const start = arrays.maps.from(part, shown.layer, shown.head, row);
  const roots = Array.from(arrays.maps.values.subarray(start, start + cells), (root) => root / 255);
  return roots.some(Boolean) ? roots : null; // weights of a query sum to 1, so that some are seen
}

// Sizes

const layerHeight = () => Math.min(320, Math.max(96, 12 * layers));
const squareCells = (width) => Math.max(3, Math.min(40, Math.floor(width / heads), Math.floor(540 / layers)));
const headMapSizes = { rows: layers, columns: heads, rowTitle: "layer", columnTitle: "head", cellSize: squareCells };
const layerStepSizes = {
  rows: layers, columns: report.steps, rowTitle: "layer", columnTitle: "step", height: layerHeight,
};
const patchSizes = {
  rows: cells, columns: cells, rowTitle: "queries", columnTitle: "keys", height: (width) => width,
  inShares: true,
};

function placeInVideo(cell) {
  return `${Math.round((100 * cell) / cells)} %`;
}

/** The lowest and highest of values, widened to tenths. */
function tenths(values) {
  const known = values.filter(Number.isFinite);
  const low = known.reduce((least, value) => Math.min(least, value), 1);
  const high = known.reduce((most, value) => Math.max(most, value), 0);
  return [Math.floor(10 * low) / 10, Math.max(Math.ceil(10 * high) / 10, Math.floor(10 * low) / 10 + 0.1)];
}

// What each kind explains

function showExplained() {
  const [low, high] = tenths(arrays.explained.values);
  showScale(byId("explained-scale"), percent(low), percent(high), unmeasured(arrays.explained.values));
  report.explained_kinds.forEach((kind, number) => {
    const title = element("h3", {}, kind);
    const chart = element("div");
    byId("explained").append(element("div", {}, title, chart));
    heatmap(chart, {
      ...layerStepSizes,
      label: `Attention weight that ${kind} patterns hold, by layer and step`,
      colour: (layer, step) => rampColour((arrays.explained.at(number, layer, step) - low) / (high - low)),
      describe: (layer, step) => [
        `${kind}: ${known(arrays.explained.at(number, layer, step))}`, `layer ${layer}, step ${step}`,
      ],
    });
  });
}

const unmeasured = (values) => (values.every(Number.isFinite) ? "" : "not measured");
const known = (share) => (Number.isFinite(share) ? percent(share) : "not measured");

// The heads' map and the shown head

function headColour(layer, head) {
  const { kind } = candidateOf(shown.step, layer, head);
  const colour = kindColours[kind];
  if (!shown.kind || shown.kind === kind) return colour;
  return colour.map((channel, place) => Math.round(0.15 * channel + 0.85 * rampColours[0][place]));
}

const headMap = () =>
  heatmap(byId("head-map"), {
    ...headMapSizes,
    gaps: true,
    label: "Pattern of every head at the step",
    colour: headColour,
    letter: (layer, head) => kindLetter(candidateOf(shown.step, layer, head).kind),
    describe: (layer, head) => [
      candidateOf(shown.step, layer, head).name, `layer ${layer}, head ${head}`,
      `error ${percent(errorOf(shown.step, layer, head))}`,
    ],
    choose: (layer, head) => show({ layer, head }),
  });

function patchLines(row, column) {
  const root = attentionRoots(row)?.[column];
  return [
    `queries at ${placeInVideo(row)}, keys at ${placeInVideo(column)}`,
    root === undefined ? "these queries were not sampled" : `attention ${percent(root * root)} of the strongest patch`,
    report.candidates[arrays.assignment.at(groupOf(shown.step), shown.layer, shown.head)].kind === "asa"
      ? "chosen anew for every input" : `${percent(keptShare(row, column))} of the pairs kept`,
  ];
}

const attentionMap = () =>
  heatmap(byId("attention-map"), {
    ...patchSizes,
    label: "Attention weight by patches of queries and keys",
    colour: (row, column) => rampColour(attentionRoots(row)?.[column]),
    describe: patchLines,
  });

const maskMap = () =>
  heatmap(byId("mask"), {
    ...patchSizes,
    label: "Share of the pairs that the pattern keeps, by patches of queries and keys",
    colour: (row, column) => rampColour(keptShare(row, column)),
    describe: patchLines,
  });

const runStrip = () =>
  heatmap(byId("run-strip"), {
    rows: 1, columns: report.steps, rowTitle: "", columnTitle: "", height: () => 22, bare: true,
    label: "The head's pattern by step",
    colour: (_, step) => kindColours[candidateOf(step, shown.layer, shown.head).kind],
    describe: (_, step) => [
      candidateOf(step, shown.layer, shown.head).name, `step ${step}`,
      `error ${percent(errorOf(step, shown.layer, shown.head))}`,
    ],
    choose: (_, step) => show({ step }),
  });

const headErrors = () =>
  Array.from({ length: report.steps }, (_, step) => [step, errorOf(step, shown.layer, shown.head)]);

const runError = () =>
  lineChart(byId("run-error"), {
    label: "The head's error by step", columnTitle: "step", rowTitle: "", columnName: "step", whole: true,
    series: [{ name: "error", points: headErrors() }], columnRange: [-0.5, report.steps - 0.5], height: 150,
    formatColumn: String, formatRow: percent, choose: (step) => show({ step }),
  });

function showDetail() {
  const { step, layer, head } = shown;
  const candidate = candidateOf(step, layer, head);
  const figures = {
    Pattern: candidate.name,
    Density: decimal(candidate.density),
    "Cost, of the full pattern's": percent(candidate.cost),
    "Error, of mean head energy": percent(errorOf(step, layer, head)),
    "Prompts that prefer another": percent(arrays.prompt_disagreement.at(layer, head)),
    "Error saved by a choice for each": percent(arrays.prompt_regret.at(layer, head)),
  };
  byId("detail-title").textContent = `Layer ${layer}, head ${head}, step ${step}`;
  byId("detail-figures").replaceChildren(
    ...Object.entries(figures).map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
}

function showLegend() {
  const counts = Object.fromEntries(report.kinds.map((kind) => [kind, 0]));
  for (let layer = 0; layer < layers; layer++) {
    for (let head = 0; head < heads; head++) counts[candidateOf(shown.step, layer, head).kind] += 1;
  }
  for (const button of byId("head-legend").querySelectorAll("button")) {
    const share = counts[button.dataset.kind] / (layers * heads);
    button.setAttribute("aria-pressed", shown.kind === button.dataset.kind);
    button.querySelector("b").textContent = percent(share);
    button.querySelector(".track span").style.width = `${100 * share}%`;
  }
}

function makeLegend() {
  const present = report.kinds.filter((kind) => report.candidates.some((one) => one.kind === kind));
  for (const kind of present) {
    const colour = `background: var(--${kind})`;
    const button = element(
      "button", { type: "button", "data-kind": kind }, element("span", { class: "swatch", style: colour }),
      `${kind} (${kindLetter(kind)})`,
      element("span", { class: "track", "aria-hidden": "true" }, element("span", { style: colour })), element("b"),
    );
    button.addEventListener("click", () => show({ kind: shown.kind === kind ? null : kind }));
    byId("head-legend").append(element("li", {}, button));
  }
}

/** Show another step, layer, head, or one kind alone. */
function show(changes) {
  Object.assign(shown, changes);
  const { step, layer, head } = shown;
  const group = groupOf(step);
  const [first, last] = [report.group_starts[group], groupEnd(group)];
  const together = groups === 1 ? "all steps have one assignment"
    : first === last ? "it has an assignment of its own" : `steps ${first} to ${last} have one assignment`;
  byId("step").value = step;
  byId("step-text").textContent = `Step ${step} of 0 to ${report.steps - 1}; ${together}.`;
  byId("step-before").disabled = step === 0;
  byId("step-after").disabled = group === groups - 1;
  byId("layer").value = layer;
  byId("head").value = head;
  showLegend();
  showDetail();
  const adaptive = candidateOf(step, layer, head).kind === "asa";
  byId("mask").hidden = byId("mask-scale").hidden = adaptive;
  byId("mask-none").hidden = !adaptive;
  for (const chart of [charts.headMap, charts.attentionMap, charts.maskMap, charts.runStrip]) chart.draw();
  charts.headMap.fix(layer, head);
  charts.runStrip.fix(0, step);
  charts.runError.update({ series: [{ name: "error", points: headErrors() }] });
}

function makeControls() {
  byId("step").addEventListener("input", (event) => show({ step: Number(event.target.value) }));
  byId("step-before").addEventListener("click", () => {
    const start = report.group_starts[groupOf(shown.step)];
    show({ step: shown.step > start ? start : report.group_starts[groupOf(shown.step) - 1] });
  });
  byId("step-after").addEventListener("click", () => show({ step: report.group_starts[groupOf(shown.step) + 1] }));
  for (const name of ["layer", "head"]) {
    byId(name).addEventListener("change", ({ target }) => {
      const value = Math.round(Number(target.value));
      show({ [name]: Math.min(Number(target.max), Math.max(0, value)) });
    });
  }
  for (const button of document.querySelectorAll("#most-dependent button")) {
    button.addEventListener("click", () => {
      show({ layer: Number(button.dataset.layer), head: Number(button.dataset.head) });
      byId("heads-title").scrollIntoView();
    });
  }
}

// The other sections

const pairs = ({ values, shape }) =>
  Array.from({ length: shape[0] }, (_, point) => [values[2 * point], values[2 * point + 1]]);

function showCurve() {
  const series = [{ name: "best assignment", points: pairs(arrays.curve) }];
  if (arrays.published_curve) {
    series.push({ name: "published rule", points: pairs(arrays.published_curve), second: true });
  }
  const marks = [{ name: "this table", point: report.chosen }];
  const { density, error } = report.verified;
  if (density !== undefined && error !== undefined) {
    marks.push({ name: "this table, measured", point: [density, error] });
  }
  const positive = series.flatMap((one) => one.points.map(([, y]) => y)).filter((y) => y > 0);
  lineChart(byId("curve"), {
    label: "Relative error by density", columnTitle: "density (share of computed pairs)",
    rowTitle: "relative error", columnName: "density", series, marks, logarithmic: positive.length > 1,
    formatColumn: decimal, formatRow: percent,
  });
}

function showRecall() {
  const { recall } = arrays;
  const share = (layer, step) => recall.at(layer, step, 0) / recall.at(layer, step, 1);
  const all = Array.from({ length: layers * report.steps }, (_, item) =>
    share(Math.floor(item / report.steps), item % report.steps));
  const [low, high] = tenths(all);
  showScale(byId("recall-scale"), percent(low), percent(high), unmeasured(all));
  heatmap(byId("recall-map"), {
    ...layerStepSizes,
    label: "Recall of ASA by layer and step",
    colour: (layer, step) => rampColour((share(layer, step) - low) / (high - low)),
    describe: (layer, step) => [
      `recall ${known(share(layer, step))}`, `layer ${layer}, step ${step}`,
      `ASA's blocks hold ${known(recall.at(layer, step, 0))}`, `the best hold ${known(recall.at(layer, step, 1))}`,
    ],
  });
  const mean = (which) =>
    Array.from({ length: report.steps }, (_, step) => {
      const values = Array.from({ length: layers }, (__, layer) => recall.at(layer, step, which));
      const measured = values.filter(Number.isFinite);
      return [step, measured.reduce((sum, value) => sum + value, 0) / measured.length];
    }).filter(([, value]) => Number.isFinite(value));
  const [held, best] = [mean(0), mean(1)];
  lineChart(byId("recall-lines"), {
    label: "Attention weight in ASA's blocks and in the best, by step", columnTitle: "step",
    rowTitle: "attention weight", columnName: "step", whole: true, formatColumn: String, formatRow: percent,
    series: [{ name: "ASA's blocks", points: held }, { name: "best equally many", points: best, second: true }],
    rowRange: tenths([...held, ...best].map(([, weight]) => weight)),
  });
}

function showPrompts(name, array, what) {
  const most = Math.max(...array.values) || 1;
  showScale(byId(`${name}-scale`), "0 %", percent(most));
  heatmap(byId(`${name}-map`), {
    ...headMapSizes,
    gaps: true,
    label: `${what} by layer and head`,
    colour: (layer, head) => rampColour(array.at(layer, head) / most),
    describe: (layer, head) => [percent(array.at(layer, head)), what, `layer ${layer}, head ${head}`],
    choose: (layer, head) => show({ layer, head }),
  });
}

document.body.append(tooltip);
readColours(report.kinds);
makeLegend();
makeControls();
const charts = {
  headMap: headMap(), attentionMap: attentionMap(), maskMap: maskMap(), runStrip: runStrip(), runError: runError(),
};
show({});
showScale(byId("attention-scale"), "none", "strongest", "not sampled");
showScale(byId("mask-scale"), "none", "all");
byId("attention-scale").title = "The colour follows the square root of the weight.";
if (report.explained_kinds.length) showExplained();
showCurve();
if (arrays.recall) showRecall();
showPrompts("disagreement", arrays.prompt_disagreement, "prompts that prefer another pattern");
showPrompts("regret", arrays.prompt_regret, "error that a choice for every prompt would save");
matchMedia("screen and (prefers-color-scheme: dark)").addEventListener("change", () => {
  readColours(report.kinds);
  redraws.forEach((draw) => draw());
});
