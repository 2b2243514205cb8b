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
// A group's name, or that of what weighs most in it.
function shortName(thing) {
  if (!thing.group) return nameOf(thing);
  if (!thing.cell) return thing.label;
  const names = strongestOf(thing);
  return `${nameOf(names[0])}${names.length > 1 ? ` +${names.length - 1}` : ""}`;
}
const strongestOf = (group) => group.own.map((at) => nodes[at]).sort((a, b) => b.reach - a.reach);
const worth = (thing) => `${thing.attribution === null ? "" : `, attribution ${number(thing.attribution)}`}${isDiff ? `, ${thing.status}` : ""}`;
function describe(thing) {
  if (!thing.group) return `${KINDS[thing.kind]} ${nameOf(thing)}, ${whereOf(thing)}${worth(thing)}`;
  return `group ${thing.label}, ${thing.own.length} nodes${thing.cell ? worth(thing) : ""}`;
}

function matches(node) {
  const query = state.query.toLowerCase();
  return [node.id, node.label, nameOf(node), view.tokens[node.pos], ...(node.top || []).map((each) => each[0])].some((text) => String(text ?? "").toLowerCase().includes(query));
}

const FOUND = 24; // so many nodes that a search finds are opened

// -- selection
function select(thing, { focus = false, quiet = false } = {}) {
  if (thing && !folds && thing.by?.group) thing = thing.by; // a group that is drawn in place of its members
  if (folds && thing && !thing.group && thing.holder) state.open.add(thing.holder.key); // stays open when the search is over
  showPath(null);
  state.selected = thing;
  refresh();
  showCard();
  const shown = thing && standIn(thing);
  if (!shown) return;
  roving(shown);
  bringIntoSight(shown);
  const { ins, outs } = linksOf(thing);
  if (!quiet) $("said").textContent = `Selected ${describe(thing)}: ${ins.length} inputs, ${outs.length} outputs`;
  if (focus) marks.get(shown.key).focus({ preventScroll: true });
}
function clear() {
  state.picked.clear();
  state.query = $("search").value = "";
  state.found.clear();
  select(null);
  $("said").textContent = "Selection cleared";
}
function roving(thing) {
  const before = nodes[stop]?.by;
  stop = thing.own[0];
  for (const each of [before, thing]) if (each?.drawn) paintAgain(each);
}
function paintAgain(thing) {
  const mark = marks.get(thing.key), now = thing === nodes[stop]?.by ? "0" : "-1";
  mark?.setAttribute("tabindex", now);
  if (mark?.want) mark.want.tabindex = now;
}
// A path of the words above: what is lit, until it is asked for again.
function showPath(path) {
  const same = !path || path.button === state.path?.button;
  state.path?.button.setAttribute("aria-pressed", "false");
  state.path = same ? null : path;
  if (!same) path.button.setAttribute("aria-pressed", "true");
}

