// The page: filters, tables and cases. Text of the data goes in by textContent and Vega's marks alone, never as HTML.

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** A table of rows; columns: field → [heading, format]. */
function tableOf(rows, columns, caption, all = rows.length) {
  const fields = Object.keys(columns).filter((field) => rows.some((row) => row[field] !== undefined));
  const kind = (field) => (typeof rows[0][field] === "number" ? "number" : "");
  const heading = (field) => element("th", { scope: "col", className: kind(field), textContent: columns[field][0] });
  const cell = (row, field) =>
    element("td", { className: kind(field), textContent: row[field] === null ? "–" : columns[field][1](row[field]) });
  const count =
    all > MOST_ROWS ? `the first ${MOST_ROWS} of ${whole(all)} rows; filters show others` : `${whole(all)} rows`;
  return element(
    "table",
    {},
    element("caption", { textContent: `${caption}: ${count}` }),
    element("thead", {}, element("tr", {}, ...fields.map(heading))),
    element(
      "tbody",
      {},
      ...rows.slice(0, MOST_ROWS).map((row) => element("tr", {}, ...fields.map((field) => cell(row, field)))),
    ),
  );
}

const tableOrWords = (rows, ...more) => (rows.length ? tableOf(rows, ...more) : "Nothing recorded for this choice.");

/** Options whose values are indices, so that any text can be one; the first is "all" where it has a name. */
function fill(select, values, all, label = String) {
  select.replaceChildren(...values.map((value, i) => new Option(label(value), i)));
  if (all) select.prepend(new Option(all, "", true, true));
  select.values = values;
}
const valueOf = (select) => (select.value === "" ? null : select.values[select.value]);
const choose = (select, value) => {
  select.value = value === null ? "" : select.values.indexOf(value);
};

const recorded = data.tables.load.modality.values;
const used = data.series.filter(({ modalities }) => modalities.some((m) => recorded.includes(m)));
const words = { prompt: "text, prompt", generated: "text, generated" };
const selects = Object.fromEntries(["group", "layer", "modality"].map((name) => [name, byId(name)]));
const layers = [...new Set(data.tables.load.layer)];
fill(selects.group, data.groups, ALL);
fill(selects.layer, layers, "all layers", (layer) => `${layer}: ${data.layers[layer]}`);
fill(selects.modality, recorded, "all modalities", (modality) => words[modality] ?? modality);

function currentState() {
  const [group, layer, modality] = Object.values(selects).map(valueOf);
  return { group, layer, modality, unit: byId("unit").value };
}

for (const chart of charts) chart.rows = remembered(chart.rows);
const shown = charts.filter((chart) => chart.rows(currentState()).length); // the record may lack what one shows

for (const chart of shown) {
  chart.view = element("div", { className: "chart" });
  chart.caption = element("p", { className: "note" });
  chart.table = element("div", {
    className: "scroll",
    tabIndex: 0,
    role: "region",
    ariaLabel: `${chart.title}: table`,
  });
  const title = element("h2", { id: `${chart.id}-title`, textContent: chart.title });
  chart.details =
    chart.spec &&
    element(
      "details",
      { ontoggle: () => showTable(chart, currentState()) },
      element("summary", { textContent: "Table" }),
      chart.table,
    );
  const section = element(
    "section",
    { id: chart.id, className: chart.wide ? "wide" : "" },
    title,
    chart.caption,
    ...(chart.spec ? [chart.view, chart.details] : [chart.table]),
  );
  section.setAttribute("aria-labelledby", title.id);
  byId("charts").append(section);
}

function showTable(chart, state) {
  if (chart.details && !chart.details.open) return;
  chart.table.replaceChildren(tableOrWords(chart.rows(state), chart.columns, chart.title));
}

