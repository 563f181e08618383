"use strict";
// A click on a column's head sorts the rows by it, a second one the other way round.
const words = new Intl.Collator("en", { numeric: true });

function compare(one, other) {
  const [first, second] = [one.dataset.number, other.dataset.number];
  if (first !== undefined && second !== undefined) return Number(first) - Number(second);
  return words.compare(one.textContent, other.textContent);
}

function sort(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const descending = heads[column].getAttribute("aria-sort") === "ascending";
  const cell = (row) => row.cells[column];
  const rows = [...table.tBodies[0].rows];
  const known = rows.filter((row) => cell(row).textContent !== "");
  known.sort((one, other) => (descending ? -1 : 1) * compare(cell(one), cell(other)));
  // What is not known stays last, whichever way the others stand.
  table.tBodies[0].append(...known, ...rows.filter((row) => cell(row).textContent === ""));
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sort(table, column));
  });
}
