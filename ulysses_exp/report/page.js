"use strict";
// What a cell is sorted and compared by: a number where both are, else the text; nothing comes last.
const key = cell => cell.dataset.v ?? cell.textContent;
const number = text => /^[-+]?[\d.]+(e[-+]?\d+)?$/i.test(text) ? parseFloat(text) : NaN;
const order = (a, b, down) => a === "" || b === "" ? (a === "") - (b === "") : (down ? -1 : 1) *
  (isNaN(number(a) + number(b)) ? a.localeCompare(b, "en", {numeric: true}) : number(a) - number(b));
// `loss<3.2` compares the column whose heading begins like that, spaces left out; any other word has to be in the row.
const condition = (word, titles) => {
  const parts = /^(.+?)(<=|>=|<|>|=)(.+)$/.exec(word), bare = text => text.toLowerCase().replace(/[\s,]/g, "");
  const exact = parts ? titles.findIndex(title => bare(title) === bare(parts[1])) : -1;
  const column = exact >= 0 || !parts ? exact : titles.findIndex(title => bare(title).startsWith(bare(parts[1])));
  if (column < 0) return row => row.text.includes(word.toLowerCase());
  const wanted = parts[3].replace(/,/g, ""), tests = {"<": (a, b) => a < b, ">": (a, b) => a > b,
    "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b};
  return row => isNaN(number(wanted)) ? parts[2] === "=" && row.keys[column].toLowerCase() === wanted.toLowerCase()
    : tests[parts[2]](number(row.keys[column]), number(wanted));
};
const matches = (query, titles) => {
  const conditions = query.split(/\s+/).filter(word => word).map(word => condition(word, titles));
  return row => conditions.every(holds => holds(row));
};

const sortable = table => {
  for (const head of table.tHead.rows[0].cells) head.firstElementChild.onclick = () => {
    const column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending", body = table.tBodies[0];
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort((a, b) => order(key(a.cells[column]), key(b.cells[column]), down)));
  };
};

const filterable = (table, place) => {
  const make = (tag, values) => Object.assign(document.createElement(tag), values);
  const heads = [...table.tHead.rows[0].cells], titles = heads.map(head => head.textContent);
  const rows = [...table.tBodies[0].rows].map(element => {
    const keys = [...element.cells].map(key);
    const shown = [...element.cells].map((cell, i) => i && i < heads.length ? `${titles[i]} ${cell.textContent}` : cell.textContent);
    return {element, keys, text: (shown.join(" ") + " " + element.cells[0].title).toLowerCase()};
  });
  const bar = make("div", {className: "filters"}), chosen = new Map();
  const search = make("input", {type: "search", placeholder: "words, or e.g. loss<3.2 tokens/s>=1000"});
  const count = make("output", {}), clear = make("button", {type: "button", textContent: "show all"});
  const apply = () => {
    const holds = matches(search.value, titles);
    let shown = 0;
    for (const row of rows) {
      const visible = holds(row) && [...chosen].every(([column, value]) => row.keys[column] === value);
      row.element.hidden = !visible;
      shown += visible;
    }
    count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} runs`;
  };
  const label = make("label", {textContent: "find"});
  label.append(search);
  bar.append(label);
  heads.forEach((head, column) => {
    if (!("choice" in head.dataset)) return;
    const values = [...new Set(rows.map(row => row.keys[column]))].sort((a, b) => order(a, b, false));
    if (values.length < 2 || values.length > 40) return;
    const select = make("select", {onchange: () => {
      select.selectedIndex ? chosen.set(column, values[select.selectedIndex - 1]) : chosen.delete(column);
      apply();
    }});
    select.append(make("option", {textContent: "all"}), ...values.map(value => make("option", {textContent: value || "-"})));
    const named = make("label", {textContent: titles[column]});
    named.append(select);
    bar.append(named);
  });
  search.oninput = apply;
  clear.onclick = () => {
    search.value = "";
    chosen.clear();
    for (const select of bar.querySelectorAll("select")) select.selectedIndex = 0;
    apply();
  };
  bar.append(clear, count);
  place.before(bar);
  apply();
};

const copy = async text => {
  try { await navigator.clipboard.writeText(text); } catch {  // a file that is opened from a disk may have no clipboard
    const area = Object.assign(document.createElement("textarea"), {value: text});
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
};
const copyable = table => {
  for (const row of table.tBodies[0].rows) {
    const cell = row.cells[0], command = cell.title;
    if (!command) continue;
    const button = Object.assign(document.createElement("button"),
      {type: "button", className: "copy", textContent: "copy", title: command});
    button.setAttribute("aria-label", `copy the command of ${cell.textContent}`);
    cell.dataset.v ??= cell.textContent;
    cell.append(button);
  }
  table.tBodies[0].addEventListener("click", async event => {
    if (!event.target.matches("button.copy")) return;
    await copy(event.target.title);
    event.target.textContent = "copied";
    event.target.classList.add("done");
    setTimeout(() => { event.target.textContent = "copy"; event.target.classList.remove("done"); }, 1500);
  });
};

if (typeof document !== "undefined") for (const table of document.querySelectorAll("table.sortable")) {
  sortable(table);
  if (table.tBodies[0].rows.length > 12) filterable(table, table.closest(".wide"));
  copyable(table);
}
