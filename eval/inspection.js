// Which tokens were visible at a position: token j of a head is read by the positions j, j + 1, …, end[j] - 1.
// One module with inspection_charts.js, which follows.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const length = data.tokens.length;
const window_ = data.window === null ? Infinity : data.window;
const hasScorer = data.layers.some((layer) => layer.logits !== null);
const retains = hasScorer || data.policy !== null;
const KINDS = [
  ["not read yet", "lies behind the position"],
  ["sink", `one of the first ${data.sinks} tokens, which always stay`],
  ["window", `one of the last ${data.window} tokens, the position's own included`],
  ["retained", "has left the window; its score is above 0.5 and it holds one of the head's slots"],
  ["evicted", "was lost with the window: its score is 0.5 or less, or tokens of higher score held all the slots"],
  ["evicted later", "was retained, until tokens of higher score took all the slots"],
];
if (data.window === null) KINDS[2][1] = "every token: attention is full";
if (!retains) KINDS[4][1] = "has left the window; nothing is retained";
if (data.policy !== null) {
  KINDS[3][1] = `has left the window; it holds one of the head's slots, given by ${data.policy}`;
  KINDS[4][1] = "was lost with the window: tokens of higher rank held all the slots";
  KINDS[5][1] = "was retained, until tokens of higher rank took all the slots";
}
const [FUTURE, SINK, WINDOW, RETAINED, EVICTED, LOST] = KINDS.keys();

// ---- numbers ----

function numbers(text, kind) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new kind(bytes.buffer);
}

/** Number of retained tokens at every position, from the stretches of positions at which each is retained. */
function retainedCounts(end) {
  const change = new Int32Array(length + 1);
  for (let j = data.sinks; j < length; j++) {
    const start = j + window_;
    if (end[j] > start) { change[start]++; change[Math.min(end[j], length)]--; }
  }
  for (let i = 1; i < length; i++) change[i] += change[i - 1];
  return change.subarray(0, length);
}

const layers = data.layers.map((layer) => {
  const ends = numbers(layer.ends, Int32Array);
  const logits = layer.logits === null ? null : numbers(layer.logits, Float32Array);
  const heads = [];
  for (let h = 0; h < data.heads; h++) {
    const end = ends.subarray(h * length, (h + 1) * length);
    const logit = logits && logits.subarray(h * length, (h + 1) * length);
    heads.push({ end, logit, counts: retainedCounts(end) });
  }
  return { number: layer.layer, heads };
});
const most = Math.max(1, ...layers.flatMap((l) => l.heads.map((h) => h.counts.reduce((a, b) => Math.max(a, b), 0))));
// the budget is the charts' top, unless the counts would be flat under it
const budgetFits = retains && data.budget > 0 && data.budget <= 2 * most;
const highest = budgetFits ? Math.max(most, data.budget) : most;

function kindOf(j, position, end) {
  if (j > position) return FUTURE;
  if (j < data.sinks) return SINK;
  if (position - j < window_) return WINDOW;
  if (end[j] > position) return RETAINED;
  return end[j] > j + window_ ? LOST : EVICTED;
}

// ---- what is chosen ----

const chosen = { position: data.position, layer: 0, head: 0, query: 0, map: "pieces", token: null };
const head = () => layers[chosen.layer].heads[chosen.head];
const group = data.query_heads / data.heads;
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria") || name === "role") made.setAttribute(name.replace("aria", "aria-").toLowerCase(), value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function button(text, label, onclick) {
  return element("button", { type: "button", onclick, ariaLabel: label }, text);
}

/** Marks one of several buttons; the tabulator key stops at that one only. */
function press(buttons, index) {
  buttons.forEach((each, i) => {
    each.setAttribute("aria-pressed", i === index);
    each.tabIndex = i === index ? 0 : -1;
  });
}

function choose(change) {
  const before = { ...chosen };
  Object.assign(chosen, change);
  if (chosen.layer !== before.layer || chosen.head !== before.head) {
    if (!("query" in change)) chosen.query = chosen.head * group;
    showChoice();
    showMaps();
  } else if (chosen.query !== before.query || chosen.map !== before.map) {
    showMaps();
  }
  schedule();
}

let waiting = false;
function schedule() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; showPosition(); });
}

// ---- parts that are built once ----

const names = { gated_deltanet: "GDN", attention: "attention", nsa: "NSA" };
const layerButtons = [], headButtons = [], barButtons = [], spans = [], bases = [], legendCounts = [];

