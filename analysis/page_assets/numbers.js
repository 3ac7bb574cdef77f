// The record's cells, and sums of them for the chosen filters.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const experts = data.colours.length;
const ALL = "all groups";
const SIGNIFICANT = 0.05; // false discovery rate, as in the figures
const MOST_ROWS = 200;
const MOST_SHAPES = 2000; // more are drawn on a canvas, since each is an element in SVG

const percent = (x) => (100 * x).toFixed(1) + " %";
const whole = new Intl.NumberFormat("en").format;
const short = (x) => String(Number(x.toPrecision(3)));
const plain = (x) =>
  x === null || x === undefined ? "–" : typeof x !== "number" ? x : Number.isInteger(x) ? whole(x) : short(x);

// A table is a column for each field: an array, or for text its different values and each row's code among them.
const codesOf = (column) => column.codes ?? column;
const codeOf = (column, value) => (column.codes ? column.values.indexOf(value) : value);
const valueAt = (column, i) => (column.codes ? column.values[column.codes[i]] : column[i]);

/** The rows of a table, by number, that have the wanted values: null wants any, as for a field that it lacks. */
function pick(name, wanted = {}) {
  const table = data.tables[name];
  if (!table) return [];
  const tests = Object.entries(wanted)
    .filter(([field, value]) => value !== null && field in table)
    .map(([field, value]) => [codesOf(table[field]), codeOf(table[field], value)]);
  const picked = [];
  const rows = codesOf(Object.values(table)[0]).length;
  for (let i = 0; i < rows; i++) picked.push(i);
  return tests.reduce((left, [codes, code]) => left.filter((i) => codes[i] === code), picked);
}

/** The rows of those numbers as objects; none if the record has no such table. */
function rowsOf(name, picked = pick(name)) {
  const columns = Object.entries(data.tables[name] ?? {});
  return picked.map((i) => Object.fromEntries(columns.map(([field, column]) => [field, valueAt(column, i)])));
}

const RADIX = 8192; // more values than a field has; the codes of four fields make an exact number

/** Counts summed over the wanted rows that agree in `keys`, and each one's share of those that agree in `within`. */
function sum(name, wanted, keys, within) {
  const table = data.tables[name];
  const numberer = (fields) => {
    const columns = fields.map((field) => codesOf(table[field]));
    return (i) => {
      let n = 0;
      for (const codes of columns) n = n * RADIX + codes[i];
      return n;
    };
  };
  const [cellOf, totalOf] = [keys, within].map(numberer);
  const cells = new Map();
  const totals = new Map();
  for (const i of pick(name, wanted)) {
    const key = cellOf(i);
    const outer = totalOf(i);
    const count = table.count[i];
    const cell = cells.get(key);
    if (cell) cell.count += count;
    else cells.set(key, { i, outer, count });
    totals.set(outer, (totals.get(outer) ?? 0) + count);
  }
  return [...cells.values()].map(({ i, outer, count }) => ({
    ...Object.fromEntries(keys.map((key) => [key, valueAt(table[key], i)])),
    count,
    share: count / totals.get(outer) || 0,
  }));
}

/** The function with its last result kept, for the same choice of filters. */
function remembered(make) {
  let asked, made;
  return (state) => {
    const key = JSON.stringify(state);
    if (key !== asked) [asked, made] = [key, make(state)];
    return made;
  };
}

/** Shannon's entropy over its maximum: 1 for even load. */
const evenness = (shares) => -shares.reduce((h, p) => h + (p ? p * Math.log(p) : 0), 0) / Math.log(experts);

const seriesOf = Object.fromEntries(data.series.flatMap(({ name, modalities }) => modalities.map((m) => [m, name])));
const series = data.series.map(({ name }) => name);
const inputs = data.tables.load.modality.values.map((modality) => series.indexOf(seriesOf[modality]));
Object.defineProperty(data.tables.load, "input", {
  value: { values: series, codes: data.tables.load.modality.codes.map((code) => inputs[code]) }, // in no list of fields
});

function loadRows({ group, layer, modality }) {
  const wanted = { group, layer, modality };
  const panels = sum("load", wanted, ["group", "expert", "input"], ["group"]);
  if (group !== null || data.groups.length < 2) return panels;
  return panels.concat(sum("load", wanted, ["expert", "input"], []).map((row) => ({ group: ALL, ...row })));
}

function pairRows({ layer }) {
  if (!data.tables.coactivation?.count.some(Boolean)) return []; // top-1 throughout
  const alone = new Map(sum("load", { layer }, ["expert"], []).map((row) => [row.expert, row.count]));
  return sum("coactivation", { layer }, ["expert", "other"], []).flatMap(({ expert, other, count }) => [
    { expert, other, count, share: count / alone.get(expert) || 0 },
    { expert: other, other: expert, count, share: count / alone.get(other) || 0 },
  ]);
}

function specialisationRows({ group }) {
  const name = group === null ? "specialisation" : "specialisation_groups";
  return rowsOf(name, pick(name, { group })).map((row) => ({
    ...row,
    bits: row.information ?? row.divergence,
    sure: row.q !== null && row.q < SIGNIFICANT,
  }));
}

function tokenRows({ layer }) {
  const { expert, share, count } = data.tables.tokens ?? {};
  const best = pick("tokens", { layer }).sort(
    (a, b) => expert[a] - expert[b] || share[b] - share[a] || count[b] - count[a],
  );
  const seen = Array(experts).fill(0);
  return rowsOf("tokens", best.filter((i) => seen[expert[i]]++ < 10));
}
