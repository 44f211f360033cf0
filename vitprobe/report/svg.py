"""SVG files of matplotlib as small elements of a page."""

from __future__ import annotations

import base64
import hashlib
import re
from io import BytesIO

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from vitprobe.plots.style import COLORS, GRID, INK, MUTED

# Cells of a heatmap or colour bar, as matplotlib writes them one after another.
_CELL = re.compile(
    r'<path d="M ([\d.-]+) ([\d.-]+) L ([\d.-]+) ([\d.-]+) L ([\d.-]+) ([\d.-]+) L [^"]+" '
    r'clip-path="[^"]+" style="fill: (#\w+)(?:; stroke: \7;[^"]*)?"/>'
)
_CELLS = re.compile(r'(?:<path d="[^"]+" fill="#\w+"/> ?)+')
# Cells that do not exceed their floor: nothing else has these colours.
_DOTS = re.compile(
    r'<use href="[^"]+" x="[^"]+" y="[^"]+" style="fill: (?P<color>#ffffff|#111111)"/>'
    r'(?: ?<use href="[^"]+" x="[^"]+" y="[^"]+" style="fill: (?P=color)"/>)*'
)
# Marks and lines in a row that look the same.
_MARKS = re.compile(
    r'(?P<use><use href="[^"]+") (?P<at>x="[^"]+" y="[^"]+") (?P<style>style="[^"]*")/>'
    r'(?: ?(?P=use) x="[^"]+" y="[^"]+" (?P=style)/>)+'
)
_LINES = re.compile(
    r'<path d="[^"]+" (?P<look>(?:clip-path="[^"]+" )?style="fill: none[^"]*")/>'
    r'(?: ?<path d="[^"]+" (?P=look)/>)+'
)
_IMAGE = re.compile(
    r'<image href="data:image/png;base64,([^"]+)"[^>]*? width="(\d+)" height="(\d+)" '
    r'(transform="[^"]+")[^>]*/>'
)
# Images of more pixels than a map has patches are photographs.
_PHOTOGRAPH = 64
_THEMED = {
    INK: "figure-ink",
    MUTED: "figure-muted",
    GRID: "figure-grid",
    **{color: f"model-{index}" for index, color in enumerate(COLORS)},
}
"""CSS variables that stand for the colours of a figure on a page."""


def inline(svg: str, *, prefix: str, label: str, images: dict[str, Markup] | None = None) -> Markup:
    """An SVG file from matplotlib as an element for an HTML page.

    Ids get `prefix`, so that several figures can share a page; colours of text, axes and models
    become CSS variables, so that they follow the theme; coordinates keep two decimals (1/100 pt).
    Bitmaps are moved to `images`, by id, as elements that the page holds once.
    """
    images = {} if images is None else images
    _, box, _ = re.split(r'viewBox="([^"]+)"', svg, maxsplit=1)
    body = svg[svg.index("<defs>") :]
    body = re.sub(r"\s*\n\s*", " ", body).replace("> <", "><")
    body = re.sub(r"<style.*?</style>", "", body)
    body = re.sub(r'<g id="[^"]+">', "<g>", body)
    body = re.sub(r'<g id="[^"]+"/>', "", body)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', body)
    body = re.sub(r'<image xlink:href="([^"]+)"', lambda m: _unbroken(m[1]), body)
    body = _IMAGE.sub(lambda image: _shared(image, images), body)
    # Inside tags alone: a tick label of 0.005 is no coordinate.
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group()), body)
    body = re.sub(r" font-family: [^;]+;", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]+"', "", body)
    # Paths that show nothing, such as undefined cells.
    body = re.sub(r'<path d="[^"]+"(?: clip-path="[^"]+")? style="fill: none"/> ?', "", body)
    body = _CELLS.sub(_merged, _CELL.sub(_cell, body))
    body = _DOTS.sub(_dotted, body)
    body = _MARKS.sub(_with_style_once, body)
    body = _LINES.sub(_as_one_path, body)
    body = _ungrouped(body)
    for color, variable in _THEMED.items():
        body = body.replace(color, f"var(--{variable})")
    return Markup(f'<svg role="img" aria-label="{escape(label)}" viewBox="{box}">{body}')


