"""The pictures are well-formed SVG that holds what it is given, within its frame."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from xml.etree import ElementTree

from pipeline.dvc.dag import load_dag
from pipeline.prefect.drawing import COLOURS, Chart, Curve, chart, graph, image

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> tuple[ElementTree.Element, float, float]:
    root = ElementTree.fromstring(svg)
    return root, float(root.get("width", 0)), float(root.get("height", 0))


def test_a_chart_keeps_its_points_in_order_and_in_the_frame() -> None:
    curve = Curve("<loss>", [(0, 3.0), (10, 1.0), (20, math.nan), (30, 0.5)])
    root, width, height = parsed(
        chart(Chart("loss", "step", "nats", [curve], {"a&b": (15, 2.0)}, limit=12.0))
    )
    line = root.find(f"{SVG}polyline")
    assert line is not None
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
    assert len(points) == 3, "what is not finite is left out"
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points), (
        "a falling loss falls: y grows downwards"
    )
    assert all(0 < x < width and 0 < y < height for x, y in points)
    texts = {element.text for element in root.iter(f"{SVG}text")}
    assert {"a&b", "<loss>", "limit 12", "step", "nats"} <= texts


def test_a_chart_of_one_value_or_none_is_a_picture_too() -> None:
    assert "polyline" in chart(Chart("t", "x", "y", [Curve("", [(1.0, 2.0)])]))
    assert "no values" in chart(Chart("t", "x", "y", [Curve("", [(math.inf, 1.0)])]))


def test_the_name_of_a_limit_stays_in_the_frame() -> None:
    for limit, anchor in ((0.0, "start"), (9.5, "end")):
        root, _, _ = parsed(
            chart(Chart("t", "cost", "reward", [Curve("", [(0.0, 1.0), (9.0, 2.0)])], limit=limit))
        )
        (label,) = [
            element for element in root.iter(f"{SVG}text") if str(element.text).startswith("limit")
        ]
        assert label.get("text-anchor") == anchor


def test_the_graph_shows_every_stage_in_the_colour_of_its_state(repo_root: Path) -> None:
    dag = load_dag(repo_root)
    states = dict.fromkeys(dag, "Unchanged") | {"sft": "Completed", "score": "Failed"}
    del states["report"]
    root, width, height = parsed(graph(dag, states))
    boxes = {
        title.text or "": box
        for group in root.iter(f"{SVG}g")
        if (title := group.find(f"{SVG}title")) is not None
        and (box := group.find(f"{SVG}rect")) is not None
    }
    assert boxes.keys() == dag.keys()
    fills = {name: box.get("fill") for name, box in boxes.items()}
    assert fills["sft"] == COLOURS["Completed"] and fills["score"] == COLOURS["Failed"]
    assert fills["report"] not in COLOURS.values()
    at = {name: (float(box.get("x", 0)), float(box.get("y", 0))) for name, box in boxes.items()}
    assert len(set(at.values())) == len(dag)
    assert all(0 <= x < width - 100 and 0 <= y < height - 20 for x, y in at.values())
    assert all(
        at[source][0] < at[name][0] for name, spec in dag.items() for source in spec.upstream
    )
    assert len({at[name][0] for name in dag if name.startswith("dual_search@")}) == 1


def test_no_line_of_the_graph_passes_under_a_box(repo_root: Path) -> None:
    root, _, _ = parsed(graph(load_dag(repo_root), {}))
    boxes = [
        (float(box.get("x", 0)), float(box.get("y", 0)), float(box.get("height", 0)))
        for group in root.iter(f"{SVG}g")
        if (box := group.find(f"{SVG}rect")) is not None
    ]
    passages = 0
    for line in root.iter(f"{SVG}path"):
        for left, y in re.findall(r"([\d.]+) ([\d.]+) H[\d.]+", line.get("d", "")):
            passages += 1
            column = [(top, height) for x, top, height in boxes if x == float(left)]
            assert column and not any(top < float(y) < top + height for top, height in column)
    assert passages, "some lines are longer than a column"


def test_an_image_holds_the_svg() -> None:
    encoded = re.search(r"base64,([^)]+)\)", image("<svg>ß</svg>", "title"))
    assert encoded is not None and base64.b64decode(encoded[1]).decode() == "<svg>ß</svg>"
