"""A plot inside a page: the SVG element alone, with ids that no other plot of the page has."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HREF = f"{{{_XLINK}}}href"
_LEAST = 0.6  # of its drawn width
_KEPT = re.compile(r"url\(#([^)]+)\)")

ET.register_namespace("", _SVG)
ET.register_namespace("xlink", _XLINK)


def inline(svg: bytes, prefix: str) -> str:
    """The svg element of a file that `report.plots` drew, without its metadata.

    As wide as it was drawn, or narrower where there is less room, but never too small to read.
    Everything that was text stays text: the serialiser escapes it.
    """
    root = ET.fromstring(svg)
    width = float(root.attrib.pop("width").removesuffix("pt"))
    del root.attrib["height"]
    root.set("style", f"width:{width:g}pt;min-width:{_LEAST * width:g}pt")
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata"):
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, prefix + value)
            elif key == _HREF and value.startswith("#"):
                element.set(key, f"#{prefix}{value[1:]}")
            elif "url(#" in value:
                element.set(key, _KEPT.sub(rf"url(#{prefix}\1)", value))
    return ET.tostring(root, encoding="unicode")
