"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const KINDS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
function unpack({ kind, bytes }) {
  return new KINDS[kind](Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0)).buffer);
}
const nats = unpack(data.nats), baseline = unpack(data.baseline), count = nats.length;
const found = Object.fromEntries(Object.entries(data.found || {}).map(([k, v]) => [k, unpack(v)]));
const sources = data.sources.map((source) => {
  let end = 0;
  const ends = source.lens ? Array.from(unpack(source.lens), (len) => (end += len)) : null;
  // Lines may end as on old Macs; a break of two characters may be two tokens.
  return { ...source, ends, text: source.text && source.text.replace(/\r(?!\n)/g, "\n") };
});
const text = sources[0];

// Text is only ever set as text. What would steer the page around it is shown instead.
const STEERING = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]/g;
function show(string) {
  return string.replace(/\r/g, "").replace(STEERING, (c) => {
    const code = c.charCodeAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code)
      : "\u27e8U+" + code.toString(16).toUpperCase().padStart(4, "0") + "\u27e9";
  });
}
const name = (string) => show(string).replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/ /g, "\u2423") || "\u00b7";
// Blanks in words: their signs are read to nobody.
const BLANKS = { "\n": "line break", "\t": "tab", "\r": "carriage return", " ": "space" };
function spoken(string) {
  if (show(string).trim()) return "";
  const runs = (string.match(/([^])\1*/gu) || []).map((run) => [BLANKS[run[0]] || "blank", [...run].length]);
  return runs.map(([blank, times]) => times > 1 ? `${times} ${blank}s` : blank).join(", ") || "part of a character";
}
function make(tag, className, content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (content !== undefined) element.append(content);
  return element;
}
const number = (value, digits = 0) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (share) => (share < 0.001 ? "under 0.1" : number(100 * share, share < 0.1 ? 1 : 0)) + "%";
const start = (source, token) => (token > 0 ? source.ends[token - 1] : 0);
const piece = (source, from, to) => source.text.slice(start(source, from), start(source, to));

// The text, a span a token.
const reader = document.getElementById("text"), detail = document.getElementById("detail");
const tokens = new Array(count);
function color(span, gain) {
  // Text on the deepest shade can still be read in the dark.
  const deep = Math.min(Math.abs(gain) / 3, 1) ** 0.7 * 0.54;
  if (Math.abs(gain) < 0.05) return;
  span.style.setProperty("--tone", `var(--${gain > 0 ? "helps" : "hurts"})`);
  span.style.setProperty("--deep", deep.toFixed(2));
}
function write() {
  const all = document.createDocumentFragment();
  for (let i = 0; i < count; i++) {
    const string = piece(text, i, i + 1), span = make("span", "", show(string)), words = spoken(string);
    span.id = "t" + i;
    span.setAttribute("role", "option");
    if (words) span.setAttribute("aria-label", words);
    color(span, baseline[i] - nats[i]);
    tokens[i] = span;
    all.append(span);
  }
  reader.append(all);
}

