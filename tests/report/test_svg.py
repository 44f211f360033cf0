"""SVG files of matplotlib as elements of a page."""

from __future__ import annotations

from vitprobe.report.svg import inline


def test_inline_svg_gets_ids_of_its_own():
    svg = (
        '<?xml version="1.0"?>\n<svg width="9pt" viewBox="0 0 9 9" version="1.1">\n<metadata>x'
        '</metadata><defs><style>*{}</style></defs><defs><path id="m1"/></defs>'
        '<g clip-path="url(#c1)"><use xlink:href="#m1" x="1.23456" style="fill: #24292f"/></g>'
        '<clipPath id="c1"/></svg>'
    )
    found = inline(svg, prefix="f", label='a "label"')
    assert found == (
        '<svg role="img" aria-label="a &#34;label&#34;" viewBox="0 0 9 9"><defs></defs><defs>'
        '<path id="f-m1"/></defs><g clip-path="url(#f-c1)"><use href="#f-m1" x="1.23" '
        'style="fill: var(--figure-ink)"/></g><clipPath id="f-c1"/></svg>'
    )


def test_inline_svg_drops_groups_that_say_nothing():
    svg = (
        '<svg viewBox="0 0 9 9"><defs></defs><g id="a"><g><g opacity="1"><g><text>1</text></g></g>'
        "</g><g></g></g></svg>"
    )
    found = inline(svg, prefix="f", label="")
    assert found.endswith('<defs></defs><g opacity="1"><text>1</text></g></svg>')


def test_inline_svg_keeps_numbers_that_are_text():
    svg = '<svg viewBox="0 0 9 9"><defs></defs><text x="1.23456">0.0056</text></svg>'
    assert '<text x="1.23">0.0056</text>' in inline(svg, prefix="f", label="")


def test_inline_svg_merges_what_looks_the_same():
    cell = (
        '<path d="M {0} 20.04 L {1} 20.04 L {1} 10 L {0} 10 L {0} 20.04" clip-path="url(#c)" '
        'style="fill: #440154; stroke: #440154; stroke-width: 0.5"/>'
    )
    # The cells of a horizontal colour bar start with their other side.
    turned = (
        '<path d="M 1 2 L 1 5 L 4 5 L 4 2 L 1 2" clip-path="url(#c)" '
        'style="fill: #440155; stroke: #440155; stroke-width: 0.5"/>'
    )
    marks = "".join(f'<use xlink:href="#m" x="{x}" y="1" style="fill: #fff"/> ' for x in (1, 2))
    lines = "".join(
        f'<path d="M {x} 0 L {x} 9" clip-path="url(#c)" style="fill: none; stroke: #123456"/> '
        for x in (1, 2)
    )
    dots = "".join(f'<use xlink:href="#d" x="{x}" y="1.04" style="fill: #ffffff"/>' for x in (1, 2))
    svg = (
        f'<svg viewBox="0 0 9 9"><defs></defs>{cell.format(1, 2)} {cell.format(2, 3)} {turned}'
        f"{dots}{marks}{lines}</svg>"
    )
    found = inline(svg, prefix="f", label="")
    assert (
        '<g class="cells"><path d="M1 20H3V10H1z" color="#440154"/>'
        '<path d="M1 2H4V5H1z" color="#440155"/></g>'
        '<path class="dots" d="M1.0 1.0h0M2.0 1.0h0" stroke="#ffffff"/>'
        '<g style="fill: #fff"><use href="#f-m" x="1" y="1"/><use href="#f-m" x="2" y="1"/></g>'
        '<path d="M 1 0 L 1 9M 2 0 L 2 9" clip-path="url(#f-c)" '
        'style="fill: none; stroke: #123456"/>'
    ) in found
