"use strict";
// Which tokens were visible at a position: token j is read by the positions j, j + 1, …, end[j] - 1 of a head.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const length = data.tokens.length;
  const window_ = data.window === null ? Infinity : data.window;
  const hasScorer = data.layers.some((layer) => layer.logits !== null);
  const KINDS = [
    ["not read yet", "lies behind the position"],
    ["sink", `one of the first ${data.sinks} tokens, which always stay`],
    ["window", `one of the last ${data.window} tokens, the position's own included`],
    ["retained", "has left the window; its score is above 0.5 and it holds one of the head's slots"],
    ["evicted", "was lost with the window: its score is 0.5 or less, or tokens of higher score held all the slots"],
    ["evicted later", "was retained, until tokens of higher score took all the slots"],
  ];
  if (data.window === null) KINDS[2][1] = "every token: attention is full";
  if (!hasScorer) KINDS[4][1] = "has left the window; nothing is retained";
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
  const budgetFits = hasScorer && data.budget > 0 && data.budget <= 2 * most;
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
        (hasScorer ? `${data.budget} retained tokens per head` : "nothing retained");
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
      if (kind === LOST && !hasScorer || kind === RETAINED && !hasScorer) entry.hidden = true;
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

  function buildBars() {
    layers.forEach((layer, l) => {
      const line = element("div");
      layer.heads.forEach((_, h) => {
        const fill = element("i"), count = element("b");
        const bar = button("", "", () => choose({ layer: l, head: h }));
        bar.append(fill, count);
        barButtons.push({ bar, fill, count, l, h });
        line.append(bar);
      });
      $("bars").append(element("div", { className: "line" }, element("span", {}, `L${layer.number}`), line));
    });
    const limit = hasScorer ? `; a full bar is ${highest} tokens, the budget ${data.budget}` : "";
    $("bars").append(element("p", { className: "hint" }, `One row a layer, one bar a KV head${limit}.`));
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
    for (const { bar, fill, count, l, h } of barButtons) {
      const value = layers[l].heads[h].counts[position];
      fill.style.transform = `scaleY(${value / highest})`;
      if (data.heads <= 8) count.textContent = value;
      const label = `layer ${layers[l].number}, KV head ${h}: ${value} retained`;
      bar.setAttribute("aria-label", label);
      bar.title = label;
    }
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

  // ---- the strip of all heads ----

  const ROW = clamp(Math.floor(160 / data.heads), 12, 26); // pixels
  let colours = null, stripWidth = null;

  function readColours() {
    const style = getComputedStyle(document.documentElement);
    const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (name) => {
      probe.fillStyle = style.getPropertyValue(name).trim();
      probe.fillRect(0, 0, 1, 1);
      return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    colours = ["--future", "--sink", "--window", "--retained", "--evicted", "--evicted"].map(rgb);
    colours.strong = [null, rgb("--sink-line"), null, rgb("--retained-line")];
    colours.here = style.getPropertyValue("--here").trim();
    colours.accent = style.getPropertyValue("--accent").trim();
  }

  function paintStrip() {
    if (!colours) readColours();
    const canvas = $("strip");
    stripWidth ??= canvas.clientWidth;
    const width = Math.max(1, Math.floor(stripWidth * devicePixelRatio));
    const row = Math.round(ROW * devicePixelRatio), height = row * data.heads;
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    const columns = Math.min(width, length);
    const image = new ImageData(columns, data.heads);
    layers[chosen.layer].heads.forEach(({ end }, h) => {
      for (let x = 0; x < columns; x++) {
        const first = Math.floor((x * length) / columns), last = Math.max(first + 1, Math.floor(((x + 1) * length) / columns));
        let best = FUTURE, retained = 0;
        for (let j = first; j < last; j++) {
          const kind = kindOf(j, chosen.position, end);
          if (kind === RETAINED) retained++;
          if (kind === SINK || (kind === WINDOW && best !== SINK) || (kind >= EVICTED && best === FUTURE)) best = kind;
        }
        // a single retained token among many stays visible
        const share = retained ? 0.45 + (0.55 * retained) / (last - first) : 0;
        const under = best === SINK ? colours.strong[SINK] : colours[retained && best === FUTURE ? EVICTED : best];
        const at = 4 * (h * columns + x);
        for (let c = 0; c < 3; c++) image.data[at + c] = under[c] + share * (colours.strong[RETAINED][c] - under[c]);
        image.data[at + 3] = 255;
      }
    });
    stripSource.width = columns;
    stripSource.height = data.heads;
    stripSource.getContext("2d").putImageData(image, 0, 0);
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.clearRect(0, 0, width, height);
    for (let h = 0; h < data.heads; h++) pen.drawImage(stripSource, 0, h, columns, 1, 0, h * row + 1, width, row - 2);
    pen.lineWidth = 2 * devicePixelRatio;
    pen.strokeStyle = colours.accent;
    if (data.heads > 1) pen.strokeRect(1, chosen.head * row + 1, width - 2, row - 2);
    const x = Math.min(width - 2, ((chosen.position + 0.5) * width) / length);
    pen.fillStyle = colours.here;
    pen.fillRect(x - 1, 0, 2 * devicePixelRatio, height);
  }
  const stripSource = document.createElement("canvas");

  function clickStrip(event) {
    const box = $("strip").getBoundingClientRect();
    const j = clamp(Math.floor(((event.clientX - box.left) * length) / box.width), 0, length - 1);
    const h = clamp(Math.floor(((event.clientY - box.top) * data.heads) / box.height), 0, data.heads - 1);
    followed = j;
    choose({ head: h, token: j });
  }

  // ---- retained tokens over the position ----

  const CHART = { left: 34, right: 8, top: 8, bottom: 20, width: 340, height: 150 };
  const historyX = (i) => CHART.left + ((CHART.width - CHART.left - CHART.right) * i) / Math.max(1, length - 1);
  const historyY = (n) => CHART.height - CHART.bottom - ((CHART.height - CHART.top - CHART.bottom) * n) / highest;
  let hereLine = null;

  function drawing(tag, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function curve(counts) {
    const points = Math.min(length, 600), parts = [];
    for (let p = 0; p < points; p++) {
      const i = points > 1 ? Math.round((p * (length - 1)) / (points - 1)) : 0;
      parts.push(`${historyX(i).toFixed(1)} ${historyY(counts[i]).toFixed(1)}`);
    }
    return `M${parts.join("L")}`;
  }

  function showHistory() {
    const layer = layers[chosen.layer];
    const last = head().counts[length - 1];
    const svg = drawing("svg", {
      viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img",
      "aria-label": `Retained tokens of layer ${layer.number}, KV head ${chosen.head} over the position; ${last} at the end`,
    });
    const bottom = CHART.height - CHART.bottom;
    svg.append(drawing("path", { class: "axis", d: `M${CHART.left} ${CHART.top}V${bottom}H${CHART.width - CHART.right}` }));
    for (const [n, text] of [[0, "0"], [highest, String(highest)]]) {
      svg.append(drawing("text", { x: CHART.left - 4, y: historyY(n) + 3, "text-anchor": "end" }, text));
    }
    svg.append(drawing("text", { x: CHART.left, y: CHART.height - 6 }, "0"));
    svg.append(drawing("text", { x: CHART.width - CHART.right, y: CHART.height - 6, "text-anchor": "end" }, String(length - 1)));
    if (budgetFits) {
      svg.append(drawing("path", { class: "budget", d: `M${CHART.left} ${historyY(data.budget)}H${CHART.width - CHART.right}` }));
    }
    layer.heads.forEach((each, h) => {
      if (h !== chosen.head) svg.append(drawing("path", { class: "other", d: curve(each.counts) }));
    });
    svg.append(drawing("path", { class: "one", d: curve(head().counts) }));
    hereLine = drawing("path", { class: "here-line", d: `M0 ${CHART.top}V${bottom}` });
    svg.append(hereLine);
    const more = data.heads > 1 ? "; thin: the layer's other heads" : "";
    const budget = budgetFits ? `; dashed: the budget of ${data.budget}` : "";
    $("history").replaceChildren(svg, element("p", { className: "hint" },
      `Thick: layer ${layer.number}, KV head ${chosen.head}${more}${budget}.`));
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

  // ---- attention maps ----

  const mapButtons = [], choiceButtons = [], large = {};

  function plot(kind, size) {
    const image = element("img", { alt: "" });
    const caption = element("figcaption");
    large[kind] = { image, caption };
    const axis = (name, text) => element("div", { className: name }, element("span", {}, "0"), element("span", {}, text), element("span", {}, String(size)));
    const y = element("div", { className: "y" }, element("span", {}, String(size)), element("span", {}, "query position"), element("span", {}, "0"));
    const least = data.least_weights[kind];
    const scale = element("div", { className: "scale" }, element("span", {}, `≤ ${least}`),
      element("img", { src: data.scale, alt: `colours of attention weights, from ${least} (dark) to 1 (light)` }), element("span", {}, "1"));
    return element("figure", {}, caption, element("div", { className: "plot" }, y, element("div", { className: "box" }, image),
      axis("x", "key position")), scale);
  }

  function buildMaps() {
    if (!data.maps.length) return;
    $("maps").hidden = false;
    $("maps-hint").textContent = `Averages of attention weights; colours go by their logarithm. Above the diagonal, and where a head no ` +
      `longer held a token, there is no weight and no colour. The framed query heads share the chosen KV head.`;
    $("maps-large").append(plot("pieces", data.piece_tokens), plot("text", length));
    for (const [kind, text] of [["pieces", "short pieces"], ["text", "the whole text"]]) {
      choiceButtons.push(button(text, `small maps of ${text}`, () => choose({ map: kind })));
      $("maps-choice").append(choiceButtons.at(-1));
    }
    layers.forEach((layer, l) => {
      const line = element("div", { className: "line" }, element("span", {}, `layer ${layer.number}`));
      for (let n = 0; n < data.query_heads; n++) {
        const image = element("img", { alt: "", loading: "lazy" });
        const made = button(image, `attention map of layer ${layer.number}, query head ${n}`, () =>
          choose({ layer: l, head: Math.floor(n / group), query: n }));
        made.append(`${n}`);
        mapButtons.push({ made, image, l, n });
        line.append(made);
      }
      $("maps-small").append(line);
    });
  }

  let drawnMap = null;
  function showMaps() {
    if (!data.maps.length) return;
    const where = `layer ${layers[chosen.layer].number}, query head ${chosen.query}`;
    const words = {
      pieces: `${where}: mean over ${data.pieces} pieces of ${data.piece_tokens} tokens, each read alone`,
      text: `${where}: the whole text in ${data.map_cells} stretches; the weight that a stretch's keys get together`,
    };
    for (const kind of ["pieces", "text"]) {
      large[kind].image.src = data.maps[chosen.layer][kind][chosen.query];
      large[kind].image.alt = `Attention map of ${words[kind]}`;
      large[kind].caption.textContent = words[kind];
    }
    press(choiceButtons, chosen.map === "pieces" ? 0 : 1);
    press(mapButtons.map((each) => each.made), mapButtons.findIndex((b) => b.l === chosen.layer && b.n === chosen.query));
    for (const { made, image, l, n } of mapButtons) {
      if (drawnMap !== chosen.map) image.src = data.maps[l][chosen.map][n];
      made.classList.toggle("mine", l === chosen.layer && Math.floor(n / group) === chosen.head);
    }
    drawnMap = chosen.map;
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

  build();
  showChoice();
  showMaps();
  followed = chosen.position;
  showPosition();
  $("slider").addEventListener("input", () => moveTo(Number($("slider").value)));
  $("number").addEventListener("input", () => {
    const wanted = $("number").valueAsNumber;
    if (Number.isInteger(wanted) && wanted >= 0 && wanted < length) moveTo(wanted);
  });
  $("number").addEventListener("change", () => { $("number").value = chosen.position; });
  $("text").addEventListener("click", (event) => {
    const span = event.target.closest(".t");
    if (span && getSelection().isCollapsed) moveTo(Number(span.dataset.j));
  });
  document.addEventListener("pointermove", showTip);
  document.addEventListener("pointerleave", () => { $("tip").hidden = true; });
  $("text").addEventListener("scroll", () => { $("tip").hidden = true; paintText(); }, { passive: true });
  new ResizeObserver(schedule).observe($("text"));
  addEventListener("beforeprint", () => paintText(true));
  $("strip").addEventListener("click", clickStrip);
  document.addEventListener("keydown", onKey);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colours = null; schedule(); });
  new ResizeObserver(() => { stripWidth = null; schedule(); }).observe($("strip"));
})();
