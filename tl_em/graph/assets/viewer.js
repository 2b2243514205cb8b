// A notebook says its theme by the height of the frame (report/html.py); where nobody does, the browser's counts.
const DARK = "(min-height: 40000px), (prefers-color-scheme: dark) and (max-height: 20000px)";
// What a person does: select, trace, filter, search, group, walk by keyboard, read a node's card, take files away.
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, each] of Object.entries(attributes)) {
    if (name === "on") for (const [event, run] of Object.entries(each)) element.addEventListener(event, run);
    else if (each !== null && each !== undefined) element.setAttribute(name, each);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
const number = (value, digits = 3) => (value === null || value === undefined ? "–" : (Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(digits)))).replace("-", "−"));
const percent = (value) => `${value < 0.0005 ? "<0.1" : (100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
const KINDS = { feature: "feature", error: "error (unexplained)", token: "token", logit: "target", head: "attention head", mlp: "MLP", adapter: "adapter" };
const nameOf = (node) => (node.label && node.label.trim() ? node.label.trim() : node.kind === "token" ? visibleSpace(view.tokens[node.pos] ?? "") : node.kind === "error" ? "error" : node.kind === "head" ? `head ${node.feature}` : node.kind === "mlp" || node.kind === "adapter" ? `${KINDS[node.kind]} ${node.layer}` : `#${node.feature ?? ""}`);
const whereOf = (node) => `${node.kind === "token" ? "" : node.kind === "logit" ? "target, " : `L${node.layer}${node.stream ? ` ${node.stream}` : ""}, `}${visibleSpace(view.tokens[node.pos] ?? "")} (${node.pos})`;
const describe = (node) => `${KINDS[node.kind]} ${nameOf(node)}, ${whereOf(node)}${node.attribution === null ? "" : `, attribution ${number(node.attribution)}`}${isDiff ? `, ${node.status}` : ""}`;

function matches(node) {
  const query = state.query.toLowerCase();
  return [node.id, node.label, nameOf(node), view.tokens[node.pos], ...(node.top || []).map((each) => each[0])].some((text) => String(text ?? "").toLowerCase().includes(query));
}

// -- selection
function select(at, { focus = false, quiet = false } = {}) {
  state.selected = at;
  if (at !== null) roving(at);
  redraw();
  showCard();
  if (at !== null) {
    bringIntoSight(at);
    if (!quiet) $("said").textContent = `Selected ${describe(nodes[at])}: ${nodes[at].ins.filter(alive).length} inputs, ${nodes[at].outs.filter(alive).length} outputs`;
    if (focus) marks[placeOf(at).at].focus({ preventScroll: true });
  }
}
function clear() {
  state.picked.clear();
  state.query = $("search").value = "";
  select(null);
  $("said").textContent = "Selection cleared";
}
let stop = 0;
function roving(at) {
  marks[stop].setAttribute("tabindex", "-1");
  stop = placeOf(at).at;
  marks[stop].setAttribute("tabindex", "0");
}
function firstStop() {
  const target = nodes.filter((node) => node.kind === "logit" && isVisible(node)).sort((a, b) => b.reach - a.reach)[0];
  roving((target || nodes.find(isVisible) || nodes[0]).at);
}

// Up and down follow the strongest link, left and right the row.
function neighbour(at, key) {
  const strongest = (list, far) => list.filter(alive).sort((a, b) => value(b).share - value(a).share).map(far)[0];
  if (key === "ArrowUp") return strongest(nodes[at].outs, (link) => link.t) ?? nearest(at, (node) => node.y < nodes[at].y - 1);
  if (key === "ArrowDown") return strongest(nodes[at].ins, (link) => link.s) ?? nearest(at, (node) => node.y > nodes[at].y + 1);
  const row = nodes.filter((node) => isVisible(node) && placeOf(node.at) === node && node.row === nodes[at].row).sort((a, b) => a.x - b.x || a.y - b.y);
  return row[row.findIndex((node) => node.at === at) + (key === "ArrowRight" ? 1 : -1)]?.at;
}
function nearest(at, where) {
  const far = (node) => Math.abs(node.x - nodes[at].x) + 3 * Math.abs(node.y - nodes[at].y);
  return nodes.filter((node) => isVisible(node) && where(node)).sort((a, b) => far(a) - far(b))[0]?.at;
}