// -- what is folded is opened, and folded again, and stays where it was on the screen
function keepingPlace(thing, change) {
  const before = thing?.own ? standIn(thing) : thing, x = before?.px ?? 0, y = before?.py ?? before?.top ?? 0;
  change();
  refresh();
  const after = thing?.own ? standIn(thing) : thing;
  if (before && after) {
    if (after.px !== undefined) camera.x += camera.k * (x - after.px);
    camera.y += camera.k * (y - (after.py ?? after.top));
  }
  showCard();
}
// A click on a group, or Enter: at size it opens; elsewhere it is selected, as its nodes would be.
function activate(thing, { focus = true } = {}) {
  if (!thing.group || !folds) { select(thing, { focus }); return; }
  hover(null);
  keepingPlace(thing, () => { showPath(null); state.open.add(thing.key); state.selected = thing; });
  const shown = standIn(thing);
  roving(shown);
  if (shown.band) bringBand(shown.band);
  bringIntoSight(shown);
  $("said").textContent = `Opened ${describe(thing)}`;
  if (focus) marks.get(shown.key).focus({ preventScroll: true });
}
function shut(thing) {
  keepingPlace(thing, () => { state.open.delete(thing.key); state.found.delete(thing.key); });
  const shown = standIn(thing);
  if (!shown) return;
  roving(shown);
  $("said").textContent = `Folded ${describe(thing)}`;
  marks.get(shown.key).focus({ preventScroll: true });
}
function toggleBand(band, on = band.folded) {
  keepingPlace(band, () => {
    if (on) state.bands.add(band);
    else {
      state.bands.delete(band);
      for (const node of nodes) if (node.band === band && node.holder) { state.open.delete(node.holder.key); state.found.delete(node.holder.key); }
    }
  });
  $("said").textContent = `Layers ${band.name} ${on ? "opened" : "folded"}`;
}
// Everything: each layer, group, node and link, and all of it in sight; or folded again as at first.
function setAll(on) {
  state.bands = new Set(on ? bands : []);
  state.open.clear();
  state.found.clear();
  state.fold = !on && state.groups.length > 0;
  if (on) $("cutoff").value = "1000";
  if (on) $("cutoff").dispatchEvent(new Event("input"));
  state.most = on ? Infinity : view.firstLinks;
  refresh();
  showCard();
  (on ? fit : firstView)();
  $("said").textContent = on ? `All ${nodes.length} nodes and ${links.length} links` : "Layers folded";
}
const allShown = () => folds && bands.every((band) => state.bands.has(band)) && !state.fold && state.cutoff === 1 && state.most >= lines.length;
// The controls say what is so.
function sayState() {
  const span = Math.log(Math.max(2, lines.length) + 1), drawn = Math.min(state.most, lines.length);
  $("links").value = lines.length ? String(Math.round((100 * Math.log(drawn + 1)) / span)) : "0";
  $("links-said").textContent = `${drawn} of ${lines.length}`;
  $("fold").setAttribute("aria-pressed", String(state.fold));
  $("fold").disabled = !state.groups.length;
  $("all").setAttribute("aria-pressed", String(allShown()));
  for (const band of bands) {
    band.button.setAttribute("aria-expanded", String(!band.folded));
    band.button.firstChild.textContent = band.folded ? "▸" : "▾";
  }
}

// Up and down follow the strongest link, left and right the row.
function neighbour(thing, key) {
  const strongest = (near, far) => thing.lines.filter((line) => line[near] === thing).sort((a, b) => b.share - a.share).map((line) => line[far])[0];
  if (key === "ArrowUp") return strongest("s", "t") ?? nearest(thing, (other) => other.py < thing.py - 1);
  if (key === "ArrowDown") return strongest("t", "s") ?? nearest(thing, (other) => other.py > thing.py + 1);
  const rowOf = (each) => (each.flat ? each.from.band : each.from.row);
  const row = things.filter((each) => rowOf(each) === rowOf(thing)).sort((a, b) => a.px - b.px || a.py - b.py);
  return row[row.indexOf(thing) + (key === "ArrowRight" ? 1 : -1)];
}
function nearest(thing, where) {
  const far = (other) => Math.abs(other.px - thing.px) + 3 * Math.abs(other.py - thing.py);
  return things.filter(where).sort((a, b) => far(a) - far(b))[0];
}

