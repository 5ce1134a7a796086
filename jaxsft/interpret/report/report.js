"use strict";
// Draws what the JSON blocks of the page hold. Text of theirs never becomes markup: it is set as textContent, or was
// escaped for Plotly, which takes a little HTML, where the block was made.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const root = document.documentElement;
  const COLOURS = new Set(["color", "bgcolor", "fgcolor"]);
  const CONFIG = {
    displaylogo: false, responsive: true, typesetMath: false,
    showSendToCloud: false, plotlyServerURL: "", // by default it offers to send the numbers to its makers
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "sendChartToCloud"],
    displayModeBar: matchMedia("(hover: none)").matches ? false : "hover", toImageButtonOptions: { format: "svg" },
  };
  const SYMBOLS = {
    circle: "M14 2a4 4 0 1 0 .01 0Z", diamond: "M14 1l5 5-5 5-5-5Z", square: "M10 2h8v8h-8Z",
    "triangle-up": "M14 1l5 9H9Z", cross: "M12 1h4v3h3v4h-3v3h-4V8H9V4h3Z",
    x: "M11 1l3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3-3-3Z", star: "M14.0 0.4L15.4 4.1L19.3 4.3L16.3 6.7L17.3 10.5L14.0 8.4L10.7 10.5L11.7 6.7L8.7 4.3L12.6 4.1Z",
  };
  const DASHES = { dash: "6 3", dot: "2 3", dashdot: "6 3 2 3", longdash: "10 3", longdashdot: "10 3 2 3" };

  const themed = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim() || name;
  const plain = (text) => String(text).replaceAll("<br>", ", ").replaceAll("&lt;", "<").replaceAll("&gt;", ">")
    .replaceAll("&amp;", "&");
  const made = (name, attributes = {}, text = "") => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text) element.textContent = text;
    return element;
  };
  const drawn = (name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const luminance = (colour) => {
    const [r, g, b] = colour.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const specOf = (figure) => JSON.parse(figure.querySelector("script.spec").textContent);

  // A copy with the colours that the style sheet gives their names now.
  const coloured = (value, key = "") => {
    if (Array.isArray(value)) return value.map((entry) => coloured(entry, key));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, entry]) => [name, coloured(entry, name)]));
    }
    return COLOURS.has(key) && typeof value === "string" ? themed(value) : value;
  };

  const layoutOf = (own) => {
    const axis = { gridcolor: themed("line"), zerolinecolor: themed("line") };
    return {
      autosize: true, showlegend: false, margin: { l: 56, r: 14, t: 12, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: themed("ink") },
      hoverlabel: { bgcolor: themed("surface"), bordercolor: themed("line"), font: { color: themed("ink") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: themed("soft"), activecolor: themed("ink") },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      ...coloured(own),
      xaxis: { ...axis, ...coloured(own.xaxis) }, yaxis: { ...axis, automargin: true, ...coloured(own.yaxis) },
    };
  };

  const draw = ({ plot, spec, shown }) => Plotly.react(
    plot, coloured(spec.traces).map((trace, i) => ({ ...trace, visible: shown[i] })), layoutOf(spec.layout), CONFIG,
  );

  const swatch = (trace) => {
    const svg = drawn("svg", { width: 28, height: 12, viewBox: "0 0 28 12", "aria-hidden": "true" });
    const colour = (trace.line?.color && !trace.marker ? trace.line.color : trace.marker?.color) ?? "ink";
    const style = `var(--${colour})`;
    if (trace.type === "bar") {
      svg.append(drawn("rect", { x: 8, y: 0, width: 12, height: 12, rx: 2, style: `fill:${style}` }));
      if (trace.marker?.pattern) {
        svg.append(drawn("path", { d: "M8 9l9-9M11 12l9-9", style: "stroke:var(--surface);stroke-width:2" }));
      }
      return svg;
    }
    if (trace.mode.includes("lines")) {
      const dashes = DASHES[trace.line.dash] ?? "";
      svg.append(drawn("path", { d: "M1 6H27", "stroke-dasharray": dashes, style: `stroke:${style};stroke-width:2` }));
    }
    if (trace.mode.includes("markers")) {
      svg.append(drawn("path", { d: SYMBOLS[trace.marker.symbol] ?? SYMBOLS.circle, style: `fill:${style}` }));
    }
    return svg;
  };

  const legend = (chart) => {
    const box = made("div", { class: "legend", role: "group", "aria-label": "Series" });
    chart.spec.traces.forEach((trace, i) => {
      if (trace.showlegend === false) return;
      const name = plain(trace.name ?? "");
      const button = made("button", { type: "button", "aria-pressed": "true", title: "Show or hide" });
      button.append(swatch(trace), name);
      button.addEventListener("click", () => {
        chart.shown[i] = !chart.shown[i];
        button.setAttribute("aria-pressed", String(chart.shown[i]));
        draw(chart);
      });
      box.append(button);
    });
    return box;
  };

  const saidOf = (trace, point) => {
    const horizontal = trace.orientation === "h" || (trace.text && trace.mode === "markers");
    const value = horizontal ? trace.x[point] : trace.y[point];
    const shown = typeof value === "number" ? Number(value.toPrecision(4)) : "none";
    if (trace.text) return `${plain(trace.text[point])}, ${plain(trace.name)} ${shown}`;
    return `epoch ${Number(trace.x[point].toPrecision(4))}, ${plain(trace.name)} ${shown}`;
  };

  // Arrow keys walk through the points: left and right within a series, up and down from one to the next.
  const walkable = (chart) => {
    const { plot, spec } = chart;
    const readout = made("p", { class: "readout unseen", role: "status" });
    plot.after(readout);
    plot.setAttribute("tabindex", "0");
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-roledescription", "chart");
    plot.setAttribute("aria-label", `${plot.dataset.said}. Arrow keys walk through the points.`);
    let series = 0, point = -1;
    plot.addEventListener("keydown", (event) => {
      const usable = spec.traces.map((_, i) => i).filter((i) => chart.shown[i] && spec.traces[i].hoverinfo !== "skip");
      if (event.key === "Escape") { Plotly.Fx.unhover(plot); readout.textContent = ""; return; }
      const sideways = { ArrowRight: 1, ArrowLeft: -1 }[event.key], across = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!usable.length || (sideways === undefined && across === undefined)) return;
      event.preventDefault();
      let at = Math.max(usable.indexOf(series), 0);
      if (across !== undefined) at = (at + across + usable.length) % usable.length;
      series = usable[at];
      const last = spec.traces[series].y.length - 1;
      point = Math.min(Math.max(point + (sideways ?? 0), 0), last);
      Plotly.Fx.hover(plot, [{ curveNumber: series, pointNumber: point }]);
      readout.textContent = saidOf(spec.traces[series], point);
    });
    plot.addEventListener("blur", () => Plotly.Fx.unhover(plot));
  };

  const matrix = (figure) => {
    const { names, entries: [rows, columns, counts] } = specOf(figure);
    const readout = figure.querySelector(".readout"), dense = names.length > 30;
    const table = made("table", { class: dense ? "matrix dense" : "matrix", role: "grid", "aria-readonly": "true" });
    table.append(made("caption", { class: "unseen" }, "Confusions: a row for each label, a column for each prediction"));
    const total = names.map(() => 0), at = new Map();
    rows.forEach((row, i) => { total[row] += counts[i]; at.set(row * names.length + columns[i], counts[i]); });
    const head = made("tr");
    head.append(made("th", { scope: "col" }, "label \\ prediction"));
    names.forEach((name) => head.append(made("th", { scope: "col", title: name }, name)));
    table.append(made("thead"), made("tbody"));
    table.tHead.append(head);
    const cells = names.map((name, row) => {
      const line = made("tr");
      line.append(made("th", { scope: "row", title: name }, name));
      const found = names.map((_, column) => {
        const count = at.get(row * names.length + column) ?? 0;
        const cell = made("td", { tabindex: row + column ? "-1" : "0" }, count && !dense ? String(count) : "");
        line.append(cell);
        return cell;
      });
      table.tBodies[0].append(line);
      return found;
    });
    const placeOf = (cell) => [cell.parentElement.rowIndex - 1, cell.cellIndex - 1];
    const tell = (cell) => {
      const [row, column] = placeOf(cell), count = at.get(row * names.length + column) ?? 0;
      const share = total[row] ? `, ${((100 * count) / total[row]).toFixed(1)} %` : "";
      const answer = row === column ? "rightly named" : `taken for ${names[column]}`;
      const text = `${names[row]}, ${answer}: ${count} of ${total[row]}${share}`;
      cell.setAttribute("aria-label", text);
      readout.textContent = text;
    };
    table.addEventListener("mouseover", (event) => event.target.tagName === "TD" && tell(event.target));
    table.addEventListener("focusin", (event) => event.target.tagName === "TD" && tell(event.target));
    table.addEventListener("keydown", (event) => {
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -names.length],
        End: [0, names.length] };
      if (event.target.tagName !== "TD" || !moves[event.key]) return;
      event.preventDefault();
      const limited = placeOf(event.target).map((place, i) =>
        Math.min(Math.max(place + moves[event.key][i], 0), names.length - 1));
      event.target.tabIndex = -1;
      const next = cells[limited[0]][limited[1]];
      next.tabIndex = 0;
      next.focus();
    });
    figure.querySelector(".grid-scroll").append(table);
    return () => {
      const hues = ["series-1", "series-0"].map((name) => rgb(themed(name))), page = rgb(themed("page"));
      cells.forEach((line, row) => line.forEach((cell, column) => {
        const count = at.get(row * names.length + column) ?? 0;
        // A mistake in fifty is to be seen, too, so the shade grows faster than the share.
        const shade = count ? 0.06 + 0.94 * (count / total[row]) ** 0.7 : 0, hue = hues[Number(row === column)];
        const mixed = page.map((value, i) => Math.round(value + shade * (hue[i] - value)));
        cell.style.background = `rgb(${mixed})`;
        cell.style.color = luminance(mixed) > 0.179 ? "#000" : "#fff"; // where both contrast alike
      }));
    };
  };

  const sortable = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    const valueOf = (row, i) => {
      const cell = row.cells[i], value = parseFloat(cell.textContent.replaceAll(",", ""));
      if (!cell.classList.contains("number")) return cell.textContent;
      return Number.isNaN(value) ? -Infinity : value;
    };
    heads.forEach((head, i) => head.querySelector("button")?.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending", body = table.tBodies[0];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [valueOf(row, i), row]);
      rows.sort(([a], [b]) => (typeof a === "number" ? (a > b) - (a < b) : a.localeCompare(b)) * (rising ? 1 : -1));
      body.append(...rows.map(([, row]) => row));
    }));
  };

  const markCurrent = () => {
    const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.getAttribute("href").slice(1), link]));
    const seen = new Set();
    const observer = new IntersectionObserver((changes) => {
      changes.forEach(({ target, isIntersecting }) => (isIntersecting ? seen.add(target.id) : seen.delete(target.id)));
      const first = [...links.keys()].find((anchor) => seen.has(anchor));
      links.forEach((link, anchor) => (anchor === first ? link.setAttribute("aria-current", "true")
        : link.removeAttribute("aria-current")));
    }, { rootMargin: "-10% 0px -60% 0px" });
    document.querySelectorAll("main > section").forEach((section) => observer.observe(section));
  };

  const charts = [...document.querySelectorAll("figure.chart")].map((figure) => {
    const spec = specOf(figure), plot = figure.querySelector(".plot");
    const chart = { plot, spec, shown: spec.traces.map(() => true) };
    if (spec.traces.length > 1) plot.before(legend(chart));
    walkable(chart);
    return chart;
  });
  const paints = [...document.querySelectorAll("figure.confusion")].map(matrix);
  const drawAll = () => {
    paints.forEach((paint) => paint());
    return Promise.all(charts.map(draw));
  };
  document.querySelectorAll("table.sortable").forEach(sortable);
  markCurrent();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { root.classList.add("print"); drawAll(); });
  addEventListener("afterprint", () => { root.classList.remove("print"); drawAll(); });
  drawAll().then(() => { root.dataset.drawn = String(charts.length); });
})();