/** Vega's colours are the page's: light or dark, in SVG and on a canvas. */
function look() {
  const page = getComputedStyle(document.documentElement);
  const [ink, line, quiet] = ["--ink", "--line", "--quiet"].map((name) => page.getPropertyValue(name).trim());
  const text = { labelColor: ink, titleColor: ink };
  const axis = { ...text, gridColor: line, domainColor: quiet, tickColor: quiet };
  return {
    aria: false, // the description is for the whole; the table has the numbers
    mark: { tooltip: { content: "data" } },
    background: null,
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis,
    legend: text,
    header: text,
  };
}

/** What the table says of a mark; Vega puts it in as HTML, so text goes through `escape`. */
function tooltipOf(columns, datum, escape) {
  const rows = Object.entries(columns)
    .filter(([field]) => datum[field] !== undefined && datum[field] !== null)
    .map(([field, [heading, format]]) => [heading, format(datum[field])]);
  const cells = ([heading, text]) => `<td class="key">${escape(heading)}</td><td class="value">${escape(text)}</td>`;
  return `<table>${rows.map((row) => `<tr>${cells(row)}</tr>`).join("")}</table>`;
}

/** Draws a chart whose rows or specification changed. */
async function draw(chart, state) {
  const rows = chart.rows(state);
  const description = `${chart.title}, chart; the same numbers are in the table below it.`;
  const spec = { ...chart.spec(state), description, config: look(), data: { values: rows } };
  const text = JSON.stringify(spec);
  if (text === chart.text) return;
  chart.text = text;
  chart.view.style.minHeight = `${chart.view.offsetHeight}px`; // so that the page does not jump
  chart.vega?.finalize();
  const renderer = rows.length > MOST_SHAPES ? "canvas" : "svg";
  const tooltip = { formatTooltip: (datum, escape) => tooltipOf(chart.columns, datum, escape) };
  chart.vega = await vegaEmbed(chart.view, spec, { mode: "vega-lite", actions: false, renderer, ast: true, tooltip });
  chart.vega.view.addEventListener("click", (_, item) => item?.datum && follow(item.datum));
  chart.view.style.minHeight = "0";
}

/** A click on a mark sets the filters that the mark has a value for; a second click takes them back. */
function follow(datum) {
  const values = Object.entries(selects).filter(([name, select]) => select.values.includes(datum[name]));
  if (!values.length) return;
  const again = values.every(([name, select]) => valueOf(select) === datum[name]);
  for (const [name, select] of values) choose(select, again ? null : datum[name]);
  show();
}

function showStatus(state) {
  const cells = sum("load", state, ["expert"], []).sort((a, b) => b.count - a.count);
  const total = cells.reduce((n, cell) => n + cell.count, 0);
  const even = evenness(cells.map((cell) => cell.share)).toFixed(3);
  const of = Object.values(selects)
    .map((select) => select.selectedOptions[0].textContent)
    .join(", ");
  byId("status").textContent = !total
    ? `No routed tokens: ${of}.`
    : `${whole(total)} routed tokens: ${of}. Expert ${cells[0].expert} got most, ${percent(cells[0].share)}; evenness ${even}.`;
}

let turn = 0;
let drawn = Promise.resolve(); // one drawing at a time: a chart that is being made takes no rows yet
function show() {
  const state = currentState();
  const mine = ++turn;
  showStatus(state);
  showAllTables(state);
  showCases(state);
  for (const chart of shown) {
    chart.caption.textContent = chart.note(state);
    showTable(chart, state);
  }
  byId("charts").ariaBusy = "true";
  drawn = drawn.then(() => drawAll(state, () => mine === turn));
}

/** Draws the charts in view, then the others one by one: in between the page is painted, and the reader has a turn. */
async function drawAll(state, isLatest) {
  const waiting = new Set(shown.filter((chart) => chart.spec));
  const next = () => [...waiting].find((chart) => isInView(chart.view)); // drawing one may push others out of view
  for (let chart; isLatest() && (chart = next()); waiting.delete(chart)) await draw(chart, state);
  if (isLatest()) byId("charts").ariaBusy = "false";
  for (const chart of waiting) {
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    if (!isLatest()) return;
    await draw(chart, state);
  }
}

