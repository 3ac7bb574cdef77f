// The record's cells, and sums of them for the chosen filters.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const experts = data.colours.length;
const ALL = "all groups";
const SIGNIFICANT = 0.05; // false discovery rate, as in the figures
const MOST_ROWS = 500;

const percent = (x) => (100 * x).toFixed(1) + " %";
const whole = (x) => x.toLocaleString("en");
const short = (x) => String(Number(x.toPrecision(3)));
const plain = (x) =>
  x === null || x === undefined ? "–" : typeof x !== "number" ? x : Number.isInteger(x) ? whole(x) : short(x);

const parsed = {};
/** A table's rows as objects, made when first asked for; none if the record has no such table. */
function rowsOf(name) {
  const columns = data.tables[name];
  if (!columns) return [];
  return (parsed[name] ??= Object.values(columns)[0].map((_, i) => {
    const row = {};
    for (const key in columns) row[key] = columns[key][i];
    return row;
  }));
}

const keep = (rows, wanted) =>
  rows.filter((row) =>
    Object.entries(wanted).every(([key, value]) => value === null || !(key in row) || row[key] === value),
  );

/** Counts summed over the rows that agree in `keys`, and each one's share of those that agree in `within`. */
function sum(rows, keys, within) {
  const cells = new Map();
  const totals = new Map();
  const name = (row, of) => of.map((key) => row[key]).join("\0");
  for (const row of rows) {
    const key = name(row, keys);
    const outer = name(row, within);
    if (!cells.has(key)) cells.set(key, { ...Object.fromEntries(keys.map((k) => [k, row[k]])), count: 0 });
    cells.get(key).count += row.count;
    totals.set(outer, (totals.get(outer) ?? 0) + row.count);
  }
  return [...cells.values()].map((cell) => ({ ...cell, share: cell.count / totals.get(name(cell, within)) || 0 }));
}

/** Shannon's entropy over its maximum: 1 for even load. */
const evenness = (shares) => -shares.reduce((h, p) => h + (p ? p * Math.log(p) : 0), 0) / Math.log(experts);

const seriesOf = Object.fromEntries(data.series.flatMap(({ name, modalities }) => modalities.map((m) => [m, name])));

function loadRows({ group, layer, modality }) {
  const rows = keep(rowsOf("load"), { group, layer, modality }).map((row) => ({
    ...row,
    input: seriesOf[row.modality],
  }));
  const panels =
    group === null && data.groups.length > 1 ? rows.concat(rows.map((row) => ({ ...row, group: ALL }))) : rows;
  return sum(panels, ["group", "expert", "input"], ["group"]);
}

function pairRows({ layer }) {
  if (!rowsOf("coactivation").some((pair) => pair.count)) return []; // top-1 throughout
  const alone = new Map(sum(keep(rowsOf("load"), { layer }), ["expert"], []).map((row) => [row.expert, row.count]));
  return sum(keep(rowsOf("coactivation"), { layer }), ["expert", "other"], []).flatMap(({ expert, other, count }) => [
    { expert, other, count, share: count / alone.get(expert) || 0 },
    { expert: other, other: expert, count, share: count / alone.get(other) || 0 },
  ]);
}

function specialisationRows({ group }) {
  const rows = group === null ? rowsOf("specialisation") : keep(rowsOf("specialisation_groups"), { group });
  return rows.map((row) => ({
    ...row,
    bits: row.information ?? row.divergence,
    sure: row.q !== null && row.q < SIGNIFICANT,
  }));
}

function tokenRows({ layer }) {
  const best = keep(rowsOf("tokens"), { layer }).sort(
    (a, b) => a.expert - b.expert || b.share - a.share || b.count - a.count,
  );
  const seen = Array(experts).fill(0);
  return best.filter((row) => seen[row.expert]++ < 10);
}
