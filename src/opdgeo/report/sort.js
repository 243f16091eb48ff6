// The heads of a table of class "sortable" become buttons. Numbers sort by the exact value in their <data>, words by themselves;
// what is undefined stays last, equal rows keep their order, and a third press brings the first order back. A page shows all
// its content without this.
{
  const words = new Intl.Collator("en", { numeric: true });

  /** A number, a text, or null where the cell holds neither. */
  const key = cell => {
    const shown = cell?.querySelector("data, .nil"), text = cell?.textContent.trim();
    if (shown) return shown.matches("data") ? Number(shown.value.replace("inf", "Infinity")) : null;
    return text || null;
  };

  const compare = (a, b) => typeof a === "number" ? Math.sign(a - b) || 0 : words.compare(a, b);

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0], first = [...body.rows], heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const keys = new Map(first.map(row => [row, key(row.cells[column])]));
      const numeric = [...keys.values()].some(found => typeof found === "number");
      for (const [row, found] of keys) if (numeric && typeof found !== "number") keys.set(row, null);
      if (new Set([...keys.values()].filter(found => found !== null)).size < 2 || !head.textContent.trim()) return;
      const turns = numeric ? ["descending", "ascending"] : ["ascending", "descending"];
      const button = document.createElement("button");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const turn = turns[turns.indexOf(head.getAttribute("aria-sort")) + 1], sign = turn === "descending" ? -1 : 1;
        heads.forEach(other => other.removeAttribute("aria-sort"));
        if (turn) head.setAttribute("aria-sort", turn);
        body.append(...(turn ? [...body.rows].sort((a, b) => {
          const [x, y] = [keys.get(a), keys.get(b)];
          return x === null || y === null ? (x === null) - (y === null) : sign * compare(x, y);
        }) : first));
      });
    });
  }
}
