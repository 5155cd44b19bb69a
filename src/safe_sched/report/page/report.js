"use strict";
// The table of rows and the scatter plot. Whatever comes from the data is put on the page with textContent: as text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { rows, signals, points } = data;
  const PAGE = 100;
  const at = (id) => document.getElementById(id);

  const make = (name, { text, className, ...attributes } = {}, ...children) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const draw = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const say = (value, digits = 3) => (value === null ? "–" : String(Number(value.toPrecision(digits))));
  const share = (value) => {
    if (value === null) return "–";
    if (value > 0 && value < 0.01) return "< 0.01";
    return value > 0.99 && value < 1 ? "> 0.99" : value.toFixed(2);
  };
  const count = (value) => value.toLocaleString("en");
  const option = (value, text) => make("option", { value, text });

  // filters and order ---------------------------------------------------------------------------------------------

  const haystack = rows.p.map((_, i) => {
    const texts = rows.parts && rows.parts[i] ? rows.parts[i].map((part) => part[3] || "") : [];
    return [rows.where[i], rows.reason[i], rows.group[i], ...texts].join("\n").toLowerCase();
  });
  const columns = [
    { key: "where", name: "row", className: "col-where" },
    { key: "p", name: "p_harmful", className: "col-p" },
    { key: "flagged", name: "flagged", className: "col-flag" },
    { key: "weight", name: "weight", className: "col-weight" },
    { key: "reason", name: "reason", className: "col-reason" },
    { key: "group", name: "group", className: "col-group" },
  ];
  const collator = new Intl.Collator("en", { numeric: true });
  let sorted = { key: null, down: false };
  let found = [];
  let shown = 0;
  const open = new Set();

  const values = () => {
    if (sorted.key === "signal") return rows.values[Number(at("filter-signal").value)];
    return rows[sorted.key];
  };
  const compare = (list) => (a, b) => {
    const [x, y] = [list[a], list[b]];
    const [noX, noY] = [x === null || x === "", y === null || y === ""];
    if (noX || noY) return noX - noY || a - b; // what is not there comes last, in both directions
    const way = typeof x === "string" ? collator.compare(x, y) : x - y;
    return (sorted.down ? -way : way) || a - b;
  };
  const look = () => {
    const text = at("filter-text").value.trim().toLowerCase();
    const least = Number(at("filter-p").value) || 0;
    const signal = at("filter-signal").value;
    const group = at("filter-group").value;
    const flagged = at("filter-flagged").checked;
    found = [];
    for (let i = 0; i < rows.p.length; i += 1) {
      if (flagged && !rows.flagged[i]) continue;
      if (least > 0 && (rows.p[i] === null || rows.p[i] < least)) continue;
      if (signal !== "" && rows.values[Number(signal)][i] === null) continue;
      if (group !== "" && rows.group[i] !== groups[Number(group)]) continue;
      if (text && !haystack[i].includes(text)) continue;
      found.push(i);
    }
    if (sorted.key) found.sort(compare(values()));
    shown = Math.min(PAGE, found.length);
    fill();
  };

  // the table -----------------------------------------------------------------------------------------------------

  const head = make("tr", {}, make("th", { className: "col-open", scope: "col" }, make("span", { text: "" })));
  head.firstChild.setAttribute("aria-label", "details");
  for (const column of columns) {
    const button = make("button", { type: "button", text: column.name });
    button.addEventListener("click", () => {
      const numbers = column.key === "p" || column.key === "flagged" || column.key === "weight";
      sorted = { key: column.key, down: sorted.key === column.key ? !sorted.down : numbers && column.key !== "weight" };
      look();
    });
    column.head = make("th", { className: column.className, scope: "col" }, button);
    head.append(column.head);
  }
  const body = make("tbody");
  const table = make("table", { id: "rows-table" }, make("thead", {}, head), body);
  table.setAttribute("aria-describedby", "count");

  const meter = (from, to, hot) => {
    const bar = make("i", hot ? { className: "hot" } : {});
    bar.style.left = `${100 * from}%`;
    bar.style.width = `${Math.max(1.5, 100 * (to - from))}%`;
    return make("span", { className: "meter", "aria-hidden": "true" }, bar);
  };
  const line = (i) => {
    const button = make("button", {
      type: "button", className: "open", text: open.has(i) ? "−" : "+",
      "aria-expanded": String(open.has(i)), "aria-label": `details of ${rows.where[i]}`, "data-row": i,
    });
    const chance = make("td", {}, make("span", { text: share(rows.p[i]) }));
    if (rows.p[i] !== null) {
      const ends = rows.low[i] === null ? "" : `${share(rows.low[i])} to ${share(rows.high[i])}`;
      if (ends && ends !== `${share(rows.p[i])} to ${share(rows.p[i])}`) {
        chance.append(make("span", { className: "soft", text: `  (${ends})` }));
      }
      chance.append(meter(0, rows.p[i]));
    }
    const flag = rows.flagged[i]
      ? make("span", { className: "tag harm", text: "flagged" })
      : make("span", { className: "soft", text: rows.p[i] === null ? "not scored" : "no" });
    return make("tr", rows.flagged[i] ? { className: "flagged" } : {},
      make("td", {}, button), make("td", {}, make("bdi", { text: rows.where[i] })), chance, make("td", {}, flag),
      make("td", { text: share(rows.weight[i]) }), make("td", { text: rows.reason[i] }),
      make("td", {}, make("bdi", { text: rows.group[i] })));
  };
  const part = ([role, characters, lines, text]) => {
    const size = lines ? `, ${count(lines)} ${lines === 1 ? "line" : "lines"}` : "";
    const box = make("div", { className: "part" }, make("b", { text: role }),
      make("span", { className: "soft", text: `  ${count(characters)} characters${size}` }));
    if (text !== null) {
      box.append(make("pre", { text: text === "" ? "(empty)" : text, tabindex: "0", dir: "auto" }));
      if (characters > data.longest) box.append(make("span", { className: "soft", text: "only its beginning is shown" }));
    } else if (data.show_text) {
      box.append(make("span", { className: "soft", text: "  not shown: the report holds as much text as it may" }));
    } else if (characters) {
      const bar = make("span", { className: "redacted", role: "img", "aria-label": "redacted" });
      bar.style.width = `${Math.min(100, 8 + 4 * Math.sqrt(characters))}%`;
      box.append(bar);
    }
    return box;
  };
  const detail = (i) => {
    const list = make("tbody");
    const silent = signals.filter((_, number) => rows.values[number][i] === null).map((signal) => signal.name);
    signals.forEach((signal, number) => {
      const value = rows.values[number][i];
      if (value === null) return;
      const cell = make("td", {}, make("span", { text: say(value) }));
      cell.append(meter(0, rows.ranks[number][i], rows.ranks[number][i] > 0.98));
      const name = make("th", { scope: "row", text: signal.name, title: signal.about });
      list.append(make("tr", {}, name, make("td", { className: "soft", text: signal.kind }), cell));
    });
    const left = make("div", {}, make("h3", { text: "Signals, and the share of rows with less" }), make("table", {}, list));
    if (silent.length) left.append(make("p", { className: "soft", text: `Say nothing of it: ${silent.join(", ")}` }));
    const right = make("div", {}, make("h3", { text: data.show_text ? "The row" : "The row, redacted" }));
    const texts = rows.parts && rows.parts[i];
    if (texts) right.append(...texts.map(part));
    else right.append(make("p", { text: rows.parts ? "This row could not be read." : "The rows were not given to the report." }));
    return make("tr", { className: "detail" }, make("td", { colspan: columns.length + 1 },
      make("div", { className: "inner" }, left, right)));
  };
  const fill = () => {
    for (const column of columns) {
      if (sorted.key === column.key) column.head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      else column.head.removeAttribute("aria-sort");
      column.head.firstChild.textContent =
        column.name + (sorted.key === column.key ? (sorted.down ? " ↓" : " ↑") : "");
    }
    body.replaceChildren(...found.slice(0, shown).flatMap((i) => (open.has(i) ? [line(i), detail(i)] : [line(i)])));
    at("count").textContent = `${count(found.length)} of ${count(rows.p.length)} rows fit; ${count(shown)} shown`;
    at("more").hidden = shown >= found.length;
  };
  body.addEventListener("click", (event) => {
    const button = event.target.closest("button.open");
    if (!button) return;
    const i = Number(button.dataset.row);
    const row = button.closest("tr");
    if (open.delete(i)) row.nextSibling.remove();
    else {
      open.add(i);
      row.after(detail(i));
    }
    button.textContent = open.has(i) ? "−" : "+";
    button.setAttribute("aria-expanded", String(open.has(i)));
  });
  at("more").addEventListener("click", () => {
    const before = shown;
    shown = Math.min(shown + PAGE, found.length);
    fill();
    body.querySelectorAll("button.open")[before].focus();
  });

  const sizes = new Map();
  for (const group of rows.group) if (group) sizes.set(group, (sizes.get(group) || 0) + 1);
  const groups = [...sizes.keys()].sort((a, b) => sizes.get(b) - sizes.get(a) || collator.compare(a, b)).slice(0, 500);
  groups.forEach((group, i) => at("filter-group").append(option(i, `${group.slice(0, 60)} (${count(sizes.get(group))})`)));
  signals.forEach((signal, i) => at("filter-signal").append(option(i, signal.name)));
  at("filter-signal").addEventListener("change", () => {
    if (at("filter-signal").value !== "") sorted = { key: "signal", down: true };
    else if (sorted.key === "signal") sorted = { key: null, down: false };
    look();
  });
  for (const id of ["filter-text", "filter-p", "filter-group", "filter-flagged"]) at(id).addEventListener("input", look);
  document.querySelectorAll("button.show").forEach((button) => {
    const number = groups.indexOf(button.dataset.group);
    if (number < 0) return; // none of its rows is in the table
    button.hidden = false;
    button.setAttribute("aria-label", `show the rows of ${button.dataset.group}`);
    button.addEventListener("click", () => {
      at("filters").reset();
      at("filter-group").value = String(number);
      at("rows").scrollIntoView();
      at("filter-group").focus({ preventScroll: true });
    });
  });
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("filters").addEventListener("reset", () => {
    sorted = { key: null, down: false };
    setTimeout(look); // the fields are empty only after the event
  });
  at("table-place").append(table);
  at("filters").hidden = false;
  look();

  // two signals ---------------------------------------------------------------------------------------------------

  const axes = [{ name: "p_harmful", list: points.p }, ...signals.map((one, i) => ({ name: one.name, list: points.values[i] }))];
  // the share of rows that have less; 0 where a signal says nothing
  const ranked = (list) => {
    const order = list.map((_, i) => i).filter((i) => list[i] !== null).sort((a, b) => list[a] - list[b]);
    const none = list.length - order.length;
    const ranks = list.map(() => 0);
    for (let from = 0, to = 0; from < order.length; from = to) {
      while (to < order.length && list[order[to]] === list[order[from]]) to += 1;
      for (let k = from; k < to; k += 1) ranks[order[k]] = (none + from) / list.length;
    }
    return ranks;
  };
  const scatter = () => {
    const [W, H, L, R, T, B] = [520, 360, 56, 12, 10, 40];
    const [x, y] = ["scatter-x", "scatter-y"].map((id) => axes[Number(at(id).value)]);
    const byRank = at("scatter-ranks").checked;
    const [xs, ys] = [x, y].map((axis) => (byRank ? ranked(axis.list) : axis.list));
    const both = xs.map((_, i) => i).filter((i) => xs[i] !== null && ys[i] !== null);
    const scale = (list, from, to) => {
      let [least, most] = byRank ? [0, 1] : [Infinity, -Infinity];
      for (const i of both) [least, most] = [Math.min(least, list[i]), Math.max(most, list[i])];
      if (!(most > least)) [least, most] = both.length ? [least - 0.5, most + 0.5] : [0, 1];
      return { least, most, place: (value) => from + ((value - least) / (most - least)) * (to - from) };
    };
    const [across, up] = [scale(xs, L + 6, W - R - 6), scale(ys, H - B - 6, T + 6)];
    const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
    svg.setAttribute("aria-label", `${count(both.length)} rows by ${x.name} and ${y.name}`);
    for (let k = 0; k <= 4; k += 1) {
      const [vx, vy] = [across, up].map((axis) => axis.least + (k / 4) * (axis.most - axis.least));
      const [px, py] = [across.place(vx), up.place(vy)];
      svg.append(draw("line", { class: "grid", x1: L, x2: W - R, y1: py, y2: py }));
      svg.append(draw("line", { class: "grid", x1: px, x2: px, y1: T, y2: H - B }));
      const label = (value) => (byRank ? `${Math.round(100 * value)} %` : say(value));
      svg.append(draw("text", { x: px, y: H - B + 16, "text-anchor": "middle" }, label(vx)));
      svg.append(draw("text", { x: L - 6, y: py + 4, "text-anchor": "end" }, label(vy)));
    }
    svg.append(draw("text", { class: "name", x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, x.name));
    svg.append(draw("text", { class: "name", transform: `translate(13 ${(T + H - B) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.name));
    for (const flagged of [0, 1]) {
      for (const i of both) {
        if (points.flagged[i] !== flagged) continue;
        const dot = draw("circle", {
          class: flagged ? "flagged" : "all", cx: across.place(xs[i]).toFixed(1), cy: up.place(ys[i]).toFixed(1),
          r: 3, "fill-opacity": 0.65,
        });
        dot.append(draw("title", {}, `${points.where[i]}: ${x.name} ${say(x.list[i])}, ${y.name} ${say(y.list[i])}`));
        svg.append(dot);
      }
    }
    at("scatter-plot").replaceChildren(svg);
  };
  if (points.p.length && axes.length > 1) {
    // the harm signals; behind them the others, those that said most first
    const order = signals.map((_, i) => i).sort((a, b) =>
      (signals[b].kind === "harm") - (signals[a].kind === "harm") ||
      (signals[a].kind === "harm" ? 0 : signals[b].said - signals[a].said) || a - b);
    for (const id of ["scatter-x", "scatter-y"]) {
      axes.forEach((axis, i) => at(id).append(option(i, axis.name)));
      at(id).addEventListener("change", scatter);
    }
    at("scatter-x").value = String(order[0] + 1);
    at("scatter-y").value = String(order.length > 1 ? order[1] + 1 : 0);
    at("scatter-ranks").addEventListener("change", scatter);
    at("scatter").hidden = false;
    scatter();
  }
})();