function buildAbout() {
  const rule = data.window === null ? "full attention"
    : `${data.sinks} sinks, a window of ${data.window} tokens, ` +
      (retains ? `${data.budget} retained tokens per head` : "nothing retained") +
      (data.policy === null ? "" : `, chosen by ${data.policy}`);
  const cut = data.total > length ? ` (the first of ${data.total})` : "";
  const others = data.layer_types.filter((kind) => kind !== "attention").length;
  $("about").textContent = `${data.model} read ${length} tokens${cut} of ${data.text}. ${layers.length} attention layers: ` +
    `${rule}.` + (others ? ` The other ${others} layers have no tokens to keep: they hold a state (GDN) or read blocks (NSA).` : "");
  if (!data.layer_types.includes("nsa")) $("about").textContent = $("about").textContent.replace("a state (GDN) or read blocks (NSA)", "a recurrent state");
}

function buildChoice() {
  data.layer_types.forEach((kind, number) => {
    const index = layers.findIndex((layer) => layer.number === number);
    const text = `${number} ${names[kind] || kind}`;
    if (index < 0) {
      $("layers").append(element("span", { title: `layer ${number} is ${kind}: it keeps no tokens` }, text));
    } else {
      layerButtons.push(button(text, `layer ${number}, attention`, () => choose({ layer: index })));
      $("layers").append(layerButtons.at(-1));
    }
  });
  for (let h = 0; h < data.heads; h++) {
    headButtons.push(button(String(h), `KV head ${h}`, () => choose({ head: h })));
    $("heads").append(headButtons.at(-1));
  }
  $("slider").max = $("number").max = length - 1;
  $("of").textContent = `of 0 … ${length - 1}`;
}

function buildLegend() {
  for (const kind of [SINK, RETAINED, WINDOW, EVICTED, LOST, FUTURE]) {
    const sample = () => element("i", { className: `t s${kind}` }, "abc");
    legendCounts[kind] = element("b");
    const entry = element("li", { title: KINDS[kind][1] }, sample(), `${KINDS[kind][0]} `, legendCounts[kind]);
    if (kind === LOST && !retains || kind === RETAINED && !retains) entry.hidden = true;
    $("legend").append(entry);
    if (!entry.hidden) $("meanings").append(element("dt", {}, sample(), KINDS[kind][0]), element("dd", {}, KINDS[kind][1]));
  }
  $("meanings").append(
    element("dt", {}, "score"),
    element("dd", {}, "what the layer's small network gave the token, from 0 to 1; it is the logistic function of the logit, and does not change later"));
}

function buildText() {
  const added = new Set(data.special);
  const all = document.createDocumentFragment();
  data.tokens.forEach((text, j) => {
    const span = document.createElement("span");
    span.textContent = text === "" ? "·" : text;
    bases.push("t" + (added.has(j) ? " added" : "") + (/[\n\r]/.test(text) ? " nl" : ""));
    span.className = bases[j];
    span.dataset.j = j;
    spans.push(span);
    all.append(span);
  });
  $("text").append(all);
}

function build() {
  buildAbout();
  buildChoice();
  buildLegend();
  buildText();
  buildBars();
  buildMaps();
}

// ---- the text at the position ----

const painted = new Int16Array(length).fill(-1);

/** The first token whose line begins below a height in the text's box. */
function firstBelow(height) {
  let low = 0, high = length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (spans[middle].offsetTop < height) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Gives the tokens in view their look, or all of them; the others get it when they come into view. */
function paintText(all = false) {
  const { end } = head();
  const box = $("text"), margin = 60;
  const first = all ? 0 : Math.max(0, firstBelow(box.scrollTop - margin) - 1);
  const last = all ? length : firstBelow(box.scrollTop + box.clientHeight + margin);
  for (let j = first; j < last; j++) {
    const look = kindOf(j, chosen.position, end) + 8 * (j === chosen.position) + 16 * (j === chosen.token);
    if (look === painted[j]) continue;
    painted[j] = look;
    spans[j].className = `${bases[j]} s${look & 7}${look & 8 ? " here" : ""}${look & 16 ? " shown" : ""}`;
  }
}

function countKinds() {
  const { end } = head();
  const counts = new Int32Array(KINDS.length);
  for (let j = 0; j < length; j++) counts[kindOf(j, chosen.position, end)]++;
  counts.forEach((count, kind) => { legendCounts[kind].textContent = count; });
}

function follow(span) {
  const box = $("text"), top = span.offsetTop;
  if (top < box.scrollTop || top + 24 > box.scrollTop + box.clientHeight) {
    box.scrollTop = top - box.clientHeight / 2;
  }
}
let followed = null; // the token to bring into view with the next picture

function showPosition() {
  const position = chosen.position;
  $("slider").value = position;
  $("slider").setAttribute("aria-valuetext", `token ${position} of ${length}`);
  if (document.activeElement !== $("number") || Number($("number").value) !== position) $("number").value = position;
  if (followed !== null) follow(spans[followed]);
  followed = null;
  paintText();
  countKinds();
  showBars();
  if (hereLine) hereLine.setAttribute("transform", `translate(${historyX(position)} 0)`);
  paintStrip();
  describe($("token"), chosen.token ?? position);
}

// ---- one token ----

const percent = (x) => x.toFixed(x > 0.0005 && x < 0.9995 ? 3 : 6);

function facts(j) {
  const { end, logit } = head();
  const facts = [["token", `${j}`], ["at the position", KINDS[kindOf(j, chosen.position, end)][0]]];
  if (logit) facts.push(["score", `${percent(1 / (1 + Math.exp(-logit[j])))} (logit ${logit[j].toFixed(3)})`]);
  else facts.push(["score", "none: the layer has no scorer"]);
  const leaves = j + window_;
  let life = "read to the end of the text";
  if (j < data.sinks) life = "a sink, read to the end of the text";
  else if (end[j] < length && end[j] > leaves) life = `leaves the window at ${leaves}, retained until ${end[j] - 1}`;
  else if (end[j] < length) life = `leaves the window at ${leaves} and is evicted` + (logit && logit[j] > 0 ? ": tokens of higher score hold all the slots" : "");
  else if (leaves < length) life = `leaves the window at ${leaves}, retained to the end of the text`;
  facts.push(["life", life]);
  return facts;
}

function label(j) {
  const text = data.tokens[j];
  return text === "" ? "(rest of the character before)" : text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/^ | $/g, "␣");
}

