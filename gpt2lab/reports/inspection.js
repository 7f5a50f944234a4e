// Script of an inspection page: colours by a chosen metric, a token's metrics, attention maps and their enlargement.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (id) => document.getElementById(id);
const percent = (share) => (share >= 0.0995 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)) + " %";
const chance = (share) => (share >= 0.001 ? percent(share) : `1 in ${Math.round(1 / share).toLocaleString("en")}`);
const escaped = (text) => text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);
const number = new Map(data.places.map((place, row) => [place, row])); // position in the text → row of the metrics

// Metrics of a token

function bars(top_tokens, tint, there) {
  return top_tokens.map(([text, share]) => `<div class="bar ${tint} ${text === there ? "there" : ""}">` +
    `<code title="${escaped(text)}">${escaped(text)}</code><i style="width:${(100 * share).toFixed(1)}%"></i>` +
    `<span>${percent(share)}</span></div>`).join("");
}

function rows(expected, row) {
  const loss = expected.losses[row];
  return [
    `${loss.toFixed(3)} nats`, `${(loss / Math.LN2).toFixed(3)} bits`, chance(Math.exp(-loss)),
    expected.ranks[row].toLocaleString("en"), `${expected.entropies[row].toFixed(3)} nats`,
    `≈ ${Math.exp(expected.entropies[row]).toFixed(1)}`,
  ];
}

function describe(card, place) {
  const row = number.get(place), text = data.signs[place];
  const origin = data.written[place] ? "generated" : "given";
  let content = `<div class="token">${escaped(text)}</div><small>token ${place + 1} of ${data.signs.length} · ${origin}</small>`;
  if (row === undefined) {
    card.innerHTML = content + `<p><small>${data.unpredicted}</small></p>`;
    return;
  }
  const names = ["loss", "", "probability", "rank", "entropy", "choices"], teacher = data.teacher;
  const columns = [rows(data.model, row), ...(teacher ? [rows(teacher, row)] : [])];
  const heading = teacher ? "<tr><th></th><td><small>student</small></td><td><small>teacher</small></td></tr>" : "";
  content += `<table>${heading}${names.map((name, line) =>
    `<tr><th>${name}</th>${columns.map((column) => `<td>${column[line]}</td>`).join("")}</tr>`).join("")}</table>`;
  if (teacher) {
    content += `<table><tr><th>KL(teacher‖student)</th><td>${teacher.kl[row].toFixed(3)} nats</td></tr>` +
      `<tr><th>total variation</th><td>${teacher.tvd[row].toFixed(3)}</td></tr></table>`;
  }
  content += `<h4>${teacher ? "Student" : "Model"} top-5</h4>${bars(data.model.top_tokens[row], "hot", text)}`;
  if (teacher) content += `<h4>Teacher top-5</h4>${bars(teacher.top_tokens[row], "apart", text)}`;
  card.innerHTML = content;
}

function choose(part, card, place) {
  for (const marked of all(".chosen", part)) marked.classList.remove("chosen");
  for (const token of all(`[data-i="${place}"]`, part)) token.classList.add("chosen");
  describe(card, place);
}

function listen(part, chosen) {
  for (const kind of ["pointerover", "click"]) {
    part.addEventListener(kind, (event) => {
      const token = event.target.closest("[data-i]");
      if (token) chosen(Number(token.dataset.i));
    });
  }
}

function arrows(strip, first, chosen) {
  strip.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const at = Number((strip.querySelector(".chosen") || { dataset: { i: first } }).dataset.i) + (way || 0);
    if (way && strip.querySelector(`[data-i="${at}"]`)) {
      chosen(at);
      event.preventDefault();
    }
  });
}

const strip = one("strip"), card = one("card");
const pick = (place) => choose(strip, card, place);
listen(strip, pick);
arrows(strip, data.first, pick);
if (data.places.length) {
  const losses = data.model.losses;
  pick(data.places[losses.indexOf(Math.max(...losses))]);
} else pick(data.first);

const heat = one("heat");
if (heat) {
  const kl = data.teacher.kl, show = (place) => choose(heat, one("heat-card"), place);
  listen(heat, show);
  show(data.places[kl.indexOf(Math.max(...kl))]);
}

// Colours by a chosen metric: function to 0 … 1, tint, meaning of both ends

