// The page's pictures: the strip of all heads, retained tokens per head and over the position, attention maps.
// One module with inspection.js, which stands before it; the last lines start the page.

// ---- retained tokens per head ----

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
  const limit = retains ? `; a full bar is ${highest} tokens, the budget ${data.budget}` : "";
  $("bars").append(element("p", { className: "hint" }, `One row a layer, one bar a KV head${limit}.`));
}

function showBars() {
  for (const { bar, fill, count, l, h } of barButtons) {
    const value = layers[l].heads[h].counts[chosen.position];
    fill.style.transform = `scaleY(${value / highest})`;
    if (data.heads <= 8) count.textContent = value;
    const label = `layer ${layers[l].number}, KV head ${h}: ${value} retained`;
    bar.setAttribute("aria-label", label);
    bar.title = label;
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

// ---- start ----

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
