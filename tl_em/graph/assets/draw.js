// Drawing: links on a canvas below, nodes as SVG above, axes that stay in sight; and the same scene as an SVG file.
const $ = (id) => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";
const stage = $("stage"), canvas = $("links-layer"), drawing = $("drawing");
const R = view.labelled ? 8 : 6.5;
const LEFT = 58, BOTTOM = 46;
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
  logit: `M${-R} ${R * 0.8}V${-R * 0.2}L0 ${-R * 1.1}L${R} ${-R * 0.2}V${R * 0.8}Z`,
};
const BADGES = { appeared: "M-3 0H3M0-3V3", vanished: "M-2.4-2.4L2.4 2.4M-2.4 2.4L2.4-2.4", stronger: "M-3 1.6L0-2L3 1.6", weaker: "M-3-1.6L0 2L3-1.6" };

// Members of a folded group stand where its middle member stands.
function placeOf(at) {
  const group = state.fold && state.groups.find((each) => each.members.includes(at));
  return group ? nodes[headOf(group)] : nodes[at];
}
function headOf(group) {
  const here = group.members.filter((at) => isVisible(nodes[at])), list = here.length ? here : group.members;
  const mean = (axis) => list.reduce((sum, at) => sum + nodes[at][axis], 0) / list.length;
  const x = mean("x"), y = mean("y");
  return list.reduce((a, b) => (Math.hypot(nodes[a].x - x, nodes[a].y - y) <= Math.hypot(nodes[b].x - x, nodes[b].y - y) ? a : b));
}

function curve(a, b) {
  const y1 = a.y - R, y2 = b.y + R, rise = y1 - y2, bend = Math.max(18, rise * 0.5);
  // Straight up would run through the nodes between: bow out to the side of the column.
  const side = Math.abs(a.x - b.x) < 2 * R && rise > 3 * R ? Math.min(34, 8 + rise * 0.09) : 0;
  return [a.x, y1, a.x + side * 1.3, y1 - bend * (side ? 0.7 : 1), b.x + side * 1.3, y2 + bend * (side ? 0.7 : 1), b.x, y2];
}

// What is to be drawn now, once, for canvas and file alike.
function scene() {
  const traced = state.selected === null ? null : traceFrom(state.selected);
  const trail = new Set(traced ? traced.trail : []);
  const ranked = links.filter(alive).sort((a, b) => value(b).score - value(a).score);
  const base = ranked.slice(0, state.shown);
  const most = ranked.length ? value(ranked[0]).score || 1 : 1;
  const strongest = traced ? Math.max(1e-12, ...traced.strength.values()) : 1;
  const drawn = [];
  for (const link of base) drawn.push(look(link, Math.sqrt(value(link).score / most), traced ? 0.1 : 1));
  if (traced) for (const [link, size] of traced.strength) if (size > strongest * 0.004 && !trail.has(link)) drawn.push(look(link, Math.sqrt(size / strongest), 2));
  if (!traced && state.hover !== null) {
    const near = [...nodes[state.hover].ins, ...nodes[state.hover].outs].filter(alive);
    for (const link of near) drawn.push(look(link, Math.sqrt(value(link).share), 2));
  }
  for (const link of trail) drawn.push(look(link, Math.max(0.4, Math.sqrt((traced.strength.get(link) || 0) / strongest)), 2, true));
  const lit = new Set(trail.size ? [...trail].flatMap((link) => [link.s, link.t]) : []);
  return { links: drawn.filter(Boolean), traced, lit };
}

function look(link, size, level, onTrail = false) {
  const a = placeOf(link.s), b = placeOf(link.t);
  if (a === b) return null;
  const status = state.mode === "diff" ? link.status : null;
  const stroke = status ? colour[status] : value(link).w >= 0 ? colour.pos : colour.neg;
  const alpha = level === 2 ? 0.35 + 0.6 * size : Math.min(0.85, 0.08 + 0.75 * size) * (status === "same" ? 0.5 : 1) * level;
  return { at: curve(a, b), stroke, alpha, width: (level === 2 ? 0.9 : 0.5) + 3.4 * size, dash: status ? DASH[status] : [], onTrail, link };
}

