// The page: a picture, what the models say about it, and a search. It talks to the server that it came from and to nobody else.
"use strict";

const LARGEST_EDGE = 1600;  // pixels; what is larger than the server takes is reduced to this before it is sent
const INFERNO = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];
const ORIGINS = {both: "shared", image: "from the picture", text: "from the sentence", neither: "hardly anyone's"};

const $ = (selector, root = document) => root.querySelector(selector);
const state = {about: null, picture: null, number: 0};

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function show(card, ...children) {
  const result = $(".result", card);
  result.className = "result";
  result.replaceChildren(...children);
}

function fail(card, message) {
  show(card, element("p", {className: "error", textContent: message}));
}

function busy(card, on) {
  card.setAttribute("aria-busy", String(on));
  if (on) show(card, element("p", {className: "busy soft", textContent: "Working …"}));
}

async function call(path, payload) {
  let answer;
  try {
    answer = await fetch(path, payload === undefined ? {} : {
      method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(payload)});
  } catch {
    throw new Error("The server cannot be reached. Is it still running?");
  }
  let told = null;
  try { told = await answer.json(); } catch { /* no JSON: the status has to do */ }
  if (answer.ok && told !== null) return told;
  const reason = told?.error?.message ?? told?.error ?? told?.detail ?? answer.statusText;
  const wait = answer.headers.get("Retry-After");
  if (answer.status === 503 || answer.status === 429) throw new Error(`The server is busy; try again${wait ? ` in ${wait} s` : ""}.`);
  throw new Error(`${typeof reason === "string" && reason ? reason : "The server could not do it"} (${answer.status})`);
}

// ---- the picture

async function reduced(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, LARGEST_EDGE / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas", {width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale)});
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

async function choosePicture(blob, name) {
  const number = ++state.number, status = $("#picture-status");
  state.picture = null;
  status.className = "status soft busy";
  status.textContent = "Reading the picture …";
  for (const card of document.querySelectorAll("[data-needs-picture]")) show(card);
  hideHeat();
  try {
    const limit = state.about?.limits?.image_bytes ?? Infinity;
    const data = await base64(blob.size > limit ? await reduced(blob) : blob);
    const url = URL.createObjectURL(blob), preview = $("#preview");
    await new Promise((resolve, reject) => {
      preview.onload = resolve;
      preview.onerror = () => reject(new Error(`${name} is not a picture that this browser can show.`));
      preview.src = url;
    });
    if (number !== state.number) return;
    state.picture = {data, name};
    $("#stage").hidden = false;
    fitPicture();
    $("#picture-name").textContent = name;
    status.className = "status";
    status.textContent = "";
  } catch (error) {
    if (number !== state.number) return;
    $("#stage").hidden = true;
    status.className = "status error";
    status.textContent = error instanceof DOMException ? `${name} is not a picture that this browser can show.` : error.message;
  }
  enable();
}

// As large as there is room for, small pictures enlarged: patches are to be told apart.
function fitPicture() {
  const preview = $("#preview"), room = $("#stage").clientWidth;
  if (!preview.naturalWidth || !room) return;
  const scale = Math.min(room / preview.naturalWidth, 0.55 * window.innerHeight / preview.naturalHeight, Math.max(1, 320 / preview.naturalWidth));
  preview.width = Math.round(preview.naturalWidth * scale);
  preview.height = Math.round(preview.naturalHeight * scale);
}

function setUpPicture() {
  const drop = $("#drop"), input = $("#picture-input");
  input.addEventListener("change", () => { if (input.files.length) choosePicture(input.files[0], input.files[0].name); input.value = ""; });
  for (const kind of ["dragenter", "dragover"]) {
    document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, () => drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    const file = event.dataTransfer?.files?.[0];
    if (file) choosePicture(file, file.name);
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (file) choosePicture(file, file.name || "pasted picture");
  });
  new ResizeObserver(fitPicture).observe($("#stage"));
}

// ---- heat map

function colour(value) {
  const place = Math.min(0.9999, Math.max(0, value)) * (INFERNO.length - 1), low = Math.floor(place), rest = place - low;
  return INFERNO[low].map((channel, n) => Math.round(channel + rest * (INFERNO[low + 1][n] - channel)));
}

function scaled(values) {
  const least = Math.min(...values), most = Math.max(...values);
  return values.map((value) => (most - least > 1e-9 ? (value - least) / (most - least) : 0));
}

function hideHeat() {
  $("#heat").hidden = true;
  $("#heat").setAttribute("aria-label", "no heat map");
  $("#preview").classList.remove("grey");
}

function drawHeat(canvas, token) {
  const rows = token.patches.length, columns = token.patches[0].length, values = token.patches.flat(), shares = scaled(values);
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), pixels = context.createImageData(columns, rows);
  shares.forEach((share, n) => pixels.data.set([...colour(share), 255], 4 * n));
  context.putImageData(pixels, 0, 0);
  const best = values.indexOf(Math.max(...values));
  canvas.setAttribute("aria-label", `heat map of token ${token.id} over ${rows} by ${columns} patches; most similar: row ${Math.floor(best / columns) + 1}, `
    + `column ${best % columns + 1}`);
}

function showHeat(token) {
  drawHeat($("#heat"), token);
  $("#heat").hidden = false;
  $("#preview").classList.add("grey");
}

// On a phone the picture is far above: the card gets one of its own.
function nearHeat(token) {
  const canvas = element("canvas", {role: "img"}), picture = element("img", {src: $("#preview").src, alt: "", className: "grey"});
  drawHeat(canvas, token);
  return element("div", {className: "near"}, element("div", {className: "fit"}, picture, canvas));
}

