// What is drawn, and where. A node is drawn by itself, by the group that somebody made of it, or by the cell (one token's
// part of a band of layers) that it is folded into; all three are things, with `own` nodes. Rows and columns are as high
// and as wide as what stands in them; within an opened row a node stands where Python has put it.
const R = view.labelled ? 8 : 6.5, PAD = 18, STRIP = 20;
const folds = view.bands.length > 0;
const bands = view.bands.map((band, at) => ({ ...band, at }));
const bandOf = new Map(bands.flatMap((band) => band.rows.map((row) => [row, band])));
const rowOf = new Map(view.rows.map((row, at) => [row.name, at]));
const middle = (band) => band.start + band.size / 2;
// How far above its row's floor a node stands, and the lowest of a row: lines are stacked from the floor upwards.
const aboveFloor = (node) => view.rows[node.row].start + view.rows[node.row].size - node.y;
const rowLeast = view.rows.map((row) => row.size / 2);
const cells = new Map();
for (const node of nodes) {
  node.row = rowOf.get(node.kind === "token" ? "token" : node.kind === "logit" ? "target" : String(node.layer));
  node.band = bandOf.get(node.row) ?? null;
  node.cell = null;
  rowLeast[node.row] = Math.min(rowLeast[node.row], aboveFloor(node));
  if (!node.band) continue;
  const key = `c${node.band.at}:${node.pos}`;
  if (!cells.has(key)) cells.set(key, { key, group: true, cell: true, band: node.band, pos: node.pos, own: [] });
  node.cell = cells.get(key);
}
let made = 0;
const grouped = (label, members) => ({ key: `g${made++}`, group: true, cell: false, label, members, own: [] });
state.groups = view.groups.map(([label, members]) => grouped(label, members));

let things = [], lines = [], handles = [];
const place = { rows: [], columns: [], width: view.width, height: view.height };
const bySelf = (thing) => state.open.has(thing.key) || state.found.has(thing.key);
const isOpen = (thing) => bySelf(thing) || (thing.cell && state.bands.has(thing.band));
// What stands for a thing in the drawing now: itself, what it is folded into, or of an opened group its head.
const standIn = (thing) => (!thing.group ? thing.by : thing.drawn ? thing : thing.own.length ? nodes[headOf(thing)].by : null);

function headOf(group) {
  const mean = (axis) => group.own.reduce((sum, at) => sum + nodes[at][axis], 0) / group.own.length;
  const x = mean("x"), y = mean("y"), far = (at) => Math.hypot(nodes[at].x - x, nodes[at].y - y);
  return group.own.reduce((a, b) => (far(a) <= far(b) ? a : b));
}

function arrange() {
  for (const thing of things) thing.drawn = false;
  for (const node of nodes) node.holder = node.cell;
  for (const cell of cells.values()) cell.own = [];
  for (const group of state.groups) {
    group.own = group.members.filter((at) => nodes[at].shown);
    if (state.fold) for (const at of group.own) nodes[at].holder = group;
  }
  for (const node of nodes) if (node.shown && node.holder?.cell) node.holder.own.push(node.at);
  const stretched = new Set(state.bands), found = new Set();
  for (const node of nodes) {
    const { holder } = node, lone = Boolean(holder?.cell && holder.own.length === 1);
    node.by = !node.shown ? null : !holder || lone || isOpen(holder) ? node : holder;
    if (node.by === node && node.band && holder && !lone) stretched.add(node.band);
    if (node.by) found.add(node.by);
  }
  things = [...found];
  things.forEach((thing, at) => Object.assign(thing, { drawn: true, no: at, lines: [], into: 0, from: thing.group ? nodes[headOf(thing)] : thing }));
  for (const thing of things) if (thing.group) sum(thing);
  settle(stretched);
  handles = !folds ? [] : [...(state.fold ? state.groups : []), ...cells.values()].filter((thing) => bySelf(thing) && thing.own.length > (thing.cell ? 1 : 0) && !(thing.cell && state.bands.has(thing.band))).map((thing) => {
    const from = nodes[headOf(thing)], top = from.band ? from.band.top + STRIP / 2 : place.rows[0].start;
    return { thing, x: middle(place.columns[from.pos]) + (thing.cell ? 0 : 9), y: top };
  });
  join();
}

