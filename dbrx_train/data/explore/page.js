"use strict";
// The map of passages, and the list of those that words, sources, clusters and signals leave.
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const $ = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const numbers = (text, Kind) => new Kind(bytes(text).buffer);
  const strings = async (text) =>
    JSON.parse(await new Response(new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("gzip"))).text());
  const x = numbers(data.x, Uint16Array), y = numbers(data.y, Uint16Array);
  const of = { source: numbers(data.source, Uint16Array), cluster: numbers(data.cluster, Uint16Array) };
  const values = numbers(data.values, Float32Array);
  const [texts, places] = await Promise.all([strings(data.texts), strings(data.places)]);
  const lower = texts.map((text) => text.toLowerCase());
  const count = x.length, MOST = 60;
  const hidden = new Set();
  let near = null, shown = [];
  const canvas = $("map"), tip = $("tip");
  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const palette = () => [...Array(12).keys()].map((i) => variable(`--c${i}`));

  data.clusters.forEach((title, i) => $("cluster").add(new Option(title, i)));
  $("explorer").hidden = false;

  function chosen() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const cluster = $("cluster").value, signal = Number($("signal").value) * count;
    const low = $("low").value === "" ? -Infinity : Number($("low").value);
    const high = $("high").value === "" ? Infinity : Number($("high").value);
    const found = [];
    for (let i = 0; i < count; i++) {
      if (hidden.has(of.source[i]) || (cluster !== "" && of.cluster[i] !== Number(cluster))) continue;
      const value = values[signal + i];
      if (value < low || value > high || !words.every((word) => lower[i].includes(word))) continue;
      found.push(i);
    }
    return found;
  }

  function place(i) {
    const margin = 10;
    return [margin + (x[i] / 65535) * (canvas.clientWidth - 2 * margin), margin + (1 - y[i] / 65535) * (canvas.clientHeight - 2 * margin)];
  }

  function colours() {
    const by = $("colour").value, pick = palette();
    if (by in of) return (i) => pick[of[by][i] % pick.length];
    const begin = Number(by) * count;
    const sorted = Float32Array.from(values.subarray(begin, begin + count)).sort();
    const low = sorted[Math.floor(count * 0.02)], high = sorted[Math.floor(count * 0.98)];
    const [from, to] = ["--ramp-from", "--ramp-to"].map((name) => variable(name).split(" ").map(Number));
    return (i) => {
      const t = Math.min(1, Math.max(0, (values[begin + i] - low) / (high - low || 1)));
      return `rgb(${from.map((c, k) => Math.round(c + t * (to[k] - c))).join(" ")})`;
    };
  }

  function draw() {
    const ratio = devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    const context = canvas.getContext("2d"), size = count > 30000 ? 1.6 : count > 5000 ? 2.4 : 3.6;
    context.scale(ratio, ratio);
    const inside = new Uint8Array(count), colour = colours();
    for (const i of shown) inside[i] = 1;
    context.globalAlpha = 0.35;
    context.fillStyle = variable("--line");
    for (let i = 0; i < count; i++) if (!inside[i]) { const [a, b] = place(i); context.fillRect(a - 1, b - 1, 2, 2); }
    context.globalAlpha = 0.75;
    for (const i of shown) { context.fillStyle = colour(i); const [a, b] = place(i); context.fillRect(a - size / 2, b - size / 2, size, size); }
    if (near) {
      context.globalAlpha = 1;
      context.strokeStyle = variable("--ink");
      context.beginPath();
      context.arc(near[0], near[1], 14, 0, 7);
      context.stroke();
    }
  }

  function list() {
    let first = shown;
    if (near) {
      const away = new Map(shown.map((i) => { const [a, b] = place(i); return [i, (a - near[0]) ** 2 + (b - near[1]) ** 2]; }));
      first = [...shown].sort((i, j) => away.get(i) - away.get(j));
    }
    $("count").textContent = `${shown.length.toLocaleString("en")} of ${count.toLocaleString("en")} passages` +
      (shown.length > MOST ? `, ${MOST} listed` : "") + (near ? ", the nearest to the circle first" : "");
    $("found").replaceChildren(...first.slice(0, MOST).map((i) => {
      const item = document.createElement("li"), about = document.createElement("small"), text = document.createElement("p");
      about.textContent = `${places[i]} · ${data.sources[of.source[i]]} · ${data.clusters[of.cluster[i]]} · ` +
        data.signals.map((name, k) => `${name} ${Number(values[k * count + i].toPrecision(3))}`).join(", ");
      text.textContent = texts[i];
      item.append(about, text);
      return item;
    }));
  }

  function legend() {
    const pick = palette(), bySource = $("colour").value === "source";
    $("legend").replaceChildren(...data.sources.map((name, i) => {
      const button = document.createElement("button"), mark = document.createElement("i");
      button.type = "button";
      button.ariaPressed = String(!hidden.has(i));
      mark.style.background = bySource ? pick[i % pick.length] : "var(--line)";
      button.append(mark, name);
      button.onclick = () => { hidden.has(i) ? hidden.delete(i) : hidden.add(i); all(); };
      return button;
    }));
  }

  function all() { shown = chosen(); legend(); draw(); list(); }

  function nearest(event) {
    const box = canvas.getBoundingClientRect(), at = [event.clientX - box.left, event.clientY - box.top];
    let best = -1, away = 100;
    for (const i of shown) {
      const [a, b] = place(i), d = (a - at[0]) ** 2 + (b - at[1]) ** 2;
      if (d < away) { away = d; best = i; }
    }
    return [best, at];
  }

  canvas.onpointermove = (event) => {
    const [i] = nearest(event);
    tip.hidden = i < 0;
    if (i < 0) return;
    tip.textContent = `${data.clusters[of.cluster[i]]}: ${texts[i].slice(0, 160)}`;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - 310)}px`;
    tip.style.top = `${event.clientY + 14}px`;
  };
  canvas.onpointerleave = () => { tip.hidden = true; };
  canvas.onclick = (event) => { near = nearest(event)[1]; draw(); list(); };
  for (const id of ["search", "cluster", "low", "high", "signal"]) $(id).oninput = () => { near = null; all(); };
  $("colour").oninput = all;
  function reset() {
    for (const id of ["search", "cluster", "low", "high"]) $(id).value = "";
    hidden.clear();
    near = null;
  }
  $("reset").onclick = () => { reset(); all(); };
  document.querySelectorAll("[data-cluster]").forEach((button) => {
    button.onclick = () => { reset(); $("cluster").value = button.dataset.cluster; all(); $("passages").scrollIntoView(); };
  });

  live(all, () => { near = null; all(); });
  root.dataset.ready = "";
})();
