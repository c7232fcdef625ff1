"use strict";
const PER_PAGE = 50;
const $ = (id) => document.getElementById(id);
const run = JSON.parse($("run").textContent);
const end = JSON.parse($("end").textContent);
const names = run.members.map(([name]) => name);
const weights = run.members.map(([, weight]) => weight);

// The order of decode.engine.attribution.Explanation, then the deciding member, -1 for none. A member of weight zero
// has null in logprobs, ranks and bests.
const FIELDS =
  ["id", "logprob", "runner", "runnerLogprob", "logprobs", "ranks", "contributions", "bests", "bestLogprobs", "decider"];
const toToken = (values) => Object.fromEntries(FIELDS.map((field, at) => [field, values[at]]));
const overruled = (token, member) => token.ranks[member] > 1 && weights[member] > 0;
const deciderName = (token) => (token.decider < 0 ? run.other : names[token.decider]);
const sentences = $("sentences").textContent.split("\n").filter((line) => line.trim()).map((line) => {
  const sentence = JSON.parse(line);
  sentence.tokens = sentence.tokens.map(toToken);
  sentence.searched = [sentence.source, sentence.reference || "", sentence.text].join("\n").toLowerCase();
  return sentence;
});

const make = (tag, attributes, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {}))
    if (value !== null) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
};
const row = (kind, attributes, ...cells) =>
  make("tr", attributes, ...cells.map((cell) => (cell instanceof Node ? cell : make(kind, null, cell))));
const count = (number) => number.toLocaleString("en");
const minus = (text) => text.replace("-", "\u2212");
const signed = (value) => (value < 0 ? "" : "+") + minus(value.toFixed(2));
const percent = (part, whole) => (whole ? Math.round((100 * part) / whole) + " %" : "");
const probability = (logprob) => {
  if (logprob === null) return "\u2013";
  const p = Math.exp(logprob);
  if (p >= 0.001) return p.toFixed(p < 0.1 ? 3 : 2);
  return logprob < -300 ? "0" : minus(p.toExponential(0));
};
const visible = (text) => text.replace(/\n/g, "\u23ce");
const piece = (id) =>
  make("span", { class: "piece", lang: run.target }, visible(end.pieces[id].replace(/^ /, "\u2423")) || "\u2205");
const swatch = (member) =>
  make("span", { class: "swatch", "data-m": member }, member < 0 ? run.other : names[member]);

// Head: the run, and each member's share of it.
const tokens = sentences.flatMap((sentence) => sentence.tokens);
$("run-line").textContent =
  `${run.expression} \u00b7 ${run.source} to ${run.target} \u00b7 ${run.search} \u00b7 ` +
  `${count(sentences.length)} sentences, ${count(tokens.length)} tokens with their ends`;
$("ended").hidden = end.whole;
$("first").textContent = names[0];
const share = (holds) => percent(tokens.filter(holds).length, tokens.length);
$("members").append(
  make("thead", null, row("th", null, "member", "weight", "decided", "overruled")),
  make("tbody", null, ...names.map((_, member) =>
    row("td", null, make("td", null, swatch(member)), minus(String(weights[member])),
      share((token) => token.decider === member),
      weights[member] > 0 ? share((token) => overruled(token, member)) : "\u2013"))),
);
names.forEach((name, member) => {
  if (weights[member] > 0) $("overruled").append(make("option", { value: member }, name + " overruled"));
  $("decided").append(make("option", { value: member }, name));
});
if (tokens.some((token) => token.decider < 0)) $("decided").append(make("option", { value: -1 }, run.other));

// List: the sentences that pass the filter, one page of them at a time.
let shown = sentences;
let first = 0;
const chosenFilter = () => {
  const [text, member, decider] = ["text", "overruled", "decided"].map((id) => $(id).value);
  return {
    text: text.trim().toLowerCase(),
    anyToken: member === "" && decider === "",
    passes: (token) => (member === "" || overruled(token, +member)) && (decider === "" || token.decider === +decider),
  };
};

