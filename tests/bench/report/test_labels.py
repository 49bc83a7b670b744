"""What candidates are called in a report, and how figures are written."""

from typing import Any

import pytest

from deploy.bench.report.labels import COLOURS, digits, label_of, make_labels, short_names, speed_up


def row(artifact: str, backend: str, precision: str = "fp32", verdict: str = "faster") -> dict[str, Any]:
    figures = {"speedup": 2.0, "speedup_low": 1.756, "speedup_high": 2.25}
    return {
        "artifact": artifact,
        "backend": backend,
        "precision": precision,
        "verdict": verdict,
        "certain": verdict != "uncertain",
        **figures,
    }


def test_a_name_is_shortened_where_it_stays_unique() -> None:
    assert short_names(["build/net", "build/net-fp16", "old/net", "build/net-fp16"]) == {
        "build/net": "build/net",
        "old/net": "old/net",
        "build/net-fp16": "net-fp16",
    }


def test_a_precision_is_named_once_and_a_single_artifact_is_not() -> None:
    rows = [row("build/net-fp16", "openvino", "fp16"), row("build/net", "eager", verdict="baseline"), row("build/net", "null")]
    labels = make_labels(rows)
    assert [label_of(each, labels) for each in rows] == ["net-fp16, openvino", "net fp32, eager", "net fp32, null"]
    alone = make_labels(rows[1:])
    assert [label_of(each, alone) for each in rows[1:]] == ["fp32, eager", "fp32, null"]


def test_the_baseline_has_the_first_colour_and_no_other_has_it() -> None:
    rows = [row("net", f"backend {index}") for index in range(2 * COLOURS)] + [row("net", "eager", verdict="baseline")]
    labels = make_labels([*rows, *rows])  # of another batch size
    assert len(labels) == len(rows)
    assert [key for key, (_, colour) in labels.items() if colour == 0] == [("net", "eager")]
    assert {colour for _, colour in labels.values()} == set(range(COLOURS))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (1.0, "1.00"), (12.34, "12.3"), (99.94, "99.9"), (99.96, "100"), (100.4, "100"), (12345.6, "12,346")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_a_speed_up_has_its_interval_and_the_baseline_none() -> None:
    assert speed_up(row("net", "null")) == "2.00 (1.76\u20132.25)"
    assert speed_up(row("net", "eager", verdict="baseline")) == "1"
    assert speed_up(row("net", "null", verdict="uncertain")) == "uncertain"