// -- the card
function showCard() {
  const card = $("card");
  card.replaceChildren(...(state.picked.size > 1 ? [pickedCard()] : []), ...(state.selected === null ? overview() : nodeCard(nodes[state.selected])));
  card.scrollTop = 0;
}
const heading = (text, more) => el("h3", {}, text, more ? el("span", {}, ` ${more}`) : null);
function row(at, share, weight, status) {
  const node = nodes[at];
  const bar = el("i", { class: weight < 0 ? "neg" : "pos" });
  bar.style.width = `${Math.max(2, Math.min(100, 100 * share))}%`;
  return el("li", {}, el("button", { type: "button", class: "row", on: { click: () => select(at), pointerenter: () => hover(at), pointerleave: () => hover(null) } },
    el("span", { class: "bar", "aria-hidden": "true" }, bar),
    el("b", {}, nameOf(node)), el("span", { class: "where" }, whereOf(node)),
    el("span", { class: "num" }, status && status !== "same" ? el("em", { class: `word ${status}` }, status) : null, ` ${number(weight)}`, el("small", {}, ` ${percent(share)}`))));
}
function list(found, far) {
  const kept = found.filter(alive).sort((a, b) => value(b).share - value(a).share);
  if (!kept.length) return [el("p", { class: "none" }, "none shown")];
  const items = kept.map((link) => row(far(link), value(link).share, value(link).w, isDiff ? link.status : ""));
  const rest = items.splice(10), shown = el("ul", { class: "rows" }, ...items);
  if (!rest.length) return [shown];
  const more = el("button", { type: "button", class: "more", on: { click: () => { shown.append(...rest); more.remove(); } } }, `${rest.length} more`);
  return [shown, more];
}
function pathRow({ trail, size }) {
  const stops = [trail[0].s, ...trail.map((link) => link.t)];
  const parts = stops.flatMap((at, i) => [i ? el("span", { class: value(trail[i - 1]).w < 0 ? "arrow neg" : "arrow pos" }, value(trail[i - 1]).w < 0 ? " ⊣ " : " → ") : null,
    el("button", { type: "button", class: "stop", on: { click: () => select(at), pointerenter: () => hover(at), pointerleave: () => hover(null) } }, nameOf(nodes[at]), el("small", {}, nodes[at].kind === "token" || nodes[at].kind === "logit" ? "" : ` L${nodes[at].layer}`))]);
  return el("li", {}, ...parts, el("span", { class: "num" }, percent(size)));
}

