/* --- Conversation --- */

function conversation(n) {
  const messages = [];
  if (S.about.chat && $("system").value.trim()) messages.push({ role: "system", content: $("system").value });
  if (S.about.chat) {
    for (const turn of S.turns.slice(0, n)) {
      messages.push({ role: "user", content: turn.user });
      if (turn.arms.steered.said) messages.push({ role: "assistant", content: turn.arms.steered.said });
    }
  } else if (n > 0) messages.push({ role: "user", content: S.turns[n - 1].user });
  return messages;
}

function settings() {
  const value = (id, otherwise) => ($(id).value === "" || !isFinite(Number($(id).value)) ? otherwise : Number($(id).value));
  const found = { max_new_tokens: value("max", S.about.default), temperature: value("temperature", 0), top_p: value("top-p", 1), seed: value("seed", 0) };
  if ($("stops").value) found.stop = [$("stops").value.replace(/\\n/g, "\n")];
  return found;
}

function emptyArm() { return { tokens: [], said: "", done: null, warnings: [] }; }

async function say(text) {
  if (S.busy || !text.trim()) return;
  problem(null);
  if (S.kl) S.kl.abort();
  const messages = [...(S.about.chat ? conversation(S.turns.length) : []), { role: "user", content: text }];
  const turn = {
    user: text, messages, dials: sent(S.dials).map((dial) => ({ ...dial })), settings: settings(), prompt: [],
    arms: { steered: emptyArm() }, beside: $("beside").checked && S.dials.some((dial) => dial.on && isWhole(dial)),
  };
  if (turn.beside) turn.arms.untreated = emptyArm();
  S.turns.push(turn);
  drawTurn(turn);
  S.busy = new AbortController();
  busy(true);
  const began = performance.now();
  let first = null;
  try {
    const body = { messages, dials: turn.dials, settings: turn.settings, beside: turn.beside };
    const response = await asked("/api/chat", body, { signal: S.busy.signal });
    for await (const event of lines(response)) {
      if (event.type === "error") throw new Error(event.said);
      if (event.type === "token" && first === null) {
        first = (performance.now() - began) / 1000;
        turn.first = first;
      }
      heard(turn, event);
    }
  } catch (error) { problem(error); turn.stopped = true; }
  S.busy = null;
  busy(false);
  for (const arm of Object.values(turn.arms)) if (!arm.done) arm.stopped = true;
  redrawAll();
  if (turn.arms.steered.stopped && !turn.arms.steered.said) turn.arms.steered.said = turn.arms.steered.tokens.map((t) => (t.space ? " " : "") + t.text).join("").trim();
  await Promise.all([python(turn), measure()]);
}

async function* lines(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const parts = rest.split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}

function heard(turn, event) {
  const arm = turn.arms[event.arm];
  if (event.type === "start") {
    arm.prompt = event.prompt.map((text) => ({ text, prompt: true }));
    arm.warnings = event.warnings;
  } else if (event.type === "token") {
    arm.said += event.piece;
    if (!event.end) arm.tokens.push({ text: event.text, space: event.space, likely: event.likely, logprob: event.logprob });
  } else if (event.type === "done") {
    arm.done = event;
    arm.said = event.said;
    event.tokens.forEach((text, i) => { arm.tokens[i].text = text; });
  }
  for (const read of event.read || []) {
    const all = read.at < arm.prompt.length ? arm.prompt[read.at] : arm.tokens[read.at - arm.prompt.length];
    if (all) Object.assign(all, { at: read.at, values: read.values, bands: read.bands, latents: read.latents });
  }
  soon(turn);
}

let drawing = new Set();
function soon(turn) {
  if (!drawing.size) requestAnimationFrame(() => { const all = drawing; drawing = new Set(); rescale(); all.forEach(redraw); });
  drawing.add(turn);
}

function busy(on) {
  $("send").disabled = on;
  $("stop").hidden = !on;
  $("again").disabled = on || !S.turns.length;
  $("empty").hidden = S.turns.length > 0;
  $("progress").textContent = on ? "Reading…" : "";
}

/* --- Colours: the distance from the median of all that is shown, one scale a direction --- */

function valueOf(token, by) {
  if (!token.values) return null;
  if (by in token.values) return token.values[by];
  const found = (token.latents || []).find((each) => "latent " + each[0] === by);
  return isLatent(by) && token.latents ? (found ? found[1] : 0) : null;
}

