"use strict";
// Everything is readable without this: it sorts, hides, searches, shows what a point says, and switches to dark.
for (const item of document.querySelectorAll(".script")) item.hidden = false;

const table = document.querySelector("table.compare");
const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], rows = [...body.rows];

// Sorting: the baseline stays first, failed variants last, and so does what was not measured.
const rank = row => row.classList.contains("failed") ? 2 : row.classList.contains("baseline") ? 0 : 1;
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const first = head.dataset.better === "higher" ? "descending" : "ascending";
  const order = head.getAttribute("aria-sort") !== first ? first : first === "ascending" ? "descending" : "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1, value = row => row.cells[column]?.dataset.value ?? "";
  const sorted = rows.slice().sort((a, b) => {
    if (rank(a) !== rank(b) || rank(a) === 2) return rank(a) - rank(b);
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (head.dataset.better ? x - y : x.localeCompare(y));
  });
  body.append(...sorted);
}));

// Columns, and rows that hold every word of the search.
const boxes = [...document.querySelectorAll("#columns input")];
const show = () => {
  const hidden = new Set(boxes.filter(box => !box.checked).map(box => box.value));
  heads.forEach((head, column) => {
    const away = hidden.has(head.dataset.name);
    head.hidden = away;
    for (const row of rows) if (!row.classList.contains("failed")) row.cells[column].hidden = away;
  });
  for (const row of rows) {
    if (row.classList.contains("failed") && row.cells[1]) row.cells[1].colSpan = Math.max(1, heads.length - 1 - hidden.size);
  }
};
boxes.forEach(box => box.addEventListener("change", show));
if (matchMedia("(max-width: 700px)").matches) {
  for (const box of boxes) if (["format", "runtime"].includes(box.value)) box.checked = false;
  show();
}
const search = document.getElementById("search"), count = document.getElementById("count");
search.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  const left = rows.filter(row => !row.hidden).length;
  count.textContent = !words.length ? "" : left ? `${left} of ${rows.length}` : "No variant matches";
});
const chooser = document.getElementById("columns");
document.addEventListener("click", event => { if (!chooser.contains(event.target)) chooser.open = false; });

// What a point or a heading says, in a box beside it.
const tip = document.getElementById("tip");
const speaking = new Map();
for (const point of document.querySelectorAll(".point")) {
  const title = point.querySelector("title");
  speaking.set(point, title.textContent.split("\n"));
  title.remove();
}
for (const head of heads) {
  const button = head.querySelector("button");
  speaking.set(button, [head.querySelector("b").textContent, button.title]);
  button.setAttribute("aria-description", button.title);
  button.removeAttribute("title");
}
const lit = name => rows.forEach(row => row.classList.toggle("lit", row.dataset.name === name));
let spoken = null;
const say = item => {
  spoken = item;
  const [name, ...lines] = speaking.get(item);
  const strong = document.createElement("b");
  strong.textContent = name;
  tip.replaceChildren(strong, ...lines.map(line => {
    const part = document.createElement("div"), at = item.dataset.name ? line.indexOf(": ") : -1;
    const label = document.createElement("span");
    label.textContent = `${line.slice(0, at)} `;
    part.append(...(at < 0 ? [] : [label]), line.slice(at < 0 ? 0 : at + 2));
    return part;
  }));
  tip.hidden = false;
  lit(item.dataset.name ?? null);
  place();
};
const place = () => {
  const at = spoken.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const left = Math.min(at.left + at.width / 2 - size.width / 2, document.documentElement.clientWidth - size.width - 8);
  const above = at.top - size.height - 8;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
};
const hush = () => { spoken = null; tip.hidden = true; lit(null); };
for (const item of speaking.keys()) {
  item.addEventListener("pointerenter", () => say(item));
  item.addEventListener("pointerleave", hush);
  item.addEventListener("focus", () => { if (item.dataset.name || item.matches(":focus-visible")) say(item); });
  item.addEventListener("blur", hush);
}
addEventListener("keydown", event => { if (event.key === "Escape") { hush(); chooser.open = false; } });
addEventListener("scroll", () => { if (spoken) place(); }, { capture: true, passive: true });

// Light and dark: the system's until one is chosen here; the choice is kept where the browser lets a page keep it.
const theme = document.getElementById("theme"), root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const kept = () => { try { return localStorage.getItem("lighten-theme"); } catch { return null; } };
const keep = value => { try { localStorage.setItem("lighten-theme", value); } catch { return; } };
const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
const label = () => {
  theme.textContent = dark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `Switch to ${theme.textContent.toLowerCase()}`);
};
if (["light", "dark"].includes(kept())) root.dataset.theme = kept();
theme.addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  keep(root.dataset.theme);
  label();
});
system.addEventListener("change", label);
label();

// Printed, everything is open.
let opened = [];
addEventListener("beforeprint", () => {
  hush();
  opened = [...document.querySelectorAll("details:not([open]):not(.chooser)")];
  for (const item of opened) item.open = true;
});
addEventListener("afterprint", () => { for (const item of opened) item.open = false; });