const entries = Math.log(data.entries);
const measures = {
  loss: [(row) => data.model.losses[row] / entries, "hot", "0 nats: certain", `${entries.toFixed(1)} nats: uniform guess`],
  entropy: [(row) => data.model.entropies[row] / entries, "hot", "0: certain", `${entries.toFixed(1)} nats: uniform`],
  rank: [(row) => Math.log(data.model.ranks[row]) / entries, "hot", "1: top-1", `${data.entries.toLocaleString("en")}: least probable`],
  kl: [(row) => data.teacher.kl[row] / 3, "apart", "0: identical", "3 nats or more"],
  tvd: [(row) => data.teacher.tvd[row], "apart", "0: identical", "1: disjoint"],
  worse: [(row) => (data.model.losses[row] - data.teacher.losses[row]) / 3, "apart", "student no worse than its teacher", "3 nats worse"],
};

function colour(name) {
  const [value, tint, low, high] = measures[name];
  for (const token of all(".t", strip)) {
    const row = number.get(Number(token.dataset.i));
    token.style.setProperty("--v", row === undefined ? 0 : Math.min(Math.max(value(row), 0), 1).toFixed(3));
  }
  for (const part of [strip, one("legend")]) part.classList.remove("hot", "apart"), part.classList.add(tint);
  one("legend").innerHTML = `${low}<i></i>${high}`;
  for (const button of all("#measures button")) button.setAttribute("aria-pressed", button.value === name);
}
for (const button of all("#measures button")) button.addEventListener("click", () => colour(button.value));
colour("loss");

// Attention: one byte per weight, 255 times its square root

const size = data.sees.length, { layers, heads } = data, square = size * size;
const bytes = Uint8Array.from(atob(data.attention), (letter) => letter.charCodeAt(0));
const state = { ...sharpest(), whole: "head", way: "from", place: size - 1 };

function sharpest() { // the head that is shown first
  const clear = Array.from({ length: layers * heads }, (_, part) => {
    let sum = 0;
    for (let k = part * square; k < (part + 1) * square; k++) sum += bytes[k] ** 4;
    return sum;
  });
  const part = clear.indexOf(Math.max(...clear));
  return { layer: Math.floor(part / heads), head: part % heads };
}

function weights() {
  const parts = [];
  for (let layer = 0; layer < layers; layer++) {
    for (let head = 0; head < heads; head++) {
      const wanted = { head: layer === state.layer && head === state.head, layer: layer === state.layer, all: true };
      if (wanted[state.whole]) parts.push(layer * heads + head);
    }
  }
  const sum = new Float32Array(square);
  for (const part of parts) {
    for (let k = 0; k < square; k++) sum[k] += (bytes[part * square + k] / 255) ** 2 / parts.length;
  }
  return sum;
}

const seen = (row, column) => column >= data.sees[row][0] && column < data.sees[row][1];
let colours = {};

function readColours() {
  const style = getComputedStyle(document.documentElement), probe = document.createElement("canvas").getContext("2d");
  const parts = (colour) => { probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1); return probe.getImageData(0, 0, 1, 1).data; };
  colours = { base: parts(style.getPropertyValue("--panel").trim()), ink: style.getPropertyValue("--ink").trim(),
    look: style.getPropertyValue("--look").trim().split(" ").map(Number), soft: style.getPropertyValue("--soft").trim() };
}

function image(value) {
  const picture = new ImageData(size, size);
  for (let row = 0; row < size; row++) {
    for (let column = 0; column < size; column++) {
      if (!seen(row, column)) continue;
      const share = value(row * size + column), at = 4 * (row * size + column);
      for (let part = 0; part < 3; part++) {
        picture.data[at + part] = colours.base[part] + share * (colours.look[part] - colours.base[part]);
      }
      picture.data[at + 3] = 255;
    }
  }
  return picture;
}

function drawMaps() {
  for (const map of all(".map")) {
    const canvas = map.querySelector("canvas"), start = Number(map.value) * square;
    canvas.width = canvas.height = size;
    canvas.style.imageRendering = size < 90 ? "pixelated" : "auto";
    canvas.getContext("2d").putImageData(image((k) => bytes[start + k] / 255), 0, 0);
  }
}

const large = one("large"), margin = 96, legible = 9; // pixels: of the names beside it, and from one name to the next
let current = new Float32Array(square);

function drawLarge() {
  const wide = large.clientWidth, ratio = window.devicePixelRatio || 1, inner = wide - margin - 4, cell = inner / size;
  large.width = large.height = Math.round(wide * ratio);
  large.style.height = `${wide}px`;
  const pen = large.getContext("2d"), small = document.createElement("canvas");
  small.width = small.height = size;
  small.getContext("2d").putImageData(image((k) => Math.sqrt(current[k])), 0, 0);
  pen.scale(ratio, ratio);
  pen.imageSmoothingEnabled = false;
  pen.fillStyle = getComputedStyle(document.body).backgroundColor; // under the names, the hatching only where nothing is seen
  pen.fillRect(0, 0, wide, margin);
  pen.fillRect(0, 0, margin, wide);
  pen.fillRect(margin + inner, 0, wide, wide);
  pen.fillRect(0, margin + inner, wide, wide);
  pen.drawImage(small, margin, margin, inner, inner);
  pen.strokeStyle = colours.ink;
  pen.lineWidth = 1.5;
  const offset = margin + state.place * cell;
  if (state.way === "from") pen.strokeRect(margin, offset, inner, cell);
  else pen.strokeRect(offset, margin, cell, inner);
  names(pen, cell);
}