// -- the card
function showCard() {
  const card = $("card"), { selected } = state;
  card.replaceChildren(...(state.picked.size > 1 ? [pickedCard()] : []), ...(!selected ? overview() : selected.group ? groupCard(selected) : nodeCard(selected)));
  card.scrollTop = 0;
}
const heading = (text, more) => el("h3", {}, text, more ? el("span", {}, ` ${more}`) : null);
function row(thing, share, weight, status) {
  const bar = el("i", { class: weight < 0 ? "neg" : "pos" });
  bar.style.width = `${Math.max(2, Math.min(100, 100 * share))}%`;
  return el("li", {}, el("button", { type: "button", class: "row", on: { click: () => select(thing), pointerenter: () => hover(standIn(thing)), pointerleave: () => hover(null) } },
    el("span", { class: "bar", "aria-hidden": "true" }, bar),
    el("b", {}, shortName(thing)), el("span", { class: "where" }, thing.group ? (thing.cell ? thing.label : `${thing.own.length} nodes`) : whereOf(thing)),
    el("span", { class: "num" }, status && status !== "same" ? el("em", { class: `word ${status}` }, status) : null, ` ${number(weight)} `, el("small", {}, percent(share)))));
}
function rows(items) {
  if (!items.length) return [el("p", { class: "none" }, "none shown")];
  const rest = items.splice(10), shown = el("ul", { class: "rows" }, ...items);
  if (!rest.length) return [shown];
  const more = el("button", { type: "button", class: "more", on: { click: () => { shown.append(...rest); more.remove(); } } }, `${rest.length} more`);
  return [shown, more];
}
// What feeds a thing and what it feeds, strongest first: of a node its links, of a group those of its nodes, by what is
// drawn at their other ends.
function linksOf(thing) {
  const found = { ins: new Map(), outs: new Map() }, inside = new Set(thing.own), total = { ins: 0, outs: 0 };
  for (const at of thing.own) for (const side of ["ins", "outs"]) for (const link of nodes[at][side]) {
    const end = nodes[side === "ins" ? link.s : link.t], far = thing.group ? end.by : end;
    if (!alive(link) || inside.has(end.at)) continue;
    const sofar = found[side].get(far) ?? { far, w: 0, score: 0, share: 0, status: link.status, links: 0 };
    found[side].set(far, Object.assign(sofar, { w: sofar.w + link.now.w, score: sofar.score + link.now.score, share: sofar.share + link.now.share, links: sofar.links + 1 }));
    total[side] += link.now.score;
  }
  return Object.fromEntries(["ins", "outs"].map((side) => [side, [...found[side].values()].map((each) => ({ ...each, share: thing.group ? each.score / (total[side] || 1) : each.share })).sort((a, b) => b.share - a.share)]));
}
const listed = (found) => rows(found.map(({ far, share, w, status, links: many }) => row(far, share, w, isDiff && many === 1 ? status : "")));
function pathRow({ trail, size }) {
  const stops = [trail[0].s, ...trail.map((link) => link.t)];
  const parts = stops.flatMap((at, i) => [i ? el("span", { class: trail[i - 1].now.w < 0 ? "arrow neg" : "arrow pos" }, trail[i - 1].now.w < 0 ? " ⊣ " : " → ") : null,
    el("button", { type: "button", class: "stop", on: { click: () => select(nodes[at]), pointerenter: () => hover(nodes[at].by), pointerleave: () => hover(null) } }, nameOf(nodes[at]), el("small", {}, always(nodes[at]) ? "" : ` L${nodes[at].layer}`))]);
  return el("li", {}, ...parts, el("span", { class: "num" }, percent(size)));
}
function cardHead(kind, thing) {
  return el("div", { class: "head" }, el("span", { class: `kind ${thing.kind ?? ""}` }, kind), isDiff ? el("em", { class: `word ${thing.status}` }, thing.status) : null,
    el("button", { type: "button", class: "close", "aria-label": "Clear the selection", on: { click: clear } }, "×"));
}
const term = (name, ...said) => [el("dt", {}, name), el("dd", {}, ...said)];
function edgesOf(thing, ofWhat = "") {
  const { ins, outs } = linksOf(thing);
  return [heading("Inputs", `${ins.length}${ofWhat}`), el("div", { id: "inputs" }, ...listed(ins)), heading("Outputs", `${outs.length}${ofWhat}`), el("div", { id: "outputs" }, ...listed(outs))];
}
function groupCard(group) {
  const facts = el("dl", { class: "facts" }, ...term("Nodes", String(group.own.length)));
  if (isDiff) facts.append(...term("In base, summed", number(group.base)), ...term("In tuned, summed", number(group.tuned)));
  else if (group.attribution !== null && group.attribution !== undefined) facts.append(...term("Attribution, summed", number(group.attribution)));
  const button = bySelf(group) ? el("button", { type: "button", class: "more", on: { click: () => shut(group) } }, "Fold") : group.drawn ? el("button", { type: "button", class: "more", on: { click: () => activate(group) } }, "Open") : null;
  const total = group.own.reduce((sum, at) => sum + nodes[at].reach, 0) || 1;
  return [
    cardHead("group", group), el("h2", {}, group.label), facts, folds ? button : null,
    heading("Nodes", "by influence"), el("div", { id: "members" }, ...rows(strongestOf(group).map((node) => row(node, node.reach / total, state.mode === "base" ? node.base : node.attribution, isDiff ? node.status : "")))),
    ...edgesOf(group, ", share of all of them"),
  ].filter(Boolean);
}