function everyToken() {
  return S.turns.flatMap((turn) => Object.values(turn.arms).flatMap((arm) => [...(arm.prompt || []), ...arm.tokens]));
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), n = sorted.length;
  return n ? (sorted[(n - 1) >> 1] + sorted[n >> 1]) / 2 : 0;
}

function rescale() {
  const by = $("colour").value;
  let tokens = everyToken().filter((token) => valueOf(token, by) !== null);
  if (by && tokens.length && tokens[0].bands && by in tokens[0].bands) {  /* a sink is far out, whatever the direction */
    const most = S.about.sink * median(tokens.map((token) => token.bands[by]));
    tokens = tokens.filter((token) => token.bands[by] <= most);
  }
  const values = tokens.map((token) => valueOf(token, by)), middle = isLatent(by) ? 0 : median(values);
  const largest = Math.max(1e-9, ...values.map((value) => Math.abs(value - middle)));
  S.scale = { by, middle, largest, low: Math.min(0, ...values), high: Math.max(0, ...values) };
}

function paint(span, token) {
  const value = S.scale.by ? valueOf(token, S.scale.by) : null;
  const strength = value === null ? 0 : Math.max(-1, Math.min(1, (value - S.scale.middle) / S.scale.largest));
  span.className = "t " + (strength > 0 ? "hot" : "cold") + (S.picked === token ? " picked" : "");
  span.style.setProperty("--a", String(Math.round(100 * Math.abs(strength))));
  const band = token.bands ? token.bands[S.scale.by] : undefined;
  span.title = value === null ? "" : number(value) + (band === undefined ? "" : "; random directions ±" + number(band));
}

/* --- Drawing a turn --- */

function drawTurn(turn) {
  turn.box = made("article", { class: "turn" });
  turn.box.append(made("p", { class: "user" }, turn.user));
  const arms = made("div", { class: "arms" });
  for (const [name, arm] of Object.entries(turn.arms)) {
    arm.text = made("div", { class: "text caret", tabIndex: 0, role: "group", "aria-label": name + " answer, token by token; arrow keys choose one" });
    arm.read = made("div", { class: "text" });
    arm.strip = made("div", { class: "strip" });
    arm.foot = made("div", { class: "foot" });
    const on = turn.dials.filter((dial) => dial.on);
    const set = name === "steered" ? on.map(dialSaid).join(" · ") : "";
    const who = name === "untreated" || !on.length ? "untreated" : "steered";
    const details = made("details", {}, made("summary", {}, "What the model read"), arm.read);
    arm.box = made("section", { class: "arm " + who, "aria-label": who + " answer" }, made("p", { class: "who" }, made("span", {}, who), made("span", { class: "set" }, set)), arm.text, arm.strip, arm.foot, details);
    listen(arm.text, () => arm.tokens);
    listen(arm.read, () => arm.prompt || []);
    arms.append(arm.box);
  }
  turn.box.append(arms);
  $("turns").append(turn.box);
  $("turns").scrollTop = $("turns").scrollHeight;
}

function listen(container, tokens) {
  container.addEventListener("click", (event) => {
    const span = event.target.closest(".t");
    if (span && span.parentNode === container) pick(tokens()[[...container.children].indexOf(span)]);
  });
  container.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const all = tokens(), at = all.indexOf(S.picked);
    pick(all[Math.max(0, Math.min(all.length - 1, at + step))]);
  });
}

function spans(container, tokens, raw) {
  while (container.children.length > tokens.length) container.lastChild.remove();
  tokens.forEach((token, i) => {
    let span = container.children[i];
    if (!span) { span = made("span", { class: "t" }); container.append(span); }
    const text = raw ? shown(token.text) : (token.space ? " " : "") + token.text;
    if (span.textContent !== text) span.textContent = text;
    token.span = span;
    paint(span, token);
  });
}

