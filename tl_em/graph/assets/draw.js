// Drawing: links on canvases below (all of them, and those of the selection), things as SVG above, axes that stay in sight.
const $ = (id) => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";
const stage = $("stage"), drawing = $("drawing");
const LEFT = folds ? 78 : 58, BOTTOM = 46, TOP = folds ? 42 : 0;
const NARROW = window.matchMedia("(max-width: 760px)");
const camera = { k: 1, x: 0, y: 0 };
const colour = {};
const COLOURS = ["page", "raised", "ink", "muted", "rule", "pos", "neg", "trail", "appeared", "vanished", "stronger", "weaker", "same", "sans", "node"];
const DASH = { appeared: [], stronger: [14, 4], weaker: [2, 4], vanished: [7, 6], same: [] };

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(NS, tag);
  for (const [name, each] of Object.entries(attributes)) element.setAttribute(name, each);
  element.append(...children);
  return element;
}

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of COLOURS) colour[name] = style.getPropertyValue(`--${name}`).trim();
}

const polygon = (n, r, turn = 0) => Array.from({ length: n }, (_, i) => {
  const angle = turn + (2 * Math.PI * i) / n - Math.PI / 2;
  return `${i ? "L" : "M"}${(r * Math.cos(angle)).toFixed(1)} ${(r * Math.sin(angle)).toFixed(1)}`;
}).join("") + "Z";
const circle = (r) => `M${-r} 0A${r} ${r} 0 1 1 ${r} 0A${r} ${r} 0 1 1 ${-r} 0Z`;
const box = (r) => `M${-r} ${-r}H${r}V${r}H${-r}Z`;
const SHAPES = {
  feature: circle(R), error: polygon(4, R * 1.15), token: box(R * 0.85), head: polygon(3, R * 1.2),
  mlp: polygon(6, R * 1.1), adapter: polygon(5, R * 1.15), group: circle(R * 1.3),
  cell: "M-8-9H8A3 3 0 0 1 11-6V6A3 3 0 0 1 8 9H-8A3 3 0 0 1-11 6V-6A3 3 0 0 1-8-9Z",
  logit: `M${-R} ${R * 0.8}V${-R * 0.2}L0 ${-R * 1.1}L${R} ${-R * 0.2}V${R * 0.8}Z`,
};
const BADGES = { appeared: "M-3 0H3M0-3V3", vanished: "M-2.4-2.4L2.4 2.4M-2.4 2.4L2.4-2.4", stronger: "M-3 1.6L0-2L3 1.6", weaker: "M-3-1.6L0 2L3-1.6" };
const shapeOf = (thing) => (thing.cell && thing.group ? "cell" : thing.group ? "group" : thing.kind);

function curve(a, b) {
  const y1 = a.py - R, y2 = b.py + R, rise = y1 - y2, bend = Math.max(18, rise * 0.5);
  // Straight up would run through the nodes between: bow out to the side of the column.
  const side = Math.abs(a.px - b.px) < 2 * R && rise > 3 * R ? Math.min(34, 8 + rise * 0.09) : 0;
  return [a.px, y1, a.px + side * 1.3, y1 - bend * (side ? 0.7 : 1), b.px + side * 1.3, y2 + bend * (side ? 0.7 : 1), b.px, y2];
}

// What is to be drawn now, once, for canvas and file alike: all lines that are asked for, and above them the lit ones.
function scene() {
  const traced = state.path ? { strength: new Map(state.path.trail.map((link) => [link, 1])), trail: state.path.trail } : state.selected ? traceFrom(state.selected.own) : null;
  const most = lines.length ? lines[0].score || 1 : 1;
  const base = lines.slice(0, state.most).map((line) => look(line, Math.sqrt(line.score / most), traced ? 0.1 : 1));
  return { base, traced, lit: traced ? litBy(traced) : [], on: new Set((traced?.trail ?? []).flatMap((link) => [nodes[link.s].by, nodes[link.t].by]).filter(Boolean)) };
}
function litBy(traced) {
  const strength = new Map(), trail = new Set(traced.trail.map((link) => link.line).filter(Boolean));
  for (const [{ line }, size] of traced.strength) if (line) strength.set(line, (strength.get(line) ?? 0) + size);
  const strongest = largest([...strength.values()], (size) => size) || 1;
  const lit = [];
  for (const [line, size] of strength) if (size > strongest * 0.004 && !trail.has(line)) lit.push(look(line, Math.sqrt(size / strongest), 2));
  for (const line of trail) lit.push(look(line, Math.max(0.4, Math.sqrt((strength.get(line) || 0) / strongest)), 2, true));
  return lit;
}
const nearby = (thing) => thing.lines.map((line) => look(line, Math.sqrt(Math.min(1, line.share)), 2));

