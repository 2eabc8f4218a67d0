"use strict";
// Draws the panels of the element "data" with uPlot; all charts show the same range of updates.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const COLORS = 7;
  const DASHES = [[], [6, 3], [2, 3]];
  const WHOLE = Array.from({ length: 13 }, (_, power) => [1, 2, 5].map((n) => n * 10 ** power)).flat();
  const ends = (steps) => [steps[0], steps.at(-1)];
  const curves = data.panels.flatMap((panel) => panel.series);
  const steps = [...curves.flatMap((curve) => ends(curve.x)), ...data.marks.flatMap((mark) => ends(mark.steps))];
  let [first, last] = [Math.min(...steps), Math.max(...steps)];
  if (first === last) [first, last] = [first - 1, last + 1];
  const hidden = new Set();
  let range = [first, last];
  let charts = [];

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const ofRun = (run) => color(`--run-${run % COLORS}`);
  const plain = (value) =>
    value !== 0 && Math.abs(value) < 1e-4
      ? String(Number(value.toPrecision(4)))
      : value.toLocaleString("en", { maximumSignificantDigits: 6 });

  function format(panel, value, digits) {
    if (value == null) return "–";
    const shown = panel.scale === "percent" ? 100 * value : value;
    return plain(Number(shown.toPrecision(digits)));
  }

  // Evaluations are few: each has a point, and the legend a filled box.
  const hasPoints = (panel, n) => n > 0 && !["", "training"].includes(panel.series[n - 1].label);

  const isDashed = (panel, n) => n > 0 && panel.series[n - 1].label === "balanced accuracy";
  const marker = (panel) => ({
    fill: (chart, n) =>
      hasPoints(panel, n) && !isDashed(panel, n) ? chart.series[n].stroke(chart, n) : "transparent",
    dash: (_, n) => (isDashed(panel, n) ? "dashed" : "solid"),
  });

  // One run: a color for each curve, as in curves.png. Several: a color for each run.
  function series(panel, curve, place) {
    const stroke = data.runs.length > 1 ? ofRun(curve.run) : ofRun(curve.curve);
    const names = [data.runs.length > 1 ? data.runs[curve.run] : "", curve.label];
    return {
      label: names.filter(Boolean).join(", ") || panel.title,
      stroke,
      width: curve.label === "training" ? 1.25 : 2,
      dash: curve.label === "balanced accuracy" ? [6, 4] : DASHES[Math.floor(curve.run / COLORS) % DASHES.length],
      points: { show: hasPoints(panel, place + 1) || undefined, size: 5, fill: stroke },
      show: !hidden.has(curve.run),
      value: (_, value) => format(panel, value, 5),
    };
  }

  function options(panel, width) {
    const line = { stroke: color("--grid") };
    const axis = { stroke: color("--text"), grid: line, ticks: line };
    const fromZero = (_, low, high) => [Math.min(0, low), high > 0 ? 1.05 * high : 1];
    const updates = (_, splits) => splits.map(plain);
    const labels = (_, splits) => splits.map((value) => (value == null ? "" : format(panel, value, 4)));
    return {
      width,
      height: 260,
      padding: [12, 16, 0, 0],
      scales: {
        x: { time: false, range: () => range },
        y: {
          distr: panel.log ? 3 : 1,
          range: panel.scale === "zero" ? fromZero : undefined,
        },
      },
      axes: [
        { ...axis, label: "updates", labelSize: 20, size: 36, incrs: WHOLE, values: updates },
        { ...axis, size: 64, values: labels, grid: { ...axis.grid, ...(panel.log && { filter: decades }) } },
      ],
      series: [
        { label: "update", value: (_, value) => (value == null ? "–" : plain(value)) },
        ...panel.series.map((curve, place) => series(panel, curve, place)),
      ],
      legend: { markers: marker(panel) },
      cursor: {
        sync: { key: "updates", setSeries: false },
        hover: { prox: 20 },  // pixels from a point to the cursor that shows its value
        drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => zoom(first, last) },
      },
      hooks: { setSelect: [select], draw: [(chart) => drawMarks(chart)] },
    };
  }

  function table(panel) {
    // A logarithm needs positive values.
    const value = (y) => (panel.log && y !== null && y <= 0 ? null : y);
    return uPlot.join(panel.series.map((curve) => [curve.x, curve.y.map(value)]));
  }

  // Of a logarithmic axis over several powers of ten, only those have a grid line.
  function decades(_, splits) {
    const isDecade = (value) => Number.isInteger(Number(Math.log10(value).toFixed(9)));
    return splits.filter(isDecade).length < 3 ? splits : splits.map((value) => (isDecade(value) ? value : null));
  }

  function drawMarks(chart) {
    const { ctx, bbox } = chart;
    const size = 4 * devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left - size, bbox.top - size, bbox.width + 2 * size, bbox.height + 2 * size);
    ctx.clip();
    for (const { run, kind, steps } of data.marks) {
      if (hidden.has(run)) continue;
      ctx.strokeStyle = ctx.fillStyle = data.runs.length > 1 ? ofRun(run) : color("--quiet");
      ctx.lineWidth = devicePixelRatio * 1.5;
      ctx.setLineDash(kind === "resume" ? [size, size] : []);
      ctx.beginPath();
      for (const step of steps) {
        if (step < range[0] || step > range[1]) continue;
        const x = chart.valToPos(step, "x", true);
        const level = 2 * size * (run % 4);  // marks of runs at the same update stand above each other
        const [top, bottom] = [bbox.top + level, bbox.top + bbox.height - level];
        if (kind === "resume") {
          ctx.moveTo(x, bbox.top);
          ctx.lineTo(x, bbox.top + bbox.height);
        } else if (kind === "skip") {
          for (const side of [-size, size]) {
            ctx.moveTo(x - side, top + size / 2);
            ctx.lineTo(x + side, top + 2.5 * size);
          }
        } else {
          ctx.moveTo(x - size, bottom);
          ctx.lineTo(x, bottom - 1.7 * size);
          ctx.lineTo(x + size, bottom);
        }
      }
      if (kind === "checkpoint") ctx.fill();
      else ctx.stroke();
    }
    ctx.restore();
  }

  function select(chart) {
    const { left, width } = chart.select;
    if (width < 3) return;
    chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    zoom(chart.posToVal(left, "x"), chart.posToVal(left + width, "x"));
  }

  function zoom(low, high) {
    const width = Math.min(last - first, Math.max(high - low, Math.min(4, last - first)));
    const middle = (low + high) / 2;
    const start = Math.max(first, Math.min(middle - width / 2, last - width));
    range = [start, start + width];
    for (const chart of charts) chart.setScale("x", { min: range[0], max: range[1] });
    document.getElementById("shown").textContent =
      `updates ${plain(Math.ceil(Math.max(0, range[0])))} to ${plain(Math.floor(range[1]))}`;
  }

  const moves = {
    in: ([low, high], part) => [low + part, high - part],
    out: ([low, high], part) => [low - 2 * part, high + 2 * part],
    left: ([low, high], part) => [low - part, high - part],
    right: ([low, high], part) => [low + part, high + part],
    all: () => [first, last],
  };
  const move = (name) => zoom(...moves[name](range, (range[1] - range[0]) / 4));

  function onKey(event, chart) {
    const key = { "+": "in", "-": "out", "−": "out", 0: "all" }[event.key];
    const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey || !(key || direction)) return;
    event.preventDefault();
    if (key) return move(key);
    const x = chart.data[0];
    const inside = x.findIndex((step) => step >= range[0]);
    const index = chart.cursor.idx == null ? inside : chart.cursor.idx + direction;
    if (index < 0 || index >= x.length || x[index] < range[0] || x[index] > range[1]) return;
    chart.setCursor({ left: chart.valToPos(x[index], "x"), top: chart.over.clientHeight / 2 });
  }

  function drawAll() {
    for (const chart of charts) chart.destroy();
    charts = [...document.querySelectorAll("figure")].map((figure) => {
      const panel = data.panels[figure.dataset.panel];
      const place = figure.querySelector(".chart");
      const chart = new uPlot(options(panel, place.clientWidth), table(panel), place);
      place.onkeydown = (event) => onKey(event, chart);
      return chart;
    });
    zoom(...range);
  }

  function fit() {
    for (const chart of charts) {
      const width = chart.root.parentElement.clientWidth;
      if (width && width !== chart.width) chart.setSize({ width, height: chart.height });
    }
  }

  if (!data.panels.length) return;
  for (const button of document.querySelectorAll("[data-zoom]")) button.onclick = () => move(button.dataset.zoom);
  for (const box of document.querySelectorAll("[data-run]")) {
    box.onchange = () => {
      hidden[box.checked ? "delete" : "add"](Number(box.dataset.run));
      drawAll();
    };
  }
  for (const button of document.querySelectorAll(".log")) {
    button.onclick = () => {
      const panel = data.panels[button.closest("figure").dataset.panel];
      panel.log = !panel.log;
      button.setAttribute("aria-pressed", panel.log);
      drawAll();
    };
  }
  const printing = (on) => () => {
    document.documentElement.classList.toggle("print", on);
    drawAll();
  };
  addEventListener("beforeprint", printing(true));
  addEventListener("afterprint", printing(false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  new ResizeObserver(fit).observe(document.getElementById("charts"));
  drawAll();
})();
