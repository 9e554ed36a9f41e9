// The page at /: asks the server's own endpoints and draws the engine's state. No library, no build step.
const $ = (id) => document.getElementById(id);
const POLL = 500, RETRY = 1500, HISTORY = 120; // milliseconds, milliseconds, points

let messages = []; // of the conversation
let request = null; // the AbortController of the request that runs

// ---- asking

const mode = () => document.querySelector("input[name=mode]:checked").value;
const headers = () => ($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {});

function parameters() {
  const body = { stream: true };
  for (const name of ["max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed"]) {
    const input = $(name);
    if (!input.checkValidity()) throw new Error(`${input.labels[0].textContent.trim()}: ${input.validationMessage}`);
    if (input.value !== "") body[name] = Number(input.value);
  }
  if ($("stop_text").value) body.stop = [$("stop_text").value];
  return body;
}

function completionBody(prompt) {
  const body = { ...parameters(), prompt };
  return $("logprobs").checked ? { ...body, logprobs: 5 } : body;
}

function chatBody() {
  const system = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  const body = { ...parameters(), messages: [...system, ...messages] };
  return $("logprobs").checked ? { ...body, logprobs: true, top_logprobs: 5 } : body;
}

// Server-sent events, each parsed; a line may come in pieces.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server ended the answer early.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message ?? String(event.error));
      yield event;
    }
  }
}

async function refusal(response) {
  let message = response.statusText;
  try {
    message = (await response.json()).error.message;
  } catch {} // no body of ours
  return `${response.status}: ${message}`;
}

async function send() {
  const prompt = $("prompt").value;
  if (request || !prompt.trim()) return;
  const chat = mode() === "chat";
  showError("");
  if (chat) messages.push({ role: "user", content: prompt });
  let path, body;
  try {
    [path, body] = chat ? ["v1/chat/completions", chatBody()] : ["v1/completions", completionBody(prompt)];
  } catch (error) {
    if (chat) messages.pop();
    return showError(error.message);
  }
  const asked = add($("output"), "turn user", prompt);
  const box = add($("output"), body.n > 1 ? "samples" : "", "");
  const answers = Array.from({ length: body.n ?? 1 }, () => ({ text: "", element: add(box, "turn answer", "") }));
  $("prompt").value = "";
  request = new AbortController();
  busy(true);
  let problem = "";
  const began = performance.now();
  let first = 0, count = 0;
  try {
    const options = { method: "POST", body: JSON.stringify(body), signal: request.signal };
    const response = await fetch(path, { ...options, headers: { ...headers(), "Content-Type": "application/json" } });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response)) {
      for (const choice of event.choices ?? []) {
        if (take(answers[choice.index], choice)) {
          first ||= performance.now();
          count += 1;
          $("speed").textContent = speed(began, first, count);
        }
      }
      follow();
    }
  } catch (error) {
    problem = error.name === "AbortError" ? "stopped" : error.message;
  }
  request = null;
  busy(false);
  if (problem && problem !== "stopped") showError(problem);
  const text = answers[0].text;
  if (problem && !text) { // nothing was said: the question comes back
    asked.remove();
    box.remove();
    $("prompt").value ||= prompt;
    if (chat) messages.pop();
  } else {
    if (problem) add($("output"), "turn end", problem === "stopped" ? "stopped" : "cut off");
    if (chat) messages.push({ role: "assistant", content: text });
  }
  follow();
}

function speed(began, first, count) {
  const rate = count > 1 ? `, ${((count - 1) / ((performance.now() - first) / 1000)).toFixed(1)} pieces/s` : "";
  return `first after ${((first - began) / 1000).toFixed(2)} s${rate}`;
}

// Adds what a chunk brings; whether it brought anything. Tokens are shown one by one where they spell the text.
function take(answer, choice) {
  const text = choice.text ?? choice.delta?.content ?? "";
  const tokens = tokensOf(choice.logprobs);
  answer.text += text;
  if (!text && !tokens.length) return false;
  if (tokens.map((one) => one.token).join("") === text) {
    for (const one of tokens) addToken(answer.element, one.token, [one]);
  } else if (tokens.length) {
    addToken(answer.element, text, tokens); // bytes of a character, or text held back: one piece of several tokens
  } else {
    answer.element.append(text);
  }
  return true;
}