function names(pen, cell) {
  const step = Math.ceil(legible / cell); // of many tokens every so many-eth is named, and the chosen one
  pen.font = `${Math.min(12, Math.max(8, cell * step * 0.8))}px ui-monospace, Menlo, monospace`;
  pen.textBaseline = "middle";
  for (let place = 0; place < size; place++) {
    if (place !== state.place && (place % step || Math.abs(place - state.place) < step)) continue;
    const text = data.read[data.from + place].slice(0, 12), middle = margin + (place + 0.5) * cell;
    pen.fillStyle = place === state.place ? colours.ink : colours.soft;
    pen.textAlign = "right";
    pen.fillText(text, margin - 5, middle);
    pen.save();
    pen.translate(middle, margin - 5);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "left";
    pen.fillText(text, 0, 0);
    pen.restore();
  }
}

const attended = one("attended");

function lookAt(place) {
  state.place = place;
  const from = state.way === "from", share = (other) => (from ? current[place * size + other] : current[other * size + place]);
  let total = 0;
  const found = [];
  for (const token of all(".t", attended)) {
    const other = Number(token.dataset.i) - data.from, value = share(other);
    token.style.setProperty("--v", Math.sqrt(Math.min(value, 1)).toFixed(3));
    token.classList.toggle("unseen", from ? !seen(place, other) : !seen(other, place));
    token.classList.toggle("chosen", other === place);
    token.title = percent(value);
    total += value;
    found.push([value, other]);
  }
  const best = found.sort((a, b) => b[0] - a[0]).slice(0, 4).filter(([value]) => value >= 0.005);
  const name = (at) => `<b>${escaped(data.read[data.from + at])}</b>`;
  const list = best.map(([value, other]) => `${percent(value)} ${from ? "to" : "by"} ${name(other)}`).join(", ");
  const earlier = from && data.from && total < 0.985 ? `; ${percent(1 - total)} to tokens before those shown` : "";
  one("attends").innerHTML = `${name(place)} (token ${data.from + place + 1}) ${from ? "attends" : "is attended to"}: ${list || `less than 0.5 % ${from ? "to" : "by"} each of those shown`}${earlier}.`;
  drawLarge();
}

function refresh() {
  current = weights();
  const titles = { head: `Layer ${state.layer + 1}, head ${state.head + 1}`, layer: `Layer ${state.layer + 1}, mean of its heads`, all: "Mean of all heads" };
  const habit = state.whole === "head" ? `: ${data.habits[state.layer * heads + state.head].replace("≈", "spread over ≈")}` : "";
  one("which").textContent = titles[state.whole] + habit;
  for (const map of all(".map")) map.setAttribute("aria-pressed", state.whole === "all" || (Math.floor(map.value / heads) === state.layer && (state.whole === "layer" || map.value % heads === state.head)));
  for (const button of all("#wholes button")) button.setAttribute("aria-pressed", button.value === state.whole);
  for (const button of all("#ways button")) button.setAttribute("aria-pressed", button.value === state.way);
  lookAt(state.place);
}

for (const map of all(".map")) {
  map.addEventListener("click", () => {
    Object.assign(state, { layer: Math.floor(map.value / heads), head: map.value % heads, whole: "head" });
    refresh();
  });
}
for (const button of all("#wholes button")) button.addEventListener("click", () => { state.whole = button.value; refresh(); });
for (const button of all("#ways button")) button.addEventListener("click", () => { state.way = button.value; refresh(); });
listen(attended, (place) => lookAt(place - data.from));
arrows(attended, data.from, (place) => lookAt(place - data.from));
for (const kind of ["pointermove", "pointerdown"]) {
  large.addEventListener(kind, (event) => {
    const cell = (large.clientWidth - margin - 4) / size, box = large.getBoundingClientRect();
    const along = state.way === "from" ? event.clientY - box.top : event.clientX - box.left;
    const place = Math.floor((along - margin) / cell);
    if (place >= 0 && place < size && place !== state.place) lookAt(place);
  });
}

function redraw() {
  readColours();
  drawMaps();
  refresh();
}
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
window.addEventListener("resize", drawLarge);
redraw();
