// The drawing as a file and on paper: what is drawn now, folded or open, with what is lit, in the colours that are shown.
const SHEET = { across: 1150, down: 780 }; // how much of the drawing a printed sheet holds
const PIXELS = 16e6;

// All of it at zoom 1, or the part between two places across and two down; the names of rows and columns stand beside it.
function toSvg(part = null) {
  const { x, y, width, height } = extent(), tight = place.columns.some((column) => Math.min([...column.name].length, 12) * 7 > column.size);
  const [from, to] = part ? part.across : [x, x + width], [top, bottom] = part ? part.down : [y, y + height], head = part ? 10 : 44;
  const w = to - from + LEFT + 12, h = bottom - top + head + (tight ? 64 : 30), foot = head + bottom - top + 12;
  const root = svg("svg", { xmlns: NS, width: Math.round(w), height: Math.round(h), viewBox: `0 0 ${w} ${h}`, "font-family": "system-ui, 'Liberation Sans', Arial, sans-serif", "font-size": 11 });
  const text = (at, words, extra = {}) => svg("text", { ...at, fill: colour.ink, ...extra }, words);
  const across = (left, right = left) => right >= from && left <= to, down = (high, low = high) => low >= top && high <= bottom;
  root.append(svg("title", {}, view.title), svg("rect", { width: w, height: h, fill: colour.page }));
  if (!part) root.append(text({ x: 12, y: 18 }, cut(view.title, 90), { "font-size": 14, "font-weight": 600 }), text({ x: 12, y: 34 }, cut(view.said, 140), { fill: colour.muted }));
  const inner = part ? svg("svg", { x: LEFT, y: head, width: to - from, height: bottom - top, viewBox: `${from} ${top} ${to - from} ${bottom - top}` }) : svg("g", { transform: `translate(${LEFT - from} ${head - top})` });
  root.append(inner);
  for (const row of place.rows) {
    inner.append(svg("path", { d: `M${from} ${row.start + row.size}H${to}`, stroke: colour.rule }));
    if (down(middle(row))) root.append(text({ x: LEFT - 8, y: head + middle(row) - top + 4, "text-anchor": "end" }, row.band || !/^-?\d/.test(row.name) ? row.name : `L${row.name}`, { fill: colour.muted }));
  }
  for (const column of place.columns) {
    const at = LEFT + middle(column) - from;
    if (across(middle(column))) root.append(text({ x: at, y: foot, "text-anchor": tight ? "end" : "middle", ...(tight ? { transform: `rotate(-38 ${at} ${foot})` } : {}) }, cut(visibleSpace(column.name), tight ? 12 : 14)));
  }
  const inPart = ([a, b, c, d, e, f, g, i]) => !part || (across(Math.min(a, c, e, g), Math.max(a, c, e, g)) && down(Math.min(b, d, f, i), Math.max(b, d, f, i)));
  for (const halo of [true, false]) for (const { at, stroke: ink, alpha, width: wide, dash, onTrail } of [...current.base, ...current.lit]) {
    if ((halo && !onTrail) || !inPart(at)) continue;
    const [x1, y1, ...rest] = at.map((each) => each.toFixed(1));
    inner.append(svg("path", { class: halo ? "halo" : "link", d: `M${x1} ${y1}C${rest.join(" ")}`, fill: "none", stroke: halo ? colour.trail : ink, "stroke-opacity": halo ? 0.9 : alpha.toFixed(3), "stroke-width": (halo ? wide + 7 : wide).toFixed(2), ...(dash.length && !halo ? { "stroke-dasharray": dash.join(" ") } : {}) }));
  }
  for (const thing of things) if (across(thing.px) && down(thing.py)) inner.append(copied(marks.get(thing.key), thing, text));
  return root;
}
function copied(mark, thing, text) {
  const glyph = mark.querySelector(".glyph"), style = getComputedStyle(glyph);
  const copy = svg("g", { class: "mark", transform: mark.getAttribute("transform"), opacity: getComputedStyle(mark).opacity });
  if (mark.querySelector(".back")) copy.append(svg("path", { d: glyph.getAttribute("d"), fill: colour.page }));
  copy.append(svg("path", { d: glyph.getAttribute("d"), transform: `scale(${mark.style.getPropertyValue("--size")})`, fill: style.fill, "fill-opacity": style.fillOpacity, stroke: style.stroke, "stroke-width": style.strokeWidth, "stroke-dasharray": style.strokeDasharray }));
  const badge = mark.querySelector(".badge");
  if (badge && state.mode === "diff") copy.append(svg("path", { d: badge.getAttribute("d"), transform: badge.getAttribute("transform") ?? "", fill: "none", stroke: getComputedStyle(badge).stroke, "stroke-width": 1.6 }));
  for (const words of mark.querySelectorAll("text")) if (words.textContent) copy.append(text({ x: words.getAttribute("x") || 0, y: words.getAttribute("y"), "text-anchor": words.getAttribute("text-anchor") }, words.textContent));
  return copy;
}

