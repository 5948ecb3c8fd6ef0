"use strict";
// Heat maps, line charts and tooltips. Charts draw themselves anew when the theme or their width changes.

const byId = (id) => document.getElementById(id);
const redraws = [];

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** An element of SVG; an <svg> that the parser made knows their namespace. */
const vectorNamespace = new DOMParser().parseFromString("<svg></svg>", "text/html").body.firstChild.namespaceURI;
function vector(tag, attributes = {}, text = "") {
  const made = document.createElementNS(vectorNamespace, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// Numbers

/** Two digits or more: 0.4 %, 35 %, 100 %. */
function percent(share) {
  const value = 100 * share;
  return Math.abs(value) < 9.95 ? `${Number(value.toPrecision(2))} %` : `${value.toFixed(0)} %`;
}

const decimal = (value) => String(Number(value.toPrecision(3)));

/** About `most` round numbers from low to high. */
function roundNumbers(low, high, most) {
  if (high <= low) return [low];
  const least = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= least * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

function powersOfTen(low, high) {
  const found = [];
  const parts = high / low < 50 ? [1, 2, 5] : [1];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    found.push(...parts.map((part) => part * 10 ** power).filter((value) => value >= low && value <= high));
  }
  return found;
}

// Colours, from the style sheet

const rgb = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
const styleValue = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
let rampColours = [];
let kindColours = {};

function readColours(kinds) {
  const stops = styleValue("ramp").split(",").map((stop) => rgb(stop.trim()));
  rampColours = Array.from({ length: 256 }, (_, value) => {
    const place = (value / 255) * (stops.length - 1);
    const first = Math.min(Math.floor(place), stops.length - 2);
    return stops[first].map((low, channel) => Math.round(low + (place - first) * (stops[first + 1][channel] - low)));
  });
  kindColours = Object.fromEntries(kinds.map((kind) => [kind, rgb(styleValue(kind))]));
}

/** A colour of the ramp, for a share of it; none for what is not known. */
function rampColour(share) {
  return Number.isFinite(share) ? rampColours[Math.round(255 * Math.min(1, Math.max(0, share)))] : null;
}

const luminance = (colour) =>
  colour
    .map((channel) => channel / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, channel) => sum + value * [0.2126, 0.7152, 0.0722][channel], 0);
const textOn = (colour) => (luminance(colour) > 0.18 ? "#000000" : "#ffffff");

/** What the colours mean; `unknown`: also what cells without a colour do. */
function showScale(container, low, high, unknown = "") {
  const rest = unknown ? [element("i", { class: "unknown" }), unknown] : [];
  container.replaceChildren(low, element("i"), high, ...rest);
}

// Tooltip

const tooltip = element("div", { class: "tooltip", role: "status" });

function showTooltip(lines, x, y) {
  tooltip.replaceChildren(...lines.map((line) => element("div", {}, line)));
  const { width, height } = tooltip.getBoundingClientRect();
  const left = Math.max(4, Math.min(x + 14, document.documentElement.clientWidth - width - 4));
  const top = y + 16 + height > window.innerHeight ? y - height - 10 : y + 16;
  tooltip.style.transform = `translate(${left + window.scrollX}px, ${top + window.scrollY}px)`;
}

const hideTooltip = () => tooltip.replaceChildren();

// Heat maps

const arrowMoves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** The numbers of some cells at their middles, or shares of the whole axis. */
function axisTicks(container, edge, count, most, inShares) {
  const every = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((one) => count / one <= most) ?? count;
  const numbers = Array.from({ length: Math.ceil(count / every) }, (_, index) => index * every);
  const ticks = inShares
    ? [0, 0.5, 1].map((share) => [share, percent(share)])
    : numbers.map((index) => [(index + 0.5) / count, index]);
  for (const [share, text] of ticks) {
    const tick = element("span", share === 1 ? { class: "end" } : {}, text);
    tick.style[edge] = `${100 * share}%`;
    container.append(tick);
  }
}

/**
 * A picture of one pixel a cell, read by pointer or by arrow keys.
 *
 * options: label, rows, columns, rowTitle, columnTitle; colour(row, column) -> [r, g, b] or null;
 * describe(row, column) -> lines of the tooltip. Optional: height(width) in pixels; cellSize(width), for square cells;
 * inShares, for axes of shares instead of numbers; bare, for no axes; letter(row, column);
 * choose(row, column); gaps.
 */
function heatmap(container, options) {
  const { rows, columns } = options;
  const canvas = element("canvas", { width: columns, height: rows, "aria-hidden": "true" });
  const marker = element("div", { class: "cursor" });
  marker.hidden = true;
  const attributes = { class: options.gaps ? "plot gaps" : "plot", tabindex: "0", role: "application" };
  const plot = element("div", { ...attributes, "aria-label": `${options.label}. Arrow keys move.` }, canvas, marker);
  plot.style.setProperty("--rows", rows);
  plot.style.setProperty("--columns", columns);
  const rowTicks = element("div", { class: options.inShares ? "ticks row-ticks wide" : "ticks row-ticks" });
  const columnTicks = element("div", { class: "ticks column-ticks" });
  const whole = element(
    "div", { class: "heatmap" }, element("div", { class: "title rows-title" }, options.rowTitle), rowTicks, plot,
    columnTicks, element("div", { class: "title columns-title" }, options.columnTitle),
  );
  if (options.bare) whole.classList.add("bare");
  container.replaceChildren(whole);
  if (!options.bare) {
    axisTicks(rowTicks, "top", rows, 10, options.inShares);
    axisTicks(columnTicks, "left", columns, 6, options.inShares);
  }

  let cursor = [0, 0];
  let letters = null;
  let fixed = false; // whether the marker stays where it is without focus

  function draw() {
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const image = context.createImageData(columns, rows);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const colour = options.colour(row, column);
        if (colour) image.data.set([...colour, 255], 4 * (row * columns + column));
      }
    }
    context.putImageData(image, 0, 0);
    letters?.remove();
    letters = null;
    if (options.letter && plot.clientWidth / columns >= 16) {
      letters = vector("svg", { viewBox: `0 0 ${columns} ${rows}`, "aria-hidden": "true" });
      for (let row = 0; row < rows; row++) {
        for (let column = 0; column < columns; column++) {
          const fill = textOn(options.colour(row, column));
          const place = { x: column + 0.5, y: row + 0.52, "font-size": 0.46, fill };
          letters.append(vector("text", place, options.letter(row, column)));
        }
      }
      plot.append(letters);
    }
  }

  function layOut() {
    const width = container.clientWidth - rowTicks.offsetWidth - whole.firstChild.offsetWidth;
    const size = options.cellSize?.(width);
    plot.style.width = size ? `${columns * size}px` : "";
    columnTicks.style.width = plot.style.width;
    whole.lastChild.style.width = plot.style.width;
    plot.style.height = `${size ? rows * size : options.height(plot.clientWidth)}px`;
    if (options.letter) draw();
  }

  function mark(row, column) {
    cursor = [row, column];
    marker.hidden = false;
    marker.style.left = `${(100 * column) / columns}%`;
    marker.style.top = `${(100 * row) / rows}%`;
    marker.style.width = `${100 / columns}%`;
    marker.style.height = `${100 / rows}%`;
  }

  function cellAt(event) {
    const box = plot.getBoundingClientRect();
    const within = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    return [
      within((event.clientY - box.top) / box.height, rows), within((event.clientX - box.left) / box.width, columns),
    ];
  }

  function showAtCursor() {
    const box = marker.getBoundingClientRect();
    showTooltip(options.describe(...cursor), box.right, box.bottom);
  }

  plot.addEventListener("pointermove", (event) => {
    showTooltip(options.describe(...cellAt(event)), event.clientX, event.clientY);
  });
  plot.addEventListener("pointerleave", hideTooltip);
  plot.addEventListener("click", (event) => {
    const cell = cellAt(event);
    mark(...cell);
    options.choose?.(...cell);
    showTooltip(options.describe(...cell), event.clientX, event.clientY);
  });
  plot.addEventListener("focus", () => {
    mark(...cursor);
    if (plot.matches(":focus-visible")) showAtCursor();
  });
  plot.addEventListener("blur", () => {
    hideTooltip();
    marker.hidden = !fixed;
  });
  plot.addEventListener("keydown", (event) => {
    let [row, column] = cursor;
    if (event.key in arrowMoves) {
      row = Math.min(rows - 1, Math.max(0, row + arrowMoves[event.key][0]));
      column = Math.min(columns - 1, Math.max(0, column + arrowMoves[event.key][1]));
    } else if (event.key === "Home") column = 0;
    else if (event.key === "End") column = columns - 1;
    else if (event.key === "Escape") return hideTooltip();
    else return;
    event.preventDefault();
    mark(row, column);
    options.choose?.(row, column);
    showAtCursor();
  });
  new ResizeObserver(layOut).observe(container);
  layOut();
  draw();
  redraws.push(draw);
  return {
    draw,
    fix(row, column) {
      fixed = true;
      mark(row, column);
    },
  };
}