function nodeCard(node) {
  const term = (name, ...said) => [el("dt", {}, name), el("dd", {}, ...said)];
  const facts = el("dl", { class: "facts" });
  const effect = node.effect === null ? null : `${number(node.effect)}${node.low === null ? "" : ` [${number(node.low)}, ${number(node.high)}]`}`;
  if (node.kind !== "token" && node.kind !== "logit") facts.append(...term("Layer", String(node.layer), node.stream ? el("span", { class: "muted" }, ` ${node.stream}`) : ""));
  facts.append(...term("Token", el("code", {}, visibleSpace(view.tokens[node.pos] ?? "")), el("span", { class: "muted" }, ` position ${node.pos}`)));
  if (node.activation !== null) facts.append(...term("Activation", number(node.activation, 4)));
  if (node.kind === "logit" && node.weight !== null) facts.append(...term("Weight", number(node.weight)));
  if (isDiff) facts.append(...term("In base", number(node.base)), ...term("In tuned", number(node.tuned)));
  else if (node.attribution !== null) facts.append(...term("Attribution", number(node.attribution)));
  facts.append(...term("Exact ablation", effect === null ? el("span", { class: "muted" }, node.kind === "token" || node.kind === "logit" ? "–" : "not measured for this node") : effect));
  if (!always(node)) facts.append(...term("Influence", `within the first ${percent(node.influence)}`));
  for (const [name, said] of node.extra) facts.append(...term(name, said));
  const { trail } = traceFrom(node.at);
  return [
    el("div", { class: "head" }, el("span", { class: `kind ${node.kind}` }, KINDS[node.kind]), isDiff ? el("em", { class: `word ${node.status}` }, node.status) : null,
      el("button", { type: "button", class: "close", "aria-label": "Clear the selection", on: { click: clear } }, "×")),
    el("h2", {}, nameOf(node)), el("p", { class: "id" }, node.id),
    node.explanation ? el("p", { class: "explanation" }, node.explanation) : null,
    facts,
    node.top && node.top.length ? el("p", { class: "top-tokens" }, el("span", { class: "muted" }, "Pushes up "), ...node.top.slice(0, 10).flatMap(([token]) => [el("code", {}, visibleSpace(token)), " "])) : null,
    node.link ? el("p", {}, el("a", { href: node.link, target: "_blank", rel: "noopener noreferrer" }, node.linkName)) : null,
    trail.length ? heading("Strongest path") : null, trail.length ? el("ol", { class: "paths", id: "trail" }, pathRow({ trail, size: trail.reduce((p, link) => p * value(link).share, 1) })) : null,
    heading("Inputs", `${node.ins.filter(alive).length}`), el("div", { id: "inputs" }, ...list(node.ins, (link) => link.s)),
    heading("Outputs", `${node.outs.filter(alive).length}`), el("div", { id: "outputs" }, ...list(node.outs, (link) => link.t)),
  ].filter(Boolean);
}

function overview() {
  const shown = nodes.filter((node) => isVisible(node) && !always(node)).sort((a, b) => b.reach - a.reach);
  const total = shown.reduce((sum, node) => sum + node.reach, 0) || 1;
  const paths = strongestPaths(5);
  const changed = isDiff ? view.changes.map(([what, counts]) => el("p", { class: "counts" }, `${what} `, ...STATUS.filter((each) => counts[each]).flatMap((each) => [el("em", { class: `word ${each}` }, `${counts[each]} ${each}`), " "]))) : [];
  return [
    el("h2", { class: "hidden" }, "Overview"),
    el("p", { class: "lead" }, "Click a node to trace what feeds it and what it feeds."),
    ...(changed.length ? [heading("What changed"), ...changed] : []),
    ...(paths.length ? [heading("Strongest paths", "share of the targets"), el("ol", { class: "paths" }, ...paths.map(pathRow))] : []),
    ...(shown.length ? [heading("Most influence"), el("ul", { class: "rows" }, ...shown.slice(0, 8).map((node) => row(node.at, node.reach / total, state.mode === "base" ? node.base : node.attribution, isDiff ? node.status : "")))] : []),
    ...(state.groups.length ? [heading("Groups"), el("ul", { class: "rows" }, ...state.groups.map((group) => el("li", {}, el("button", { type: "button", class: "row", on: { click: () => select(group.members[0]) } }, el("b", {}, group.label), el("span", { class: "where" }, `${group.members.length} nodes`)))))] : []),
    el("details", {}, el("summary", {}, "Keys and mouse"), el("dl", { class: "facts keys" }, ...[["/", "search; Enter takes the best hit"], ["↑ ↓", "along the strongest link"], ["← →", "along the row"], ["Enter", "select"], ["Space", "pick for a group (or Shift-click)"], ["Esc", "clear"], ["+ − 0", "zoom in, out, all"], ["wheel", view.framed ? "with Ctrl: zoom" : "zoom; drag to move"]].flatMap(([key, said]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, said)]))),
    ...(view.details.length ? [el("details", {}, el("summary", {}, "How it was made"), el("dl", { class: "facts" }, ...view.details.flatMap(([name, said]) => [el("dt", {}, name), el("dd", {}, said)])))] : []),
  ];
}

