"use strict";
const PER_PAGE = 50;
const $ = (id) => document.getElementById(id);
const run = JSON.parse($("run").textContent),
  end = JSON.parse($("end").textContent);
const names = run.members.map(([name]) => name),
  weights = run.members.map(([, weight]) => weight);

// The order of decode.explain.Explanation, the decider behind it.
const token = ([id, logprob, runner, runnerLogprob, logprobs, ranks, pushes, bests, bestLogprobs, by]) => ({
  id,
  logprob,
  runner,
  runnerLogprob,
  logprobs,
  ranks,
  pushes,
  bests,
  bestLogprobs,
  by,
});
const overruled = (t, member) => t.ranks[member] > 1 && weights[member] > 0;
const sentences = $("sentences")
  .textContent.split("\n")
  .filter((line) => line.trim())
  .map((line) => {
    const sentence = JSON.parse(line);
    sentence.tokens = sentence.tokens.map(token);
    sentence.found = [sentence.source, sentence.reference || "", sentence.text].join("\n").toLowerCase();
    return sentence;
  });

const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
};
const minus = (text) => text.replace("-", "\u2212");
const probability = (logprob) => {
  const p = Math.exp(logprob);
  if (p >= 0.001) return p.toFixed(p < 0.1 ? 3 : 2);
  return logprob < -300 ? "0" : minus(p.toExponential(0));
};
const signed = (value) => (value < 0 ? minus(value.toFixed(2)) : "+" + value.toFixed(2));
const percent = (part, whole) => (whole ? Math.round((100 * part) / whole) + " %" : "");
const text = (id) => end.pieces[id];
const visible = (id) => text(id).replace(/^ /, "\u2423").replace(/\n/g, "\u23ce") || "\u2205";
const piece = (id, lang) => make("span", { class: "piece", lang }, visible(id));
const swatch = (member) => make("span", { class: "swatch", "data-m": member }, member < 0 ? run.other : names[member]);

// Head: what was run, and what each member did in all of it.
const total = sentences.reduce((sum, s) => sum + s.tokens.length, 0);
$("run-line").textContent =
  `${run.expression} \u00b7 ${run.source} to ${run.target} \u00b7 ${run.search} \u00b7 ` +
  `${sentences.length.toLocaleString("en")} sentences, ${total.toLocaleString("en")} tokens with their ends`;
$("ended").hidden = end.whole;
$("first").textContent = names[0];
const decided = new Array(names.length).fill(0),
  against = new Array(names.length).fill(0);
for (const s of sentences)
  for (const t of s.tokens) {
    if (t.by >= 0) decided[t.by] += 1;
    names.forEach((_, member) => {
      if (overruled(t, member)) against[member] += 1;
    });
  }
$("members").append(
  make(
    "thead",
    {},
    make("tr", {}, ...["member", "weight", "decided", "overruled"].map((name) => make("th", { scope: "col" }, name))),
  ),
  make(
    "tbody",
    {},
    ...names.map((_, member) =>
      make(
        "tr",
        {},
        make("td", {}, swatch(member)),
        make("td", {}, minus(String(weights[member]))),
        make("td", {}, percent(decided[member], total)),
        make("td", {}, weights[member] > 0 ? percent(against[member], total) : "\u2013"),
      ),
    ),
  ),
);
names.forEach((name, member) => {
  if (weights[member] > 0) $("overruled").append(make("option", { value: member }, name + " overruled"));
  $("decided").append(make("option", { value: member }, name));
});
if (sentences.some((s) => s.tokens.some((t) => t.by < 0)))
  $("decided").append(make("option", { value: -1 }, run.other));

// List: the sentences that pass the filter, a page of them at a time.
let shown = sentences,
  first = 0;
const asked = () => ({
  text: $("text").value.trim().toLowerCase(),
  overruled: $("overruled").value,
  decided: $("decided").value,
});
const passes = (t, want) =>
  (want.overruled === "" || overruled(t, +want.overruled)) && (want.decided === "" || t.by === +want.decided);

function filter() {
  const want = asked(),
    free = want.overruled === "" && want.decided === "";
  shown = sentences.filter((s) => s.found.includes(want.text) && (free || s.tokens.some((t) => passes(t, want))));
  const tokens = free ? 0 : shown.reduce((sum, s) => sum + s.tokens.filter((t) => passes(t, want)).length, 0);
  $("count").textContent =
    shown.length === sentences.length && free
      ? `All ${sentences.length.toLocaleString("en")} sentences`
      : `${shown.length.toLocaleString("en")} of ${sentences.length.toLocaleString("en")} sentences` +
        (free ? "" : `, ${tokens.toLocaleString("en")} such tokens`);
  first = 0;
  list();
}