// Line charts

const margin = { left: 56, right: 2, top: 12, bottom: 42 };
const titleWidth = 18; // of the rows' title, beside which their numbers stand
const pen = element("canvas").getContext("2d");

function textWidth(text) {
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width;
}

/**
 * Lines over one axis; points are read by pointer or by the arrow keys.
 *
 * options: label, columnTitle, rowTitle, columnName, series [{ name, points [[x, y]], second }]; formatColumn(x),
 * formatRow(y) -> text. Optional: marks [{ name, point }], shown as rings; logarithmic, then points at 0 are left out;
 * columnRange and rowRange, each [low, high]; height; whole, for whole numbers below the columns; choose(x).
 */
function lineChart(container, options) {
  const drawing = vector("svg", { tabindex: "0", role: "application" });
  drawing.setAttribute("aria-label", `${options.label}. Left and right arrow keys move from point to point.`);
  const legend = element("ul", { class: "legend" });
  container.classList.add("chart");
  container.replaceChildren(drawing, legend);
  let points = []; // { name, x, y, left, top }, by x
  let active = -1;
  let highlight = null;

  function draw() {
    const { series, logarithmic, height = 280 } = options;
    const width = container.clientWidth;
    const shown = ([, y]) => !logarithmic || y > 0;
    const marks = (options.marks ?? []).filter((one) => shown(one.point));
    const all = [...series.flatMap((one) => one.points.filter(shown)), ...marks.map((one) => one.point)];
    const columns = all.map(([x]) => x);
    const rows = all.map(([, y]) => y);
    points = [];
    if (!all.length) return;
    const [first, last] = options.columnRange ?? [Math.min(...columns), Math.max(...columns)];
    const [low, high] = options.rowRange ?? [logarithmic ? Math.min(...rows) : 0, Math.max(...rows) || 0.01];
    const scale = logarithmic ? Math.log : (value) => value;
    const span = scale(high) - scale(low) || 1;
    const rowNumbers = logarithmic ? powersOfTen(low, high) : roundNumbers(low, high, height / 55);
    const widest = Math.max(0, ...rowNumbers.map((y) => textWidth(options.formatRow(y))));
    const start = Math.max(margin.left, (options.rowTitle ? titleWidth : 0) + widest + 9);
    const left = (x) => start + ((x - first) / (last - first || 1)) * (width - start - margin.right);
    const bottom = height - margin.bottom;
    const top = (y) => bottom - ((scale(y) - scale(low)) / span) * (bottom - margin.top);

    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.setAttribute("height", height);
    drawing.replaceChildren();
    for (const y of rowNumbers) {
      drawing.append(
        vector("line", { class: "grid", x1: start, x2: width - margin.right, y1: top(y), y2: top(y) }),
        vector("text", { class: "number", x: start - 7, y: top(y) + 4, "text-anchor": "end" }, options.formatRow(y)),
      );
    }
    const columnNumbers = roundNumbers(first, last, width / 60).filter((x) => !options.whole || Number.isInteger(x));
    for (const x of columnNumbers) {
      drawing.append(vector("text", { x: left(x), y: bottom + 17, "text-anchor": "middle" }, options.formatColumn(x)));
    }
    const middle = (margin.top + bottom) / 2;
    const turned = { class: "rows-title", "text-anchor": "middle", transform: `translate(11 ${middle}) rotate(-90)` };
    const below = { "text-anchor": "middle", x: (start + width - margin.right) / 2, y: height - 6 };
    drawing.append(vector("text", turned, options.rowTitle), vector("text", below, options.columnTitle));

    const place = (name, [x, y]) => ({ name, x, y, left: left(x), top: top(y) });
    for (const one of series) {
      const placed = one.points.filter(shown).map((point) => place(one.name, point));
      const path = placed.map((point) => `${point.left.toFixed(1)},${point.top.toFixed(1)}`).join(" ");
      drawing.append(vector("polyline", { class: one.second ? "line second" : "line", points: path }));
      points.push(...placed);
    }
    highlight = vector("g");
    drawing.append(highlight);
    for (const [number, { name, point }] of [...marks.entries()].reverse()) {
      const placed = place(name, point);
      drawing.append(
        vector("circle", { class: number ? "mark" : "mark first", cx: placed.left, cy: placed.top, r: 5.5 }),
      );
      points.push(placed);
    }
    points.sort((one, other) => one.x - other.x);
    active = Math.min(active, points.length - 1);
    // names stand below: beside a point, they would lie over a line or over each other
    const entry = (swatch, name) => element("li", {}, element("span", { class: `swatch ${swatch}` }), name);
    const lines = series.map((one) => entry(one.second ? "line dashed" : "line", one.name));
    const rings = marks.map((one, number) => entry(number ? "ring" : "ring first", one.name));
    legend.replaceChildren(...(series.length + marks.length > 1 ? [...lines, ...rings] : []));
  }

  function activate(index, x, y) {
    const point = points[index];
    if (!point) return;
    active = index;
    highlight.replaceChildren(
      vector("line", { class: "guide", x1: point.left, x2: point.left, y1: margin.top,
        y2: (options.height ?? 280) - margin.bottom }),
      vector("circle", { class: "mark", cx: point.left, cy: point.top, r: 4 }),
    );
    const box = drawing.getBoundingClientRect();
    showTooltip(
      [point.name, `${options.columnName} ${options.formatColumn(point.x)}`, options.formatRow(point.y)],
      x ?? box.left + point.left, y ?? box.top + point.top,
    );
  }

  function nearest(event) {
    const box = drawing.getBoundingClientRect();
    const distances = points.map((one) =>
      Math.hypot(one.left - (event.clientX - box.left), 0.3 * (one.top - (event.clientY - box.top))));
    return distances.indexOf(Math.min(...distances));
  }

  function leave() {
    highlight?.replaceChildren();
    hideTooltip();
  }

  drawing.addEventListener("pointermove", (event) => activate(nearest(event), event.clientX, event.clientY));
  drawing.addEventListener("pointerleave", leave);
  drawing.addEventListener("blur", leave);
  drawing.addEventListener("click", (event) => options.choose?.(points[nearest(event)].x));
  drawing.addEventListener("focus", () => {
    if (drawing.matches(":focus-visible")) activate(Math.max(0, active));
  });
  drawing.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") leave();
    if (!move) return;
    event.preventDefault();
    activate(Math.min(points.length - 1, Math.max(0, active + move)));
  });
  new ResizeObserver(draw).observe(container);
  draw();
  return {
    update(changes) {
      Object.assign(options, changes);
      draw();
    },
  };
}
