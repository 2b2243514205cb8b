"use strict";
const TOKEN = new URLSearchParams(location.search).get("token") || "";
const $ = (id) => document.getElementById(id);
const SCOPES = ["all", "prompt", "generated", "instruction"];
const S = { about: null, dials: [], turns: [], picked: null, busy: null, kl: null, scale: { by: "", middle: 0, largest: 1, low: 0, high: 1 } };

function made(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name === "class") element.className = value;
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function number(value, digits = 2) {
  return value === null || value === undefined || !isFinite(value) ? "–" : value.toFixed(digits).replace("-", "\u2212");
}

function shown(text) {
  if (text && !text.trim().length && !text.includes("\n")) return "·".repeat(text.length);
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
}

async function asked(path, body, options = {}) {
  const headers = { Authorization: "Bearer " + TOKEN };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: options.method || (body === undefined ? "GET" : "POST"), headers, signal: options.signal,
    body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store",
  });
  if (!response.ok) {
    let said = "The server answered " + response.status + ".";
    try { said = (await response.json()).error.message; } catch { /* no JSON: the sentence above stands */ }
    throw new Error(said);
  }
  return response;
}

function problem(error) {
  const box = $("problem");
  if (error && error.name === "AbortError") return;
  box.hidden = !error;
  box.textContent = error ? (error.message === "Failed to fetch" ? "The server does not answer; is it still running?" : error.message) : "";
}

async function copied(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = made("textarea", { value: text });
    document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1200);
}

/* --- Dials --- */

function plainDial(name) {
  return { name, act: "add", coefficient: 1, low: null, high: null, where: "all", on: false };
}

function dialSaid(dial) {
  let said = "ablated";
  if (dial.act === "add") said = (dial.coefficient < 0 ? "\u2212" : "+") + Math.abs(dial.coefficient);
  if (dial.act === "clamp") said = dial.low === dial.high ? "= " + dial.low : "in [" + (dial.low ?? "") + ", " + (dial.high ?? "") + "]";
  const where = Array.isArray(dial.where) ? "last " + dial.where[1] : dial.where;
  return dial.name + " " + said + (where === "all" ? "" : " (" + where + ")");
}

function isWhole(dial) {
  return dial.act !== "clamp" || dial.low !== null || dial.high !== null;
}

function sent(dials) {
  return dials.filter(isWhole).map((dial) => ({ ...dial }));
}

function siteOf(name) {
  const direction = S.about.directions.find((each) => each.name === name);
  return direction ? direction.about : S.about.dictionary ? S.about.dictionary.site : "";
}

function isLatent(name) {
  return /^latent \d+$/.test(name) && !S.about.directions.some((each) => each.name === name);
}

function drawDials() {
  const list = $("dial-list");
  list.replaceChildren(...S.dials.map(drawnDial));
  if (!S.dials.length) list.append(made("p", { class: "muted small" }, "No direction is served. Start with --direction FILE, or add a latent."));
}

function drawnDial(dial, index) {
  const id = "dial-" + index;
  const box = made("div", { class: "dial", role: "group", "aria-label": dial.name });
  const on = made("input", { type: "checkbox", id, checked: dial.on });
  const head = made("div", { class: "head" }, made("label", { htmlFor: id, class: "check" }, on, made("span", { class: "name" }, dial.name)));
  if (isLatent(dial.name)) {
    const remove = made("button", { type: "button", class: "quiet remove", "aria-label": "Remove " + dial.name }, "×");
    remove.addEventListener("click", () => { S.dials.splice(index, 1); drawDials(); drawColours(); turned(); });
    head.append(remove);
  }
  const act = made("select", { "aria-label": "What " + dial.name + " does" });
  for (const each of ["add", "ablate", "clamp"]) act.append(made("option", { value: each, selected: each === dial.act }, each));
  if (isLatent(dial.name) && !S.about.dictionary.set) [...act.options].slice(1).forEach((o) => { o.disabled = true; });
  const where = made("select", { "aria-label": "At which tokens " + dial.name + " acts" });
  const scopes = SCOPES.includes(dial.where) ? SCOPES : [...SCOPES, dial.where];
  for (const each of scopes) {
    where.append(made("option", { value: JSON.stringify(each), selected: each === dial.where }, each === "all" ? "all tokens" : Array.isArray(each) ? "last " + each[1] : each));
  }
  const values = made("div", { class: "line values" });
  const kl = made("p", { class: "kl" });
  const draw = () => {
    box.classList.toggle("on", dial.on);
    values.replaceChildren(...valuesOf(dial, turnedHere));
  };
  const turnedHere = (redraw) => { if (redraw) draw(); turned(); };
  on.addEventListener("change", () => { dial.on = on.checked; draw(); turned(); });
  act.addEventListener("change", () => { dial.act = act.value; draw(); turned(); });
  where.addEventListener("change", () => { dial.where = JSON.parse(where.value); turned(); });
  box.append(head, made("div", { class: "site" }, siteOf(dial.name)), made("div", { class: "line" }, act, where), values, kl);
  draw();
  return box;
}