function download(name, blob) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 4000);
  $("save").open = false;
}
const written = (root) => new XMLSerializer().serializeToString(root);
function saveSvg() {
  download(`${view.slug}.svg`, new Blob([written(toSvg())], { type: "image/svg+xml" }));
}
function savePng() {
  const image = new Image();
  image.addEventListener("load", () => {
    const scale = Math.min(2, 8000 / Math.max(image.width, image.height), Math.sqrt(PIXELS / (image.width * image.height))), sheet = el("canvas", { width: Math.round(image.width * scale), height: Math.round(image.height * scale) });
    sheet.getContext("2d").drawImage(image, 0, 0, sheet.width, sheet.height);
    sheet.toBlob((blob) => download(`${view.slug}.png`, blob), "image/png");
  });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(written(toSvg()))}`;
}
function saveJson() {
  const graph = exchanged(state.mode === "base" ? data.base : data.graph);
  const named = (at) => graph.nodes[isDiff ? (state.mode === "base" ? nodes[at].inBase : nodes[at].inTuned) : at]?.node_id;
  const groups = state.groups.map(({ label, members }) => [label, ...members.map(named).filter(Boolean)]).filter((group) => group.length > 1);
  const saved = { ...graph.qParams, pinnedIds: groups.flatMap((group) => group.slice(1)), supernodes: groups, linkType: "both" };
  const clicked = state.selected && !state.selected.group && named(state.selected.at);
  if (clicked) saved.clickedId = clicked;
  graph.metadata.info.create_time_ms = Date.now();
  const whole = { ...graph, qParams: groups.length || saved.clickedId ? saved : graph.qParams };
  download(`${view.slug}${isDiff && state.mode === "base" ? "-base" : ""}.json`, new Blob([JSON.stringify(whole)], { type: "application/json" }));
}

// Paper is light, and as large as it is: a large drawing is cut into parts, between tokens and between layers.
let onPaper = null;
function toPaper() {
  if (onPaper) return;
  onPaper = { dark: state.dark, words: $("words").open };
  $("words").open = true;
  setTheme(false);
  const { x, y, width, height } = extent(), sheets = [];
  for (const down of parts(y, height, SHEET.down, place.rows)) for (const across of parts(x, width, SHEET.across, place.columns)) sheets.push(toSvg(width > SHEET.across * 1.1 || height > SHEET.down * 1.1 ? { across, down } : null));
  for (const sheet of sheets) { // a small one stays small, and none is higher than a page
    const [w, h] = ["width", "height"].map((name) => Number(sheet.getAttribute(name)));
    sheet.style.maxWidth = `min(${1.1 * w}px, ${(170 * w) / h}mm)`;
  }
  $("sheets").replaceChildren(...sheets);
}
function parts(from, size, most, along) {
  const many = Math.max(1, Math.ceil(size / most - 0.1)), edges = along.map((each) => each.start);
  const near = (at) => edges.reduce((a, b) => (Math.abs(a - at) <= Math.abs(b - at) ? a : b), at + size);
  const cuts = [from, ...Array.from({ length: many - 1 }, (_, at) => near(from + ((at + 1) * size) / many)), from + size];
  return cuts.slice(1).map((to, at) => [cuts[at], to]).filter(([a, b]) => b > a);
}
function fromPaper() {
  if (!onPaper) return;
  $("sheets").replaceChildren();
  $("words").open = onPaper.words;
  setTheme(onPaper.dark);
  onPaper = null;
}
