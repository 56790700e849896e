"use strict";
// The pictures of gpt/gaze.py's page. Numbers come from the element "data"; every text is set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const {T, L, H, G, D} = data;
  const CLOSE = T <= 32 ? T : 24; // rows and columns of a close-up
  const MAP = 360; // cells a side of a picture of a whole matrix: beyond that the largest, or the mean, of several
  const LISTED = 24; // keys listed by weight where there are more than
  const SHORT = 48;

  // Numbers

  const bytes = (text) => {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  };
  const floats = (text) => new Float32Array(bytes(text).buffer); // little-endian, as every browser's machine is
  const once = (make) => { // of each argument
    const made = new Map();
    return (x) => made.has(x) ? made.get(x) : (made.set(x, make(x)), made.get(x));
  };
  const query = once((layer) => floats(data.layers[layer].q));
  const keys = once((layer) => floats(data.layers[layer].k));
  const mask = once((number) => bytes(data.masks[number]));
  const bias = data.bias === null ? null : floats(data.bias);
  const thumbs = bytes(data.thumbs);
  const logprobs = floats(data.next.logprobs), logits = floats(data.next.logits), rivals = floats(data.next.rival_logprobs);

  const sees = (layer, q, k) => {
    const at = q * T + k;
    return (mask(data.layers[layer].mask)[at >> 3] >> (at & 7)) & 1;
  };
  const biasOf = (head, q, k) => bias === null ? 0 : bias[head * (2 * T - 1) + T - 1 + q - k];
  const present = (layer) => "q" in data.layers[layer];

  let held = {layer: -1, head: -1};
  function matrices(layer, head) { // scores with nothing hidden, and the softmax of what is seen; queries first
    if (held.layer === layer && held.head === head) return held;
    const scores = new Float32Array(T * T), weights = new Float32Array(T * T);
    const q = query(layer), k = keys(layer), group = Math.floor(head / (H / G)), scale = 1 / Math.sqrt(D);
    let most = 0;
    for (let i = 0; i < T; i++) {
      let top = -Infinity, sum = 0;
      const from = (head * T + i) * D;
      for (let j = 0; j < T; j++) {
        const to = (group * T + j) * D;
        let dot = 0;
        for (let d = 0; d < D; d++) dot += q[from + d] * k[to + d];
        const score = scores[i * T + j] = dot * scale + biasOf(head, i, j);
        if (sees(layer, i, j)) { top = Math.max(top, score); most = Math.max(most, Math.abs(score)); }
      }
      for (let j = 0; j < T; j++) if (sees(layer, i, j)) sum += weights[i * T + j] = Math.exp(scores[i * T + j] - top);
      for (let j = 0; j < T; j++) weights[i * T + j] /= sum;
    }
    return held = {layer, head, scores, weights, most};
  }

  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
  const chance = (p) => p >= 0.0001 ? p.toFixed(4) : p.toExponential(1);
  const piece = (id) => data.pieces[id];
  const said = (id) => id === undefined ? "" : `"${piece(id)}"`;

  // Elements

  function el(tag, about = {}, ...inner) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(about)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name === "style") Object.assign(made.style, value);
      else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...inner.map((x) => typeof x === "number" ? String(x) : x));
    return made;
  }
  const stage = (name) => document.getElementById(name);
  function table(columns, words, rows) {
    const cells = (tag, row) => row.map((cell, i) => cell instanceof Node ? el(tag, {class: "bar"}, cell) : el(tag, i < words ? {} : {class: "n"}, cell));
    return el("table", {}, el("tr", {}, ...cells("th", columns)),
      ...rows.map(({cells: row, is, on}) => el("tr", {class: is ? "is" : undefined, ...(on ? {tabindex: "0", onclick: on,
        onkeydown: (event) => { if (event.key === "Enter") on(); }} : {})}, ...cells("td", row))));
  }
  const bar = (share) => el("div", {style: {width: `${(100 * share).toFixed(2)}%`, minWidth: share > 0 ? "1px" : "0"}});

  // Colours: steps between the page's own, chosen again when it turns light or dark

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const SCALES = {
    weight: {
      light: [[253, 253, 252], [214, 234, 240], [127, 188, 212], [39, 112, 156], [10, 42, 84]],
      dark: [[30, 30, 34], [22, 62, 84], [38, 118, 158], [110, 190, 226], [232, 248, 255]],
    },
    signed: {
      light: [[150, 74, 8], [222, 158, 84], [250, 248, 244], [112, 176, 206], [18, 84, 132]],
      dark: [[250, 178, 92], [146, 92, 34], [36, 36, 41], [34, 98, 134], [124, 206, 244]],
    },
  };
  let theme = {};
  function choose() {
    const css = getComputedStyle(document.documentElement), shade = dark.matches ? "dark" : "light";
    const name = (n) => css.getPropertyValue(n).trim();
    theme = {fg: name("--fg"), bg: name("--bg"), soft: name("--soft"), line: name("--line"), mark: name("--c"), bar: name("--bar")};
    for (const kind of Object.keys(SCALES)) {
      const stops = SCALES[kind][shade], ramp = new Uint8ClampedArray(256 * 4);
      for (let i = 0; i < 256; i++) {
        const at = i / 255 * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
        for (let c = 0; c < 3; c++) ramp[4 * i + c] = stops[low][c] + (stops[low + 1][c] - stops[low][c]) * (at - low);
        ramp[4 * i + 3] = 255;
      }
      theme[kind] = ramp;
    }
    const tile = el("canvas", {width: 6, height: 6}), pen = tile.getContext("2d");
    pen.fillStyle = theme.bg; pen.fillRect(0, 0, 6, 6);
    pen.strokeStyle = theme.line; pen.lineWidth = 1;
    pen.beginPath();
    for (const x of [-6, 0, 6]) { pen.moveTo(x, 6); pen.lineTo(x + 6, 0); }
    pen.stroke();
    theme.hidden = tile;
    theme.rgb = (kind, x) => { // x from 0 to 1
      const i = 4 * Math.round(255 * clamp(x, 0, 1)), ramp = theme[kind];
      return [ramp[i], ramp[i + 1], ramp[i + 2]];
    };
    theme.colour = (kind, x) => `rgb(${theme.rgb(kind, x).join(",")})`;
  }
  function legend(kind, low, high) {
    const stops = [0, .25, .5, .75, 1].map((x) => theme.colour(kind, x));
    return el("span", {class: "legend"}, low, el("i", {style: {background: `linear-gradient(to right, ${stops.join(",")})`}}), high);
  }
  function paint(canvas, width, height) { // at the screen's own resolution
    const dpr = devicePixelRatio || 1;
    canvas.width = Math.round(width * dpr); canvas.height = Math.round(height * dpr);
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(dpr, dpr);
    return pen;
  }
  function image(width, height, colour) { // a canvas with a pixel a cell
    const small = el("canvas", {width, height}), pen = small.getContext("2d"), pixels = pen.createImageData(width, height);
    for (let y = 0, at = 0; y < height; y++) for (let x = 0; x < width; x++, at += 4) {
      const rgb = colour(y, x); // null: nothing there
      if (rgb) [pixels.data[at], pixels.data[at + 1], pixels.data[at + 2], pixels.data[at + 3]] = [...rgb, 255];
    }
    pen.putImageData(pixels, 0, 0);
    return small;
  }

  // What is chosen: it stands in the address too, as #layer=0&head=1&query=5&key=3; code: a row of the codes of position

  const at = {layer: data.layer, head: data.head, query: T - 1, key: 0, code: 0, q0: 0, k0: 0};
  const LIMITS = {layer: L, head: H, query: T, key: T, code: {bias: H, none: 1}[data.position.kind] ?? data.position.rows};
  function read() {
    for (const part of location.hash.slice(1).split("&")) {
      const [name, value] = part.split("=");
      if (Object.hasOwn(LIMITS, name) && /^\d+$/.test(value ?? "")) at[name] = clamp(Number(value), 0, LIMITS[name] - 1);
    }
  }
  const inside = (x, from) => x >= from && x < from + CLOSE;
  const around = (x) => clamp(x - Math.floor(CLOSE / 2), 0, T - CLOSE);
  function select(change) {
    for (const [name, value] of Object.entries(change)) at[name] = clamp(value, 0, LIMITS[name] - 1);
    if (!inside(at.query, at.q0)) at.q0 = around(at.query);
    if (!inside(at.key, at.k0)) at.k0 = around(at.key);
    const address = Object.keys(LIMITS).map((name) => `${name}=${at[name]}`).join("&");
    try { history.replaceState(null, "", `#${address}`); } catch { /* it stays as it was */ }
    draw();
  }

  // The bar on top

  const number = (name, count) => el("select", {id: `choose-${name}`, onchange: (event) => select({[name]: Number(event.target.value)})},
    ...Array.from({length: count}, (_, i) => el("option", {value: i}, i)));
  const controls = {
    layer: number("layer", L), head: number("head", H),
    query: el("input", {id: "choose-query", type: "number", min: 0, max: T - 1,
      onchange: (event) => select({query: Math.floor(Number(event.target.value)) || 0})}),
  };
  const reads = el("output", {});
  stage("choice").append(...["layer", "head"].map((name) => el("label", {for: `choose-${name}`}, `${name} `, controls[name])),
    el("label", {for: "choose-query"}, "position ", controls.query), reads);
  function drawChoice() {
    for (const [name, control] of Object.entries(controls)) control.value = at[name];
    reads.textContent = `reads ${said(data.ids[at.query])}`;
  }

  // Strips of text, a span a token

  function strip(label, pick) {
    const spans = data.ids.map((id, i) => {
      const text = piece(id);
      const span = el("span", {title: `position ${i}, id ${id}`, onclick: () => pick(i)}, text.replaceAll("↵", "↵\n"));
      return span;
    });
    return {spans, box: el("div", {class: "ids strip", role: "group", "aria-label": label}, ...spans)};
  }
  function tint(span, share) {
    const [r, g, b] = theme.rgb("weight", .7);
    span.style.background = share > 0 ? `rgba(${r},${g},${b},${(.7 * Math.sqrt(share)).toFixed(3)})` : "none";
  }

  // 3. Codes of position

  const code = data.position;
  const turns = code.kind === "angles" ? {cos: floats(code.cos), sin: floats(code.sin)} : {};
  const added = code.kind === "codes" ? floats(code.values) : null;
  const reach = added === null ? 1 : added.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  const nBias = bias === null ? 0 : bias.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  const angle = (row, p) => { const a = Math.atan2(turns.sin[row * T + p], turns.cos[row * T + p]); return a < 0 ? a + 2 * Math.PI : a; };
  const pictures = {
    angles: {rows: code.rows, value: (row, p) => turns.cos[row * T + p], most: 1, title: "cosine of each pair's angle, down, by position, across",
      tell: (row, p) => `pair ${row}, position ${p}: angle ${angle(row, p).toFixed(4)}, cos ${turns.cos[row * T + p].toFixed(4)}, sin ${turns.sin[row * T + p].toFixed(4)}`},
    codes: {rows: code.rows, value: (row, p) => added[row * T + p], most: reach,
      title: `what is added to ${code.rows === code.of ? "the" : `the first ${code.rows} of ${code.of}`} columns, down, by position, across`,
      tell: (row, p) => `column ${row}, position ${p}: ${added[row * T + p].toFixed(4)} is added`},
    bias: {rows: H, value: (row, p) => biasOf(row, p, 0), most: nBias, title: "bias of each head, down, by the distance from query back to key, across",
      tell: (row, p) => `head ${row}, distance ${p}: ${biasOf(row, p, 0).toFixed(4)} is added to the score`},
  };
  const shown = pictures[code.kind];
  const column = () => code.kind === "bias" ? Math.max(at.query - at.key, 0) : at.query; // of the picture: what is chosen
  const codeCanvas = el("canvas", {class: "pick", "aria-label": shown?.title ?? ""}), codeSaid = el("p", {class: "said", id: "code"}), codeTable = el("div", {class: "scroll"});
  const codeCaption = el("div", {class: "caption"});
  if (shown) {
    stage("positions").append(codeCaption, codeCanvas, codeSaid, codeTable);
    const cell = (event) => [Math.floor(event.offsetY / codeCanvas.clientHeight * shown.rows), Math.floor(event.offsetX / codeCanvas.clientWidth * T)]
      .map((x, i) => clamp(x, 0, [shown.rows, T][i] - 1));
    codeCanvas.addEventListener("mousemove", (event) => { codeSaid.textContent = shown.tell(...cell(event)); });
    codeCanvas.addEventListener("mouseleave", () => { codeSaid.textContent = shown.tell(at.code, column()); });
    codeCanvas.addEventListener("click", (event) => { const [row, x] = cell(event); select({code: row, ...(code.kind === "bias" ? {key: at.query - x} : {query: x})}); });
  }
  function drawCodes() {
    if (!shown) return;
    const width = stage("positions").clientWidth, height = clamp(shown.rows * 8, 48, 256), n = shown.rows;
    const pen = paint(codeCanvas, width, height);
    pen.imageSmoothingEnabled = n > height || T > width * 1.5;
    pen.drawImage(image(T, n, (row, p) => theme.rgb("signed", .5 + .5 * shown.value(row, p) / (shown.most || 1))), 0, 0, width, height);
    pen.strokeStyle = theme.mark; pen.lineWidth = 1.5;
    pen.strokeRect(column() / T * width, 0.75, Math.max(width / T, 1.5), height - 1.5);
    codeCaption.replaceChildren(el("b", {}, shown.title), legend("signed", `-${shown.most.toPrecision(3)}`, shown.most.toPrecision(3)));
    codeSaid.textContent = shown.tell(at.code, column());
    if (code.kind !== "angles") return;
    const rows = Array.from({length: n}, (_, row) => {
      const step = T > 1 ? angle(row, 1) : 0;
      return {is: row === at.code, on: () => select({code: row}), cells: [row, step.toPrecision(4), (2 * Math.PI / step).toPrecision(4), angle(row, at.query).toFixed(4),
        turns.cos[row * T + at.query].toFixed(4), turns.sin[row * T + at.query].toFixed(4)]};
    });
    codeTable.replaceChildren(table(["pair", "radians a position", "positions a turn", `angle at ${at.query}`, "cos", "sin"], 0, rows));
  }

  // 4. Every head small

  const side = data.side;
  const small = [];
  const grid = el("div", {class: "grid", style: {gridTemplateColumns: `auto repeat(${H}, minmax(44px, ${H > 8 ? 72 : 104}px))`}}, el("small", {}, "layer"),
    ...Array.from({length: H}, (_, head) => el("small", {}, `head ${head}`)));
  for (let layer = 0; layer < L; layer++) {
    grid.append(el("small", {}, layer));
    for (let head = 0; head < H; head++) {
      const canvas = el("canvas", {width: side, height: side});
      const button = el("button", {type: "button", title: `layer ${layer}, head ${head}`, onclick: () => select({layer, head})}, canvas);
      small.push({layer, head, canvas, button});
      grid.append(button);
    }
  }
  stage("heads").append(grid);
  function drawThumbs() {
    small.forEach(({canvas}, i) => canvas.getContext("2d")
      .drawImage(image(side, side, (y, x) => theme.rgb("weight", thumbs[(i * side + y) * side + x] / 255)), 0, 0));
  }

  // 4. One head large: the whole of long matrices, a close-up, one row in words and numbers

  const KINDS = ["score", "mask", "weight"];
  const TITLES = {score: "scores: q kᵀ / √D" + (bias === null ? "" : " + bias"), mask: "mask", weight: "softmax"};
  const whole = T > CLOSE ? KINDS.map((kind) => ({kind, caption: el("div", {class: "caption"}), canvas: el("canvas", {class: "pick"})})) : [];
  const close = KINDS.map((kind) => ({kind, caption: el("div", {class: "caption"}), canvas: el("canvas", {class: "pick", tabindex: "0"}), frame: {}}));
  const figure = ({caption, canvas}) => el("div", {}, caption, canvas);
  const cellSaid = el("p", {class: "said", id: "cell", "aria-live": "polite"});
  const attended = strip("the text, shaded by what the chosen position attends to", (i) => select(sees(at.layer, at.query, i) ? {key: i} : {query: i, key: i}));
  const rowNote = el("p"), rowTable = el("div", {class: "scroll", id: "row"}), absent = el("p", {class: "said"});
  const body = el("div", {}, ...(whole.length ? [el("div", {class: "panels"}, ...whole.map(figure))] : []),
    el("div", {class: "panels"}, ...close.map(figure)), cellSaid, el("div", {class: "two"}, el("div", {}, rowNote, attended.box), rowTable));
  const headTitle = el("h3", {id: "which"});
  stage("matrices").append(headTitle, absent, body);

  function tell(q, k) {
    const {scores, weights} = held, raw = scores[q * T + k];
    const see = sees(at.layer, q, k);
    const plus = bias === null ? "" : ` (${(raw - biasOf(at.head, q, k)).toFixed(4)} + bias ${biasOf(at.head, q, k).toFixed(4)})`;
    return `query ${q} ${said(data.ids[q])} → key ${k} ${said(data.ids[k])}: score ${raw.toFixed(4)}${plus}, ` +
      (see ? `softmax ${weights[q * T + k].toFixed(4)}` : "hidden by the mask, softmax 0");
  }
  function tone(kind, q, k) { // [scale, where on it], null: hidden
    if (kind === "score") return ["signed", .5 + .5 * held.scores[q * T + k] / (held.most || 1)];
    if (!sees(at.layer, q, k)) return null;
    return kind === "mask" ? ["weight", .42] : ["weight", Math.sqrt(held.weights[q * T + k])];
  }
  function captions(panels) {
    for (const {kind, caption} of panels) {
      const scale = {score: () => legend("signed", `-${held.most.toPrecision(3)}`, held.most.toPrecision(3)), weight: () => legend("weight", "0", "1"),
        mask: () => el("span", {class: "legend"}, el("i", {style: {width: "1rem", background: theme.colour("weight", .42)}}), "seen",
          el("i", {style: {width: "1rem", background: `repeating-linear-gradient(135deg, ${theme.line} 0 1px, ${theme.bg} 1px 4px)`}}), "hidden")}[kind]();
      const part = !whole.length ? "" : panels === whole ? `, all ${T.toLocaleString("en")}` : ", close";
      caption.replaceChildren(el("b", {}, TITLES[kind] + part), scale);
    }
  }
  function drawClose(panel, mark) {
    const {canvas, kind} = panel, width = canvas.parentElement.clientWidth, gutter = clamp(width * .2, 52, 84);
    const size = (width - gutter - 2) / CLOSE, height = gutter + size * CLOSE + 2, pen = paint(canvas, width, height);
    const edge = (i) => Math.round((gutter + i * size) * devicePixelRatio) / devicePixelRatio; // no seams between cells
    panel.frame = {gutter, size};
    for (let y = 0; y < CLOSE; y++) for (let x = 0; x < CLOSE; x++) {
      const got = tone(kind, at.q0 + y, at.k0 + x);
      pen.fillStyle = got ? theme.colour(...got) : pen.createPattern(theme.hidden, "repeat");
      pen.fillRect(edge(x), edge(y), edge(x + 1) - edge(x), edge(y + 1) - edge(y));
    }
    const font = clamp(size * .85, 7, 12);
    pen.font = `${font}px ui-monospace, monospace`; pen.textBaseline = "middle"; pen.textAlign = "right";
    const fitted = (id) => { let text = piece(id); while (text.length > 1 && pen.measureText(text).width > gutter - 8) text = text.slice(0, -1); return text; };
    const every = Math.ceil(8 / size);
    for (let i = 0; i < CLOSE; i += every) {
      pen.fillStyle = at.q0 + i === mark[0] ? theme.mark : theme.soft;
      pen.fillText(fitted(data.ids[at.q0 + i]), gutter - 4, gutter + (i + .5) * size);
      pen.save();
      pen.translate(gutter + (i + .5) * size, gutter - 4); pen.rotate(Math.PI / 2);
      pen.fillStyle = at.k0 + i === mark[1] ? theme.mark : theme.soft;
      pen.fillText(fitted(data.ids[at.k0 + i]), 0, 0);
      pen.restore();
    }
    pen.strokeStyle = theme.mark; pen.lineWidth = 1.5;
    const [y, x] = [mark[0] - at.q0, mark[1] - at.k0];
    if (y >= 0 && y < CLOSE) pen.strokeRect(gutter, gutter + y * size, size * CLOSE, size);
    if (y >= 0 && y < CLOSE && x >= 0 && x < CLOSE) { pen.lineWidth = 2.5; pen.strokeRect(gutter + x * size, gutter + y * size, size, size); }
  }
  function drawWhole({canvas, kind}) {
    const n = Math.min(T, MAP), share = T / n;
    const picture = image(n, n, (y, x) => {
      let sum = 0, top = -1, count = 0;
      for (let q = Math.floor(y * share); q < Math.max(Math.floor((y + 1) * share), Math.floor(y * share) + 1); q++) for (let k = Math.floor(x * share); k < Math.max(Math.floor((x + 1) * share), Math.floor(x * share) + 1); k++, count++) {
        const got = tone(kind, q, k);
        if (got) { sum += got[1]; top = Math.max(top, got[1]); }
      }
      if (kind === "score") return theme.rgb("signed", sum / count);
      return top < 0 ? null : theme.rgb("weight", top);
    });
    const width = canvas.parentElement.clientWidth, pen = paint(canvas, width, width), unit = width / T;
    pen.fillStyle = pen.createPattern(theme.hidden, "repeat");
    pen.fillRect(0, 0, width, width);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(picture, 0, 0, width, width);
    pen.strokeStyle = theme.line; pen.strokeRect(.5, .5, width - 1, width - 1);
    pen.strokeStyle = theme.mark; pen.lineWidth = 1.5;
    pen.strokeRect(at.k0 * unit, at.q0 * unit, CLOSE * unit, CLOSE * unit);
    pen.globalAlpha = .45;
    pen.strokeRect(0, at.query * unit, width, Math.max(unit, .5));
  }
  function drawRow() {
    const q = at.query, {scores, weights} = held;
    attended.spans.forEach((span, k) => {
      tint(span, weights[q * T + k]);
      span.className = [k === q ? "is" : "", sees(at.layer, q, k) ? "" : "dim"].join(" ").trim();
    });
    rowNote.textContent = `position ${q}, ${said(data.ids[q])}, attends to what is shaded; choose a token to see its number, or a dim one to see its row`;
    let listed = Array.from({length: T}, (_, k) => k);
    if (T > SHORT) {
      listed = listed.filter((k) => sees(at.layer, q, k)).sort((a, b) => weights[q * T + b] - weights[q * T + a]).slice(0, LISTED);
      if (!listed.includes(at.key)) listed.push(at.key);
    }
    const most = listed.reduce((top, k) => Math.max(top, weights[q * T + k]), 0);
    const columns = ["key", "token", "score", ...(bias === null ? [] : ["of it bias"]), "softmax", ""];
    const rows = listed.map((k) => ({is: k === at.key, on: () => select({key: k}), cells: [k, said(data.ids[k]), scores[q * T + k].toFixed(4),
      ...(bias === null ? [] : [biasOf(at.head, q, k).toFixed(4)]), sees(at.layer, q, k) ? weights[q * T + k].toFixed(4) : "hidden", bar(weights[q * T + k] / (most || 1))]}));
    rowTable.replaceChildren(table(columns, 2, rows));
    if (T > SHORT) rowTable.append(el("small", {}, `the ${LISTED} heaviest of ${T} keys, and the chosen one`));
  }
  function drawHead() {
    for (const {layer, head, button} of small) button.setAttribute("aria-pressed", layer === at.layer && head === at.head);
    headTitle.textContent = `layer ${at.layer}, head ${at.head}`;
    body.hidden = !present(at.layer); absent.hidden = present(at.layer);
    absent.textContent = `The queries and keys of all layers would make this page ${data.megabytes} MB larger, so it has those of layer ${data.layer}: ` +
      `make it again with --layer ${at.layer} for these numbers. The small pictures are of every layer.`;
    if (!present(at.layer)) return;
    matrices(at.layer, at.head);
    captions(whole); captions(close);
    whole.forEach(drawWhole);
    close.forEach((panel) => drawClose(panel, [at.query, at.key]));
    cellSaid.textContent = tell(at.query, at.key);
    drawRow();
  }
  for (const panel of close) {
    const cell = (event) => {
      const {gutter, size} = panel.frame, y = Math.floor((event.offsetY - gutter) / size), x = Math.floor((event.offsetX - gutter) / size);
      return y >= 0 && x >= 0 && y < CLOSE && x < CLOSE ? [at.q0 + y, at.k0 + x] : null;
    };
    panel.canvas.addEventListener("mousemove", (event) => {
      const over = cell(event);
      cellSaid.textContent = tell(...(over ?? [at.query, at.key]));
      close.forEach((each) => drawClose(each, over ?? [at.query, at.key]));
    });
    panel.canvas.addEventListener("mouseleave", () => {
      cellSaid.textContent = tell(at.query, at.key);
      close.forEach((each) => drawClose(each, [at.query, at.key]));
    });
    panel.canvas.addEventListener("click", (event) => { const over = cell(event); if (over) select({query: over[0], key: over[1]}); });
    panel.canvas.addEventListener("keydown", (event) => {
      const move = {ArrowUp: {query: at.query - 1}, ArrowDown: {query: at.query + 1}, ArrowLeft: {key: at.key - 1}, ArrowRight: {key: at.key + 1}}[event.key];
      if (move) { event.preventDefault(); select(move); }
    });
    panel.canvas.setAttribute("aria-label", `${TITLES[panel.kind]}; arrow keys move, the numbers stand below`);
  }
  for (const {canvas} of whole) canvas.addEventListener("click", (event) => {
    const [query_, key] = [event.offsetY / canvas.clientHeight, event.offsetX / canvas.clientWidth].map((x) => clamp(Math.floor(x * T), 0, T - 1));
    at.q0 = around(query_); at.k0 = around(key);
    select({query: query_, key});
  });

  // 5. What is expected next

  const came = strip("the text, each token shaded by the probability it had", (i) => select({query: Math.max(i - 1, 0)}));
  const nextNote = el("p", {class: "said", id: "expected"}), nextTable = el("div", {id: "rivals"});
  stage("next").append(el("div", {class: "two"}, came.box, el("div", {}, nextNote, nextTable)));
  function drawNext() {
    const q = at.query, last = q === T - 1, n = data.next.rivals[0].length;
    came.spans.forEach((span, i) => { tint(span, i ? Math.exp(logprobs[i - 1]) : 0); span.className = i === q + 1 ? "is" : ""; });
    const after = `after position ${q}, ${said(data.ids[q])}`;
    nextNote.textContent = last ? `${after}, the text ends: the likeliest next tokens` :
      `${after}, came ${said(data.ids[q + 1])}: probability ${chance(Math.exp(logprobs[q]))}, log-probability ${logprobs[q].toFixed(4)}, ` +
      `logit ${logits[q].toFixed(4)}, rank ${data.next.ranks[q]}`;
    const all = data.next.rivals[q].map((id, i) => ({id, logprob: rivals[q * n + i], is: false}));
    if (!last) all.push({id: data.ids[q + 1], logprob: logprobs[q], is: true});
    all.sort((a, b) => b.logprob - a.logprob);
    const most = Math.exp(all[0].logprob);
    nextTable.replaceChildren(table(["token", "id", "probability", "log-probability", ""], 1,
      all.map(({id, logprob, is}) => ({is, cells: [said(id), id, chance(Math.exp(logprob)), logprob.toFixed(4), bar(Math.exp(logprob) / most)]}))));
  }

  function draw() { drawChoice(); drawCodes(); drawHead(); drawNext(); }
  function redraw() { choose(); drawThumbs(); draw(); }
  dark.addEventListener("change", redraw);
  addEventListener("hashchange", () => { read(); select({}); });
  let width = document.body.clientWidth;
  addEventListener("resize", () => { if (document.body.clientWidth !== width) { width = document.body.clientWidth; draw(); } });
  choose();
  drawThumbs();
  read();
  select({});
})();
