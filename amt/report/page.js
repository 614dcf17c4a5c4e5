"use strict";
// Tables sort by their headings, with the mouse or the keyboard; rows without a value stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const direction = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of headings) other.setAttribute("aria-sort", other === heading ? direction : "none");
      const sign = direction === "ascending" ? 1 : -1;
      for (const body of table.tBodies) {
        const rows = [...body.rows].map((row) => {
          const cell = row.cells[column];
          const value = cell.dataset.value === undefined ? NaN : Number(cell.dataset.value);
          return { row, value, text: cell.textContent, missing: cell.classList.contains("none") };
        });
        const numeric = rows.some((each) => !Number.isNaN(each.value));
        rows.sort((a, b) => {
          if (a.missing !== b.missing) return a.missing ? 1 : -1;
          if (numeric) return sign * (a.value - b.value);
          return sign * a.text.localeCompare(b.text, "en", { numeric: true });
        });
        body.append(...rows.map((each) => each.row));
      }
    });
  });
}
