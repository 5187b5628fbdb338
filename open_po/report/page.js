"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const hidden = new Set();
  const kinds = new Set(); // that are drawn
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
    if (layout.annotations) {
      found.annotations = layout.annotations.map((one) => ({ ...one, bgcolor: colour("panel") }));
    }
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
      visible: trace.meta.kind === "grid" || (!hidden.has(trace.meta.run) && kinds.has(trace.meta.kind)),
      line: { ...trace.line, color: own },
      marker: { ...trace.marker, color: own },
    };
  }

  // ------------------------------------------------------------------------------------------------------------ drawing
  const options = (figure) => ({
    responsive: true,
    displaylogo: false,
    displayModeBar: "hover",
    modeBarButtons: [[...(figure.layout.xaxis ? ["zoom2d", "pan2d", "resetScale2d"] : []), "toImage"]],
    toImageButtonOptions: { scale: 2 },
  });

  function draw(plot) {
    const figure = figures[Number(plot.dataset.figure)];
    // On paper of the size it has there: a plot that finds out its size by itself does so too late.
    const paper = document.body.classList.contains("printing");
    const size = paper ? { width: plot.clientWidth, height: plot.clientHeight } : { autosize: true };
    const layout = themed({ ...figure.layout, ...size, ...zoom(plot) });
    return Plotly.react(plot, figure.data.map(painted), layout, options(figure));
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
  const kindBoxes = [...document.querySelectorAll("input[data-kind]")];

  function chooseKinds() {
    kinds.clear();
    kindBoxes.filter((box) => box.checked).forEach((box) => box.dataset.kind.split(" ").forEach((kind) => kinds.add(kind)));
  }

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
  kindBoxes.forEach((box) => box.addEventListener("change", () => {
    chooseKinds();
    redraw();
  }));
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
  }
  addEventListener("beforeprint", () => printing(true));
  addEventListener("afterprint", () => printing(false));

  const legend = document.getElementById("legend");
  if (innerWidth <= 900 && boxes.length > 12) legend.open = false;
  chooseKinds();
  drawNext();
})();