function describe(box, j) {
  const list = element("dl");
  for (const [name, value] of facts(j)) list.append(element("dt", {}, name), element("dd", {}, value));
  box.replaceChildren(element("span", { className: "name" }, label(j)), list);
}

function showTip(event) {
  const span = event.target.closest?.("#text .t");
  const tip = $("tip");
  tip.hidden = !span;
  if (!span) return;
  const j = Number(span.dataset.j);
  if (tip.dataset.j !== `${j} ${chosen.position}`) {
    tip.dataset.j = `${j} ${chosen.position}`;
    tip.replaceChildren(element("span", { className: "name" }, label(j)),
      ...facts(j).map(([name, value]) => element("div", {}, `${name}: ${value}`)));
  }
  const { width, height } = tip.getBoundingClientRect();
  const x = clamp(event.clientX + 14, 4, innerWidth - width - 4);
  const y = event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18;
  tip.style.transform = `translate(${Math.round(x)}px, ${Math.round(Math.max(4, y))}px)`;
}

/** The next (1) or previous (-1) retained token after the one that is shown, without an end. */
function step(direction) {
  const start = chosen.token ?? (direction > 0 ? -1 : length);
  for (let n = 1; n <= length; n++) {
    const j = (((start + direction * n) % length) + length) % length;
    if (kindOf(j, chosen.position, head().end) === RETAINED) {
      followed = j;
      choose({ token: j });
      return;
    }
  }
}

// ---- layer and head ----

function showChoice() {
  const layer = layers[chosen.layer];
  press(layerButtons, chosen.layer);
  press(headButtons, chosen.head);
  press(barButtons.map((each) => each.bar), barButtons.findIndex((b) => b.l === chosen.layer && b.h === chosen.head));
  $("strip-names").replaceChildren(...layer.heads.map((_, h) =>
    element("span", { className: h === chosen.head ? "on" : "" }, data.heads > 12 ? String(h) : `head ${h}`)));
  $("strip").style.height = $("strip-names").style.height = `${ROW * data.heads}px`;
  $("strip").setAttribute("aria-label",
    `Kinds of all tokens in the ${data.heads} KV heads of layer ${layer.number}; the numbers are in the legend and in the chart`);
  $("text-title").textContent = `Text, as layer ${layer.number}, KV head ${chosen.head} could read it`;
  showHistory();
}

// ---- input ----

function moveTo(position) {
  followed = clamp(position, 0, length - 1);
  choose({ position: followed, token: null });
}

const turn = (value, by, count) => (value + by + count) % count;

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === $("number")) return;
  const big = Math.max(2, Math.round(length / 100));
  const acts = {
    ArrowLeft: () => moveTo(chosen.position - (event.shiftKey ? big : 1)),
    ArrowRight: () => moveTo(chosen.position + (event.shiftKey ? big : 1)),
    "[": () => choose({ head: turn(chosen.head, -1, data.heads) }),
    h: () => choose({ head: turn(chosen.head, -1, data.heads) }),
    "]": () => choose({ head: turn(chosen.head, 1, data.heads) }),
    l: () => choose({ head: turn(chosen.head, 1, data.heads) }),
    j: () => choose({ layer: turn(chosen.layer, 1, layers.length) }),
    k: () => choose({ layer: turn(chosen.layer, -1, layers.length) }),
    n: () => step(1),
    p: () => step(-1),
  };
  if (!Object.hasOwn(acts, event.key)) return;
  event.preventDefault();
  acts[event.key]();
}