let current = { links: [], traced: null, lit: new Set() };
let queued = false;
function redraw() {
  current = scene();
  paintNodes();
  repaint();
}
function repaint() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => { queued = false; paint(); });
}

function paint() {
  const ratio = window.devicePixelRatio || 1, { clientWidth: w, clientHeight: h } = stage;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  const { k, x, y } = camera;
  pen.setTransform(ratio * k, 0, 0, ratio * k, ratio * x, ratio * y);
  for (const row of view.rows) {
    pen.fillStyle = colour.rule;
    pen.globalAlpha = 0.6;
    pen.fillRect(-5000 / k, row.start + row.size, 10000 / k + view.width, 1 / k);
  }
  pen.lineCap = "round";
  for (const halo of [true, false]) for (const link of current.links) {
    if (halo && !link.onTrail) continue;
    pen.globalAlpha = halo ? 0.9 : link.alpha;
    pen.strokeStyle = halo ? colour.trail : link.stroke;
    pen.lineWidth = halo ? link.width + 7 : link.width;
    pen.setLineDash(halo ? [] : link.dash);
    const [x1, y1, cx1, cy1, cx2, cy2, x2, y2] = link.at;
    pen.beginPath();
    pen.moveTo(x1, y1);
    pen.bezierCurveTo(cx1, cy1, cx2, cy2, x2, y2);
    pen.stroke();
  }
  pen.setLineDash([]);
  world.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)}) scale(${k.toFixed(4)})`);
  paintAxes(w, h);
}

// -- nodes
const world = svg("g", { class: "world" });
const axes = svg("g", { class: "axes", "aria-hidden": "true" });
drawing.append(world, axes);
const mostReach = Math.max(1e-12, ...nodes.filter((node) => !always(node)).map((node) => node.reach));
const marks = nodes.map((node) => {
  const mark = svg("g", { class: `node ${node.kind}`, transform: `translate(${node.x} ${node.y})`, role: "button", tabindex: "-1" });
  mark.dataset.at = node.at;
  mark.style.setProperty("--size", always(node) ? "1" : (0.72 + 0.5 * Math.sqrt(node.reach / mostReach)).toFixed(3));
  mark.append(svg("circle", { class: "hit", r: R + 3.5 }), svg("path", { class: "ring", d: circle(R + 4) }), svg("path", { class: "glyph", d: SHAPES[node.kind] }));
  if (isDiff) mark.append(svg("path", { class: "badge", d: BADGES[node.status] || "" }));
  const words = svg("text", node.kind === "logit" ? { x: -R - 6, y: 4, "text-anchor": "end" } : { y: R + 13, "text-anchor": "middle" });
  mark.append(words);
  world.append(mark);
  return mark;
});
const cut = (text, n) => { const all = [...text]; return all.length > n ? all.slice(0, n - 1).join("") + "…" : text; };

function paintNodes() {
  const near = new Set();
  for (const link of current.links) if (current.traced && link.alpha > 0.35) { near.add(link.link.s); near.add(link.link.t); }
  nodes.forEach((node, at) => {
    const mark = marks[at], group = state.fold && state.groups.find((each) => each.members.includes(at));
    const hidden = !isVisible(node) || Boolean(group && headOf(group) !== at);
    mark.classList.toggle("gone", hidden);
    mark.setAttribute("aria-hidden", hidden ? "true" : "false");
    if (hidden) return;
    const hit = state.query && matches(node);
    mark.classList.toggle("selected", at === state.selected);
    mark.classList.toggle("picked", state.picked.has(at));
    mark.classList.toggle("found", Boolean(hit));
    mark.classList.toggle("lit", current.lit.has(at));
    mark.classList.toggle("dim", (current.traced && !near.has(at) && at !== state.selected) || Boolean(state.query && !hit && !current.traced));
    mark.classList.toggle("group", Boolean(group));
    mark.setAttribute("aria-pressed", String(at === state.selected));
    mark.setAttribute("aria-label", group ? `group ${group.label}, ${group.members.length} nodes` : describe(node));
    const glyph = mark.querySelector(".glyph");
    glyph.setAttribute("d", group ? SHAPES.group : SHAPES[node.kind]);
    const sign = signed(node);
    mark.classList.toggle("pos", sign.size > 0 && sign.positive);
    mark.classList.toggle("neg", sign.size > 0 && !sign.positive);
    for (const status of STATUS) mark.classList.toggle(status, state.mode === "diff" && node.status === status);
    glyph.style.fillOpacity = state.mode === "diff" ? "" : sign.size ? (0.25 + 0.75 * sign.size).toFixed(2) : "";
    const named = group || node.kind === "logit" || (view.labelled && node.kind !== "token") || current.lit.has(at) || at === state.selected || at === state.hover;
    mark.lastChild.textContent = named && !(node.kind === "token" && !current.lit.has(at) && at !== state.hover) ? cut(group ? group.label : nameOf(node), view.labelled ? 13 : 22) : "";
  });
  drawing.setAttribute("aria-label", `Attribution graph, ${nodes.filter(isVisible).length} nodes. Arrow keys move along links, Enter selects, Escape clears.`);
}

const most = Math.max(1e-12, ...nodes.filter((node) => node.kind !== "logit").map((node) => Math.abs(node.attribution ?? 0)));
function signed(node) {
  const now = state.mode === "base" ? node.base : node.attribution;
  if (now === null || now === undefined) return { size: 0, positive: true };
  return { size: Math.min(1, Math.sqrt(Math.abs(now) / most)), positive: now >= 0 };
}

// -- axes
function paintAxes(w, h) {
  axes.replaceChildren();
  const { k, x, y } = camera;
  axes.append(svg("rect", { class: "gutter", x: 0, y: 0, width: LEFT, height: h }), svg("rect", { class: "gutter", x: 0, y: h - BOTTOM, width: w, height: BOTTOM }));
  let last = Infinity;
  for (const row of [...view.rows].reverse()) {
    const at = y + k * (row.start + row.size / 2);
    if (at < 8 || at > h - BOTTOM - 4 || last - at < 13) continue;
    last = at;
    axes.append(svg("text", { x: LEFT - 10, y: at + 4, "text-anchor": "end" }, row.name === "token" || row.name === "target" ? row.name : `L${row.name}`));
  }
  const tight = view.columns.some((column) => Math.min([...column.name].length, 12) * 7 > column.size * k);
  last = -Infinity;
  view.columns.forEach((column, pos) => {
    const at = x + k * (column.start + column.size / 2);
    if (at < LEFT + 4 || at > w - 4 || at - last < 13) return;
    last = at;
    const words = svg("text", tight ? { x: at + 4, y: h - BOTTOM + 14, "text-anchor": "end", transform: `rotate(-38 ${at + 4} ${h - BOTTOM + 14})` } : { x: at, y: h - BOTTOM + 18, "text-anchor": "middle" });
    words.textContent = cut(visibleSpace(column.name), tight ? 9 : 14);
    words.classList.toggle("here", state.selected !== null && nodes[state.selected].pos === pos);
    axes.append(words);
  });
}
// Everything that would not show was made a sign before it came here (tl_em/showing.py); a space at the head is the
// tokenizer's, and a token without a text goes on with the character of the one before.
const visibleSpace = (text) => (text === "" ? "‥" : text.replace(/^ /, "") || "␣");

// -- the camera
// Everything that is drawn, labels and all, inside the axes: whatever the zoom that takes.
function fit() {
  const { clientWidth: w, clientHeight: h } = stage, room = { left: LEFT + 4, right: w - 6, top: 6, bottom: h - BOTTOM - 4 };
  if (w <= LEFT + 20 || h <= BOTTOM + 20) return; // a frame that is not laid out yet
  for (let pass = 0; pass < 2; pass++) { // marks grow a little as the zoom falls, and reach a little further
    const drawn = world.getBBox(), x = Math.min(0, drawn.x), y = Math.min(0, drawn.y);
    const wide = Math.max(view.width, drawn.x + drawn.width) - x, high = Math.max(view.height, drawn.y + drawn.height) - y;
    camera.k = Math.min((room.right - room.left) / wide, (room.bottom - room.top) / high, 1.7);
    camera.x = room.left + (room.right - room.left - camera.k * wide) / 2 - camera.k * x;
    camera.y = room.bottom - camera.k * (high + y);
    grow();
  }
  repaint();
}
// On a narrow screen the first view is one that can be read: it begins at the targets, and the rest is dragged into it.
function firstView() {
  fit();
  const least = view.labelled ? 0.75 : 0.55, { clientWidth: w, clientHeight: h } = stage;
  if (!NARROW.matches || camera.k >= least) return;
  camera.k = least;
  camera.x = Math.max(w - 12 - view.width * least, Math.min(LEFT, w - view.width * least));
  camera.y = 4;
  if (view.height * least < h - BOTTOM) camera.y = h - BOTTOM - view.height * least - 4;
  grow();
  repaint();
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
function bringIntoSight(at) {
  const { x, y } = placeOf(at), { clientWidth: w, clientHeight: h } = stage;
  const sx = camera.x + camera.k * x, sy = camera.y + camera.k * y;
  camera.x += sx < LEFT + 16 ? LEFT + 16 - sx : sx > w - 16 ? w - 16 - sx : 0;
  camera.y += sy < 16 ? 16 - sy : sy > h - BOTTOM - 16 ? h - BOTTOM - 16 - sy : 0;
  repaint();
}

// -- the drawing as a file: everything, at zoom 1, in the colours that are shown
function toSvg() {
  const w = view.width + LEFT, h = view.height + BOTTOM + 44;
  const root = svg("svg", { xmlns: NS, width: Math.round(w), height: Math.round(h), viewBox: `0 0 ${w} ${h}`, "font-family": "system-ui, 'Liberation Sans', Arial, sans-serif", "font-size": 11 });
  root.append(svg("title", {}, view.title), svg("rect", { width: w, height: h, fill: colour.page }));
  const inner = svg("g", { transform: `translate(${LEFT} 40)` });
  const text = (at, words, extra = {}) => svg("text", { ...at, fill: colour.ink, ...extra }, words);
  root.append(text({ x: 12, y: 18 }, cut(view.title, 90), { "font-size": 14, "font-weight": 600 }), text({ x: 12, y: 34 }, cut(view.said, 140), { fill: colour.muted }), inner);
  for (const row of view.rows) inner.append(svg("path", { d: `M0 ${row.start + row.size}H${view.width}`, stroke: colour.rule }), text({ x: -10, y: row.start + row.size / 2 + 4, "text-anchor": "end" }, /^\d/.test(row.name) ? `L${row.name}` : row.name, { fill: colour.muted }));
  for (const column of view.columns) inner.append(text({ x: column.start + column.size / 2, y: view.height + 12, "text-anchor": "middle" }, cut(visibleSpace(column.name), Math.max(2, Math.floor(column.size / 7)))));
  for (const halo of [true, false]) for (const { at, stroke, alpha, width, dash, onTrail } of current.links) {
    if (halo && !onTrail) continue;
    const [x1, y1, ...rest] = at.map((each) => each.toFixed(1));
    inner.append(svg("path", { d: `M${x1} ${y1}C${rest.join(" ")}`, fill: "none", stroke: halo ? colour.trail : stroke, "stroke-opacity": halo ? 0.9 : alpha.toFixed(3), "stroke-width": (halo ? width + 7 : width).toFixed(2), ...(dash.length && !halo ? { "stroke-dasharray": dash.join(" ") } : {}) }));
  }
  for (const mark of marks) {
    if (mark.classList.contains("gone")) continue;
    const glyph = mark.querySelector(".glyph"), style = getComputedStyle(glyph);
    const copy = svg("g", { transform: mark.getAttribute("transform"), opacity: getComputedStyle(mark).opacity });
    copy.append(svg("path", { d: glyph.getAttribute("d"), transform: `scale(${mark.style.getPropertyValue("--size")})`, fill: style.fill, "fill-opacity": style.fillOpacity, stroke: style.stroke, "stroke-width": style.strokeWidth, "stroke-dasharray": style.strokeDasharray }));
    const badge = mark.querySelector(".badge");
    if (badge && state.mode === "diff") copy.append(svg("path", { d: badge.getAttribute("d"), fill: "none", stroke: getComputedStyle(badge).stroke, "stroke-width": 1.6 }));
    const words = mark.lastChild;
    if (words.textContent) copy.append(text({ x: words.getAttribute("x") || 0, y: words.getAttribute("y"), "text-anchor": words.getAttribute("text-anchor") }, words.textContent));
    inner.append(copy);
  }
  return new XMLSerializer().serializeToString(root);
}