function nodeCard(node) {
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
  const { trail } = traceFrom(node.own);
  return [
    cardHead(KINDS[node.kind], node),
    el("h2", {}, nameOf(node)), el("p", { class: "id" }, node.id),
    node.explanation ? el("p", { class: "explanation" }, node.explanation) : null,
    facts,
    node.top && node.top.length ? el("p", { class: "top-tokens" }, el("span", { class: "muted" }, "Pushes up "), ...node.top.slice(0, 10).flatMap(([token]) => [el("code", {}, visibleSpace(token)), " "])) : null,
    node.link ? el("p", {}, el("a", { href: node.link, target: "_blank", rel: "noopener noreferrer" }, node.linkName)) : null,
    trail.length ? heading("Strongest path") : null, trail.length ? el("ol", { class: "paths", id: "trail" }, pathRow({ trail, size: trail.reduce((p, link) => p * link.now.share, 1) })) : null,
    ...edgesOf(node),
  ].filter(Boolean);
}

function overview() {
  const shown = nodes.filter((node) => node.shown && !always(node)).sort((a, b) => b.reach - a.reach);
  const total = shown.reduce((sum, node) => sum + node.reach, 0) || 1;
  const changed = isDiff ? view.changes.map(([what, counts]) => el("p", { class: "counts" }, `${what} `, ...STATUS.filter((each) => counts[each]).flatMap((each) => [el("em", { class: `word ${each}` }, `${counts[each]} ${each}`), " "]))) : [];
  return [
    el("h2", { class: "hidden" }, "Overview"),
    el("p", { class: "lead" }, folds ? "A number is that many nodes folded together: click it, or the layers at the left, to open them. Click a node to trace what feeds it and what it feeds." : "Click a node to trace what feeds it and what it feeds."),
    ...(changed.length ? [heading("What changed"), ...changed] : []),
    ...(shown.length ? [heading("Most influence"), el("ul", { class: "rows" }, ...shown.slice(0, 8).map((node) => row(node, node.reach / total, state.mode === "base" ? node.base : node.attribution, isDiff ? node.status : "")))] : []),
    ...(state.groups.length ? [heading("Groups"), ...rows(state.groups.map((group) => el("li", {}, el("button", { type: "button", class: "row", on: { click: () => select(group) } }, el("b", {}, group.label), el("span", { class: "where" }, `${group.own.length} nodes`)))))] : []),
    ...(folds ? [el("details", {}, el("summary", {}, "Prompt"), el("p", {}, view.tokens.join("")))] : []),
    el("details", {}, el("summary", {}, "Keys and mouse"), el("dl", { class: "facts keys" }, ...[["/", "search; Enter takes the best hit"], ["↑ ↓", "along the strongest link"], ["← →", "along the row"], ["Enter", folds ? "select a node, open a group" : "select"], ...(folds ? [["Backspace", "fold the group again"]] : []), ["Space", "pick for a group (or Shift-click)"], ["Esc", "clear"], ["+ − 0", "zoom in, out, all"], ["wheel", view.framed ? "with Ctrl: zoom" : "zoom; with Shift, or a drag: move"]].flatMap(([key, said]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, said)]))),
    ...(view.details.length ? [el("details", {}, el("summary", {}, "How it was made"), el("dl", { class: "facts" }, ...view.details.flatMap(([name, said]) => [el("dt", {}, name), el("dd", {}, said)])))] : []),
  ];
}