function look(line, size, level, onTrail = false) {
  const status = state.mode === "diff" ? line.status : null;
  const stroke = status ? colour[status] : line.w >= 0 ? colour.pos : colour.neg;
  const alpha = level === 2 ? 0.35 + 0.6 * size : Math.min(0.85, 0.08 + 0.75 * size) * (status === "same" ? 0.5 : 1) * level;
  return { at: curve(line.s, line.t), stroke, alpha, width: (level === 2 ? 0.9 : 0.5) + 3.4 * size, dash: status ? DASH[status] : [], onTrail, line };
}

let current = { base: [], traced: null, lit: [], on: new Set() };
// After a change of what counts, of what is open, or of the selection.
function refresh() {
  count();
  arrange();
  redraw();
}
function redraw() {
  current = scene();
  stale = true;
  paintNodes();
  sayState();
  repaint();
}
let queued = false, stale = true;
function repaint() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => { queued = false; paint(); });
}

const MOVING = 3000;
let seen = "", resting = 0;
function paint() {
  const { clientWidth: w, clientHeight: h } = stage, { k, x, y } = camera, now = [w, h, k, x, y].join();
  if (stale || now !== seen) {
    const pen = penOf($("links-layer"), w, h);
    pen.fillStyle = colour.rule;
    for (const row of place.rows) {
      pen.globalAlpha = 0.6;
      pen.fillRect(-x / k, row.start + row.size, w / k, 1 / k);
    }
    pen.fillStyle = colour.raised;
    pen.globalAlpha = 1;
    for (const band of bands) if (!band.folded) pen.fillRect(-x / k, band.top, w / k, STRIP);
    // While it moves, the strongest; all of them when it rests.
    const moving = !stale && current.base.length > MOVING;
    stroke(pen, moving ? current.base.slice(0, MOVING) : current.base, w, h);
    clearTimeout(resting);
    if (moving) resting = setTimeout(() => { stale = true; repaint(); }, 160);
    world.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)}) scale(${k.toFixed(4)})`);
    paintAxes(w, h);
    paintMap(w, h);
  }
  stale = false;
  seen = now;
  const over = !current.traced && state.hover?.drawn ? nearby(state.hover) : current.lit;
  stroke(penOf($("lit-layer"), w, h), over, w, h);
}
function penOf(canvas, w, h) {
  const ratio = window.devicePixelRatio || 1, { k, x, y } = camera;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.setTransform(ratio * k, 0, 0, ratio * k, ratio * x, ratio * y);
  return pen;
}
// Only what can be seen: a curve lies between its four points.
function stroke(pen, list, w, h) {
  const { k, x, y } = camera, left = -x / k, right = (w - x) / k, top = -y / k, bottom = (h - y) / k;
  const inSight = list.filter(({ at: [a, b, c, d, e, f, g, i] }) => Math.max(a, c, e, g) >= left && Math.min(a, c, e, g) <= right && Math.max(b, d, f, i) >= top && Math.min(b, d, f, i) <= bottom);
  pen.lineCap = "round";
  for (const halo of [true, false]) for (const { at, stroke: ink, alpha, width, dash, onTrail } of inSight) {
    if (halo && !onTrail) continue;
    pen.globalAlpha = halo ? 0.9 : alpha;
    pen.strokeStyle = halo ? colour.trail : ink;
    pen.lineWidth = halo ? width + 7 : width;
    pen.setLineDash(halo ? [] : dash);
    pen.beginPath();
    pen.moveTo(at[0], at[1]);
    pen.bezierCurveTo(at[2], at[3], at[4], at[5], at[6], at[7]);
    pen.stroke();
  }
  pen.setLineDash([]);
}

// -- things
const world = svg("g", { class: "world" });
const axes = svg("g", { class: "axes", "aria-hidden": "true" });
drawing.append(world, axes);
const mostReach = Math.max(1e-12, ...nodes.filter((node) => !always(node)).map((node) => node.reach));
const marks = new Map();
function markOf(thing) {
  if (marks.has(thing.key)) return marks.get(thing.key);
  const shape = shapeOf(thing), mark = svg("g", { role: "button" }), size = always(thing) || thing.group ? 1 : 0.72 + 0.5 * Math.sqrt(thing.reach / mostReach);
  mark.thing = thing;
  if (thing.group && folds) mark.setAttribute("aria-expanded", "false");
  mark.style.setProperty("--size", size.toFixed(3));
  mark.append(svg("circle", { class: "hit", r: thing.cell && thing.group ? 13 : R + 3.5 }), svg("path", { class: "ring", d: shape === "cell" ? "M-13-11H13V11H-13Z" : circle(R + 4) }));
  if (shape === "cell") mark.append(svg("path", { class: "back", d: SHAPES.cell }));
  mark.append(svg("path", { class: "glyph", d: SHAPES[shape] }));
  if (isDiff) mark.append(svg("path", { class: "badge", ...(shape === "cell" ? { transform: "translate(8.5 -7.5)" } : {}) }));
  if (shape === "cell") mark.append(svg("text", { class: "count", y: 4, "text-anchor": "middle" }));
  mark.append(svg("text", thing.kind === "logit" ? { class: "name", x: -R - 6, y: 4, "text-anchor": "end" } : { class: "name", y: (shape === "cell" ? 8 : R) + 13, "text-anchor": "middle" }));
  marks.set(thing.key, mark);
  return mark;
}
const WORDS = view.labelled ? 13 : 22;
const cut = (text, n) => { const all = [...text]; return all.length > n ? all.slice(0, n - 1).join("") + "…" : text; };

let stop = nodes.filter((node) => node.kind === "logit").sort((a, b) => b.reach - a.reach)[0]?.at ?? 0; // the node on which the keyboard enters the drawing
function paintNodes() {
  const wanted = new Set(things.map(markOf));
  paintSome(things);
  for (const mark of wanted) if (!mark.parentNode) world.append(mark);
  for (const each of handles) {
    const mark = handleOf(each);
    wanted.add(mark);
    if (!mark.parentNode) world.append(mark);
  }
  for (const mark of [...world.children]) if (!wanted.has(mark)) mark.remove();
  drawing.setAttribute("aria-label", `Attribution graph, ${nodes.filter((node) => node.shown).length} nodes${folds ? ` drawn as ${things.length} marks` : ""}. Arrow keys move along links, Enter selects${folds ? " or opens, Backspace folds" : ""}, Escape clears.`);
}
function paintSome(some) {
  const near = new Set(), entry = nodes[stop]?.by ?? things[0], chosen = state.selected && standIn(state.selected);
  for (const { line, alpha } of current.lit) if (alpha > 0.35) { near.add(line.s); near.add(line.t); }
  const names = namesFor([...(chosen ? [chosen] : []), ...current.on, ...(folds ? things.filter((thing) => thing.group && !thing.cell).sort((a, b) => b.reach - a.reach) : [])]);
  for (const thing of some) paintNode(markOf(thing), thing, { near, chosen, entry, names });
}
// Those of the lit things whose names have room beside those before them.
function namesFor(list) {
  const taken = [], half = (thing) => 3.2 * [...cut(shortName(thing), WORDS)].length;
  return new Set(list.filter((thing) => {
    const box = [thing.px - half(thing), thing.px + half(thing), thing.py];
    if (taken.some(([left, right, y]) => left < box[1] && right > box[0] && Math.abs(y - box[2]) < 13)) return false;
    taken.push(box);
    return true;
  }));
}
function paintNode(mark, thing, { near, chosen, entry, names }) {
  const hit = Boolean(state.query) && thing.own.some((at) => nodes[at].shown && matches(nodes[at])), lit = current.on.has(thing), sign = signed(thing);
  const selected = thing === chosen, kind = thing.group ? `group ${thing.cell ? "cell" : ""} ${thing.from.kind}` : thing.kind;
  const classes = ["node", kind, selected && "selected", thing.own.some((at) => state.picked.has(at)) && "picked", hit && "found", lit && "lit",
    ((current.traced && !near.has(thing) && !selected && !lit) || (state.query && !hit && !current.traced)) && "dim",
    sign.size > 0 && (sign.positive ? "pos" : "neg"), state.mode === "diff" && thing.status];
  const named = (thing.group && !thing.cell && !folds) || thing.kind === "logit" || (view.labelled && thing.kind !== "token") || thing === state.hover || (names.has(thing) && (thing.kind !== "token" || lit));
  const words = named ? cut(shortName(thing), WORDS) : "";
  const fill = state.mode === "diff" && !(thing.cell && thing.group) ? "" : sign.size ? ((thing.cell && thing.group ? 0.1 : 0.25) + (thing.cell && thing.group ? 0.4 : 0.75) * sign.size).toFixed(2) : "";
  const half = 3.2 * [...words].length, moved = thing.px < half ? half - thing.px : Math.min(0, place.width - half - thing.px);
  const aside = folds && words && thing.kind !== "logit" ? moved : 0; // a name stays inside the drawing
  const want = { aside, class: classes.filter(Boolean).join(" "), transform: `translate(${thing.px.toFixed(1)} ${thing.py.toFixed(1)})`, tabindex: thing === entry ? "0" : "-1", "aria-pressed": String(selected), "aria-label": describe(thing), fill, words, count: thing.group ? String(thing.own.length) : "", badge: thing.status };
  const same = mark.want ?? {};
  for (const name of ["class", "transform", "tabindex", "aria-pressed", "aria-label"]) if (want[name] !== same[name]) mark.setAttribute(name, want[name]);
  if (want.fill !== same.fill) mark.querySelector(".glyph").style.fillOpacity = fill;
  if (want.words !== same.words) mark.lastChild.textContent = words;
  if (want.aside !== (same.aside ?? 0)) mark.lastChild.setAttribute("x", want.aside.toFixed(1));
  if (want.badge !== same.badge) mark.querySelector(".badge")?.setAttribute("d", BADGES[thing.status] || "");
  if (thing.cell && want.count !== same.count && thing.group) mark.querySelector(".count").textContent = want.count;
  mark.want = want;
}
// What folds an opened group again.
function handleOf({ thing, x, y }) {
  const key = `h${thing.key}`;
  if (!marks.has(key)) {
    const mark = svg("g", { class: "handle", role: "button", tabindex: "0" }, svg("rect", { x: -11, y: -8, width: 22, height: 16, rx: 4 }), svg("path", { d: "M-4 0H4" }));
    mark.shuts = thing;
    marks.set(key, mark);
  }
  const mark = marks.get(key);
  mark.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
  mark.setAttribute("aria-label", `Fold ${thing.label}, ${thing.own.length} nodes`);
  return mark;
}

const most = Math.max(1e-12, ...nodes.filter((node) => node.kind !== "logit").map((node) => Math.abs(node.attribution ?? 0)));
function signed(thing) {
  const now = state.mode === "base" ? thing.base : thing.attribution;
  if (now === null || now === undefined) return { size: 0, positive: true };
  return { size: Math.min(1, Math.sqrt(Math.abs(now) / most)), positive: now >= 0 };
}

// -- axes
function paintAxes(w, h) {
  axes.replaceChildren();
  const { k, x, y } = camera;
  axes.append(svg("rect", { class: "gutter", x: 0, y: 0, width: LEFT, height: h }), svg("rect", { class: "gutter", x: 0, y: h - BOTTOM, width: w, height: BOTTOM }));
  const taken = bands.map((band) => { // the name of an opened band stays in sight as long as any of it is
    const from = y + k * band.top, to = from + k * band.size, half = (k * (band.folded ? band.size : STRIP)) / 2;
    const at = Math.max(from + half, Math.min(14, to - 12)), inside = at > 6 && at < h - BOTTOM - 6;
    Object.assign(band.button.style, { top: `${Math.max(8, Math.min(h - BOTTOM - 6, at))}px`, opacity: inside ? "" : "0", pointerEvents: inside ? "" : "none" });
    return inside ? at : -99;
  });
  let last = Infinity;
  for (const row of [...place.rows].reverse()) {
    const at = y + k * middle(row);
    if (row.band || at < 8 || at > h - BOTTOM - 4 || last - at < 13 || taken.some((each) => Math.abs(each - at) < 13)) continue;
    last = at;
    axes.append(svg("text", { x: LEFT - 10, y: at + 4, "text-anchor": "end" }, row.name === "token" || row.name === "target" ? row.name : `L${row.name}`));
  }
  const tight = place.columns.some((column) => Math.min([...column.name].length, 12) * 7 > column.size * k);
  last = -Infinity;
  place.columns.forEach((column, pos) => {
    const at = x + k * middle(column);
    if (at < LEFT + 4 || at > w - 4 || at - last < 13) return;
    last = at;
    const words = svg("text", tight ? { x: at + 4, y: h - BOTTOM + 14, "text-anchor": "end", transform: `rotate(-38 ${at + 4} ${h - BOTTOM + 14})` } : { x: at, y: h - BOTTOM + 18, "text-anchor": "middle" });
    words.textContent = cut(visibleSpace(column.name), tight ? 9 : 14);
    words.classList.toggle("here", state.selected?.own.some((each) => nodes[each].pos === pos) ?? false);
    axes.append(words);
  });
}

// -- the camera
// Everything that is drawn, labels and all, inside the axes: whatever the zoom that takes.
function fit() {
  const { clientWidth: w, clientHeight: h } = stage, room = { left: LEFT + 4, right: w - 6, top: 6, bottom: h - BOTTOM - 4 };
  if (w <= LEFT + 20 || h <= BOTTOM + 20) return; // a frame that is not laid out yet
  for (let pass = 0; pass < 2; pass++) { // marks grow a little as the zoom falls, and reach a little further
    const { x, y, width, height } = extent();
    camera.k = Math.min((room.right - room.left) / width, (room.bottom - room.top) / height, 1.7);
    camera.x = room.left + (room.right - room.left - camera.k * width) / 2 - camera.k * x;
    camera.y = room.bottom - camera.k * (height + y);
    grow();
  }
  settled(fit);
}
// A view that nobody has moved since it was taken is taken again when its place changes its size.
let home = { by: null, at: "" };
const cameraAt = () => [camera.k, camera.x, camera.y].join();
function settled(by) {
  home = { by, at: cameraAt() };
  repaint();
}
function resized() {
  if (stage.clientWidth <= LEFT + 20) return; // not laid out, or on paper
  if (!home.by || home.at === cameraAt()) (home.by ?? firstView)();
  else repaint();
}
function extent() {
  const drawn = world.getBBox(), x = Math.min(0, drawn.x), y = Math.min(0, drawn.y);
  return { x, y, width: Math.max(place.width, drawn.x + drawn.width) - x, height: Math.max(place.height, drawn.y + drawn.height) - y };
}
// The first view is one that can be read: where not all of it can, it begins at the targets, and the rest is dragged
// into it.
function firstView() {
  fit();
  const { clientWidth: w, clientHeight: h } = stage, room = h - BOTTOM - TOP - 8;
  const least = folds ? Math.min(1, Math.max(0.85, room / place.height)) : view.labelled ? 0.75 : 0.55;
  home.by = firstView;
  if (!(folds || NARROW.matches) || camera.k >= least) return;
  camera.k = least;
  camera.x = Math.max(w - 12 - place.width * least, Math.min(LEFT, w - place.width * least));
  camera.y = TOP + 4;
  if (place.height * least < h - BOTTOM - TOP) camera.y = h - BOTTOM - place.height * least - 4;
  grow();
  settled(firstView);
}
// Far away, marks are drawn larger than the zoom would have them, as far as their distance allows.
const grow = () => drawing.style.setProperty("--grow", Math.min(1.5, Math.max(1, 2.6 / (R * camera.k))).toFixed(3));
function zoom(factor, cx = stage.clientWidth / 2, cy = stage.clientHeight / 2) {
  const k = Math.min(6, Math.max(Math.min(0.08, camera.k), camera.k * factor));
  camera.x = cx - ((cx - camera.x) * k) / camera.k;
  camera.y = cy - ((cy - camera.y) * k) / camera.k;
  camera.k = k;
  grow();
  repaint();
}
// An opened band: all of it where there is room, else its name and what folds it.
function bringBand(band) {
  const high = stage.clientHeight - BOTTOM - TOP, from = camera.y + camera.k * band.top - TOP, over = from + camera.k * band.size - high;
  camera.y -= from < 0 ? from : Math.max(0, Math.min(over, from));
  repaint();
}
function bringIntoSight({ px, py }) {
  const { clientWidth: w, clientHeight: h } = stage;
  const sx = camera.x + camera.k * px, sy = camera.y + camera.k * py;
  camera.x += sx < LEFT + 16 ? LEFT + 16 - sx : sx > w - 16 ? w - 16 - sx : 0;
  camera.y += sy < TOP + 16 ? TOP + 16 - sy : sy > h - BOTTOM - 16 ? h - BOTTOM - 16 - sy : 0;
  repaint();
}

// -- the map: the whole drawing, and the part of it that is in sight
const map = $("map");
function paintMap(w, h) {
  const { k, x, y } = camera, far = { left: LEFT - x, top: -y, right: w - x, bottom: h - BOTTOM - y };
  map.hidden = !folds || !(far.left > 1 || far.top > 1 || far.right < k * place.width - 1 || far.bottom < k * place.height - 1) ;
  if (map.hidden) return;
  const ratio = window.devicePixelRatio || 1, wide = Math.min(240, Math.round(0.34 * w)), scale = wide / place.width, high = Math.max(22, Math.min(TOP - 8, Math.round(scale * place.height))), tall = high / place.height;
  Object.assign(map.style, { width: `${wide}px`, height: `${high}px` });
  [map.width, map.height] = [wide * ratio, high * ratio];
  const pen = map.getContext("2d");
  pen.scale(ratio, ratio);
  for (const thing of things) {
    const sign = signed(thing);
    pen.fillStyle = state.mode === "diff" && thing.status ? colour[thing.status] : always(thing) ? colour.ink : sign.positive ? colour.pos : colour.neg;
    pen.globalAlpha = always(thing) ? 0.8 : 0.2 + 0.8 * sign.size;
    pen.fillRect(thing.px * scale - 1, thing.py * tall - 1, 2, 2);
  }
  pen.globalAlpha = 1;
  pen.strokeStyle = colour.ink;
  pen.lineWidth = 1.5;
  const from = [Math.max(0, far.left / k) * scale, Math.max(0, far.top / k) * tall], to = [Math.min(place.width, far.right / k) * scale, Math.min(place.height, far.bottom / k) * tall];
  pen.strokeRect(from[0] + 0.75, from[1] + 0.75, Math.max(2, to[0] - from[0] - 1.5), Math.max(2, to[1] - from[1] - 1.5));
  const at = (along) => place.columns.find((column) => column.start + column.size > along) ?? place.columns[place.columns.length - 1];
  map.setAttribute("aria-valuenow", String(Math.round((100 * (from[0] + to[0])) / 2 / wide)));
  map.setAttribute("aria-valuetext", place.columns.length ? `in sight: ${visibleSpace(at(from[0] / scale).name)} to ${visibleSpace(at(to[0] / scale - 1).name)}` : "");
}
// The place of the map, 0 to 1 across and down, becomes the middle of what is in sight.
function lookAt(across, down) {
  const { clientWidth: w, clientHeight: h } = stage;
  camera.x = (LEFT + w) / 2 - camera.k * across * place.width;
  camera.y = (h - BOTTOM) / 2 - camera.k * down * place.height;
  repaint();
}
