"use strict";
// Everything shown comes from the page's own elements by textContent and attributes; no text is ever read as HTML.
const at = (id) => document.getElementById(id);
const figures = [...document.querySelectorAll("figure")];
const [view, full, words, adapter] = ["view", "full", "words", "adapter"].map(at);
const link = (figure) => figure.querySelector("a");
const plain = (text) => text.toLowerCase().normalize("NFKD");
const searched = new Map(figures.map((figure) => [figure, plain(figure.querySelector(".prompt").textContent)]));
let current = null;

document.documentElement.classList.add("scripted");
at("filter").hidden = false;

// --- filter

const matching = () => figures.filter((figure) => !figure.hidden);

function filter() {
  const wanted = plain(words.value).split(/\s+/).filter(Boolean);
  const worn = adapter ? adapter.value : "";
  for (const figure of figures) {
    const text = searched.get(figure);
    figure.hidden = !wanted.every((word) => text.includes(word)) || (worn !== "" && !figure.dataset.adapters.split(" ").includes(worn));
  }
  const left = matching().length;
  const all = `${figures.length} picture${figures.length === 1 ? "" : "s"}`;
  at("count").textContent = left === figures.length ? all : `${left} of ${all}`;
  at("none").hidden = left > 0;
}

words.addEventListener("input", filter);
if (adapter) adapter.addEventListener("change", filter);
at("reset").addEventListener("click", () => {
  words.value = "";
  if (adapter) adapter.value = "";
  filter();
  words.focus();
});

// --- full view; the address names the picture, so that a phone's back button closes it

function show(figure) {
  current = figure;
  const shown = matching();
  const picture = figure.querySelector("img");
  full.src = link(figure).href;
  full.alt = picture.alt;
  at("place").textContent = `${shown.indexOf(figure) + 1} of ${shown.length}`;
  at("view-prompt").textContent = figure.querySelector(".prompt").textContent;
  const facts = figure.querySelector("dl");
  at("facts").replaceChildren(...(facts ? [...facts.cloneNode(true).children] : []));
  at("facts").hidden = !facts;
  at("download").href = link(figure).href;
  at("download").download = link(figure).download;
  for (const button of view.querySelectorAll("[data-copy]")) button.hidden = textOf(button.dataset.copy) === "";
  at("previous").hidden = at("next").hidden = shown.length < 2;
  say("");
  if (!view.open) view.showModal();
}

function visit(figure) {
  const way = view.open ? "replaceState" : "pushState";
  try {
    history[way]({ view: true }, "", `#${figure.id}`);
  } catch {
    // a page inside another one may have no address of its own
  }
  show(figure);
}

function move(steps) {
  const shown = matching();
  if (shown.length) visit(shown[(shown.indexOf(current) + steps + shown.length) % shown.length]);
}

function follow() {
  const named = location.hash ? at(location.hash.slice(1)) : null;
  if (named instanceof HTMLElement && figures.includes(named)) show(named);
  else if (view.open) view.close();
}

for (const figure of figures) {
  link(figure).addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    visit(figure);
  });
}
at("close").addEventListener("click", () => view.close());
at("previous").addEventListener("click", () => move(-1));
at("next").addEventListener("click", () => move(1));
view.addEventListener("close", () => {
  try {
    if (history.state && history.state.view) history.back();
    else if (location.hash) history.replaceState(null, "", location.href.split("#")[0]);
  } catch {
    // as above
  }
  full.removeAttribute("src");
  link(current).focus();
});
addEventListener("popstate", follow);

document.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!steps || event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (view.open) {
    event.preventDefault();
    move(steps);
    return;
  }
  const shown = matching();
  const from = shown.findIndex((figure) => figure.contains(document.activeElement));
  if (from >= 0) link(shown[Math.min(shown.length - 1, Math.max(0, from + steps))]).focus();
});

let touched = null;
at("stage").addEventListener("touchstart", (event) => {
  touched = event.touches.length === 1 ? event.touches[0] : null;
}, { passive: true });
at("stage").addEventListener("touchend", (event) => {
  const end = event.changedTouches[0];
  const zoomed = window.visualViewport && visualViewport.scale > 1.05;
  if (touched && !zoomed && Math.abs(end.clientX - touched.clientX) > 48 && Math.abs(end.clientX - touched.clientX) > 1.5 * Math.abs(end.clientY - touched.clientY)) {
    move(end.clientX < touched.clientX ? 1 : -1);
  }
  touched = null;
}, { passive: true });

// --- copy

function textOf(what) {
  if (what === "prompt") return current.querySelector(".prompt").textContent;
  if (what === "seed") return current.querySelector("dd") ? current.querySelector("dd").textContent : "";
  const text = current.querySelector(`pre[data-text="${what}"]`);
  return text ? text.textContent : "";
}

function say(text) {
  at("said").textContent = text;
  at("shown").hidden = true;
}

async function copy(what) {
  const text = textOf(what);
  try {
    await navigator.clipboard.writeText(text);
    const where = what === "prompt" || what === "seed" ? "" : "; run it in the folder of the adapter files";
    say(`Copied the ${what === "python" ? "Python lines" : what}${where}.`);
  } catch {
    say("Select and copy:");
    at("shown").hidden = false;
    at("shown").value = text;
    at("shown").focus();
    at("shown").select();
  }
}

for (const button of view.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy));

follow();
