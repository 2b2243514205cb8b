// The graph itself: its links by node, what counts in the chosen view, what is upstream and downstream of a selection.
const data = JSON.parse(document.getElementById("data").textContent);
const view = data.view;
// The file has nodes as columns, and links by rows of nodes, because keys and ids that repeat are most of its room.
const rowsOf = (columns) => (Object.values(columns)[0] ?? []).map((_, at) => Object.fromEntries(Object.entries(columns).map(([name, all]) => [name, all[at]])));
function exchanged(part) {
  const listed = rowsOf(part.nodes), id = (at) => listed[at].node_id;
  return { ...part, nodes: listed, links: part.links.map(([s, t, weight]) => ({ source: id(s), target: id(t), weight })) };
}
const nodes = rowsOf(view.nodes).map((node, at) => ({ ...node, at, key: `n${at}`, own: [at], ins: [], outs: [] }));
const STATUS = ["appeared", "vanished", "stronger", "weaker", "same"];
const links = view.links.map(([s, t, w, share, score, wb, shareb, scoreb, status]) => {
  const link = { s, t, tuned: { w, share, score }, base: { w: wb, share: shareb, score: scoreb }, status: STATUS[status] };
  nodes[s].outs.push(link);
  nodes[t].ins.push(link);
  return link;
});
const isDiff = view.mode === "diff";

const state = {
  mode: isDiff ? "diff" : "graph", cutoff: 1, most: 0, trace: "both", query: "", selected: null, hover: null, path: null,
  picked: new Set(), groups: [], fold: false, bands: new Set(), open: new Set(), found: new Set(), dark: false,
};

// The weight, share of the target's input and score of a link in the chosen view; null where it has none.
function value(link) {
  if (!isDiff || state.mode === "tuned") return link.tuned.w === null ? null : link.tuned;
  if (state.mode === "base") return link.base.w === null ? null : link.base;
  if (link.tuned.w === null) return link.base;
  if (link.base.w === null) return link.tuned;
  return link.tuned.score >= link.base.score ? link.tuned : { ...link.base, w: link.tuned.w };
}

const inMode = (node) => !isDiff || state.mode === "diff" || (state.mode === "base" ? node.status !== "appeared" : node.status !== "vanished");
const always = (node) => node.kind === "token" || node.kind === "logit";
const isVisible = (node) => inMode(node) && (always(node) || node.influence <= state.cutoff + 1e-9 || node === state.selected);

// Sources before targets, whatever order the file has (Kahn's algorithm; what a cycle would leave comes last).
const order = (() => {
  const open = nodes.map((node) => node.ins.length);
  const done = nodes.filter((node) => !open[node.at]).map((node) => node.at);
  for (let i = 0; i < done.length; i++)
    for (const link of nodes[done[i]].outs) if (--open[link.t] === 0) done.push(link.t);
  const seen = new Set(done);
  return [...done, ...nodes.map((node) => node.at).filter((at) => !seen.has(at))];
})();

// What counts in the chosen view: whether a node is there, and a link's figures, or null.
function count() {
  for (const node of nodes) node.shown = isVisible(node);
  for (const link of links) link.now = nodes[link.s].shown && nodes[link.t].shown ? value(link) : null;
}
const alive = (link) => link.now !== null;

// How much of the selection comes through each node (up) and how much of each node comes from it (down): sums over all
// paths of the products of shares; and the one path with the largest product each way.
function traceFrom(seeds) {
  const up = reach(seeds, [...order].reverse(), (node) => node.ins, (link) => link.s);
  const down = reach(seeds, order, (node) => node.outs, (link) => link.t);
  const strength = new Map();
  for (const link of links) {
    const { now } = link;
    if (!now) continue;
    const direct = up.seeds.has(link.t) || up.seeds.has(link.s);
    let size = 0;
    if (state.trace === "direct") size = direct ? now.share : 0;
    else {
      if (state.trace !== "down") size = now.share * up.total[link.t];
      if (state.trace !== "up") size = Math.max(size, now.share * down.total[link.s]);
    }
    if (size > 0) strength.set(link, size);
  }
  const trail = [];
  if (state.trace !== "down" && state.trace !== "direct") trail.push(...follow(up, (node) => !node.ins.some(alive), (link) => link.t).reverse());
  if (state.trace !== "up" && state.trace !== "direct") trail.push(...follow(down, (node) => node.kind === "logit", (link) => link.s));
  return { strength, trail, up: up.total, down: down.total };
}

function reach(seeds, sequence, linksOf, far) {
  const total = new Float64Array(nodes.length), best = new Float64Array(nodes.length), via = new Array(nodes.length).fill(null);
  for (const at of seeds) total[at] = best[at] = 1;
  for (const at of sequence) {
    if (!total[at]) continue;
    for (const link of linksOf(nodes[at])) {
      if (!alive(link)) continue;
      const { share } = link.now, to = far(link);
      total[to] += share * total[at];
      if (share * best[at] > best[to]) { best[to] = share * best[at]; via[to] = link; }
    }
  }
  return { total, best, via, seeds: new Set(seeds) };
}

// The links of the strongest path from a seed to the best node at which paths end, nearest the seed first.
function follow({ best, via, seeds }, ends, back) {
  let top = -1;
  for (const node of nodes) if (via[node.at] && ends(node) && (top < 0 || best[node.at] > best[top])) top = node.at;
  const found = [];
  for (let guard = 0; top >= 0 && via[top] && guard <= nodes.length; guard++) {
    found.unshift(via[top]);
    const next = back(via[top]);
    if (seeds.has(next)) break;
    top = next;
  }
  return found;
}
