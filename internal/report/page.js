// Draws the throughput plots; the rest of the page needs no script. Colours
// come from the style sheet at each drawing, so light, dark and paper differ
// in nothing else.
(() => {
  "use strict";
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const boxes = [...document.querySelectorAll(".canvas")];
  const numbers = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });
  const font = '13px system-ui, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif';
  const row = 19; // height of a line of labels
  const plots = [];
  // All plots leave the same room for their figures, so that a second stands at the same place in each.
  const gutter = 18 + 7.8 * Math.max(4, ...data.plots.map((s) => numbers.format(Math.round(s.v.reduce((a, b) => Math.max(a, b), 0))).length));

  const color = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();

  const clock = (s) => {
    const ms = Math.round(s * 1000), two = (n) => String(n).padStart(2, "0");
    const sec = Math.floor(ms / 1000) % 60, min = Math.floor(ms / 60000) % 60, h = Math.floor(ms / 3600000);
    const head = h > 0 ? h + ":" + two(min) + ":" + two(sec) : min + ":" + two(sec);
    return ms % 1000 ? head + "." + String(ms % 1000).padStart(3, "0").replace(/0+$/, "") : head;
  };

  // place finds a row for each mark's label: number and name, only the number
  // where there is no room for more, and numbers alone where that would still
  // leave a mark without label. The list below the plots names all.
  const place = (ctx, at, left, right, rows, scale) => {
    const seen = data.marks.filter((m) => at(m.to) >= left && at(m.from) <= right);
    const labels = fit(ctx, seen, (m) => [m.n + " " + m.name, String(m.n)], at, left, right, rows, scale);
    return labels.length === seen.length ? labels : fit(ctx, seen, (m) => [String(m.n)], at, left, right, rows, scale);
  };

  const fit = (ctx, marks, texts, at, left, right, rows, scale) => {
    const ends = new Array(rows).fill(-Infinity), out = [];
    for (const m of marks) {
      for (const text of texts(m)) {
        const width = ctx.measureText(text).width + 10 * scale;
        const x = Math.max(left, Math.min(at(m.from), right - width));
        const free = ends.findIndex((end) => x > end + 3 * scale);
        if (free < 0 || width > right - left) continue;
        ends[free] = x + width;
        out.push({ m, text, x, width, row: free });
        break;
      }
    }
    return out;
  };

  const rowsAt = (width) => {
    const ctx = document.createElement("canvas").getContext("2d");
    ctx.font = font;
    const left = gutter, right = width - 20;
    const at = (t) => left + (right - left) * t / (data.end || 1);
    return Math.max(0, ...place(ctx, at, left, right, 4, 1).map((l) => l.row + 1));
  };

  const hatch = (ctx, scale) => {
    const tile = document.createElement("canvas"), n = Math.round(8 * scale);
    tile.width = tile.height = n;
    const t = tile.getContext("2d");
    t.strokeStyle = color("muted");
    t.globalAlpha = 0.5;
    t.lineWidth = scale;
    for (const shift of [-n, 0, n]) {
      t.moveTo(shift, n);
      t.lineTo(shift + n, 0);
    }
    t.stroke();
    return ctx.createPattern(tile, "repeat");
  };

  const inside = (u, draw) => {
    u.ctx.save();
    u.ctx.beginPath();
    u.ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    u.ctx.clip();
    draw(u.ctx, (t) => u.valToPos(t, "x", true), uPlot.pxRatio);
    u.ctx.restore();
  };

  const drawBehind = (series) => (u) => inside(u, (ctx, at, scale) => {
    for (const m of data.marks) {
      ctx.globalAlpha = 0.22;
      ctx.fillStyle = color("hue" + m.hue);
      ctx.fillRect(at(m.from), u.bbox.top, Math.max(at(m.to) - at(m.from), 0), u.bbox.height);
    }
    ctx.globalAlpha = 1;
    ctx.fillStyle = hatch(ctx, scale);
    for (const [from, to] of series.gaps) ctx.fillRect(at(from), u.bbox.top, Math.max(at(to) - at(from), 2 * scale), u.bbox.height);
  });

  const drawLabels = (u) => {
    const ctx = u.ctx, scale = uPlot.pxRatio, { left, top, width, height } = u.bbox;
    const at = (t) => u.valToPos(t, "x", true);
    ctx.save();
    ctx.font = font.replace("13px", 13 * scale + "px");
    ctx.textBaseline = "middle";
    ctx.textAlign = "left";
    const rows = rowsAt(u.width), labels = place(ctx, at, left, left + width, rows, scale);
    for (const { m, row: r } of labels) {
      const x = Math.max(left, at(m.from));
      ctx.strokeStyle = color("hue" + m.hue);
      ctx.lineWidth = 1.5 * scale;
      ctx.setLineDash(m.to > m.from ? [] : [4 * scale, 3 * scale]);
      ctx.beginPath();
      ctx.moveTo(x, top - (rows - r) * row * scale + row * scale / 2);
      ctx.lineTo(x, top + height);
      ctx.stroke();
    }
    ctx.setLineDash([]);
    for (const { m, text, x, width: w, row: r } of labels) {
      const y = top - (rows - r) * row * scale, h = (row - 3) * scale;
      ctx.fillStyle = color("bg");
      ctx.fillRect(x, y, w, h);
      ctx.strokeStyle = color("hue" + m.hue);
      ctx.strokeRect(x, y, w, h);
      ctx.fillStyle = color("fg");
      ctx.fillText(text, x + 5 * scale, y + h / 2 + scale);
    }
    ctx.restore();
    u.root.parentNode.dataset.drawn = "";
  };

  // steps: a value holds until the next one, and no line crosses a gap.
  const steps = (series) => (u) => {
    const stroke = new Path2D(), fill = new Path2D();
    const x = (t) => u.valToPos(t, "x", true), y = (v) => u.valToPos(v, "y", true), zero = y(0);
    let pen = false;
    series.t.forEach((t, i) => {
      const next = series.t[i + 1], last = next === undefined || next - t > 1.5 * series.step;
      const x0 = x(t), x1 = x(last ? t + series.step : next), h = y(series.v[i]);
      if (pen) {
        stroke.lineTo(x0, h);
      } else {
        stroke.moveTo(x0, h);
        fill.moveTo(x0, zero);
      }
      fill.lineTo(x0, h);
      stroke.lineTo(x1, h);
      fill.lineTo(x1, h);
      if (last) fill.lineTo(x1, zero);
      pen = !last;
    });
    return { stroke, fill, clip: null, band: null, gaps: null, flags: 1 };
  };

  const axis = (more) => Object.assign({
    font, stroke: () => color("fg"),
    grid: { stroke: () => color("rule"), width: 1 }, ticks: { stroke: () => color("rule"), width: 1, size: 5 },
  }, more);

  const options = (series, width) => ({
    width, height: height(width),
    padding: [(u) => rowsAt(u.width) * row + 8, 20, 0, 0],
    scales: {
      x: { time: false, range: (u, min, max) => [min, max] },
      y: { range: (u, min, max) => [Math.min(0, min || 0), max > 0 ? max * 1.08 : 1] },
    },
    axes: [
      axis({ space: 64, size: 34, incrs: [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400], values: (u, ticks) => ticks.map(clock) }),
      axis({ space: 34, values: (u, ticks) => ticks.map((v) => numbers.format(v)), size: () => gutter }),
    ],
    series: [
      { label: "Time", value: (u, v) => v == null ? "–" : clock(v) },
      { label: series.unit || series.name, stroke: () => color("line"), fill: () => color("fill"), width: 1.5, points: { show: false }, paths: steps(series), value: (u, v) => v == null ? "–" : numbers.format(v) },
    ],
    cursor: { sync: { key: "run" }, points: { show: false }, y: false },
    hooks: { drawClear: [drawBehind(series)], draw: [drawLabels] },
  });

  const height = (width) => (width < 500 ? 190 : 230) + rowsAt(width) * row;

  const resize = (u, width) => {
    if (width < 50) return;
    u.setSize({ width, height: height(width) });
  };

  // padded adds a beginning and an end without a value, so that all plots have
  // one time axis.
  const padded = ({ t, v }) => {
    const before = t[0] > 0 ? [0] : [], after = data.end > t[t.length - 1] ? [data.end] : [], none = (a) => a.map(() => null);
    return [[...before, ...t, ...after], [...none(before), ...v, ...none(after)]];
  };

  const draw = (box, series) => {
    const width = Math.max(50, box.clientWidth);
    const u = new uPlot(options(series, width), padded(series), box);
    plots.push(u);
    new ResizeObserver(() => { if (!("print" in root.dataset) && box.clientWidth !== u.width) resize(u, box.clientWidth); }).observe(box);
  };

  data.plots.forEach((series, i) => {
    try {
      draw(boxes[i], series);
    } catch (e) {
      boxes[i].textContent = "The plot could not be drawn: " + e;
    }
  });

  const redraw = () => plots.forEach((u) => u.redraw(true, true));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    root.dataset.print = "";
    plots.forEach((u) => { resize(u, 640); u.redraw(true, true); });
  });
  addEventListener("afterprint", () => {
    delete root.dataset.print;
    plots.forEach((u, i) => { resize(u, boxes[i].clientWidth); u.redraw(true, true); });
  });
})();