// ---- what the cards show

function bars(shares, most = 5) {
  const list = element("ul", {className: "bars"});
  for (const [name, share] of Object.entries(shares).slice(0, most)) {
    const item = element("li", {}, element("span", {textContent: name}), element("span", {textContent: `${(100 * share).toFixed(1)} %`}));
    item.style.setProperty("--share", `${100 * share}%`);
    list.append(item);
  }
  return list;
}

const SHOWN = {
  caption: (told) => [element("p", {className: "big", textContent: told.caption || "(an empty caption)"}),
    ...(told.others?.length ? [element("p", {className: "soft", textContent: `also: ${told.others.slice(0, 3).join(" · ")}`})] : [])],
  answer: (told) => [element("p", {className: "big", textContent: told.answer}), bars(told.candidates)],
  entail: (told) => [element("p", {className: "big", textContent: told.label}), bars(told.probabilities)],
  explain: explained,
  search: found,
};

function explained(told) {
  const lines = (told.summary ?? []).map((line) => element("p", {className: "soft", textContent: line}));
  const detail = element("div"), choice = element("fieldset", {}, element("legend", {textContent: "Heat map of token"}));
  const choose = (token) => {
    const words = element("p", {className: "words"}), shares = scaled(token.words);
    told.words.forEach((word, n) => {
      const span = element("span", {textContent: word, title: token.words[n].toFixed(3)});
      Object.assign(span.style, {background: `rgb(${colour(shares[n])})`, color: shares[n] > 0.6 ? "#000" : "#fff"});
      words.append(span, " ");
    });
    const share = (value) => (value === null || value === undefined ? "-" : value.toFixed(3));
    detail.replaceChildren(element("p", {className: "soft",
      textContent: `rank ${token.rank}, ${ORIGINS[token.origin]}; mean relevance: patches ${share(token.image_share)}, words ${share(token.text_share)}`}), words);
    if (token.patches.length) {
      showHeat(token);
      detail.append(nearHeat(token));
    }
  };
  told.tokens.forEach((token, n) => {
    const radio = element("input", {type: "radio", name: "token", value: String(token.id), checked: n === 0});
    radio.addEventListener("change", () => choose(token));
    choice.append(element("label", {}, radio, `${token.id}${token.origin === "both" ? " ●" : ""}`));
  });
  const off = element("input", {type: "radio", name: "token", value: "none"});
  off.addEventListener("change", () => { hideHeat(); detail.replaceChildren(); });
  choice.append(element("label", {}, off, "none"));
  if (told.tokens.length) choose(told.tokens[0]);
  return [...lines, choice, detail];
}

function found(told) {
  if (!told.results.length) return [element("p", {textContent: "Nothing found."})];
  const list = element("ul", {className: "found"});
  told.results.forEach((row, n) => {
    const name = row.item.split("/").pop(), picture = element("img", {src: `api/thumbnails/${row.place}`, alt: "", loading: "lazy"});
    const button = element("button", {type: "button", title: `Use ${name}`}, picture, element("small", {textContent: `${n + 1}. ${name}`}),
      element("small", {textContent: `score ${row.score.toFixed(2)}`}));
    button.addEventListener("click", () => useFound(row, name));
    list.append(element("li", {}, button));
  });
  return [element("p", {className: "soft", textContent: `${told.results.length} of ${told.items} pictures; press one to use it`}), list];
}

async function useFound(row, name) {
  try {
    const answer = await fetch(`api/pictures/${row.place}`);
    if (!answer.ok) throw new Error();
    await choosePicture(await answer.blob(), name);
    $("#picture-title").scrollIntoView({block: "nearest"});
  } catch {
    fail($("#search"), `${name} cannot be fetched any more; index the folder again.`);
  }
}

// ---- asking

async function ask(card) {
  const name = card.id, text = card.elements.text?.value.trim() ?? "", number = state.number, picture = card.hasAttribute("data-needs-picture");
  if (picture && !state.picture) return fail(card, "Choose a picture first.");
  if (card.elements.text?.required && !text) return fail(card, "Type something first.");
  busy(card, true);
  $("button", card).disabled = true;
  try {
    const told = await call(state.about.tasks[name].path, {...(picture ? {image: state.picture.data} : {}), ...(text ? {text} : {})});
    if (!picture || number === state.number) show(card, ...SHOWN[name](told));
  } catch (error) {
    if (!picture || number === state.number) fail(card, error.message);
  }
  card.setAttribute("aria-busy", "false");
  enable();
}

function enable() {
  for (const card of document.querySelectorAll("form.card")) {
    const able = state.about?.tasks?.[card.id]?.available, waiting = card.getAttribute("aria-busy") === "true";
    const ready = able && !waiting && (!card.hasAttribute("data-needs-picture") || state.picture);
    $("button", card).disabled = !ready;
    card.classList.toggle("unavailable", !able);
    if (card.elements.text) card.elements.text.disabled = !able;
  }
}

async function start() {
  const cards = [...document.querySelectorAll("form.card")];
  setUpPicture();
  cards.forEach((card) => card.addEventListener("submit", (event) => { event.preventDefault(); ask(card); }));
  enable();
  const server = $("#server");
  try {
    state.about = await call("api/about");
    server.textContent = state.about.title;
    for (const card of cards) {
      const task = state.about.tasks[card.id];
      if (!task?.available) show(card, element("p", {className: "soft", textContent: `Not available: ${task?.reason ?? "this server has no model for it"}.`}));
    }
  } catch (error) {
    server.className = "error";
    server.textContent = error.message;
  }
  enable();
}

start();