function isInView(part) {
  const { top, bottom } = part.getBoundingClientRect();
  return top < innerHeight && bottom > 0;
}

// ---- every table of the summary

const names = {
  shares: "load with intervals",
  balance: "evenness with intervals",
  modality: "modality preference",
  ranks: "first and later experts",
  confidence: "routing confidence",
  specialisation_groups: "specialisation of groups",
};
const label = (name) => names[name] ?? name;
fill(byId("table"), Object.keys(data.tables), null, label);

function showAllTables(state) {
  const name = valueOf(byId("table"));
  const picked = pick(name, state);
  const rows = rowsOf(name, picked.slice(0, MOST_ROWS));
  const columns = Object.fromEntries(
    Object.keys(data.tables[name]).map((field) => [field, [field.replaceAll("_", " "), plain]]),
  );
  byId("table-view").replaceChildren(tableOrWords(rows, columns, label(name), picked.length));
}

// ---- cases

function shownCases() {
  const { group } = currentState();
  return data.cases.filter((shown) => group === null || shown.group === group);
}
fill(byId("overlay-layer"), layers, null);

function showCases({ layer }) {
  byId("cases").hidden = !data.cases.length;
  const before = valueOf(byId("case"));
  fill(byId("case"), shownCases(), null, ({ id }) => id);
  if (byId("case").values.includes(before)) choose(byId("case"), before);
  if (layer !== null) choose(byId("overlay-layer"), layer);
  showCase();
}

function showCase() {
  const shown = valueOf(byId("case"));
  byId("case-view").replaceChildren(...(shown ? caseParts(shown) : ["No case of this group is in the page."]));
}

function caseParts({ id, group, frames, texts }) {
  const layer = valueOf(byId("overlay-layer"));
  const entries = Object.entries({ group, ...texts }).flatMap(([name, text]) => [
    element("dt", { textContent: name }),
    element("dd", { textContent: text }),
  ]);
  const figures = frames.map((frame, i) => frameFigure(frame, frame.experts[layer], `${id}, frame ${i + 1}`));
  return [element("div", { className: "frames" }, ...figures), element("dl", {}, ...entries)];
}

function frameFigure({ image, rows, columns }, chosenExperts, name) {
  const canvas = element("canvas", { width: columns, height: rows, ariaHidden: "true" });
  canvas.style.opacity = byId("strength").value / 100;
  const pen = canvas.getContext("2d");
  const counts = Array(experts).fill(0);
  chosenExperts?.forEach((expert, i) => {
    pen.fillStyle = data.colours[expert];
    pen.fillRect(i % columns, Math.floor(i / columns), 1, 1);
    counts[expert]++;
  });
  const parts = counts.flatMap((count, expert) => {
    const swatch = element("i", { className: "swatch" });
    swatch.style.background = data.colours[expert];
    return count ? [element("span", {}, swatch, `expert ${expert}: ${percent(count / (rows * columns))}`)] : [];
  });
  const caption = parts.length ? parts : ["no image token in this layer"];
  return element(
    "figure",
    {},
    element("div", { className: "frame" }, element("img", { src: image, alt: name }), canvas),
    element("figcaption", {}, ...caption),
  );
}

function step(by) {
  const select = byId("case"),
    number = select.values.length;
  if (number) select.value = (Number(select.value) + by + number) % number;
  showCase();
}

// ---- start

const { model, cases, tokens } = data.facts;
byId("facts").textContent =
  `${model}: ${whole(tokens)} tokens, ${whole(cases)} cases, ${layers.length} layers of ${experts} experts.`;
byId("filters").addEventListener("change", show);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("filters").addEventListener("reset", () => setTimeout(show));
byId("table").addEventListener("change", () => showAllTables(currentState()));
for (const id of ["case", "overlay-layer"]) byId(id).addEventListener("change", showCase);
byId("strength").addEventListener("input", () =>
  document.querySelectorAll(".frame canvas").forEach((canvas) => {
    canvas.style.opacity = byId("strength").value / 100;
  }),
);
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
show();