function pickedCard() {
  const name = el("input", { type: "text", id: "group-name", "aria-label": "Name of the group", placeholder: "name" });
  const make = () => {
    const members = [...state.picked];
    state.groups = state.groups.map((group) => ({ ...group, members: group.members.filter((at) => !state.picked.has(at)) })).filter((group) => group.members.length);
    state.groups.push({ label: name.value.trim() || `group ${state.groups.length + 1}`, members });
    state.picked.clear();
    setFold(true);
  };
  name.addEventListener("keydown", (event) => { event.stopPropagation(); if (event.key === "Enter") make(); });
  return el("div", { class: "picking" }, el("b", {}, `${state.picked.size} nodes picked`), name, el("button", { type: "button", id: "group-make", on: { click: make } }, "Group"));
}
function setFold(on) {
  state.fold = on && state.groups.length > 0;
  $("fold").setAttribute("aria-pressed", String(state.fold));
  $("fold").disabled = !state.groups.length;
  redraw();
  showCard();
}
function pick(at) {
  state.picked.has(at) ? state.picked.delete(at) : state.picked.add(at);
  redraw();
  showCard();
}

// -- hover
function hover(at, event) {
  if (state.hover === at) return;
  state.hover = at;
  const tip = $("tip");
  tip.hidden = at === null || !event;
  if (!tip.hidden) {
    const node = nodes[at], group = state.fold && state.groups.find((each) => each.members.includes(at));
    tip.replaceChildren(el("b", {}, group ? group.label : nameOf(node)), el("span", {}, group ? `${group.members.length} nodes` : `${KINDS[node.kind]} · ${whereOf(node)}`), ...(node.attribution === null ? [] : [el("span", {}, `attribution ${number(node.attribution)}${node.effect === null ? "" : ` · ablation ${number(node.effect)}`}`)]));
    const box = stage.getBoundingClientRect();
    tip.style.left = `${Math.min(event.clientX - box.left + 14, box.width - 220)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY - box.top + 14, box.height - 80))}px`;
  }
  redraw();
}
const nodeAt = (target) => { const mark = target.closest?.(".node"); return mark ? Number(mark.dataset.at) : null; };

// -- pointer: drag to move, two fingers to zoom, click to select
const fingers = new Map();
let moved = 0, spread = 0, down = null;
stage.addEventListener("pointerdown", (event) => {
  if (event.target.closest(".zoom")) return;
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  moved = 0;
  down = nodeAt(event.target);
});
window.addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (!before) { if (stage.contains(event.target)) hover(nodeAt(event.target), event); return; }
  const dx = event.clientX - before[0], dy = event.clientY - before[1];
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  moved += Math.abs(dx) + Math.abs(dy);
  if (fingers.size === 2) {
    const [[ax, ay], [bx, by]] = [...fingers.values()], box = stage.getBoundingClientRect(), now = Math.hypot(ax - bx, ay - by);
    if (spread) zoom(now / spread, (ax + bx) / 2 - box.left, (ay + by) / 2 - box.top);
    spread = now;
  } else if (moved > 4) {
    camera.x += dx;
    camera.y += dy;
    repaint();
  }
});
function lift(event) {
  if (!fingers.delete(event.pointerId)) return;
  spread = 0;
  if (event.type === "pointercancel" || moved > 4) return;
  if (down === null) { if (event.target.closest("#stage")) clear(); return; }
  if (event.shiftKey || event.ctrlKey || event.metaKey) pick(down);
  else select(down, { focus: true });
}
window.addEventListener("pointerup", lift);
window.addEventListener("pointercancel", lift);
stage.addEventListener("pointerleave", () => hover(null));
stage.addEventListener("wheel", (event) => {
  if (view.framed && !event.ctrlKey) return; // a notebook scrolls
  event.preventDefault();
  const box = stage.getBoundingClientRect();
  zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)), event.clientX - box.left, event.clientY - box.top);
}, { passive: false });

