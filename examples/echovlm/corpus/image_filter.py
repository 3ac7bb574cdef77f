"""Which images stay: those that show one scan, of one part of the body.

The paper keeps "single-region" images and leaves open which region it means, so there are two filters, by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from examples.echovlm.cases import Case
from examples.echovlm.corpus.manifest import Manifest
from examples.echovlm.corpus.organs import organs_in
from examples.echovlm.corpus.regions import displays
from examples.echovlm.corpus.scan import panels
from examples.echovlm.corpus.store import Corpus, Layout, write_corpus

SEVERAL, NONE, ANATOMY = "several display regions", "no scan in the frame", "several anatomical regions"


def display(case: Case, layout: Layout, path: Path) -> tuple[str, str]:
    """Why the frame is not one scan, "" if it is; and whether the tag said so, or pixels where it is missing or stale.

    The tag is (0018,6011), of which 2D regions of tissue or colour flow count. It is stale if one of them lies outside
    the frame: the frame has been resized or cropped since.
    """
    with Image.open(path) as image:
        shown = displays(layout.regions or ())
        if shown and all(region.fits(*image.size) for region in shown):
            return (SEVERAL if len(shown) > 1 else ""), "tag"
        count = panels(np.asarray(image.convert("RGB")))
    return ("" if count == 1 else SEVERAL if count else NONE), "stale tag, pixels" if layout.regions else "pixels"


def anatomy(case: Case, layout: Layout, path: Path) -> tuple[str, str]:
    """Why the image is not of one part of the body, by its report and the organs that its header names."""
    organs = {*organs_in(f"{case.findings}\n{case.impression}"), *layout.organs}
    return (ANATOMY if len(organs) > 1 else ""), "report and header"


FILTERS: dict[str, Callable[[Case, Layout, Path], tuple[str, str]]] = {"anatomy": anatomy, "display": display}


def filter_images(corpus: Corpus, out: Path, *, filters: Sequence[str] = tuple(FILTERS)) -> Manifest:
    """Write the cases with the images that pass the filters into `out`; a case without any is dropped.

    The manifest counts images, and under "cases" the cases.
    """
    given = sum(len(case.images) for case in corpus.cases)
    manifest = Manifest(step="filter-images", given=given, settings={"filters": list(filters)})
    decided: Counter[str] = Counter()
    kept: list[Case] = []
    for case in corpus.cases:
        images = []
        for number, image in enumerate(case.images):
            reason = _verdict(case, corpus.layout(image), corpus.folder / image, filters, decided)
            if reason:
                manifest.drop(case.id, reason, image=number)
            else:
                images.append(image)
                manifest.keep()
        if images:
            kept.append(replace(case, images=tuple(images)))
    lost = len(corpus.cases) - len(kept)
    cases = {"given": len(corpus.cases), "kept": len(kept), "dropped": {"no image left": lost} if lost else {}}
    manifest.more = {"cases": cases, "decided by": dict(decided.most_common())}
    write_corpus(out, kept, corpus.layouts, manifest)
    return manifest


def _verdict(case: Case, layout: Layout, path: Path, filters: Sequence[str], decided: Counter[str]) -> str:
    for name in filters:
        reason, by = FILTERS[name](case, layout, path)
        if name == "display":
            decided[by] += 1
        if reason:
            return reason
    return ""