// [{token, logprob, top: [[token, logprob], …]}, …] of either endpoint's form
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((one) => ({ ...one, top: one.top_logprobs.map((other) => [other.token, other.logprob]) }));
  }
  return (logprobs.tokens ?? []).map((token, index) => ({
    token,
    logprob: logprobs.token_logprobs[index],
    top: Object.entries(logprobs.top_logprobs?.[index] ?? {}).sort((a, b) => b[1] - a[1]),
  }));
}

function addToken(parent, text, tokens) {
  const span = document.createElement("span");
  span.className = "token";
  span.tabIndex = parent.querySelector(".token") ? -1 : 0; // one stop of the Tab key; arrows go on from there
  span.textContent = text;
  span.tokens = tokens;
  const least = Math.min(...tokens.map((one) => Math.exp(one.logprob)));
  span.style.background = `color-mix(in srgb, var(--shared) ${Math.round(32 * (1 - least))}%, transparent)`;
  parent.append(span);
}

function add(parent, className, text) {
  const element = document.createElement("div");
  element.className = className;
  element.textContent = text;
  parent.append(element);
  return element;
}

function follow() {
  if (!$("tip").hidden) return; // somebody is reading a token
  const box = $("output");
  if (box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
}

function busy(on) {
  $("send").disabled = on;
  $("stop").disabled = !on;
  $("output").setAttribute("aria-busy", String(on));
  if (on) $("speed").textContent = "waiting for the first token…";
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function clear() {
  request?.abort();
  messages = [];
  $("output").replaceChildren();
  showError("");
  $("prompt").focus();
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
$("stop").addEventListener("click", () => request?.abort());
$("clear").addEventListener("click", clear);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") { request?.abort(); hideTip(); } });
for (const input of document.querySelectorAll("input[name=mode]")) input.addEventListener("change", clear);
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("input", () => sessionStorage.setItem("key", $("key").value));

// ---- log-probabilities of a token

let tipped = null; // the token that the tip tells of

function showTip(span) {
  tipped = span;
  const table = document.createElement("table");
  for (const one of span.tokens) {
    const rows = one.top.some(([token]) => token === one.token) ? one.top : [[one.token, one.logprob], ...one.top];
    for (const [token, logprob] of rows) {
      const row = table.insertRow();
      row.className = token === one.token ? "chosen" : "";
      row.insertCell().textContent = JSON.stringify(token).slice(1, -1);
      row.insertCell().textContent = logprob.toFixed(3);
      row.insertCell().textContent = `${(100 * Math.exp(logprob)).toFixed(1)}%`;
    }
  }
  const tip = $("tip"), box = span.getClientRects()[0];
  tip.replaceChildren(table);
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
  const below = box.bottom + 6;
  tip.style.top = `${below + tip.offsetHeight < innerHeight ? below : Math.max(4, box.top - tip.offsetHeight - 6)}px`;
  span.setAttribute("aria-describedby", "tip");
}

function hideTip() {
  tipped = null;
  $("tip").hidden = true;
}

for (const kind of ["mouseover", "focusin"]) {
  $("output").addEventListener(kind, (event) => { if (event.target.tokens) showTip(event.target); });
}
for (const kind of ["mouseout", "focusout"]) $("output").addEventListener(kind, hideTip);
$("output").addEventListener("scroll", () => { if (tipped) showTip(tipped); });
$("output").addEventListener("keydown", (event) => {
  const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  const next = step && event.target.tokens && event.target[step];
  if (next?.tokens) {
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
});

// ---- the engine

let last = null; // state drawn last
let pages = new Uint8Array(); // a byte a page: owners, or CACHED
let layout = null; // of the pool's drawing
const rates = [];
const CACHED = 255;

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function poll() {
  let wait = document.hidden ? 4 * POLL : POLL;
  try {
    const response = await fetch("engine/state", { headers: headers(), signal: AbortSignal.timeout(5000) });
    if (response.status === 401) $("settings").open = true;
    if (!response.ok) throw new Error(await refusal(response));
    const state = await response.json();
    pages = await inflate(state.pages);
    show(state);
    link("connected", false);
  } catch (error) {
    wait = RETRY;
    last = null;
    link(/^\d+:/.test(error.message) ? error.message : "no connection, trying again…", true);
  }
  setTimeout(poll, wait);
}

function link(text, lost) {
  if ($("link").textContent !== text) $("link").textContent = text; // said once by screen readers
  $("link").classList.toggle("lost", lost);
}

function show(state) {
  const again = last && last.started === state.started && state.time > last.time;
  const rate = again ? (state.generation_tokens - last.generation_tokens) / (state.time - last.time) : 0;
  last = state;
  rates.push(rate);
  if (rates.length > HISTORY) rates.shift();
  const recent = rates.slice(-4);
  $("model").textContent = state.model;
  $("running").textContent = state.running;
  $("waiting").textContent = state.waiting;
  $("rate").textContent = (recent.reduce((a, b) => a + b, 0) / recent.length).toFixed(1);
  $("used").textContent = `${((100 * state.used) / state.num_pages).toFixed(state.used ? 1 : 0)}%`;
  $("free").textContent = state.num_pages - state.used - state.cached;
  $("cached").textContent = state.cached;
  $("one").textContent = state.used - state.shared;
  $("shared").textContent = state.shared;
  $("page-size").textContent = state.page_size;
  const counts = `${state.num_pages} pages: ${state.used} used, of them ${state.shared} shared; ${state.cached} cached`;
  $("pool").setAttribute("aria-label", `Page pool, ${counts}`);
  draw();
}

function canvasOf(id, height) {
  const canvas = $(id), scale = devicePixelRatio || 1, width = canvas.clientWidth;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width, height];
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  const colour = Object.fromEntries(["free", "cached", "one", "shared", "accent"].map((name) => [name, style.getPropertyValue(`--${name}`)]));
  drawPool(colour);
  drawHistory(colour);
}

function drawPool(colour) {
  const width = $("pool").clientWidth;
  if (!pages.length || !width) return;
  const cell = Math.max(3, Math.min(16, Math.floor(Math.sqrt((width * 420) / pages.length))));
  const columns = Math.max(1, Math.floor(width / cell));
  layout = { cell, columns };
  const [context] = canvasOf("pool", Math.ceil(pages.length / columns) * cell);
  const size = cell - (cell > 4 ? 1.5 : cell > 3 ? 1 : 0.5);
  const kinds = { free: [], cached: [], one: [], shared: [] };
  pages.forEach((owners, page) => kinds[owners === 0 ? "free" : owners === CACHED ? "cached" : owners === 1 ? "one" : "shared"].push(page));
  for (const [kind, listed] of Object.entries(kinds)) {
    context.fillStyle = colour[kind];
    context.beginPath();
    for (const page of listed) context.rect((page % columns) * cell, Math.floor(page / columns) * cell, size, size);
    context.fill();
  }
  if (cell < 11) return;
  context.fillStyle = ON_SHARED; // how many own it
  context.font = `600 ${cell - 6}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (const page of kinds.shared) {
    context.fillText(pages[page], (page % columns) * cell + size / 2, Math.floor(page / columns) * cell + size / 2 + 0.5);
  }
}

const ON_SHARED = "#10151b"; // dark on the orange of shared pages, in both schemes

function drawHistory(colour) {
  const [context, width, height] = canvasOf("history", 44);
  const top = Math.max(10, ...rates);
  context.strokeStyle = colour.accent;
  context.lineWidth = 1.5;
  context.beginPath();
  rates.forEach((rate, index) => {
    const x = width - ((rates.length - 1 - index) * width) / (HISTORY - 1);
    context.lineTo(x, height - 2 - ((height - 4) * rate) / top);
  });
  context.stroke();
}

$("pool").addEventListener("mousemove", (event) => {
  if (!layout) return;
  const page = Math.floor(event.offsetY / layout.cell) * layout.columns + Math.floor(event.offsetX / layout.cell);
  const owners = pages[page];
  if (owners === undefined || event.offsetX >= layout.columns * layout.cell) return void ($("page-note").textContent = "");
  const text = owners === 0 ? "free" : owners === CACHED ? "free, cached" : owners === 1 ? "one owner" : `${owners} owners`;
  $("page-note").textContent = `Page ${page}: ${text}`;
});
$("pool").addEventListener("mouseleave", () => { $("page-note").textContent = ""; });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("resize", draw);
poll();
