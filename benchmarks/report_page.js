"use strict";

// Headers with data-sort become buttons that sort their table; a <tbody> is what moves, with all of its rows.
// Cells without a value come last in either direction.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    if (!header.dataset.sort) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const ascending = header.getAttribute("aria-sort") !== "ascending";
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sort(table, column, header.dataset.sort === "number", ascending ? 1 : -1);
    });
  });
}

function sort(table, column, isNumber, sign) {
  const keyed = [...table.tBodies].map((body) => {
    const cell = body.rows[0].cells[column];
    const text = (cell.dataset.value ?? cell.textContent).trim();
    return { body, text, value: isNumber ? Number(text) : text };
  });
  keyed.sort((a, b) => {
    if (a.text === "" || b.text === "") return (a.text === "") - (b.text === "");
    return sign * (isNumber ? a.value - b.value : a.value.localeCompare(b.value, "en", { numeric: true }));
  });
  for (const { body } of keyed) table.append(body);
}
