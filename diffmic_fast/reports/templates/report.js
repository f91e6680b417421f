"use strict";
// Sorting, filtering and moving among the images of a page of predictions. Values are read from data attributes, and
// text is written with textContent alone.
(() => {
  const list = document.getElementById("cards");
  const tools = document.getElementById("tools");
  if (!list || !tools) return;
  const field = (id) => document.getElementById(id);
  const status = field("status");
  const nothing = field("nothing");
  const numberOf = (text) => (text === undefined ? NaN : Number(text));
  const cards = Array.from(list.children, (item) => ({
    item,
    article: item.querySelector("article"),
    number: Number(item.dataset.number),
    name: item.dataset.name,
    lower: item.dataset.name.toLowerCase(),
    label: item.dataset.label,
    confidence: numberOf(item.dataset.confidence),
    spread: numberOf(item.dataset.spread),
    novelty: numberOf(item.dataset.novelty),
    flagged: "flagged" in item.dataset,
    undecided: "undecided" in item.dataset,
    disagree: "disagree" in item.dataset,
  }));
  const names = new Intl.Collator(undefined, { numeric: true });
  let order = cards.slice();

  const labelOf = (card) => (card.label === "unreadable" ? NaN : Number(card.label));

  // Values that are not defined come last, in either direction; equal ones keep the order of the run.
  function compare(key) {
    const sign = key.startsWith("-") ? -1 : 1;
    const name = key.replace("-", "");
    if (name === "name") return (a, b) => names.compare(a.name, b.name) || a.number - b.number;
    const value = name === "label" ? labelOf : (card) => card[name];
    return (a, b) => {
      const x = value(a);
      const y = value(b);
      if (Number.isNaN(x) || Number.isNaN(y)) {
        return Number.isNaN(x) - Number.isNaN(y) || a.number - b.number;
      }
      return sign * (x - y) || a.number - b.number;
    };
  }

  function sort() {
    order = cards.slice().sort(compare(field("sort").value));
    const all = document.createDocumentFragment();
    for (const card of order) all.append(card.item);
    list.append(all);
    filter();
  }

  function limit(id, otherwise) {
    const value = field(id).valueAsNumber;
    return Number.isNaN(value) ? otherwise : value / 100;
  }

  const checked = (id) => field(id) !== null && field(id).checked;

  function filter() {
    const label = field("class").value;
    const least = limit("least", -Infinity);
    const most = limit("most", Infinity);
    const bounded = least !== -Infinity || most !== Infinity;
    const text = field("text").value.trim().toLowerCase();
    const only = ["flagged", "undecided", "disagree"].filter(checked);
    let shown = 0;
    for (const card of cards) {
      const keep =
        (label === "" || card.label === label) &&
        (!bounded || (card.confidence >= least && card.confidence <= most)) &&
        (text === "" || card.lower.includes(text)) &&
        only.every((id) => card[id]);
      card.item.hidden = !keep;
      if (keep) shown += 1;
    }
    const of = shown === cards.length ? "" : ` of ${cards.length.toLocaleString("en")}`;
    status.textContent = `${shown.toLocaleString("en")}${of} images`;
    nothing.hidden = shown > 0;
    rove();
  }

  const visible = () => order.filter((card) => !card.item.hidden);

  // One image of the list is in the tab order; the arrow keys move from there.
  function rove(chosen) {
    const among = visible();
    const current = chosen ?? among.find((card) => card.article.tabIndex === 0) ?? among[0];
    for (const card of cards) card.article.tabIndex = card === current ? 0 : -1;
  }

  function show() {
    for (const id of ["show-heat", "show-boxes"]) list.classList.toggle(id, checked(id));
  }

  list.addEventListener("keydown", (event) => {
    const among = visible();
    const at = among.findIndex((card) => card.article === event.target);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: among.length - 1 }[event.key];
    if (at < 0 || to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const card = among[Math.min(Math.max(to, 0), among.length - 1)];
    rove(card);
    card.article.focus();
  });
  list.addEventListener("focusin", (event) => {
    const card = cards.find((one) => one.article === event.target);
    if (card) rove(card);
  });
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.addEventListener("input", (event) => {
    if (["least", "most", "text"].includes(event.target.id)) filter();
  });
  tools.addEventListener("change", (event) => {
    if (event.target.id === "sort") sort();
    else if (event.target.id.startsWith("show-")) show();
    else filter();
  });
  tools.addEventListener("reset", () => {
    setTimeout(() => {
      sort();
      show();
    });
  });
  tools.hidden = false;
  field("hint").hidden = false;
  // A browser may restore the controls of an earlier visit.
  show();
  sort();
})();