function filter() {
  const { text, anyToken, passes } = chosenFilter();
  shown = sentences.filter((s) => s.searched.includes(text) && (anyToken || s.tokens.some(passes)));
  const found = shown.reduce((sum, s) => sum + s.tokens.filter(passes).length, 0);
  $("count").textContent =
    shown.length === sentences.length && anyToken
      ? `All ${count(sentences.length)} sentences`
      : `${count(shown.length)} of ${count(sentences.length)} sentences` +
        (anyToken ? "" : `, ${count(found)} such tokens`);
  first = 0;
  list();
}

function list() {
  const { passes } = chosenFilter();
  const last = Math.min(first + PER_PAGE, shown.length);
  $("list").replaceChildren(...shown.slice(first, last).map((sentence) => article(sentence, passes)));
  $("back").disabled = first === 0;
  $("forward").disabled = last === shown.length;
  $("where").textContent = `${first + 1} to ${last} of ${shown.length}`;
  document.querySelector(".page").hidden = shown.length <= PER_PAGE;
  select(null);
}

function article(sentence, passes) {
  const group = make("div", {
    class: "tokens", role: "group", "aria-label": `Tokens of sentence ${sentence.line}`, lang: run.target, dir: "auto",
  });
  sentence.tokens.forEach((token, number) => {
    const raw = end.pieces[token.id];
    const isEnd = sentence.finished === "stop" && number === sentence.tokens.length - 1;
    const over = overruled(token, 0);
    const classes = {
      token: true, word: raw.startsWith(" ") && number, end: isEnd, overruled: over, dim: !passes(token),
    };
    const button = make("button", {
      type: "button",
      class: Object.keys(classes).filter((name) => classes[name]).join(" "),
      "data-m": token.decider,
      "aria-label": `${raw.trim() || "space"}, ${probability(token.logprob)}, decided by ${deciderName(token)}` +
        (over ? `, ${names[0]} overruled` : ""),
      "aria-pressed": "false",
      "aria-controls": "panel",
      tabindex: number ? -1 : 0,
    }, isEnd ? "end" : visible(raw.replace(/^ /, "") || "\u2423"));
    button.shown = { sentence, number };
    group.append(button);
  });
  return make("article", { id: "s" + sentence.line },
    make("h2", null, String(sentence.line)),
    make("p", { class: "source", lang: run.source, dir: "auto" }, sentence.source),
    sentence.reference === null ? null : make("p", { class: "reference", dir: "auto" }, "Reference: ",
      make("span", { lang: run.target }, sentence.reference)),
    group);
}

// Panel: the details of one token.
let selected = null;
function select(button) {
  if (selected) selected.setAttribute("aria-pressed", "false");
  selected = button;
  const panel = $("panel");
  panel.classList.toggle("empty", !button);
  document.body.classList.toggle("open", !!button);
  if (!button) {
    panel.replaceChildren(make("p", { class: "soft" }, "Choose a token to see the probabilities of each member."));
    return;
  }
  for (const other of button.parentNode.children) other.tabIndex = other === button ? 0 : -1;
  button.setAttribute("aria-pressed", "true");
  const { sentence, number } = button.shown;
  const close = make("button", { type: "button", class: "close", "aria-label": "Close" }, "\u00d7");
  close.addEventListener("click", () => {
    select(null);
    button.focus();
  });
  panel.replaceChildren(close, ...details(sentence, number, sentence.tokens[number]));
  $("announced").textContent = panel.querySelector(".sum").textContent;
  panel.scrollTop = 0;
  try {
    history.replaceState(null, "", `#${sentence.line}.${number + 1}`);
  } catch {
    // Some viewers do not allow it.
  }
}