// Parts of a source, [from, to, tag, class].
const AROUND = 24;
function excerpt(source, parts, flat) {
  const box = make("span", "quote");
  box.dir = "auto";
  if (parts[0][0] > 0) box.append("\u2026");
  for (const [from, to, tag, kind] of parts) {
    if (to <= from) continue;
    const string = show(piece(source, from, to));
    box.append(make(tag, kind, flat ? string.replace(/\s*\n\s*/g, " \u23ce ") : string));
  }
  return box;
}
// What was stored, and what came next, in the text around them.
function quote(source, at) {
  const after = Math.min(at + 1, source.ends.length), before = Math.max(at - 1, 0);
  return excerpt(source, [
    [Math.max(0, before - AROUND), before, "span", ""], [before, at, "span", "stored"], [at, after, "b", ""],
    [after, Math.min(after + AROUND, source.ends.length), "span", ""],
  ], true);
}
function locate(place) {
  let number = sources.length - 1;
  while (number > 0 && sources[number].first > place) number--;
  return [sources[number], place - sources[number].first];
}
function line(source, token) {
  let lines = 1;
  for (let i = source.text.indexOf("\n"); i >= 0 && i < start(source, token); i = source.text.indexOf("\n", i + 1)) lines++;
  return lines;
}
// No element is called so: the browser scrolls to none, and the page stays where it is.
const address = (token) => "#token-" + token;
function link(token, content) {
  const anchor = make("a", "", content);
  anchor.href = address(token);
  return anchor;
}
function describe(place, token) {
  const [source, at] = locate(place), box = make("div", "place"), where = make("div", "where");
  if (source === text) {
    where.append(link(Math.min(at, count - 1), `line ${number(line(source, at))}, ${number(token - at)} tokens before`));
  } else {
    where.append(show(source.name) + (source.ends ? `, line ${number(line(source, at))}` : `, token ${number(at)}; its text is not on this page`));
  }
  box.append(where);
  if (source.ends) box.append(quote(source, at));
  return [box, where];
}
function list(token) {
  const { heads, kept, per } = data.shape, places = new Map();
  const cards = [];
  for (let h = 0; h < kept; h++) {
    const row = token * kept + h, gate = found.gates[row] / 65535;
    const [layer, head] = heads[found.which ? found.which[row] : h];
    const title = make("h3", "", `layer ${layer}, head ${head}`);
    title.append(make("small", "", data.shape.varying ? `${percent(gate)} from memory` : `gate ${number(gate, 2)}`));
    const card = make("section", "head");
    card.append(title);
    for (let i = 0; i < per; i++) {
      const at = row * per + i;
      if (!found.places[at]) break;
      const place = found.places[at] - 1, weight = found.weights[at] / 65535;
      const score = data.shape.low + (found.scores[at] / 65535) * (data.shape.high - data.shape.low);
      const [box, where] = describe(place, token);
      where.append(` \u00b7 weight ${percent(weight)} \u00b7 score ${number(score, 3)}`);
      card.append(box);
      places.set(place, (places.get(place) || 0) + gate * weight);
    }
    if (gate > 0) cards.push([gate, card]);
  }
  return [cards.map(([, card]) => card), places];
}
function inSight(token) {
  let passages = [];
  for (const one of data.sights) if (one.first <= token) passages = one.passages;
  return passages;
}
function sight(token) {
  const cards = [], places = new Map();
  inSight(token).forEach((one, i) => {
    const [source, from] = locate(one.place), card = make("section", "head");
    const title = make("h3", "", `passage ${i + 1}`);
    title.append(make("small", "", `heads give it ${percent(one.score)}`));
    const box = make("div", "place"), where = make("div", "where");
    if (source === text) where.append(link(from, `tokens ${number(from)} to ${number(from + one.len - 1)} of this text, line ${number(line(source, from))}`));
    else where.append(show(source.name) + (source.ends ? `, lines ${number(line(source, from))} to ${number(line(source, from + one.len - 1))}` : ""));
    box.append(where);
    card.append(title, box);
    if (source.ends) {
      const to = Math.min(from + one.len, source.ends.length), same = match(source, from, to, token);
      box.append(passage(source, from, to, same));
      if (same.len > 1) where.append(` \u00b7 ${number(same.len - 1)} token${same.len > 2 ? "s" : ""} before it the same`);
    }
    cards.push(card);
    if (source === text) for (let t = from; t < from + one.len; t++) places.set(t, 1);
  });
  return [cards, places];
}
// Where a passage says the token, behind most tokens that are also before it in the text.
function match(source, from, to, token) {
  const equal = (a, b) => a >= from && b >= 0 && piece(source, a, a + 1) === piece(text, b, b + 1);
  let found = { at: -1, len: 0 };
  for (let at = from; at < to; at++) {
    let len = 0;
    while (equal(at - len, token - len)) len++;
    if (len > found.len) found = { at, len };
  }
  return found;
}
// It, with what stands around it, and the token in it.
function passage(source, from, to, { at, len }) {
  const same = len ? at - len + 1 : to, [word, after] = len ? [at, at + 1] : [to, to];
  return excerpt(source, [
    [Math.max(0, from - AROUND), from, "span", "quiet"], [from, same, "span", ""],
    [same, word, "span", "same"], [word, after, "b", ""], [after, to, "span", ""],
    [to, Math.min(to + AROUND, source.ends.length), "span", "quiet"],
  ], false);
}

let now = -1, hits = [];
function select(token, focus) {
  token = Math.max(0, Math.min(count - 1, token));
  if (now >= 0) tokens[now].classList.remove("now"), tokens[now].removeAttribute("aria-selected");
  for (const hit of hits) hit.classList.remove("hit");
  now = token;
  const span = tokens[token], gain = baseline[token] - nats[token];
  span.classList.add("now");
  span.setAttribute("aria-selected", "true");
  reader.setAttribute("aria-activedescendant", span.id);
  const box = reader.getBoundingClientRect(), at = span.getBoundingClientRect();
  if (at.top < box.top || at.bottom > box.bottom) reader.scrollTop += at.top - box.top - box.height / 3;
  const [cards, places] = data.sights.length ? sight(token) : [[], new Map()];
  if (data.shape) {
    const [others, more] = list(token);
    cards.push(...others);
    for (const [place, weight] of more) places.set(place, weight);
  }
  hits = [...places.keys()].filter((place) => place < count).map((place) => tokens[place]);
  for (const hit of hits) hit.classList.add("hit");
  const summary = make("p", "");
  summary.id = "summary";
  const change = Math.abs(gain) < 0.005 ? "memory changes nothing" : gain > 0 ? `memory saves ${number(gain, 2)} nats` : `memory costs ${number(-gain, 2)} nats`;
  summary.append(make("span", "token", name(piece(text, token, token + 1))), make("br"),
    `token ${number(token)}, line ${number(line(text, token))}: ${change}`, make("br"),
    make("span", "quiet", `probability ${percent(Math.exp(-baseline[token]))} ${data.baselineName}, ${percent(Math.exp(-nats[token]))} ${data.memoryName} (loss ${number(baseline[token], 4)} and ${number(nats[token], 4)} nats)`));
  if (!cards.length) cards.push(make("p", "quiet", "Nothing was retrieved for this token."));
  detail.replaceChildren(summary, ...cards);
  detail.scrollTop = 0;
  if (focus) reader.focus({ preventScroll: true });
  draw();
}
function go(token) {
  if (location.hash === address(token)) select(token, true);
  else location.hash = address(token);
}
function follow() {
  const found = /^#token-(\d+)$/.exec(location.hash);
  if (!found) return;
  select(Number(found[1]), true);
  reader.scrollIntoView({ block: "nearest" });
}

