"""Reading findings back: negation, measurements, synonyms, and words of another organ."""

from __future__ import annotations

import pytest

from examples.echovlm.findings import parse_findings
from moe_adapter.errors import MoEAdapterError


@pytest.mark.parametrize(
    ("text", "organ", "language", "expected"),
    [
        ("No nodule, cyst or calcification.", "thyroid", "en", {"lesion": "none"}),
        ("The gland is normal in size.", "thyroid", "en", {}),
        ("No cyst, but a hypoechoic nodule of 1.2 cm on the right.", "thyroid", "en",
         {"lesion": "nodule", "echogenicity": "hypoechoic", "side": "right", "size_mm": "12"}),
        ("No cyst is seen, a 10 mm nodule lies in the left lobe.", "thyroid", "en",
         {"lesion": "nodule", "side": "left", "size_mm": "10"}),
        ("A 12 x 8.5 mm oval mass without posterior shadow.", "breast", "en",
         {"lesion": "mass", "shape": "oval", "size_mm": "12"}),
        ("A cyst is not seen.", "liver", "en", {"lesion": "none"}),
        ("Plaque is absent. Flow is absent.", "vessel", "en", {"lesion": "none", "flow": "absent"}),
        ("Renal cyst with aliasing flow.", "kidney", "en", {"lesion": "cyst"}),
        ("No stone; a cyst of the lower pole.", "kidney", "en", {"lesion": "cyst", "position": "lower pole"}),
        ("A 9 mm stone in the spleen.", "spleen", "en", {"lesion": "stone", "size_mm": "9"}),
        ("甲状腺左叶见低回声结节,大小约1.2cm,未见钙化。", "thyroid", "zh",
         {"lesion": "nodule", "side": "left", "echogenicity": "hypoechoic", "size_mm": "12"}),
        ("未见囊肿,右叶可见6mm结节。", "thyroid", "zh", {"lesion": "nodule", "side": "right", "size_mm": "6"}),
        ("肝内见无回声囊肿。", "liver", "zh", {"lesion": "cyst", "echogenicity": "anechoic"}),
        ("椭圆形肿块,后方无声影。", "breast", "zh", {"lesion": "mass", "shape": "oval"}),
        ("未见积液,未见反流。", "heart", "zh", {"lesion": "none"}),
        ("", "heart", "zh", {}),
        ("the the cyst the 3 mm mm of of", "liver", "en", {"lesion": "cyst", "size_mm": "3"}),
    ],
)  # fmt: skip
def test_parse(text: str, organ: str, language: str, expected: dict[str, str]) -> None:
    assert parse_findings(text, organ, language) == expected


def test_another_language_is_refused() -> None:
    with pytest.raises(MoEAdapterError, match="got 'de'; expected one of en, zh"):
        parse_findings("Zyste", "liver", "de")