function details(sentence, number, token) {
  const margin = token.runner === null ? null : token.logprob - token.runnerLogprob;
  const contributions = token.contributions;
  const largest = Math.max(1e-9, ...contributions.map(Math.abs));
  const contribution = (value) => {
    const bar = make("i", { class: value < 0 ? "against" : null });
    const width = (50 * Math.abs(value)) / largest;
    bar.style.cssText = `left:${value < 0 ? 50 - width : 50}%;width:${width}%`;
    return make("td", { class: "margin" }, signed(value), make("span", { class: "bar" }, bar));
  };
  const own = (member) => {
    if (token.bests[member] === null) return ["\u2013"];
    if (token.ranks[member] === 1) return ["the same"];
    return [piece(token.bests[member]), " " + probability(token.bestLogprobs[member])];
  };
  const rows = names.map((_, member) =>
    row("td", { "data-m": member }, make("td", null, swatch(member)), probability(token.logprobs[member]),
      token.ranks[member] === null ? "" : "#" + token.ranks[member],
      make("td", { class: "own" }, ...own(member)),
      margin === null ? "" : contribution(contributions[member])));
  const found = [
    make("h2", null, piece(token.id), " ", probability(token.logprob)),
    make("p", { class: "soft" }, `Token ${number + 1} of sentence ${sentence.line}`),
    make("p", { class: "sum" }, "Decided by ", swatch(token.decider), ". ",
      ...(margin === null
        ? ["Every other token is masked."]
        : ["Runner-up: ", piece(token.runner),
          ` ${probability(token.runnerLogprob)}, margin ${signed(margin)} nats.`])),
    make("table", null,
      make("thead", null,
        row("th", null, "", "p", "rank", make("th", { class: "own" }, "own choice"), "contribution")),
      make("tbody", null, ...rows),
      margin === null ? null : make("tfoot", null,
        row("td", null, make("td", { colspan: 4 }, "Margin"), make("td", { class: "margin" }, signed(margin))))),
  ];
  const over = names.filter((_, member) => overruled(token, member));
  if (over.length)
    found.push(make("p", { class: overruled(token, 0) ? "warn" : null },
      over.join(" and ") + (over.length > 1 ? " are overruled." : " is overruled.")));
  const needed = names.filter((_, member) => margin >= 0 && margin - contributions[member] < 0);
  if (needed.length)
    found.push(make("p", { class: "soft" }, `Without ${needed.join(" or ")} the runner-up would be the best.`));
  return found;
}

// Keys and clicks. A sentence is one stop of the Tab key; the focused token is the selected one.
$("list").addEventListener("focusin", (event) => {
  if (event.target.shown) select(event.target);
});
$("list").addEventListener("click", (event) => {
  const button = event.target.closest(".token");
  if (!button) return;
  button.focus();
  select(button);
});
$("list").addEventListener("keydown", (event) => {
  const button = event.target;
  if (!button.shown || event.altKey || event.ctrlKey || event.metaKey) return;
  const group = button.parentNode;
  const [next, previous] = [button.nextElementSibling, button.previousElementSibling];
  const rightToLeft = getComputedStyle(group).direction === "rtl";
  const tabStop = (article) => (article ? article.querySelector(".token[tabindex='0']") : null);
  const targets = {
    ArrowRight: rightToLeft ? previous : next,
    ArrowLeft: rightToLeft ? next : previous,
    Home: group.firstElementChild,
    End: group.lastElementChild,
    ArrowDown: tabStop(group.parentNode.nextElementSibling),
    ArrowUp: tabStop(group.parentNode.previousElementSibling),
  };
  if (!(event.key in targets)) return;
  event.preventDefault();
  const target = targets[event.key];
  if (!target) return;
  target.focus();
  target.scrollIntoView({ block: "nearest" });
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("text").focus();
  }
  if (event.key === "Escape") select(null);
});
let timer = 0;
$("text").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(filter, 120);
});
$("overruled").addEventListener("change", filter);
$("decided").addEventListener("change", filter);
$("filter").addEventListener("submit", (event) => event.preventDefault());
const showPage = (direction) => {
  first += direction * PER_PAGE;
  list();
  $("count").scrollIntoView();
};
$("back").addEventListener("click", () => showPage(-1));
$("forward").addEventListener("click", () => showPage(1));

// An address such as #12.3 names a token: the third of sentence 12.
function follow() {
  const [, line, number] = /^#(\d+)(?:\.(\d+))?$/.exec(location.hash) || [];
  const at = shown.findIndex((sentence) => sentence.line === +line);
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