function valuesOf(dial, changed) {
  const touched = (on) => { if (!dial.on && on) { dial.on = true; return true; } return false; };
  if (dial.act === "add") {
    const slider = made("input", { type: "range", min: -4, max: 4, step: 0.1, value: dial.coefficient, "aria-label": dial.name + ", coefficient" });
    const exact = made("input", { type: "number", step: "any", value: dial.coefficient, "aria-label": dial.name + ", coefficient as a number" });
    const set = (value, other) => {
      if (value === "" || !isFinite(Number(value))) return;
      dial.coefficient = Number(value); other.value = value;
      if (touched(true)) $("dial-" + S.dials.indexOf(dial)).checked = true;
      $("dial-" + S.dials.indexOf(dial)).closest(".dial").classList.toggle("on", dial.on);
      changed(false);
    };
    slider.addEventListener("input", () => set(slider.value, exact));
    exact.addEventListener("input", () => set(exact.value, slider));
    return [slider, exact];
  }
  if (dial.act === "ablate") return [];
  const bound = (name, label) => {
    const field = made("input", { type: "number", step: "any", class: "bound", value: dial[name] ?? "", "aria-label": dial.name + ", " + label });
    field.addEventListener("input", () => {
      const value = field.value === "" || !isFinite(Number(field.value)) ? null : Number(field.value);
      dial[name] = value;
      if (isLatent(dial.name)) dial.high = value;
      changed(false);
    });
    return made("label", { class: "check small" }, label, field);
  };
  return isLatent(dial.name) ? [bound("low", "set to")] : [bound("low", "from"), bound("high", "to")];
}

let later = null;
function turned() {
  const on = S.dials.filter((dial) => dial.on && isWhole(dial));
  $("state").textContent = on.length ? on.map(dialSaid).join(" · ") : "untreated";
  clearTimeout(later);
  later = setTimeout(async () => {
    try {
      await asked("/api/dials", { dials: sent(S.dials) }, { method: "PUT" });
      problem(null);
      await measure();
    } catch (error) { problem(error); }
  }, 300);
}

async function measure() {
  if (S.busy) return;  /* the answer first; it is measured when that is done */
  if (S.kl) S.kl.abort();
  S.kl = new AbortController();
  const dials = S.dials.filter(isWhole);
  const messages = conversation(S.turns.length);
  const draft = $("draft").value.trim();
  if (draft) messages.push({ role: "user", content: draft });
  if (!messages.some((each) => each.role === "user")) return drawKl(dials, null);
  document.querySelectorAll(".dial .kl").forEach((each) => { each.textContent = "KL …"; });
  try {
    const found = await (await asked("/api/kl", { dials: sent(dials), messages }, { signal: S.kl.signal })).json();
    drawKl(dials, found);
  } catch (error) { problem(error); }
}

function klSaid(found) {
  if (!found || found.kl === null) return ["KL – (" + (found ? found.error ? "refused" : found.over : "no message yet") + ")"];
  const n = found.n === 1 ? "1" : String(found.n);
  return ["KL ", made("b", {}, number(found.kl, 3)), " over " + found.over + ", n = " + n];
}

function drawKl(dials, found) {
  dials.forEach((dial, i) => {
    const box = document.querySelectorAll(".dial")[S.dials.indexOf(dial)];
    const each = found && found.each ? found.each[i] : null;
    const random = each && each.random && each.random.length ? "; random directions of its length " + each.random.map((kl) => number(kl, 3)).join(", ") : "";
    box.querySelector(".kl").replaceChildren(...klSaid(each), random || (dial.on || !found ? "" : " (if it were on)"));
    box.querySelectorAll(".note").forEach((note) => note.remove());
    const notes = each ? [...(each.warnings || []), ...(each.error ? [each.error] : [])] : [];
    notes.forEach((note) => box.append(made("p", { class: "note" }, note)));
  });
  const on = dials.filter((dial) => dial.on).length;
  $("together").replaceChildren(...(on > 1 && found ? ["All together: ", ...klSaid(found.all)] : []));
}