function list() {
  const want = asked();
  $("list").replaceChildren(...shown.slice(first, first + PER_PAGE).map((s) => article(s, want)));
  $("back").disabled = first === 0;
  $("forward").disabled = first + PER_PAGE >= shown.length;
  $("where").textContent = shown.length
    ? `${first + 1} to ${Math.min(first + PER_PAGE, shown.length)} of ${shown.length}`
    : "";
  document.querySelector(".page").hidden = shown.length <= PER_PAGE;
  choose(null);
}

function article(s, want) {
  const group = make("div", {
    class: "tokens",
    role: "group",
    "aria-label": `Tokens of sentence ${s.line}`,
    lang: run.target,
    dir: "auto",
  });
  s.tokens.forEach((t, number) => {
    const raw = text(t.id),
      isEnd = s.finished === "stop" && number === s.tokens.length - 1;
    const over = overruled(t, 0);
    const label =
      `${raw.trim() || "space"}, ${probability(t.logprob)}, decided by ${t.by < 0 ? run.other : names[t.by]}` +
      (over ? `, ${names[0]} overruled` : "");
    const kinds = [
      "token",
      raw.startsWith(" ") && number ? "word" : "",
      isEnd ? "end" : "",
      over ? "overruled" : "",
      passes(t, want) ? "" : "dim",
    ];
    const button = make(
      "button",
      {
        type: "button",
        class: kinds.filter(Boolean).join(" "),
        "data-m": t.by,
        "aria-label": label,
        "aria-pressed": "false",
        "aria-controls": "panel",
        tabindex: number ? -1 : 0,
      },
      isEnd ? "end" : (raw.replace(/^ /, "") || "\u2423").replace(/\n/g, "\u23ce"),
    );
    button.shown = { sentence: s, number };
    group.append(button);
  });
  return make(
    "article",
    { id: "s" + s.line },
    make("h2", {}, String(s.line)),
    make("p", { class: "source", lang: run.source, dir: "auto" }, s.source),
    s.reference === null
      ? null
      : make("p", { class: "reference", dir: "auto" }, "Reference: ", make("span", { lang: run.target }, s.reference)),
    group,
  );
}

// Panel: one token.
let chosen = null;
function choose(button) {
  if (chosen) chosen.setAttribute("aria-pressed", "false");
  chosen = button;
  const panel = $("panel");
  panel.classList.toggle("empty", !button);
  document.body.classList.toggle("open", !!button);
  if (!button) {
    panel.replaceChildren(make("p", { class: "soft" }, "Choose a token to see what each member said of it."));
    return;
  }
  for (const other of button.parentNode.children) other.tabIndex = other === button ? 0 : -1;
  button.setAttribute("aria-pressed", "true");
  const { sentence, number } = button.shown,
    t = sentence.tokens[number];
  const close = make("button", { type: "button", class: "close", "aria-label": "Close" }, "\u00d7");
  close.addEventListener("click", () => {
    const at = chosen;
    choose(null);
    at.focus();
  });
  panel.replaceChildren(close, ...details(sentence, number, t));
  $("said").textContent = panel.querySelector(".sum").textContent;
  panel.scrollTop = 0;
  try {
    history.replaceState(null, "", `#${sentence.line}.${number + 1}`);
  } catch {
    /* not where addresses are fixed */
  }
}

