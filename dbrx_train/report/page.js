"use strict";
// Draws what the page's data says: curves as SVG, expert load as SVG and canvas. Redrawn for width and theme.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const tip = document.getElementById("tip");
  const $ = (id) => document.getElementById(id);
  // Series that share their moments name them by number.
  for (const plot of data.charts) for (const s of plot.series) s.x = data.moments[s.x];
  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function svg(name, attributes, parent, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }
  function html(name, attributes, parent, text) {
    const node = Object.assign(document.createElement(name), attributes);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  // Numbers
  function short(value) {
    const size = Math.abs(value);
    for (const [unit, one] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]])
      if (size >= one) return `${+(value / one).toPrecision(4)}${unit}`;
    return size && size < 1e-3 ? value.toExponential(1).replace("e-", "e−") : `${+value.toPrecision(3)}`;
  }
  function ticks(low, high, count) {
    const rough = (high - low) / count || 1;
    const ten = 10 ** Math.floor(Math.log10(rough));
    const step = ten * [1, 2, 5, 10].find((each) => each * ten >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }
  function logTicks(low, high) {
    const found = [];
    const wide = Math.log10(high / low) > 2.5;
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of wide ? [1] : [1, 2, 5]) {
        const value = m * 10 ** e;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    return found.length > 1 ? found : [low, high];
  }
  function nearest(x, wanted) {
    let low = 0, high = x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (x[middle] < wanted) low = middle; else high = middle;
    }
    return wanted - x[low] < x[high] - wanted ? low : high;
  }
  const between = (from, to, t) => from.map((a, i) => Math.round(a + (to[i] - a) * t));
  const triple = (name) => variable(name).split(/\s+/).map(Number);

  // Curves
  function colours(plot) {
    const n = plot.series.length;
    if (!plot.ramp) return plot.series.map((_, i) => variable(`--c${(plot.pairs ? i >> 1 : i) % 8}`));
    const ends = [triple("--ramp-from"), triple("--ramp-to")];
    return plot.series.map((_, i) => `rgb(${between(...ends, n > 1 ? i / (n - 1) : 0)})`);
  }
  function stacked(plot) {
    const x = plot.series[0].x;
    const totals = x.map((_, i) => plot.series.reduce((sum, s) => sum + (s.y[i] || 0), 0) || 1);
    const base = x.map(() => 0);
    return plot.series.map((s) => {
      const low = base.slice();
      const y = x.map((_, i) => (base[i] += (s.y[i] || 0) / totals[i]));
      return { ...s, x, y, low, shown: x.map((_, i) => (s.y[i] || 0) / totals[i]) };
    });
  }

  function chart(figure) {
    const plot = data.charts[figure.dataset.chart];
    const box = figure.querySelector(".plot");
    const hidden = new Set();
    const series = plot.stacked ? stacked(plot) : plot.series;
    let scale = null, at = null, marks = null;

    function legend() {
      const place = figure.querySelector(".legend");
      const colour = colours(plot);
      place.replaceChildren();
      if (plot.ramp && series.length > 6) {
        const ends = [0, series.length - 1];
        html("small", {}, place, `layer ${series[ends[0]].name}`);
        html("i", { className: "band" }, place).style.background =
          `linear-gradient(90deg, ${colour[ends[0]]}, ${colour[ends[1]]})`;
        html("small", {}, place, `layer ${series[ends[1]].name}`);
        return;
      }
      if (series.length === 1) return;
      series.forEach((s, i) => {
        if (plot.pairs && i % 2 === 0) return;
        const name = plot.pairs ? s.name.replace(/ served$/, "") : plot.ramp ? `layer ${s.name}` : s.name;
        const members = plot.pairs ? [i - 1, i] : [i];
        const button = html("button", { type: "button" }, place);
        button.setAttribute("aria-pressed", String(!hidden.has(i)));
        html("i", {}, button).style.background = colour[i];
        button.append(name);
        button.onclick = () => {
          members.forEach((m) => (hidden.has(m) ? hidden.delete(m) : hidden.add(m)));
          if (hidden.size === series.length) hidden.clear();
          draw();
        };
      });
    }

    function draw() {
      legend();
      const colour = colours(plot);
      const width = Math.max(box.clientWidth, 200), height = box.clientHeight;
      const shown = series.filter((_, i) => !hidden.has(i));
      const xs = shown.flatMap((s) => [s.x[0], s.x[s.x.length - 1]]);
      const ys = shown.flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])])
        .filter((v) => v !== null && (!plot.log || v > 0));
      let low = Math.min(...ys), high = Math.max(...ys);
      if (plot.stacked) [low, high] = [0, 1];
      if (plot.zero) low = Math.min(0, low);
      if (plot.top) high = Math.max(high, plot.top);
      if (plot.log) [low, high] = [low / 1.15, high * 1.15];
      else if (!plot.stacked) {
        const room = (high - low || Math.abs(high) || 1) * 0.06;
        if (!(plot.zero && low >= 0)) low -= room;
        if (high !== plot.top) high += room;
      }
      const x0 = Math.min(...xs), x1 = Math.max(...xs);
      const yTicks = plot.log ? logTicks(low, high) : ticks(low, high, 4);
      const left = 14 + 6.6 * Math.max(...yTicks.map((v) => short(v).length));
      const frame = { left, right: width - 12, top: 8, bottom: height - 24 };
      const f = plot.log ? Math.log : (v) => v;
      const X = (v) => frame.left + ((v - x0) / (x1 - x0 || 1)) * (frame.right - frame.left);
      const Y = (v) => frame.bottom - ((f(v) - f(low)) / (f(high) - f(low) || 1)) * (frame.bottom - frame.top);
      scale = { X, Y, frame, x0, x1 };

      const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
      for (const v of yTicks) {
        svg("line", { class: "gridline", x1: left, x2: frame.right, y1: Y(v), y2: Y(v) }, picture);
        svg("text", { x: left - 6, y: Y(v) + 4, "text-anchor": "end" }, picture, short(v));
      }
      svg("line", { class: "axis", x1: left, x2: frame.right, y1: frame.bottom, y2: frame.bottom }, picture);
      for (const v of ticks(x0, x1, Math.max(2, width / 75)))
        svg("text", { x: X(v), y: height - 7, "text-anchor": X(v) > frame.right - 14 ? "end" : "middle" }, picture, short(v));
      series.forEach((s, i) => {
        if (hidden.has(i)) return;
        const points = s.x.map((x, j) => [X(x), s.y[j]]).filter(([, y]) => y !== null && (!plot.log || y > 0));
        const path = points.map(([x, y], j) => `${j ? "L" : "M"}${x.toFixed(1)},${Y(y).toFixed(1)}`).join("");
        const floor = plot.stacked ? s.low : s.low && s.high ? s.low : null;
        if (floor) {
          const ceiling = plot.stacked ? s.y : s.high;
          const edge = (values) => s.x.map((x, j) => [X(x), values[j]])
            .filter(([, y]) => y !== null && (!plot.log || y > 0)).map(([x, y]) => `${x.toFixed(1)},${Y(y).toFixed(1)}`);
          svg("path", {
            d: `M${[...edge(ceiling), ...edge(floor).reverse()].join("L")}Z`,
            fill: colour[i], "fill-opacity": plot.stacked ? 0.75 : 0.2,
          }, picture);
        }
        if (!plot.stacked)
          svg("path", {
            d: path, class: "curve", stroke: colour[i],
            "stroke-dasharray": plot.pairs && i % 2 === 0 ? "5 4" : "none",
            "stroke-opacity": plot.pairs && i % 2 === 0 ? 0.8 : 1,
          }, picture);
        if (points.length <= 12 && !plot.stacked && !(plot.pairs && i % 2 === 0))
          for (const [x, y] of points) svg("circle", { cx: x, cy: Y(y), r: 3, fill: colour[i] }, picture);
      });
      marks = svg("g", {}, picture);
      box.replaceChildren(picture);
    }

    function show(tokens, clientX, clientY) {
      at = tokens;
      marks.replaceChildren();
      const colour = colours(plot);
      const rows = [];
      let there = null;
      series.forEach((s, i) => {
        if (hidden.has(i)) return;
        const j = nearest(s.x, tokens);
        if (there === null || Math.abs(s.x[j] - tokens) < Math.abs(there - tokens)) there = s.x[j];
        const value = s.shown ? s.shown[j] : s.y[j];
        if (value === null) return;
        if (!plot.stacked && !(plot.log && s.y[j] <= 0))
          svg("circle", { cx: scale.X(s.x[j]), cy: scale.Y(s.y[j]), r: 3.5, fill: colour[i] }, marks);
        rows.push([plot.ramp ? `layer ${s.name}` : s.name, short(value)]);
      });
      const x = scale.X(there);
      svg("line", { class: "cursor", x1: x, x2: x, y1: scale.frame.top, y2: scale.frame.bottom }, marks);
      tip.replaceChildren(html("strong", {}, null, `${there.toLocaleString("en")} tokens`));
      const kept = rows.length > 10 ? [...rows.slice(0, 5), ["…", ""], ...rows.slice(-4)] : rows;
      for (const [name, value] of kept) {
        const row = html("div", {}, tip);
        html("span", {}, row, name);
        html("span", {}, row, value);
      }
      place(clientX ?? box.getBoundingClientRect().left + x, clientY ?? box.getBoundingClientRect().top + 30);
    }
    function leave() {
      at = null;
      tip.hidden = true;
      if (marks) marks.replaceChildren();
    }
    const moved = (event) => {
      const inside = event.clientX - box.getBoundingClientRect().left;
      const { frame, x0, x1 } = scale;
      const part = Math.min(1, Math.max(0, (inside - frame.left) / (frame.right - frame.left)));
      show(x0 + part * (x1 - x0), event.clientX, event.clientY);
    };
    box.addEventListener("pointermove", moved);
    box.addEventListener("pointerdown", moved);
    box.addEventListener("pointerleave", leave);
    box.addEventListener("blur", leave);
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") leave();
      if (!step) return;
      event.preventDefault();
      const x = series.reduce((most, s) => (s.x.length > most.length ? s.x : most), []);
      const here = at === null ? (step > 0 ? -1 : x.length) : nearest(x, at);
      show(x[Math.min(x.length - 1, Math.max(0, here + step))]);
    });
    return draw;
  }

  function place(x, y) {
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${x + 16 + width > innerWidth ? Math.max(4, x - width - 16) : x + 16}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - height - 4))}px`;
  }

  // Expert load
  function experts(load) {
    const cells = Uint8Array.from(atob(load.cells), (c) => c.charCodeAt(0));
    const { layers: L, experts: E, tokens } = load;
    const cell = (t, l, e) => cells[(t * L + l) * E + e];
    const ratio = (byte) => (byte ? 2 ** ((byte - 128) / 32) : 0);
    const slider = $("moment");
    let rects = [];

    function colour(byte) {
      if (!byte) return null;
      const t = Math.max(-1, Math.min(1, (byte - 128) / 64)); // from a quarter to four times its share
      return between(triple("--even"), triple(t < 0 ? "--cold" : "--hot"), Math.abs(t) ** 0.8);
    }
    function palette() {
      const even = triple("--even"), none = variable("--none");
      return Array.from({ length: 256 }, (_, byte) => (byte ? `rgb(${colour(byte)})` : none) || `rgb(${even})`);
    }
    function says(l, e) {
      const t = +slider.value;
      return `layer ${l}, expert ${e}: ${+ratio(cell(t, l, e)).toPrecision(2)} of an equal share`;
    }
    function update() {
      const paint = palette(), t = +slider.value;
      $("moment-tokens").textContent = tokens[t].toLocaleString("en");
      rects.forEach(([rect, l, e]) => rect.setAttribute("fill", paint[cell(t, l, e)]));
      let most = [0, 0, -1], least = [0, 0, 256];
      for (let l = 0; l < L; l++)
        for (let e = 0; e < E; e++) {
          const byte = cell(t, l, e);
          if (byte > most[2]) most = [l, e, byte];
          if (byte < least[2]) least = [l, e, byte];
        }
      $("heat-says").textContent = `most: ${says(most[0], most[1])}; least: ${says(least[0], least[1])}`;
    }
    function grid() {
      const place = $("heat"), width = Math.max(place.clientWidth, 240), left = 62, top = 20;
      const w = (width - left) / E, h = Math.max(8, Math.min(28, 420 / L));
      const picture = svg("svg", { viewBox: `0 0 ${width} ${top + L * h + 2}`, height: top + L * h + 2, "aria-hidden": "true" });
      rects = [];
      const every = Math.max(1, Math.ceil(26 / w)), rows = Math.max(1, Math.ceil(14 / h));
      for (let e = 0; e < E; e += every)
        svg("text", { x: left + (e + 0.5) * w, y: 13, "text-anchor": "middle" }, picture, e);
      for (let l = 0; l < L; l++) {
        if (l % rows === 0) svg("text", { x: left - 8, y: top + (l + 0.5) * h + 4, "text-anchor": "end" }, picture, `layer ${l}`);
        for (let e = 0; e < E; e++) {
          const gap = Math.min(2, w / 8);
          const rect = svg("rect", { x: left + e * w, y: top + l * h, width: Math.max(1, w - gap), height: Math.max(1, h - gap), rx: Math.min(3, w / 6) }, picture);
          rects.push([rect, l, e]);
        }
      }
      picture.addEventListener("pointermove", (event) => {
        const found = rects.find(([rect]) => rect === event.target);
        if (!found) return void (tip.hidden = true);
        tip.textContent = says(found[1], found[2]);
        place_(event);
      });
      picture.addEventListener("pointerleave", () => (tip.hidden = true));
      place.replaceChildren(picture);
      update();
    }
    const place_ = (event) => place(event.clientX, event.clientY);
    function strips() {
      const bytes = Array.from({ length: 256 }, (_, byte) => colour(byte));
      const none = /^#(..)(..)(..)$/.exec(variable("--none")).slice(1).map((each) => parseInt(each, 16));
      const parent = $("strips");
      parent.replaceChildren();
      for (let l = 0; l < L; l++) {
        const figure = html("figure", {}, parent);
        html("small", {}, figure, `layer ${l}`);
        const canvas = html("canvas", { width: tokens.length, height: E }, figure);
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `Load of the experts of layer ${l} over the run`);
        const context = canvas.getContext("2d");
        const image = context.createImageData(tokens.length, E);
        for (let t = 0; t < tokens.length; t++)
          for (let e = 0; e < E; e++)
            image.data.set([...(bytes[cell(t, l, e)] || none), 255], 4 * (e * tokens.length + t));
        context.putImageData(image, 0, 0);
      }
    }
    function scale() {
      const stops = [-64, -32, 0, 32, 63].map((step) => `rgb(${colour(128 + step)})`);
      $("scale").replaceChildren();
      html("span", {}, $("scale"), "¼");
      html("i", {}, $("scale")).style.background = `linear-gradient(90deg, ${stops})`;
      html("span", {}, $("scale"), "4 times its share");
    }
    slider.addEventListener("input", update);
    return () => { scale(); grid(); strips(); };
  }

  const drawings = [...document.querySelectorAll("figure.chart")].map(chart);
  if (data.experts) drawings.push(experts(data.experts));
  const all = () => drawings.forEach((draw) => draw());

  live(all);
})();
