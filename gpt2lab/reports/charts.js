// Draws the charts of a page (charts.py) with uPlot, and highlights a setting in all tables and charts at once.
'use strict';
(() => {
const figures = [...document.querySelectorAll('figure.plot')].map(figure => ({
  figure, spec: JSON.parse(figure.querySelector('script').textContent), plot: null, lines: [],
}));
const clocks = JSON.parse(document.getElementById('clocks')?.textContent ?? '[]');
const control = id => document.getElementById(id);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();
const FONT = '12px system-ui, sans-serif';
const INCREMENTS = Array.from({length: 39}, (_, index) => [1, 2, 5][index % 3] * 10 ** Math.floor(index / 3));
const HEIGHTS = {curves: 190, slices: 190, parallel: 320, wide: 320};

function number(value) {
  if (value == null) return '–';
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
  return Number(value.toPrecision(size >= 1e4 ? 3 : 4)).toLocaleString('en', {maximumSignificantDigits: 6});
}

function axisNumber(value) {
  if (value == null) return '';
  const size = Math.abs(value);
  if (size >= 1e9) return value / 1e9 + 'G';
  if (size >= 1e6) return +(value / 1e6).toPrecision(4) + 'M';
  if (size >= 1e4) return +(value / 1e3).toPrecision(4) + 'k';
  return value !== 0 && size < 1e-3 ? value.toExponential().replace('+', '') : String(+value.toPrecision(6));
}

// Position of a step on the chosen x axis, between the logged steps of its run by linear interpolation
function onAxis(step, clock) {
  const name = control('x-axis')?.value ?? 'steps', own = clocks[clock];
  if (name === 'steps' || !own?.[name]) return step;
  const steps = own.steps, values = own[name];
  let right = steps.findIndex(one => one >= step);
  if (right < 0) right = steps.length - 1;
  const before = right ? steps[right - 1] : 0, start = right ? values[right - 1] : 0;
  return start + (values[right] - start) * (step - before) / (steps[right] - before || 1);
}

function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map(value => {
    if (value == null) return value;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function columns(spec) {
  const isCurve = spec.kind === 'curves', positive = isCurve && control('log-x')?.checked;
  const maps = spec.lines.map(line =>
    new Map(line.points.map(([x, y]) => [isCurve ? onAxis(x, line.clock) : x, y]).filter(([x]) => !positive || x > 0)));
  const xs = [...new Set(maps.flatMap(map => [...map.keys()]))].sort((a, b) => a - b);
  return [xs, maps.map(map => xs.map(x => map.get(x) ?? null))];
}

// Index of the nearest value of a line, which need not have one at every x
function nearestIndex(plot, series, index) {
  const values = plot.data[series];
  if (!series || values[index] != null) return index;
  for (let away = 1; away < values.length; away++) {
    if (values[index - away] != null) return index - away;
    if (values[index + away] != null) return index + away;
  }
  return index;
}

function styles(spec, weight) {
  const series = [{label: spec.kind === 'curves' ? control('x-axis')?.value ?? 'steps' : '', value: (_, v) => number(v)}];
  const style = (line, more) => ({
    label: line.name, stroke: colour(line.colour), width: line.is_bold ? 2.5 : 1.5, spanGaps: true,
    dash: line.is_dashed ? [5, 4] : undefined, value: (plot, v, s, i) => number(i == null ? plot.data[s].findLast(one => one != null) : v),
    points: {size: 6, fill: colour(line.colour), show: spec.kind === 'slices' || (spec.kind === 'curves' && line.points.length < 40 && spec.lines.length <= 12)}, ...more,
  });
  for (const line of spec.lines) {
    const isSmooth = weight > 0 && line.is_smoothed;
    series.push(style(line, isSmooth ? {alpha: .3, points: {show: false}} : spec.kind === 'slices' ? {paths: () => null} : {}));
    if (isSmooth) series.push(style(line, {label: line.name + ', smoothed', width: 2, points: {show: false}}));
  }
  for (const [name, , tint] of spec.levels) series.push(style({name, colour: tint, points: [], is_dashed: true}, {points: {show: false}}));
  return series;
}

function data(spec, weight) {
  const [xs, values] = columns(spec), all = [xs];
  spec.lines.forEach((line, index) => {
    all.push(values[index]);
    if (weight > 0 && line.is_smoothed) all.push(smoothed(values[index], weight));
  });
  for (const [, value] of spec.levels) all.push(xs.map(() => value));
  return all;
}

function axes(spec) {
  const plain = {stroke: colour('soft'), font: FONT, grid: {stroke: colour('line'), width: 1}, ticks: {show: false}};
  if (spec.kind === 'parallel') return [{show: false}, {show: false}];
  const x = {...plain, size: 34, incrs: INCREMENTS, values: (_, splits) => splits.map(axisNumber)};
  if (spec.x_ticks.length) {
    x.splits = () => spec.x_ticks.map(tick => tick[0]);
    x.values = plot => apart(plot, spec.x_ticks);
  }
  return [x, {...plain, size: 54, values: (_, splits) => splits.map(axisNumber)}];
}

// Texts of the ticks that do not overlap an earlier one
function apart(plot, ticks) {
  let end = -Infinity;
  return ticks.map(([position, text]) => {
    const middle = plot.valToPos(position, 'x'), half = text.length * 3.5;
    if (middle - half < end) return '';
    end = middle + half + 6;
    return text;
  });
}

function scales(spec, isLogX, isLogY) {
  const values = spec.lines.flatMap(line => line.points.map(point => point[1]));
  const lowest = values.reduce((a, b) => Math.min(a, b)), highest = values.reduce((a, b) => Math.max(a, b));
  const around = (low, high) => uPlot.rangeNum(low ?? 0, high ?? 1, .08, false);
  const y = {distr: isLogY ? 3 : 1};
  if (spec.kind === 'parallel') y.range = () => [0, 1];
  else if (!isLogY) y.range = (_, low, high) => spec.y_range && low === lowest && high === highest ? around(...spec.y_range) : around(low, high);
  const x = {time: false, distr: isLogX ? 3 : 1};
  if (isLogX) x.range = (_, low, high) => [low ?? 1, high > low ? high : 10 * (low ?? 1)]; // not to the next power of ten
  if (spec.kind === 'slices') x.range = () => [-.08, 1.08];
  return {x, y};
}

function drawEvents(plot, spec) {
  const context = plot.ctx, ratio = devicePixelRatio;
  context.save();
  context.strokeStyle = context.fillStyle = colour('soft');
  context.font = `${12 * ratio}px system-ui, sans-serif`;
  for (const [step, text] of spec.events) {
    const x = plot.valToPos(onAxis(step, 0), 'x', true);
    if (x < plot.bbox.left || x > plot.bbox.left + plot.bbox.width) continue;
    context.setLineDash([3 * ratio, 3 * ratio]);
    context.beginPath();
    context.moveTo(x, plot.bbox.top);
    context.lineTo(x, plot.bbox.top + plot.bbox.height);
    context.stroke();
    const isRight = x > plot.bbox.left + plot.bbox.width * .7;
    context.textAlign = isRight ? 'right' : 'left';
    context.fillText(text, x + (isRight ? -4 : 4) * ratio, plot.bbox.top + 12 * ratio);
  }
  context.restore();
}

function drawParallel(plot, spec) {
  const context = plot.ctx, ratio = devicePixelRatio, {top, height} = plot.bbox;
  context.save();
  context.font = `${12 * ratio}px system-ui, sans-serif`;
  context.lineWidth = 3 * ratio;
  context.lineJoin = 'round';
  spec.axes.forEach(([name, marks], index) => {
    const x = plot.valToPos(index, 'x', true), isLast = index === spec.axes.length - 1;
    context.fillStyle = colour('soft');
    context.fillRect(x - ratio / 2, top, ratio, height);
    context.textAlign = index === 0 ? 'left' : isLast ? 'right' : 'center';
    context.fillText(name, x + (index === 0 ? -48 : isLast ? 48 : 0) * ratio, top + height + (20 + 16 * (index % 2)) * ratio);
    context.textAlign = isLast ? 'left' : 'right';
    context.strokeStyle = colour('paper');
    context.fillStyle = colour('ink');
    for (const [position, text] of marks) {
      const at = [text, x + (isLast ? 6 : -6) * ratio, plot.valToPos(position, 'y', true) + 4 * ratio];
      context.strokeText(...at);
      context.fillText(...at);
    }
  });
  context.restore();
}

// Two fingers zoom into the x axis
function pinch(plot) {
  let start = null;
  const span = touches => [...touches].map(touch => touch.clientX - plot.over.getBoundingClientRect().left).sort((a, b) => a - b);
  plot.over.addEventListener('touchstart', event => {
    if (event.touches.length !== 2) return;
    start = span(event.touches).map(left => plot.posToVal(left, 'x'));
  });
  plot.over.addEventListener('touchmove', event => {
    if (event.touches.length !== 2 || !start) return;
    event.preventDefault();
    const [left, right] = span(event.touches), scale = (start[1] - start[0]) / Math.max(right - left, 20);
    const low = start[0] - left * scale, all = plot.data[0];
    plot.setScale('x', {min: Math.max(low, all[0]), max: Math.min(low + plot.over.clientWidth * scale, all.at(-1))});
  }, {passive: false});
}

function tip(entry) {
  const box = document.createElement('div');
  box.className = 'tip';
  box.hidden = true;
  entry.figure.append(box);
  return {hooks: {setSeries: (plot, index, options) => {
    if (!options.focus || entry.isMarking) return;
    const line = index ? entry.lines[index] : null;
    mark(line ? line.setting : null);
    show(plot, index, line);
  }, setCursor: plot => {
    const index = plot.series.findIndex((one, i) => i && one._focus);
    show(plot, index > 0 && plot.cursor.left >= 0 ? index : null, entry.lines[index]);
  }}};
  function show(plot, index, line) {
    box.hidden = !line;
    if (!line) return;
    const at = plot.cursor.idxs[index], y = plot.data[index][at];
    box.textContent = entry.spec.kind === 'curves' ? `${line.name} · ${number(plot.data[0][at])}: ${number(y)}` : line.name;
    const left = plot.cursor.left + plot.over.offsetLeft, isRight = left > plot.width / 2;
    box.style.left = isRight ? '' : left + 14 + 'px';
    box.style.right = isRight ? plot.width - left + 14 + 'px' : '';
    box.style.top = plot.cursor.top + entry.figure.firstChild.offsetHeight + 'px';
  }
}

function draw(entry) {
  const {figure, spec} = entry, weight = Number(control('smoothing')?.value ?? 0), isCurve = spec.kind === 'curves';
  const isLogX = isCurve && control('log-x')?.checked, isLogY = isCurve && control('log-y')?.checked && allPositive(spec);
  entry.plot?.destroy();
  figure.querySelector('.tip')?.remove();
  entry.lines = [null, ...spec.lines.flatMap(line => weight > 0 && line.is_smoothed ? [line, line] : [line])];
  const plugins = [{hooks: {ready: pinch, draw: plot => spec.kind === 'parallel' ? drawParallel(plot, spec) : drawEvents(plot, spec)}}];
  if (spec.names_nearest) plugins.push(tip(entry));
  entry.plot = figure.plot = new uPlot({
    width: figure.clientWidth, height: HEIGHTS[spec.is_wide && isCurve ? 'wide' : spec.kind],
    padding: spec.kind === 'parallel' ? [14, 56, 44, 60] : [10, 20, 0, 0], plugins,
    scales: scales(spec, isLogX, isLogY), series: styles(spec, weight), axes: axes(spec),
    legend: {show: !spec.names_nearest}, focus: {alpha: spec.names_nearest ? .15 : 1},
    cursor: {dataIdx: nearestIndex, focus: {prox: spec.names_nearest ? 24 : -1}, drag: {x: spec.kind === 'curves', y: false},
      points: {show: spec.kind !== 'parallel'}, ...(isCurve ? {sync: {key: 'curves', setSeries: false, scales: ['x', null]}} : {})},
  }, data(spec, weight), figure);
}

const allPositive = spec => spec.lines.every(line => line.points.every(point => point[1] > 0));

// The setting under the pointer, in tables, rows and charts
let marked = null;
function mark(setting) {
  if (setting === marked) return;
  marked = setting;
  document.querySelectorAll('[data-s]').forEach(one => one.classList.toggle('on', setting != null && one.dataset.s == setting));
  document.body.classList.toggle('hot', setting != null);
  for (const entry of figures) {
    const index = setting == null ? null : entry.lines.findIndex(line => line && line.setting === setting);
    if (!entry.plot || index === -1 || !entry.spec.names_nearest || entry.plot.cursor.left >= 0) continue;
    entry.isMarking = true;
    entry.plot.setSeries(index, {focus: true});
    entry.isMarking = false;
    entry.figure.dataset.on = setting ?? '';
  }
}
document.addEventListener('mouseover', event => {
  if (event.target.closest('figure.plot')) return;
  const own = event.target.closest('[data-s]');
  mark(own ? Number(own.dataset.s) : null);
});

// The controls keep their values when the page reloads itself
const CONTROLS = ['x-axis', 'log-x', 'log-y', 'smoothing'], key = 'controls of ' + location.pathname;
function keep() {
  const values = CONTROLS.map(control).map(one => one && [one.value, one.checked]);
  try { sessionStorage.setItem(key, JSON.stringify(values)); } catch { /* no storage */ }
}
function restore() {
  let values = null;
  try { values = JSON.parse(sessionStorage.getItem(key)); } catch { /* no storage */ }
  CONTROLS.map(control).forEach((one, index) => { if (one && values?.[index]) [one.value, one.checked] = values[index]; });
}

const all = () => figures.forEach(draw);
restore();
all();
for (const id of CONTROLS) control(id)?.addEventListener('input', () => { keep(); all(); });
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', all);
const observer = new ResizeObserver(entries => entries.forEach(({target}) => {
  const entry = figures.find(one => one.figure === target);
  if (entry.plot.width !== target.clientWidth) entry.plot.setSize({width: target.clientWidth, height: entry.plot.height});
}));
figures.forEach(entry => observer.observe(entry.figure));
})();