function pickedCard() {
  const name = el("input", { type: "text", id: "group-name", "aria-label": "Name of the group", placeholder: "name" });
  const make = () => {
    const members = [...state.picked];
    for (const group of state.groups) group.members = group.members.filter((at) => !state.picked.has(at));
    state.groups = state.groups.filter((group) => group.members.length);
    state.groups.push(grouped(name.value.trim() || `group ${state.groups.length + 1}`, members));
    state.picked.clear();
    setFold(true);
  };
  name.addEventListener("keydown", (event) => { event.stopPropagation(); if (event.key === "Enter") make(); });
  return el("div", { class: "picking" }, el("b", {}, `${state.picked.size} nodes picked`), name, el("button", { type: "button", id: "group-make", on: { click: make } }, "Group"));
}
function setFold(on) {
  state.fold = on && state.groups.length > 0;
  refresh();
  showCard();
}
function pick(thing) {
  const all = thing.own.every((at) => state.picked.has(at));
  for (const at of thing.own) state.picked[all ? "delete" : "add"](at);
  redraw();
  showCard();
}

// -- hover
function hover(thing, event) {
  if (state.hover === thing) return;
  const before = state.hover;
  state.hover = thing;
  const tip = $("tip");
  tip.hidden = !thing || !event;
  if (!tip.hidden) {
    tip.replaceChildren(el("b", {}, thing.group ? thing.label : nameOf(thing)), el("span", {}, thing.group ? `${thing.own.length} nodes: ${strongestOf(thing).slice(0, 3).map(nameOf).join(", ")}${thing.own.length > 3 ? " …" : ""}` : `${KINDS[thing.kind]} · ${whereOf(thing)}`), ...(thing.attribution === null || thing.attribution === undefined ? [] : [el("span", {}, `attribution ${number(thing.attribution)}${(thing.effect ?? null) === null ? "" : ` · ablation ${number(thing.effect)}`}`)]));
    const box = stage.getBoundingClientRect();
    tip.style.left = `${Math.max(0, Math.min(event.clientX - box.left + 14, box.width - 220))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY - box.top + 14, box.height - 80))}px`;
  }
  paintSome([before, thing].filter((each) => each?.drawn));
  repaint();
}
const thingAt = (target) => target.closest?.(".node")?.thing ?? null;

// -- pointer: drag to move, two fingers to zoom, click to select
const fingers = new Map();
let moved = 0, spread = 0, down = null;
stage.addEventListener("pointerdown", (event) => {
  if (event.target.closest(".zoom, .map, .bands")) return;
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  moved = 0;
  down = event.target.closest(".handle") ?? thingAt(event.target);
});
window.addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (!before) { if (stage.contains(event.target)) hover(thingAt(event.target), event); return; }
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
  if (down.shuts) shut(down.shuts);
  else if (event.shiftKey || event.ctrlKey || event.metaKey) pick(down);
  else activate(down);
}
window.addEventListener("pointerup", lift);
window.addEventListener("pointercancel", lift);
stage.addEventListener("pointerleave", () => hover(null));
stage.addEventListener("wheel", (event) => {
  if (view.framed && !event.ctrlKey) return; // a notebook scrolls
  event.preventDefault();
  const box = stage.getBoundingClientRect(), aside = event.shiftKey ? event.deltaX || event.deltaY : event.deltaX;
  if (!event.ctrlKey && (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY))) {
    camera.x -= aside;
    repaint();
    return;
  }
  zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)), event.clientX - box.left, event.clientY - box.top);
}, { passive: false });

// -- the map: click, drag, arrow keys
const onMap = (event) => { const box = map.getBoundingClientRect(); lookAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height); };
map.addEventListener("pointerdown", (event) => { event.preventDefault(); map.focus(); map.setPointerCapture(event.pointerId); onMap(event); });
map.addEventListener("pointermove", (event) => { if (map.hasPointerCapture(event.pointerId)) onMap(event); });
map.addEventListener("keydown", (event) => {
  const [across, down] = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] ?? [0, 0];
  if (!across && !down) return;
  event.preventDefault();
  event.stopPropagation();
  camera.x += (across * stage.clientWidth) / 4;
  camera.y += (down * stage.clientHeight) / 4;
  repaint();
});

