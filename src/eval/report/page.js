"use strict";
// Everything is on the page without this: it only hides what is not asked for and sorts tables.
const filters = document.getElementById("filters");
filters.hidden = false;
function show() {
  const text = document.getElementById("text").value, mode = document.getElementById("mode").value;
  for (const figure of document.querySelectorAll("[data-text]"))
    figure.hidden = (text && figure.dataset.text !== text) || (mode && figure.dataset.mode !== mode);
  for (const box of filters.querySelectorAll("input"))
    for (const part of document.querySelectorAll("main ." + box.value)) part.style.display = box.checked ? "" : "none";
}
filters.addEventListener("change", show);
filters.addEventListener("submit", (event) => event.preventDefault());
show();

for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.ariaSort === "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.ariaSort = down ? "descending" : "ascending";
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const x = key(a), y = key(b), p = Number.parseFloat(x), q = Number.parseFloat(y);
        return Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
      });
      table.tBodies[0].append(...(down ? rows.reverse() : rows));
    });
  });
}
