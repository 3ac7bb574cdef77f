"""One page of a record to explore in a browser: filters, linked charts, tables and cases, in one file, no network."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import io
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.colors import to_hex
from PIL import Image

from moe_adapter.analysis import style
from moe_adapter.analysis.figures import SERIES
from moe_adapter.analysis.overlays import patch_experts_by_layer
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.resampling import DEFAULT, Resampling
from moe_adapter.analysis.summary import summary
from moe_adapter.analysis.vocabulary import Tokenizer
from moe_adapter.errors import MoEAdapterError

FRAME_SIDE = 512  # pixels of a frame's longer side in the page
SCRIPTS = ("numbers.js", "charts.js", "page.js")  # one module, in this order
CASE_KEYS = {"frames", "grids", "texts"}


def write_report(
    record: RoutingRecord,
    path: str | os.PathLike[str],
    *,
    cases: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: Tokenizer | None = None,
    title: str | None = None,
    resampling: Resampling = DEFAULT,
) -> Path:
    """Write a self-contained HTML page of the record's statistics, and of `cases` under their experts; its path.

    Args:
        cases: for each case id to show, "frames" (PIL images or paths), "grids" ((rows, columns) of image tokens of
            each, as for `patch_experts`) and "texts" (by name, such as "answer" and "reference"); each may be absent.
        tokenizer: names the token ids.

    Raises:
        MoEAdapterError: as `summary`; a case that the record does not have, or whose image tokens the grids don't fit.
    """
    shown = _cases(record, cases or {})
    tables = summary(record, tokenizer=tokenizer, resampling=resampling)
    content = _content(record, tables) | {"cases": shown}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(title or f"Routing of {record.facts.model}", content), encoding="utf-8")
    return path


def _page(title: str, content: dict[str, Any]) -> str:
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # "<" escaped, no text of the data can end the element that holds it; and no other script than ours may run.
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = dict(title=html.escape(title), digest=digest, style=_asset("page.css"), script=script, data=data)
    return Template(_asset("page.html")).substitute(parts)


@functools.cache
def _script() -> str:
    """The page's own script and, in one bundle with it, Vega-Lite."""
    try:
        import vl_convert
    except ImportError as error:
        raise MoEAdapterError('a report needs vl-convert: pip install "moe-adapter[analysis]".') from error
    return vl_convert.javascript_bundle("\n".join(map(_asset, SCRIPTS)))


def _asset(name: str) -> str:
    return resources.files("moe_adapter.analysis").joinpath("page_assets", name).read_text(encoding="utf-8")


def _content(record: RoutingRecord, tables: dict[str, pa.Table]) -> dict[str, Any]:
    """What the page shows, as JSON; tables column by column, for their rows would repeat the names."""
    experts = max(layer.num_experts for layer in record.facts.layers)
    if "coactivation" in tables:  # the shares of a pair are made from counts in the page
        pairs = tables["coactivation"].filter(pc.field("expert") < pc.field("other"))
        tables = tables | {"coactivation": pairs.select(["layer", "expert", "other", "count"])}
    return {
        "facts": {"model": record.facts.model, "cases": record.facts.cases, "tokens": record.facts.tokens},
        "groups": sorted(record.facts.groups),
        "layers": [layer.name for layer in record.facts.layers],
        "colours": [to_hex(look["facecolor"]) for look in style.expert_looks(experts)],
        "series": [
            {"name": name, "modalities": list(modalities), "colour": look["facecolor"]}
            for name, (modalities, look) in SERIES.items()
        ],
        "tables": {name: _columns(table) for name, table in tables.items()},
    }


def _columns(table: pa.Table) -> dict[str, Any]:
    """Values by column: floats to six digits, and text as its different values with an index into them for each row."""
    return {
        name: _text(column) if pa.types.is_string(column.type) else list(map(_short, column.to_pylist()))
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def _text(column: pa.ChunkedArray) -> dict[str, list]:
    coded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return {"values": coded.dictionary.to_pylist(), "codes": coded.indices.to_pylist()}


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _cases(record: RoutingRecord, cases: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not cases:
        return []
    if record.aggregated:
        raise MoEAdapterError("cases need a record of tokens, by record_routing; the given one holds counts alone.")
    rows = record.count(["case", "group"], pc.field("case").isin(list(cases)))
    groups = dict(zip(rows["case"].to_pylist(), rows["group"].to_pylist(), strict=True))
    if missing := [case for case in cases if case not in groups]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise MoEAdapterError(f"{record.name} has no case {', '.join(map(repr, missing[:3]))}{more}.")
    return [_case(record, case, groups[case], given) for case, given in cases.items()]


def _case(record: RoutingRecord, case: str, group: str, given: Mapping[str, Any]) -> dict[str, Any]:
    frames, grids = given.get("frames", ()), given.get("grids", ())
    if set(given) - CASE_KEYS or len(frames) != len(grids):
        raise MoEAdapterError(
            f"case {case!r} has {len(frames)} frames, {len(grids)} grids and the keys {sorted(given)}; expected a grid "
            f"for each frame and keys among {sorted(CASE_KEYS)}."
        )
    maps = patch_experts_by_layer(record, case, grids) if frames else {}
    shown = []
    for number, (frame, (rows, columns)) in enumerate(zip(frames, grids, strict=True)):
        experts = {layer: frames_of[number].ravel().tolist() for layer, frames_of in maps.items()}
        shown.append({"image": data_uri(frame), "rows": rows, "columns": columns, "experts": experts})
    texts = {name: str(text) for name, text in given.get("texts", {}).items()}
    return {"id": case, "group": group, "frames": shown, "texts": texts}


def data_uri(frame: Any) -> str:
    """An image, or a file that Pillow reads, as a JPEG of at most FRAME_SIDE pixels a side that a page can hold.

    Raises: MoEAdapterError for what Pillow does not read.
    """
    try:
        image = (frame if isinstance(frame, Image.Image) else Image.open(frame)).convert("RGB")
    except OSError as error:
        raise MoEAdapterError(f"{frame} is not an image that Pillow reads: {error}") from error
    image.thumbnail((FRAME_SIDE, FRAME_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