// -- keys
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input");
  if (event.key === "Escape") { $("save").open = false; clear(); if (typing) event.target.blur(); return; }
  if (event.target.id === "search" && event.key === "Enter") {
    const hit = nodes.filter((node) => node.shown && state.query && matches(node)).sort((a, b) => b.reach - a.reach)[0];
    if (hit) select(hit, { focus: true });
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); $("search").focus(); return; }
  if (event.key === "+" || event.key === "=") zoom(1.25);
  if (event.key === "-") zoom(0.8);
  if (event.key === "0") fit();
  const shuts = event.target.closest?.(".handle")?.shuts, thing = thingAt(event.target);
  if (shuts && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); shut(shuts); }
  if (!thing) return;
  if (event.key.startsWith("Arrow")) {
    event.preventDefault();
    const next = neighbour(thing, event.key);
    if (!next) return;
    roving(next);
    bringIntoSight(next);
    marks.get(next.key).focus({ preventScroll: true });
    if (!state.selected) hover(next);
  } else if (event.key === "Enter") { event.preventDefault(); activate(thing); }
  else if (event.key === " ") { event.preventDefault(); pick(thing); }
  else if (event.key === "Backspace" && thing.holder && isOpen(thing.holder)) {
    event.preventDefault();
    if (bySelf(thing.holder)) shut(thing.holder);
    else toggleBand(thing.band, false);
    const shown = standIn(thing);
    roving(shown);
    marks.get(shown.key).focus({ preventScroll: true });
  }
});
drawing.addEventListener("focusin", (event) => { const thing = thingAt(event.target); if (thing?.drawn) bringIntoSight(thing); });

// -- controls
function setMode(name) {
  state.mode = name;
  if (state.selected && !state.selected.own.some((at) => inMode(nodes[at]))) state.selected = null;
  legend();
  refresh();
  showCard();
}
// What is found is marked, and opened where it is little enough to look at.
function search() {
  state.query = $("search").value.trim();
  const hits = state.query ? nodes.filter((node) => node.shown && matches(node)) : [];
  state.found = new Set(folds && hits.length <= FOUND ? hits.filter((node) => node.holder && !(node.holder.cell && node.holder.own.length === 1)).map((node) => node.holder.key) : []);
  refresh();
  if (folds && hits.length && hits.length <= FOUND) bringIntoSight(hits.sort((a, b) => b.reach - a.reach)[0].by);
  $("said").textContent = state.query ? `${hits.length} nodes found` : "";
}
// A sentence of the page becomes a button that lights its path.
function wordsOf(item, name, sentence, ids) {
  const trail = ids.slice(1).map((t, at) => nodes[ids[at]]?.outs.find((link) => link.t === t));
  if (!trail.every(Boolean)) return; // a node or a link of it is not on the page
  const button = el("button", { type: "button", class: "path", "aria-pressed": "false", on: { click: () => {
    state.selected = null;
    showPath({ button, trail });
    if (state.path && isDiff && state.mode !== name) document.querySelector('#modes [data-choice="diff"]').click();
    refresh();
    showCard();
    if (state.path && folds) bringIntoSight(nodes[ids[ids.length - 1]].by);
  } } }, sentence);
  item.replaceChildren(button);
}
function segments(into, choices, get, set) {
  const buttons = choices.map(([name, said]) => el("button", { type: "button", "data-choice": name, on: { click: () => { set(name); show(); } } }, said));
  const show = () => buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.choice === get())));
  into.replaceChildren(...buttons);
  show();
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
  if (folds) items.push(el("li", {}, svg("svg", { viewBox: "-14 -12 28 24", class: "key node", "aria-hidden": "true" }, svg("path", { class: "glyph", d: SHAPES.cell }), svg("text", { y: 4, "text-anchor": "middle" }, "3")), "so many nodes, folded"));
  if (state.mode === "diff") items.push(...STATUS.map((status) => el("li", {}, svg("svg", { viewBox: "-12 -12 24 24", class: `key node feature ${status}`, "aria-hidden": "true" }, svg("path", { class: "glyph", d: SHAPES.feature }), svg("path", { class: "badge", d: BADGES[status] || "" })), stroke(status, DASH[status]), status)));
  else items.push(el("li", {}, stroke("pos", []), "raises"), el("li", {}, stroke("neg", []), "lowers"));
  items.push(el("li", {}, stroke("trail", []), "strongest path"));
  $("legend").replaceChildren(...items);
}