// Rows from the top downwards and columns from the left, then everything that stands in them.
function settle(stretched) {
  const flat = new Map(), wide = view.columns.map(() => !folds), high = rowLeast.map((least) => 2 * least), lines = new Map();
  for (const thing of things) {
    const { band, pos, x, row } = thing.from;
    thing.flat = Boolean(band && !stretched.has(band));
    if (!thing.flat) high[row] = Math.max(high[row], aboveFloor(thing.from) + rowLeast[row]);
    if (thing.flat) flat.set(`${band.at}:${pos}`, [...(flat.get(`${band.at}:${pos}`) ?? []), thing]);
    else if (Math.abs(x - middle(view.columns[pos])) > 0.5) wide[pos] = true;
  }
  let left = PAD, top = PAD;
  place.columns = view.columns.map(({ name, size }, pos) => {
    const column = { name, start: left, size: wide[pos] ? size : Math.min(size, view.folded[0]) };
    left += column.size;
    return column;
  });
  for (const list of flat.values()) lines.set(list[0].from.band, Math.max(lines.get(list[0].from.band) ?? 1, list.length));
  const moved = new Map();
  place.rows = [];
  view.rows.forEach((row, at) => {
    const band = bandOf.get(at), first = band && band.rows[0] === at;
    if (first) Object.assign(band, { top, folded: !stretched.has(band) });
    const line = (lines.get(band) ?? 1) * view.folded[1];
    if (first && band.folded) place.rows.push({ name: band.name, band, start: top, size: line });
    if (first) top += band.folded ? line : STRIP;
    if (band) band.size = top - band.top;
    if (band?.folded) return;
    const size = band ? high[at] : row.size;
    moved.set(at, top + size - row.start - row.size);
    place.rows.push({ name: row.name, start: top, size });
    top += size;
    if (band) band.size = top - band.top;
  });
  Object.assign(place, { width: left + PAD, height: top + PAD });
  const beside = new Map();
  for (const { from } of things) beside.set(from.cell, (beside.get(from.cell) ?? 0) + 1);
  for (const thing of things) {
    const { x, y, pos, row, band, cell } = thing.from;
    if (thing.flat) continue;
    thing.px = middle(place.columns[pos]) + x - middle(view.columns[pos]);
    thing.py = y + moved.get(row);
    // What is still folded beside an opened group stands between the layers that it is of, where it is alone.
    if (thing.group && thing.cell && beside.get(cell) === 1) [thing.px, thing.py] = [middle(place.columns[pos]), band.top + (STRIP + band.size) / 2];
  }
  for (const list of flat.values()) list.forEach((thing, at) => {
    const { band, pos } = thing.from;
    thing.px = middle(place.columns[pos]);
    thing.py = band.top + band.size - (at + 0.5) * view.folded[1];
  });
}

// What a group's nodes have together.
function sum(group) {
  const total = (name) => {
    const said = group.own.map((at) => nodes[at][name]).filter((each) => each !== null && each !== undefined);
    return said.length ? said.reduce((a, b) => a + b, 0) : null;
  };
  for (const name of ["reach", "attribution", "base", "tuned"]) group[name] = total(name);
  if (isDiff) group.status = became(group.base, group.tuned, nodeFloor);
  if (group.cell) group.label = `${group.band.name} at ${visibleSpace(view.tokens[group.pos] ?? "")} (${group.pos})`;
}
// What became of a sum of values: the rule of graph/diff.py.
function became(base, tuned, floor) {
  if (base === null) return "appeared";
  if (tuned === null) return "vanished";
  if (Math.abs(tuned - base) <= Math.max(floor, view.least * Math.max(Math.abs(tuned), Math.abs(base)))) return "same";
  return Math.abs(tuned) >= Math.abs(base) ? "stronger" : "weaker";
}
const largest = (list, ...sizes) => list.reduce((most, each) => Math.max(most, ...sizes.map((size) => Math.abs(size(each) ?? 0))), 0);
const nodeFloor = isDiff ? 0.01 * largest(nodes, (node) => node.base, (node) => node.tuned) : 0;
const linkFloor = isDiff ? 0.01 * largest(links, (link) => link.base.w, (link) => link.tuned.w) : 0;

// The links between two things as one line, strongest first: weights, scores and shares add up.
function join() {
  const found = new Map(), plus = (a, b) => (b === null ? a : (a ?? 0) + b);
  for (const link of links) {
    const s = link.now && nodes[link.s].by, t = link.now && nodes[link.t].by;
    link.line = null;
    if (!link.now || s === t) continue;
    const key = s.no * things.length + t.no;
    let line = found.get(key);
    if (!line) found.set(key, line = { s, t, links: 0, w: 0, score: 0, share: 0, base: null, tuned: null, status: link.status });
    link.line = line;
    line.links++;
    line.w += link.now.w;
    line.score += link.now.score;
    line.share += link.now.share;
    if (isDiff) { line.base = plus(line.base, link.base.w); line.tuned = plus(line.tuned, link.tuned.w); }
    t.into += link.now.score;
  }
  lines = [...found.values()].sort((a, b) => b.score - a.score);
  for (const line of lines) {
    if (line.t.group) line.share = line.score / (line.t.into || 1); // of what comes into the group, by score
    if (isDiff && line.links > 1) line.status = became(line.base, line.tuned, linkFloor);
    line.s.lines.push(line);
    line.t.lines.push(line);
  }
}
// Everything that would not show was made a sign before it came here (tl_em/showing.py); a space at the head is the
// tokenizer's, and a token without a text goes on with the character of the one before.
const visibleSpace = (text) => (text === "" ? "‥" : text.replace(/^ /, "") || "␣");
