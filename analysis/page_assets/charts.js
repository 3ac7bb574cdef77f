// The charts: what each shows (rows, columns of its table), and how (a Vega-Lite specification).

const layerAxis = {
  field: "layer",
  type: "quantitative",
  axis: { tickMinStep: 1, format: "d", grid: false },
  scale: { nice: false, zero: false, padding: 8 },
};
const layerBand = { field: "layer", type: "ordinal", axis: { labelAngle: 0, labelOverlap: true } };
const expertAxis = { type: "ordinal", axis: { labelAngle: 0, labelOverlap: true }, title: "expert" };
const heat = {
  type: "quantitative",
  scale: { scheme: "cividis", domainMin: 0 },
  legend: { format: ".0%", gradientLength: 140 },
};
/** A line where the chosen layer is. */
const chosen = (layer) =>
  layer === null
    ? []
    : [
        {
          data: { values: [{ layer }] },
          mark: { type: "rule", strokeDash: [2, 2], color: "#888" },
          encoding: { x: layerAxis },
        },
      ];
/** Lines by layer, one for each of the fields, told apart by colour and shape. */
function lines(fields, y, layer, more = []) {
  const names = Object.keys(fields);
  const look = { field: "key", type: "nominal", title: null, sort: names, legend: { orient: "top" } };
  look.legend.labelExpr = names.map((name) => `datum.value === '${name}' ? '${fields[name]}' : `).join("") + "''";
  return {
    width: "container",
    height: 190,
    layer: [
      ...chosen(layer),
      {
        transform: [{ fold: names }, { filter: "isValid(datum.value)" }],
        mark: { type: "line", point: { size: 45, filled: true }, cursor: "pointer" },
        encoding: {
          x: layerAxis,
          y: { field: "value", type: "quantitative", title: y },
          color: { ...look, scale: { domain: names, range: ["#0072B2", "#D55E00", "#009E73"] } },
          shape: { ...look, scale: { domain: names, range: ["circle", "square", "triangle-up"] } },
        },
      },
      ...more,
    ],
  };
}

const panelWidth = experts > 24 ? 480 : Math.max(110, experts * 26);
const charts = [
  {
    id: "load",
    title: "Expert load by group",
    wide: true,
    note: () =>
      "Routed tokens of each expert, by what went in. A token counts once for each top-k expert and layer. Click one to filter.",
    rows: loadRows,
    columns: {
      group: ["group", plain],
      expert: ["expert", plain],
      input: ["input", plain],
      count: ["routed tokens", whole],
      share: ["share of group", percent],
    },
    spec: ({ unit }) => ({
      facet: { field: "group", type: "nominal", title: null, sort: [...data.groups, ALL] },
      columns: Math.max(1, Math.floor((byId("charts").clientWidth - 60) / (panelWidth + 90))),
      spec: {
        width: panelWidth,
        height: 130,
        mark: { type: "bar", cursor: "pointer", stroke: "#444", strokeWidth: experts > 24 ? 0 : 0.7 },
        encoding: {
          x: { field: "expert", ...expertAxis },
          y: {
            field: unit,
            type: "quantitative",
            title: unit === "count" ? "routed tokens" : "share of group",
            axis: { format: unit === "count" ? "~s" : ".0%", tickCount: 4 },
          },
          color: {
            field: "input",
            type: "nominal",
            title: null,
            legend: { orient: "top" },
            scale: { domain: used.map((s) => s.name), range: used.map((s) => s.colour) },
          },
        },
      },
      resolve: {
        scale: { y: unit === "count" ? "independent" : "shared" },
        axis: { x: "independent", y: "independent" },
      },
    }),
  },
  {
    id: "layers",
    title: "Load by layer",
    note: () =>
      "Share of each layer's routed tokens, for the chosen group and modality. Click a cell to choose its layer.",
    rows: ({ group, modality }) => sum("load", { group, modality }, ["layer", "expert"], ["layer"]),
    columns: {
      layer: ["layer", plain],
      expert: ["expert", plain],
      count: ["routed tokens", whole],
      share: ["share of layer", percent],
    },
    spec: ({ layer }) => ({
      width: "container",
      height: 210,
      layer: [
        {
          mark: { type: "rect", cursor: "pointer" },
          encoding: {
            x: layerBand,
            y: { field: "expert", ...expertAxis, sort: "descending" },
            color: { field: "share", ...heat, title: "share" },
          },
        },
        ...(layer === null
          ? []
          : [
              {
                data: { values: [{ layer }] },
                mark: { type: "rect", fill: null, stroke: "#D55E00", strokeWidth: 2 },
                encoding: { x: layerBand },
              },
            ]),
      ],
    }),
  },
  {
    id: "specialisation",
    title: "Specialisation by layer",
    note: ({ group }) =>
      (group === null
        ? "How much a case's group tells of its tokens' experts, I(group; expert)"
        : "How far the group's experts depart from all tokens', KL divergence") +
      `, beside what shuffled groups give; ringed where q < ${SIGNIFICANT}. Of all modalities.`,
    rows: specialisationRows,
    columns: {
      layer: ["layer", plain],
      bits: ["bits", plain],
      null: ["shuffled", plain],
      p: ["p", plain],
      q: ["q", plain],
    },
    spec: ({ layer }) =>
      lines({ bits: "record", null: "groups shuffled" }, "bits", layer, [
        {
          mark: { type: "point", strokeWidth: 1.5, color: "#0072B2" },
          encoding: {
            size: { condition: { test: "datum.sure", value: 130 }, value: 0 },
            x: layerAxis,
            y: { field: "bits", type: "quantitative" },
          },
        },
      ]),
  },
  {
    id: "coactivation",
    title: "Co-activation",
    note: () =>
      "Of the tokens that chose one expert, the share that chose the other too. Of all groups and modalities.",
    rows: pairRows,
    columns: {
      expert: ["expert", plain],
      other: ["with", plain],
      count: ["tokens", whole],
      share: ["share of expert's", percent],
    },
    spec: () => ({
      width: "container",
      height: 210,
      mark: "rect",
      encoding: {
        x: { field: "other", ...expertAxis, title: "with expert" },
        y: { field: "expert", ...expertAxis },
        color: { field: "share", ...heat, title: "share" },
      },
    }),
  },
  {
    id: "paths",
    title: "Weights of the paths",
    note: () =>
      "α weighs the static expert, (1 − α)·λ the shared one, 1 − α the routed ones. Of the model, not of the tokens.",
    rows: () => rowsOf("paths").filter((row) => row.alpha !== null || row.lam !== null),
    columns: {
      layer: ["layer", plain],
      name: ["name", plain],
      alpha: ["α", plain],
      lam: ["λ", plain],
      shared: ["(1 − α)·λ", plain],
      routed: ["1 − α", plain],
    },
    spec: ({ layer }) => lines({ alpha: "α (static)", lam: "λ", shared: "(1 − α)·λ (shared)" }, "weight", layer),
  },
  {
    id: "tokens",
    title: "Tokens of each expert",
    note: ({ layer }) =>
      `Tokens of which the expert got the largest share, ${layer === null ? "in any layer" : `in layer ${layer}`}. Of all groups.`,
    rows: tokenRows,
    columns: {
      expert: ["expert", plain],
      layer: ["layer", plain],
      token: ["token", (text) => JSON.stringify(text)],
      token_id: ["id", String],
      count: ["times", whole],
      share: ["share", percent],
    },
  },
];