def _ungrouped(body: str) -> str:
    """Without groups that say nothing of what they hold, of which matplotlib writes many."""
    parts: list[str] = []
    bare: list[bool] = []
    for part in re.split(r"(<g>|<g [^>]*[^>/]>|</g>)", body):
        if part.startswith("<g"):
            bare.append(part == "<g>")
        if part in ("<g>", "</g>") and (bare[-1] if part == "<g>" else bare.pop()):
            continue
        parts.append(part)
    return "".join(parts)


def _unbroken(data: str) -> str:
    return f'<image href="{data.replace(" ", "")}"'


def _shared(image: re.Match[str], images: dict[str, Markup]) -> str:
    """A use of a bitmap that the page holds once, however many panels show it."""
    data, width, height, transform = image.groups()
    # A name for its content, and no secret.
    name = f"i-{hashlib.sha1(data.encode(), usedforsecurity=False).hexdigest()[:10]}"
    if name not in images:
        kind, packed = _packed(base64.b64decode(data))
        look = "" if int(width) > _PHOTOGRAPH else ' class="map"'
        images[name] = Markup(
            f'<image id="{name}"{look} width="{width}" height="{height}" '
            f'href="data:image/{kind};base64,{packed}"/>'
        )
    return f'<use href="#{name}" {transform}/>'


def _packed(png: bytes) -> tuple[str, str]:
    """A bitmap in fewer bytes: with a palette where it has few colours, else as JPEG."""
    with Image.open(BytesIO(png)) as opened:
        pixels = np.asarray(opened.convert("RGBA"))
    buffer = BytesIO()
    colors, places = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    if len(colors) > 256 and (colors[:, 3] == 255).all():
        Image.fromarray(pixels[..., :3].copy()).save(buffer, "JPEG", quality=88, optimize=True)
        return "jpeg", base64.b64encode(buffer.getvalue()).decode()
    if len(colors) <= 256:
        indexed = Image.fromarray(places.reshape(pixels.shape[:2]).astype(np.uint8))
        indexed.putpalette(colors[:, :3].tobytes())
        indexed.save(buffer, "PNG", optimize=True, transparency=colors[:, 3].tobytes())
    else:
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    smaller = min(png, buffer.getvalue(), key=len)
    return "png", base64.b64encode(smaller).decode()


def _cell(path: re.Match[str]) -> str:
    """A cell in few bytes: to 1/10 pt, and unclipped, for it lies inside the axes."""
    x, y, x_1, y_1, right, top = map(float, path.groups()[:6])
    if (x_1, y_1) not in ((right, y), (x, top)):
        return path.group()
    ends = (f"{end:.1f}".removesuffix(".0") for end in (x, y, right, top))
    return '<path d="M{0} {1}H{2}V{3}H{0}z" fill="{4}"/>'.format(*ends, path[7])


def _merged(run: re.Match[str]) -> str:
    """Cells side by side as one path for each colour, and neighbours of one colour as one cell.

    The page draws them with crisp edges, and printed with an edge of their colour, so that no seams
    part them.
    """
    by_color: dict[str, list[list[str]]] = {}
    cells = re.findall(r'd="M(\S+) (\S+)H(\S+)V(\S+)H\S+z" fill="([^"]+)"', run.group())
    for left, low, right, top, color in cells:
        drawn = by_color.setdefault(color, [])
        if drawn and drawn[-1][1:] == [low, left, top]:
            drawn[-1][2] = right
        else:
            drawn.append([left, low, right, top])
    paths = "".join(
        f'<path d="{"".join("M{0} {1}H{2}V{3}H{0}z".format(*cell) for cell in drawn)}" '
        f'color="{color}"/>'
        for color, drawn in by_color.items()
    )
    return f'<g class="cells">{paths}</g>'


def _dotted(run: re.Match[str]) -> str:
    """Dots as one path of lines without length, which the page draws with round ends."""
    places = re.findall(r'x="([^"]+)" y="([^"]+)"', run.group())
    path = "".join(f"M{float(x):.1f} {float(y):.1f}h0" for x, y in places)
    return f'<path class="dots" d="{path}" stroke="{run["color"]}"/>'


def _with_style_once(run: re.Match[str]) -> str:
    marks = run.group().replace(f" {run['style']}", "").replace("/> <", "/><")
    return f"<g {run['style']}>{marks}</g>"


def _as_one_path(run: re.Match[str]) -> str:
    paths = "".join(re.findall(r'd="([^"]+)"', run.group()))
    return f'<path d="{paths}" {run["look"]}/>'