// How high the drawing's place is; a frame may be narrow, or have no size at all, when it is loaded.
function settleStage() {
  const high = (folds ? place.height / 0.55 : view.height) * (view.labelled ? 0.75 : 0.55) + BOTTOM + 16;
  stage.style.height = NARROW.matches ? `${Math.max(260, Math.min(high, 0.62 * (window.innerHeight % 20000)))}px` : "";
  firstView();
}

function start() {
  view.framed = window.self !== window.top;
  $("prompt").append(...view.tokens.map((token) => el("span", {}, visibleSpace(token))));
  $("validation").append(...view.validation.flatMap(([name, said, title]) => [el("div", { title }, el("dt", {}, name), el("dd", {}, said))]));
  document.documentElement.classList.toggle("folds", folds);
  $("all").hidden = !folds;
  for (const band of bands) {
    band.button = el("button", { type: "button", "aria-label": `Layers ${band.name}`, on: { click: () => toggleBand(band), focus: () => { camera.y += Math.max(0, 8 - camera.y - camera.k * band.top) + Math.min(0, stage.clientHeight - BOTTOM - 20 - camera.y - camera.k * band.top); repaint(); } } }, el("span", { "aria-hidden": "true" }), band.name);
    $("bands").append(band.button);
  }
  view.words.forEach(([name, said], which) => said.forEach(([sentence, ids], at) => wordsOf(document.querySelectorAll("#words ol")[which].children[at], name, sentence, ids)));
  if (isDiff) {
    $("modes").hidden = false;
    segments($("modes"), [["base", "Base"], ["tuned", "Tuned"], ["diff", "Diff"]], () => state.mode, setMode);
  }
  segments($("trace"), [["both", "Trace both"], ["up", "Upstream"], ["down", "Downstream"], ["direct", "Direct"]], () => state.trace, (name) => { state.trace = name; redraw(); if (state.selected) showCard(); });
  $("cutoff").addEventListener("input", () => {
    const at = Number($("cutoff").value);
    state.cutoff = at / 1000;
    $("cutoff-said").textContent = `${(at / 10).toFixed(0)} %`;
    refresh();
    if (!state.selected) showCard();
  });
  $("cutoff-said").textContent = "100 %";
  $("links").addEventListener("input", () => {
    const at = Number($("links").value), span = Math.log(Math.max(2, lines.length) + 1);
    state.most = at >= 100 ? Infinity : Math.round(Math.exp((span * at) / 100) - 1);
    redraw();
  });
  state.most = view.firstLinks;
  $("search").addEventListener("input", search);
  $("all").addEventListener("click", () => setAll(!allShown()));
  $("fold").addEventListener("click", () => setFold(!state.fold));
  $("theme").addEventListener("click", () => setTheme(!state.dark));
  $("zoom-in").addEventListener("click", () => zoom(1.3));
  $("zoom-out").addEventListener("click", () => zoom(1 / 1.3));
  $("zoom-fit").addEventListener("click", fit);
  $("save-png").addEventListener("click", savePng);
  $("save-svg").addEventListener("click", saveSvg);
  $("save-json").addEventListener("click", saveJson);
  const scheme = window.matchMedia(DARK);
  scheme.addEventListener("change", (event) => setTheme(event.matches));
  const paper = window.matchMedia("print");
  paper.addEventListener("change", (event) => (event.matches ? toPaper : fromPaper)());
  window.addEventListener("beforeprint", toPaper);
  window.addEventListener("afterprint", fromPaper);
  legend();
  state.fold = folds && state.groups.length > 0;
  count();
  arrange();
  setTheme(scheme.matches);
  showCard();
  settleStage();
  NARROW.addEventListener("change", settleStage);
  new ResizeObserver(resized).observe(stage);
  paint();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}
start();
