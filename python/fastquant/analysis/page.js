"use strict";
const table = document.querySelector(".layers");
const body = table.tBodies[0];
const spoken = document.getElementById("spoken");

// Numbers sort by their value, and what was not measured comes last either way.
function key(row, column) {
  const text = row.cells[column].dataset.value;
  if (text === undefined) return row.cells[column].textContent.trim();
  const value = Number(text);
  return Number.isNaN(value) ? null : value;
}

function sort(header) {
  const column = header.cellIndex;
  const ascending = header.getAttribute("aria-sort") !== "ascending";
  const rows = [...body.rows].map((row) => [key(row, column), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a < b ? -1 : +(a > b);
    return ascending ? order : -order;
  });
  body.append(...rows.map(([, row]) => row));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  spoken.textContent = `Sorted by ${header.textContent.trim()}, ${ascending ? "ascending" : "descending"}`;
}

for (const button of table.tHead.querySelectorAll("button")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}

const filter = document.getElementById("filter");
filter.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  let shown = 0;
  for (const row of body.rows) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
    shown += !row.hidden;
  }
  spoken.textContent = `${shown} layers`;
});
filter.closest("label").hidden = false;

function openLinked() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
    target.querySelector("summary").focus();
  }
}
addEventListener("hashchange", openLinked);
openLinked();
// A second click on the same link changes no hash.
table.addEventListener("click", (event) => {
  if (event.target.closest("a")) setTimeout(openLinked);
});