// Lines above and below: the token nearest to the same column.
function move(token, step) {
  const at = tokens[token].getBoundingClientRect();
  let best = token, top = null;
  for (let i = token + step; i >= 0 && i < count; i += step) {
    const box = tokens[i].getBoundingClientRect();
    if (Math.abs(box.top - at.top) < 4) continue;
    if (top === null) top = box.top;
    if (Math.abs(box.top - top) > 4) break;
    const other = tokens[best].getBoundingClientRect();
    if (best === token || Math.abs(box.left - at.left) < Math.abs(other.left - at.left)) best = i;
  }
  return best;
}
const marked = Array.from(nats.keys()).filter((i) => baseline[i] - nats[i] >= 1);
const next = (token) => marked.find((i) => i > token) ?? token;
const previous = (token) => marked.findLast((i) => i < token) ?? token;
const KEYS = {
  ArrowRight: (t) => t + 1, ArrowLeft: (t) => t - 1, ArrowDown: (t) => move(t, 1), ArrowUp: (t) => move(t, -1),
  Home: () => 0, End: () => count - 1, n: next, p: previous,
};
reader.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const key = KEYS[event.key];
  if (key) {
    event.preventDefault();
    select(key(Math.max(now, 0)), false);
    history.replaceState(null, "", address(now));
  } else if (event.key === "Enter") {
    event.preventDefault();
    (detail.querySelector("a") ?? detail).focus();
  }
});
reader.addEventListener("click", (event) => {
  const span = event.target.closest("span[id]");
  if (span && String(getSelection()) === "") go(Number(span.id.slice(1)));
});
document.getElementById("next").addEventListener("click", () => go(next(now)));
document.getElementById("previous").addEventListener("click", () => go(previous(now)));

// The whole text at a glance: nats saved, and where it is read now.
const overview = document.getElementById("overview");
function draw() {
  const { width, height } = overview.getBoundingClientRect(), scale = devicePixelRatio || 1;
  overview.width = width * scale; overview.height = height * scale;
  const pen = overview.getContext("2d"), style = getComputedStyle(document.documentElement);
  const bins = Math.max(1, Math.min(count, Math.floor(width / 2))), sums = new Float64Array(bins);
  for (let i = 0; i < count; i++) sums[Math.floor((i * bins) / count)] += ((baseline[i] - nats[i]) * bins) / count;
  const most = Math.max(0.2, ...Array.from(sums, Math.abs)), middle = 0.72 * height;
  pen.scale(scale, scale);
  for (let b = 0; b < bins; b++) {
    pen.fillStyle = `rgb(${style.getPropertyValue(sums[b] > 0 ? "--helps" : "--hurts")})`;
    const size = (sums[b] / most) * (sums[b] > 0 ? middle : height - middle);
    pen.fillRect((b * width) / bins, middle - Math.max(size, 0), width / bins, Math.abs(size));
  }
  pen.fillStyle = style.getPropertyValue("--hit");
  for (const hit of hits) pen.fillRect((Number(hit.id.slice(1)) / count) * width - 1, 0, 2, height);
  pen.fillStyle = style.getPropertyValue("--ink");
  if (now >= 0) pen.fillRect((now / count) * width - 1, 0, 2, height);
}
overview.addEventListener("click", (event) => {
  const box = overview.getBoundingClientRect();
  go(Math.min(count - 1, Math.floor(((event.clientX - box.left) / box.width) * count)));
});

// What was looked up for the tokens that gained most; of passages, where one says the token.
function look(token, place) {
  let most = 0;
  for (const one of place < 0 ? inSight(token) : []) {
    const [source, from] = locate(one.place);
    const same = source.ends ? match(source, from, Math.min(from + one.len, source.ends.length), token) : { len: 0 };
    if (same.len > most) [most, place] = [same.len, source.first + same.at];
  }
  return place;
}
function fill() {
  for (const item of document.querySelectorAll("[data-token]")) {
    const token = Number(item.dataset.token), box = quote(text, token);
    const head = make("div", "where"), gain = `${percent(Math.exp(-baseline[token]))} \u2192 ${percent(Math.exp(-nats[token]))}`;
    head.append(link(token, `line ${number(line(text, token))}, token ${number(token)}`), ` \u00b7 probability ${gain}`);
    item.append(head, box);
    const place = look(token, Number(item.dataset.place));
    if (place >= 0) {
      const [other, where] = describe(place, token);
      where.prepend("looked at: ");
      item.append(other);
    }
  }
}

write();
fill();
addEventListener("hashchange", follow);
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
follow();
if (now < 0) select(data.first, false);
