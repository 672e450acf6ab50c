"""Matplotlib figures as inline SVG that takes its colours and fonts from the page.

Figures are drawn in the few colours of `COLOURS`; in the SVG each becomes a CSS variable, so that a dark page
has dark figures. Text stays text. The same figure gives the same bytes: no dates, no random ids.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

from .._core import UnsupportedError

COLOURS = {
    "ink": "#1a1a2e",
    "muted": "#6b7080",
    "line": "#d9dce3",
    "paper": "#fdfdfe",
    "float": "#7a7f8d",
    "ptq": "#c2570c",
    "qat": "#0b6e8f",
    "other": "#7c4dbe",
}
"""CSS variable -> the colour that stands for it while a figure is drawn. All differ."""

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "libqat",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "text.parse_math": False,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
}


@contextmanager
def figure(width: float = 4.8, height: float = 2.5) -> Iterator[tuple]:
    """(figure, axes) in the report's style; sizes in inches. No window, no global state left behind."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            f"report: expected the package {error.name}, got none: pip install 'libqat[report]'"
        ) from error
    with matplotlib.rc_context(matplotlib.rcParamsDefault | _STYLE):
        drawing = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(drawing)
        yield drawing, drawing.add_subplot()


def inline_svg(drawing, name: str, title: str) -> str:
    """The drawing as an <svg> element for HTML.

    name: unique on the page; ids of the drawing begin with it. title: what a reader who cannot see it hears.
    """
    stream = io.BytesIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph"
        )  # only measured with this font; the page's browser draws it
        drawing.savefig(stream, format="svg", metadata=no_metadata)
    root = ElementTree.fromstring(stream.getvalue())
    _drop_metadata(root)
    _plain_names(root)
    _own_ids(root, name)
    for element in root.iter():
        if style := element.get("style"):
            element.set("style", _style(style))
    box = root.get("viewBox")
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-labelledby": f"{name}-title"})
    label = ElementTree.Element("title", {"id": f"{name}-title"})
    label.text = title
    root.insert(0, label)
    text = ElementTree.tostring(root, encoding="unicode")
    return re.sub(r">\s+<", "><", text)


def _drop_metadata(root: ElementTree.Element) -> None:
    """Without the RDF, and without matplotlib's style sheet, which would apply to the whole page."""
    for parent in root.iter():
        for child in list(parent):
            if child.tag == f"{_SVG}metadata" or (
                child.tag == f"{_SVG}defs" and child.find(f"{_SVG}style") is not None
            ):
                parent.remove(child)


def _plain_names(root: ElementTree.Element) -> None:
    """HTML's parser knows SVG by its tags alone; namespaces would be spelled out in each."""
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))


def _own_ids(root: ElementTree.Element, name: str) -> None:
    """Only ids that something refers to, numbered under `name`: no two figures of a page share one."""
    used: dict[str, str] = {}
    for element in root.iter():
        for key, value in element.attrib.items():
            found = _REFERENCE.findall(value) + ([value[1:]] if key == "href" else [])
            for identity in found:
                used.setdefault(identity, f"{name}-{len(used)}")
    for element in root.iter():
        if (identity := element.attrib.pop("id", None)) in used:
            element.set("id", used[identity])
        for key, value in element.attrib.items():
            if key == "href":
                element.set(key, "#" + used[value[1:]])
            else:
                element.set(key, _REFERENCE.sub(lambda match: f"url(#{used[match[1]]})", value))


def _style(style: str) -> str:
    """Colours as variables of the page; of the font only the size."""
    style = re.sub(r"font: ((?:\w+ )*)([\d.]+)px[^;]*", _font, style)
    for variable, colour in COLOURS.items():
        style = style.replace(colour, f"var(--{variable})")
    return style


def _font(match: re.Match) -> str:
    bold = "; font-weight: 600" if "700" in match[1] or "bold" in match[1] else ""
    return f"font-size: {match[2]}px{bold}"