function redraw(turn) {
  const end = $("turns"), following = end.scrollHeight - end.scrollTop - end.clientHeight < 80;
  for (const [name, arm] of Object.entries(turn.arms)) {
    spans(arm.text, arm.tokens, false);
    spans(arm.read, arm.prompt || [], true);
    arm.text.classList.toggle("caret", !arm.done && !arm.stopped);
    drawStrip(arm);
    const parts = [];
    if (arm.done) parts.push(arm.done.n_answer + " tokens, " + number(arm.done.seconds, 1) + " s" + (arm.done.truncated ? ", cut off" : ""));
    else if (arm.stopped) parts.push(arm.tokens.length + " tokens, stopped");
    if (name === "steered" && turn.first) parts.push("first after " + number(turn.first) + " s");
    arm.foot.replaceChildren(...parts.map((part) => made("span", {}, part)));
    if (name === "steered" && (arm.done || arm.stopped)) {
      const code = made("button", { type: "button", class: "quiet" }, "Python"), back = made("button", { type: "button", class: "quiet" }, "Set these dials");
      code.addEventListener("click", () => { document.body.dataset.tab = "token"; tabs(); python(turn); $("python").scrollIntoView({ block: "center" }); });
      back.addEventListener("click", () => restore(turn));
      arm.foot.append(code, back);
    }
    for (const each of arm.warnings || []) arm.foot.append(made("span", { class: "note" }, each));
  }
  if (S.busy) $("progress").textContent = turn.first ? "Answering, token " + Object.values(turn.arms).reduce((n, arm) => n + arm.tokens.length, 0) : "Reading…";
  if (following) end.scrollTop = end.scrollHeight;
}

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function drawStrip(arm) {
  const by = S.scale.by, tokens = arm.tokens.filter((token) => by && valueOf(token, by) !== null);
  if (tokens.length < 2) return arm.strip.replaceChildren();
  const { low, high } = S.scale, span = high - low || 1, width = 1000, height = 34;
  const x = (i) => (i * width / (tokens.length - 1)).toFixed(1);
  const y = (value) => (Math.max(0, Math.min(1, (high - value) / span)) * height).toFixed(1);
  const picture = svg("svg", { viewBox: "0 0 1000 34", preserveAspectRatio: "none", role: "img", "aria-label": by + ", token by token: from " + number(low) + " to " + number(high) });
  if (tokens[0].bands && by in tokens[0].bands) {
    const up = tokens.map((token, i) => x(i) + "," + y(token.bands[by])), down = tokens.map((token, i) => x(i) + "," + y(-token.bands[by]));
    picture.append(svg("polygon", { class: "band", points: [...up, ...down.reverse()].join(" ") }));
  }
  picture.append(svg("path", { class: "zero", d: "M0 " + y(0) + "H1000" }));
  picture.append(svg("polyline", { class: "line", points: tokens.map((token, i) => x(i) + "," + y(valueOf(token, by))).join(" ") }));
  arm.strip.replaceChildren(picture, made("span", { class: "axis" }, made("span", {}, number(high, 1)), made("span", {}, number(low, 1))));
}

function redrawAll() { rescale(); S.turns.forEach(redraw); }

/* --- One token --- */

function pick(token) {
  if (!token) return;
  const before = S.picked;
  S.picked = token;
  for (const each of [before, token]) if (each && each.span) paint(each.span, each);
  const rows = (caption, cells) => made("table", {}, made("caption", {}, caption), made("tbody", {}, ...cells));
  const row = (said, ...cells) => made("tr", { class: said ? "said" : "" }, ...cells.map((cell, i) => made("td", { class: i ? "r" : "" }, cell)));
  const parts = [made("h2", { id: "token-h" }, "Token"), made("p", { class: "big" }, made("code", {}, shown(token.text))), made("p", { class: "small muted" }, (token.prompt ? "of the prompt" : "of the answer") + (token.at === undefined ? "" : ", place " + token.at))];
  if (token.values && Object.keys(token.values).length) {
    parts.push(rows("Read here", Object.entries(token.values).map(([name, value]) => row(Math.abs(value) > token.bands[name], name, number(value), "±" + number(token.bands[name])))));
    parts.push(made("p", { class: "small muted" }, "±: where 95 % of random directions stay. Beyond it in bold; not yet a concept: all tokens share a mean."));
  }
  if (token.likely) {
    const words = token.likely.map(([text, logprob]) => [shown(text), logprob]);
    const own = token.likely.some(([text]) => text === token.text) ? [] : [[shown(token.text), token.logprob]];
    parts.push(rows("What could have been said", [...words, ...own].map(([text, logprob]) => row(text === shown(token.text), made("code", {}, text), number(100 * Math.exp(logprob), 1) + " %"))));
  }
  if (token.latents) {
    const cells = token.latents.map(([index, activation]) => {
      const name = "latent " + index, add = made("button", { type: "button", "aria-label": "Dial for " + name }, "dial");
      add.addEventListener("click", () => addLatent(index));
      return row(false, name, number(activation), add);
    });
    parts.push(rows("Latents", cells.length ? cells : [row(false, "none is on")]));
  }
  $("inspector").replaceChildren(...parts);
}