function details(sentence, number, t) {
  const margin = t.runner === null ? null : t.logprob - t.runnerLogprob;
  const largest = Math.max(1e-9, ...t.pushes.map(Math.abs));
  const rows = names.map((name, member) => {
    const own = t.ranks[member] > 1;
    const push = t.pushes.length ? t.pushes[member] : null;
    const width = push === null ? 0 : (50 * Math.abs(push)) / largest;
    const bar = make("i", { class: push < 0 ? "against" : false });
    bar.style.cssText = `left:${push < 0 ? 50 - width : 50}%;width:${width}%`;
    return make(
      "tr",
      { "data-m": member },
      make("td", {}, swatch(member)),
      make("td", {}, probability(t.logprobs[member])),
      make("td", {}, "#" + t.ranks[member]),
      make(
        "td",
        { class: "own" },
        ...(own ? [piece(t.bests[member], run.target), " " + probability(t.bestLogprobs[member])] : ["the same"]),
      ),
      make(
        "td",
        { class: "push" },
        push === null ? "" : signed(push),
        push === null ? null : make("span", { class: "bar" }, bar),
      ),
    );
  });
  const head = ["", "says", "rank", "own choice", "push"].map((name) =>
    make("th", { scope: "col", class: name === "own choice" ? "own" : false }, name),
  );
  const found = [
    make("h2", {}, piece(t.id, run.target), " ", probability(t.logprob)),
    make("p", { class: "soft" }, `Token ${number + 1} of sentence ${sentence.line}`),
    make(
      "p",
      { class: "sum" },
      "Decided by ",
      swatch(t.by),
      ". ",
      ...(t.runner === null
        ? ["Every other token is masked."]
        : [
            "Runner-up: ",
            piece(t.runner, run.target),
            ` ${probability(t.runnerLogprob)}, ${margin < 0 ? "better" : "behind"} by ${Math.abs(margin).toFixed(2)} nats.`,
          ]),
    ),
    make(
      "table",
      {},
      make("thead", {}, make("tr", {}, ...head)),
      make("tbody", {}, ...rows),
      margin === null
        ? null
        : make(
            "tfoot",
            {},
            make("tr", {}, make("td", { colspan: 4 }, "Together"), make("td", { class: "push" }, signed(margin))),
          ),
    ),
  ];
  const over = names.map((_, member) => member).filter((member) => overruled(t, member));
  if (over.length) {
    found.push(
      make(
        "p",
        { class: over[0] === 0 ? "warn" : false },
        over.map((member) => names[member]).join(" and ") + (over.length > 1 ? " are overruled." : " is overruled."),
      ),
    );
  }
  const needed = names.filter((_, member) => margin >= 0 && t.pushes.length && margin - t.pushes[member] < 0);
  if (needed.length)
    found.push(
      make(
        "p",
        { class: "soft" },
        ...needed.flatMap((name, at) => [at ? " or " : "Without ", name]),
        " the runner-up would be ahead.",
      ),
    );
  return found;
}

// Keys and clicks. A sentence is one stop of the Tab key; choosing follows the focus.
$("list").addEventListener("focusin", (event) => {
  if (event.target.shown) choose(event.target);
});
$("list").addEventListener("click", (event) => {
  const button = event.target.closest(".token");
  if (button) {
    button.focus();
    choose(button);
  }
});
$("list").addEventListener("keydown", (event) => {
  const button = event.target;
  if (!button.shown || event.altKey || event.ctrlKey || event.metaKey) return;
  const group = button.parentNode,
    rtl = getComputedStyle(group).direction === "rtl";
  const along = { ArrowRight: rtl ? -1 : 1, ArrowLeft: rtl ? 1 : -1 }[event.key];
  let to = null;
  if (along) to = along > 0 ? button.nextElementSibling : button.previousElementSibling;
  else if (event.key === "Home") to = group.firstElementChild;
  else if (event.key === "End") to = group.lastElementChild;
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const next =
      event.key === "ArrowDown" ? group.parentNode.nextElementSibling : group.parentNode.previousElementSibling;
    to = next ? next.querySelector(".token[tabindex='0']") : null;
  } else return;
  event.preventDefault();
  if (to) {
    to.focus();
    to.scrollIntoView({ block: "nearest" });
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("text").focus();
  }
  if (event.key === "Escape") choose(null);
});
let waiting = 0;
$("text").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(filter, 120);
});
$("overruled").addEventListener("change", filter);
$("decided").addEventListener("change", filter);
$("filter").addEventListener("submit", (event) => event.preventDefault());
const turn = (by) => {
  first += by * PER_PAGE;
  list();
  $("count").scrollIntoView();
};
$("back").addEventListener("click", () => turn(-1));
$("forward").addEventListener("click", () => turn(1));

// An address such as #12.3 names a token: the third of sentence 12.
function follow() {
  const [, line, number] = /^#(\d+)(?:\.(\d+))?$/.exec(location.hash) || [];
  const at = shown.findIndex((s) => s.line === +line);
  if (at < 0) return;
  first = at - (at % PER_PAGE);
  list();
  const found = $("s" + line);
  found.scrollIntoView();
  const button = found.querySelectorAll(".token")[(number || 1) - 1];
  if (button) button.focus({ preventScroll: true });
}
window.addEventListener("hashchange", follow);
filter();
follow();