// -- keys
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input");
  if (event.key === "Escape") { $("save").open = false; clear(); if (typing) event.target.blur(); return; }
  if (event.target.id === "search" && event.key === "Enter") {
    const hit = nodes.filter((node) => isVisible(node) && state.query && matches(node)).sort((a, b) => b.reach - a.reach)[0];
    if (hit) select(hit.at, { focus: true });
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); $("search").focus(); return; }
  if (event.key === "+" || event.key === "=") zoom(1.25);
  if (event.key === "-") zoom(0.8);
  if (event.key === "0") fit();
  const at = nodeAt(event.target);
  if (at === null) return;
  if (event.key.startsWith("Arrow")) {
    event.preventDefault();
    const next = neighbour(at, event.key);
    if (next === undefined) return;
    roving(next);
    bringIntoSight(next);
    marks[placeOf(next).at].focus({ preventScroll: true });
    if (state.selected === null) hover(next);
  } else if (event.key === "Enter") { event.preventDefault(); select(at, { focus: true }); }
  else if (event.key === " ") { event.preventDefault(); pick(at); }
});
drawing.addEventListener("focusin", (event) => { const at = nodeAt(event.target); if (at !== null) bringIntoSight(at); });

// -- controls
function segments(into, choices, get, set) {
  const buttons = choices.map(([name, said]) => el("button", { type: "button", "data-choice": name, on: { click: () => { set(name); show(); } } }, said));
  const show = () => buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.choice === get())));
  into.replaceChildren(...buttons);
  show();
}
function slide(input, said, run) {
  const now = () => { said.textContent = run(Number(input.value)); };
  input.addEventListener("input", () => { now(); redraw(); if (state.selected === null) showCard(); });
  now();
}
function download(name, blob) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 4000);
  $("save").open = false;
}
function savePng() {
  const image = new Image();
  image.addEventListener("load", () => {
    const scale = Math.min(2, 8000 / Math.max(image.width, image.height)), sheet = el("canvas", { width: Math.round(image.width * scale), height: Math.round(image.height * scale) });
    sheet.getContext("2d").drawImage(image, 0, 0, sheet.width, sheet.height);
    sheet.toBlob((blob) => download(`${view.slug}.png`, blob), "image/png");
  });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(toSvg())}`;
}
function saveJson() {
  const graph = exchanged(state.mode === "base" ? data.base : data.graph);
  const named = (at) => graph.nodes[isDiff ? (state.mode === "base" ? nodes[at].inBase : nodes[at].inTuned) : at]?.node_id;
  const groups = state.groups.map(({ label, members }) => [label, ...members.map(named).filter(Boolean)]).filter((group) => group.length > 1);
  const saved = { ...graph.qParams, pinnedIds: groups.flatMap((group) => group.slice(1)), supernodes: groups, linkType: "both" };
  if (state.selected !== null && named(state.selected)) saved.clickedId = named(state.selected);
  graph.metadata.info.create_time_ms = Date.now();
  const whole = { ...graph, qParams: groups.length || saved.clickedId ? saved : graph.qParams };
  download(`${view.slug}${isDiff && state.mode === "base" ? "-base" : ""}.json`, new Blob([JSON.stringify(whole)], { type: "application/json" }));
}
function setTheme(dark) {
  state.dark = dark;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  readColours();
  redraw();
}

function legend() {
  const glyph = (kind) => svg("svg", { viewBox: "-12 -12 24 24", class: `key node ${kind} pos`, "aria-hidden": "true" }, svg("path", { class: "glyph", d: SHAPES[kind] }));
  const stroke = (name, dash) => svg("svg", { viewBox: "0 0 30 12", class: "key long", "aria-hidden": "true" }, svg("path", { d: "M2 6H28", style: `stroke:var(--${name});stroke-width:3;fill:none`, "stroke-dasharray": dash.join(" ") }));
  const kinds = Object.keys(KINDS).filter((kind) => nodes.some((node) => node.kind === kind));
  const items = kinds.map((kind) => el("li", {}, glyph(kind), KINDS[kind]));
  if (state.mode === "diff") items.push(...STATUS.map((status) => el("li", {}, svg("svg", { viewBox: "-12 -12 24 24", class: `key node feature ${status}`, "aria-hidden": "true" }, svg("path", { class: "glyph", d: SHAPES.feature }), svg("path", { class: "badge", d: BADGES[status] || "" })), stroke(status, DASH[status]), status)));
  else items.push(el("li", {}, stroke("pos", []), "raises"), el("li", {}, stroke("neg", []), "lowers"));
  items.push(el("li", {}, stroke("trail", []), "strongest path"));
  $("legend").replaceChildren(...items);
}

// How high the drawing's place is; a frame may be narrow, or have no size at all, when it is loaded.
function settle() {
  const high = view.height * (view.labelled ? 0.75 : 0.55) + BOTTOM + 16;
  stage.style.height = NARROW.matches ? `${Math.max(260, Math.min(high, 0.62 * (window.innerHeight % 20000)))}px` : "";
  firstView();
}

function start() {
  view.framed = window.self !== window.top;
  $("about").textContent = view.said;
  $("prompt").append(...view.tokens.map((token) => el("span", {}, visibleSpace(token))));
  $("validation").append(...view.validation.flatMap(([name, said, title]) => [el("div", { title }, el("dt", {}, name), el("dd", {}, said))]));
  if (view.warning) { $("warning").hidden = false; $("warning").textContent = view.warning; }
  $("note").textContent = view.note;
  if (isDiff) {
    $("modes").hidden = false;
    segments($("modes"), [["base", "Base"], ["tuned", "Tuned"], ["diff", "Diff"]], () => state.mode, (name) => { state.mode = name; if (state.selected !== null && !inMode(nodes[state.selected])) state.selected = null; legend(); redraw(); showCard(); });
  }
  segments($("trace"), [["both", "Trace both"], ["up", "Upstream"], ["down", "Downstream"], ["direct", "Direct"]], () => state.trace, (name) => { state.trace = name; redraw(); if (state.selected !== null) showCard(); });
  slide($("cutoff"), $("cutoff-said"), (at) => { state.cutoff = at / 1000; return `${(at / 10).toFixed(0)} %`; });
  const span = Math.log(Math.max(2, links.length) + 1);
  $("links").value = links.length ? String(Math.round((100 * Math.log(Math.min(links.length, view.firstLinks) + 1)) / span)) : "0";
  slide($("links"), $("links-said"), (at) => { state.shown = at >= 100 ? links.length : Math.round(Math.exp((span * at) / 100) - 1); return `${state.shown} of ${links.length}`; });
  $("search").addEventListener("input", () => { state.query = $("search").value.trim(); redraw(); const found = state.query ? nodes.filter((node) => isVisible(node) && matches(node)).length : 0; $("said").textContent = state.query ? `${found} nodes found` : ""; });
  $("fold").addEventListener("click", () => setFold(!state.fold));
  $("theme").addEventListener("click", () => setTheme(!state.dark));
  $("zoom-in").addEventListener("click", () => zoom(1.3));
  $("zoom-out").addEventListener("click", () => zoom(1 / 1.3));
  $("zoom-fit").addEventListener("click", fit);
  $("save-png").addEventListener("click", savePng);
  $("save-svg").addEventListener("click", () => download(`${view.slug}.svg`, new Blob([toSvg()], { type: "image/svg+xml" })));
  $("save-json").addEventListener("click", saveJson);
  const scheme = window.matchMedia(DARK);
  scheme.addEventListener("change", (event) => setTheme(event.matches));
  legend();
  firstStop();
  setTheme(scheme.matches);
  setFold(false);
  settle();
  NARROW.addEventListener("change", settle);
  new ResizeObserver(firstView).observe(stage);
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}
start();