/* --- The rest of the page --- */

function addLatent(index) {
  const name = "latent " + index;
  if (!S.dials.some((dial) => dial.name === name)) S.dials.push(plainDial(name));
  drawDials(); drawColours(); turned();
}

function drawColours() {
  const before = $("colour").value, latents = S.dials.map((dial) => dial.name).filter(isLatent);
  const names = [...S.about.directions.map((each) => each.name), ...latents];
  $("colour").replaceChildren(...names.map((name) => made("option", { value: name }, name)), made("option", { value: "" }, "nothing"));
  $("colour").value = names.includes(before) ? before : names[0] || "";
}

function restore(turn) {
  S.dials = turn.dials.map((dial) => ({ ...dial }));
  for (const each of S.about.directions) if (!S.dials.some((dial) => dial.name === each.name)) S.dials.push(plainDial(each.name));
  drawDials(); drawColours(); turned();
}

async function python(turn) {
  try {
    const code = await (await asked("/api/python", { messages: turn.messages, dials: turn.dials, settings: turn.settings })).text();
    turn.code = $("python").textContent = code;
    $("copy-python").disabled = false;
    const files = S.about.directions.filter((each) => turn.dials.some((dial) => dial.on && dial.name === each.name));
    $("files").replaceChildren(...files.map((each) => {
      const button = made("button", { type: "button", class: "quiet" }, each.file);
      button.addEventListener("click", () => download(each.file));
      return button;
    }));
  } catch (error) { problem(error); }
}

async function download(file) {
  try {
    const data = await (await asked("/api/files/" + encodeURIComponent(file))).blob(), url = URL.createObjectURL(data);
    made("a", { href: url, download: file }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  } catch (error) { problem(error); }
}

function tabs() {
  document.querySelectorAll(".tabs button").forEach((each) => each.setAttribute("aria-current", String(each.dataset.to === document.body.dataset.tab)));
}

async function begin() {
  try { S.about = await (await asked("/api/about")).json(); } catch (error) { return problem(error); }
  S.dials = S.about.dials.map((dial) => ({ ...dial }));
  for (const each of S.about.directions) if (!S.dials.some((dial) => dial.name === each.name)) S.dials.push(plainDial(each.name));
  $("max").value = Math.min(S.about.default, Math.max(1, S.about.n_ctx >> 1));
  $("max").max = S.about.longest;
  $("add-latent").hidden = !S.about.dictionary;
  $("system").closest("section").querySelectorAll(".system, #system").forEach((each) => { each.hidden = !S.about.chat; });
  if (!S.about.chat) $("empty").textContent += " The model has no chat template: each message is read on its own.";
  $("base-url").textContent = location.origin + "/v1";
  document.querySelectorAll("[data-a]").forEach((each) => each.style.setProperty("--a", each.dataset.a));
  drawDials(); drawColours(); tabs(); turned();
  $("draft").focus();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); const text = $("draft").value; if (S.busy || !text.trim()) return; $("draft").value = ""; say(text); });
$("draft").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); } });
$("stop").addEventListener("click", () => S.busy && S.busy.abort());
$("again").addEventListener("click", () => { const turn = S.turns.pop(); if (turn) { turn.box.remove(); say(turn.user); } });
$("new").addEventListener("click", () => { if (S.busy) S.busy.abort(); S.turns = []; $("turns").replaceChildren(); $("empty").hidden = false; $("again").disabled = true; measure(); });
$("all-off").addEventListener("click", () => { S.dials.forEach((dial) => { dial.on = false; }); drawDials(); turned(); });
$("add-latent").addEventListener("submit", (event) => { event.preventDefault(); addLatent(Number($("latent-n").value)); $("latent-n").value = ""; });
$("colour").addEventListener("change", redrawAll);
$("copy-python").addEventListener("click", (event) => copied(event.target, $("python").textContent));
$("copy-key").addEventListener("click", (event) => copied(event.target, TOKEN));
document.querySelectorAll(".tabs button").forEach((each) => each.addEventListener("click", () => { document.body.dataset.tab = each.dataset.to; tabs(); }));
begin();
