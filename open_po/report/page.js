"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const hidden = new Set();
  const raw = document.getElementById("raw");
  const drawn = [];

  // ---------------------------------------------------------------- the theme: what the style sheet says at the moment
  const colour = (name) => getComputedStyle(document.body).getPropertyValue(`--${name}`).trim();

  function themed(layout) {
    const found = {
      ...layout,
      font: { family: "system-ui, sans-serif", size: 12, color: colour("ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: colour("paper"), bordercolor: colour("line"), font: { color: colour("ink") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("faint"), activecolor: colour("ink") },
    };
    for (const name of ["xaxis", "yaxis"]) {
      if (layout[name]) {
        found[name] = {
          ...layout[name],
          gridcolor: colour("line"),
          zerolinecolor: colour("line"),
          linecolor: colour("faint"),
        };
      }
    }
    return found;
  }

  function painted(trace) {
    if (!trace.meta) return trace;
    const own = colour(`run-${trace.meta.run % 8}`);
    return {
      ...trace,
      visible: !hidden.has(trace.meta.run) && (trace.meta.kind !== "raw" || raw.checked),
      line: { ...trace.line, color: own },
      marker: { ...trace.marker, color: own },
    };
  }

  // ------------------------------------------------------------------------------------------------------------ drawing
  const options = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { scale: 2 },
  };

  function draw(plot) {
    const figure = figures[Number(plot.dataset.figure)];
    return Plotly.react(plot, figure.data.map(painted), themed({ ...figure.layout, ...zoom(plot) }), options);
  }

  // What a reader has zoomed into stays.
  function zoom(plot) {
    const kept = {};
    for (const name of ["xaxis", "yaxis"]) {
      const axis = plot.layout?.[name];
      if (axis && axis.autorange === false) {
        const figure = figures[Number(plot.dataset.figure)];
        kept[name] = { ...figure.layout[name], range: axis.range, autorange: false };
      }
    }
    return kept;
  }

  function redraw() {
    drawn.forEach(draw);
  }

  // One after the other, so that the page can be read while the rest is drawn.
  function drawNext() {
    const plot = plots[drawn.length];
    if (!plot) {
      document.body.dataset.drawn = String(drawn.length);
      return;
    }
    drawn.push(plot);
    draw(plot);
    setTimeout(drawNext, 0);
  }

  // --------------------------------------------------------------------------------------------- which runs are drawn
  const boxes = [...document.querySelectorAll("input[data-run]")];

  function show(wanted) {
    boxes.forEach((box) => {
      box.checked = wanted(Number(box.dataset.run));
    });
    choose();
  }

  function choose() {
    hidden.clear();
    boxes.filter((box) => !box.checked).forEach((box) => hidden.add(Number(box.dataset.run)));
    redraw();
  }

  boxes.forEach((box) => box.addEventListener("change", choose));
  raw.addEventListener("change", redraw);
  document.getElementById("all")?.addEventListener("click", () => show(() => true));
  document.getElementById("none")?.addEventListener("click", () => show(() => false));
  document.querySelectorAll("button[data-only]").forEach((button) => {
    button.addEventListener("click", () => show((run) => run === Number(button.dataset.only)));
  });

  // ---------------------------------------------------------------------------------------------------- sorted tables
  function key(row, column) {
    const cell = row.cells[column];
    const text = cell.textContent.trim();
    const number = Number(cell.dataset.value ?? (text || NaN));
    return Number.isNaN(number) ? text : number;
  }

  function compare(one, other) {
    if (typeof one === typeof other) return typeof one === "number" ? one - other : one.localeCompare(other);
    return typeof one === "number" ? -1 : 1; // what has no number last
  }

  function sort(table, head) {
    const column = [...head.parentNode.children].indexOf(head);
    const direction = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    [...head.parentNode.children].forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
    rows.sort(([one], [other]) => {
      const mixed = typeof one !== typeof other;
      return mixed ? compare(one, other) : direction * compare(one, other);
    });
    rows.forEach(([, row]) => table.tBodies[0].append(row));
  }

  document.querySelectorAll("table.sortable").forEach((table) => {
    table.querySelectorAll("thead th").forEach((head) => {
      head.tabIndex = 0;
      head.addEventListener("click", () => sort(table, head));
      head.addEventListener("keydown", (event) => {
        if (event.key === "Enter") sort(table, head);
      });
    });
  });

  // ------------------------------------------------------------------------------------------------- screens and paper
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  function printing(now) {
    document.body.classList.toggle("printing", now);
    while (drawn.length < plots.length) drawn.push(plots[drawn.length]);
    redraw();
    drawn.forEach((plot) => Plotly.Plots.resize(plot));
  }
  addEventListener("beforeprint", () => printing(true));
  addEventListener("afterprint", () => printing(false));

  const legend = document.getElementById("legend");
  if (innerWidth <= 900 && boxes.length > 12) legend.open = false;
  drawNext();
})();
