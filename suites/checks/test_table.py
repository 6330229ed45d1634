"""Every part of a method that there is occurs in a row of the table of checks."""

import dataclasses
import re

import pytest

from kvsuite.methods import catalogue, parse, survey
from kvsuite.methods.described import markdown
from suites.checks.table import ELSEWHERE, METHODS
from suites.checks.tiny import ROOT


def test_every_part_is_in_a_row():
    written = {piece.partition(":")[0].strip() for text in METHODS for piece in text.split("+")}
    assert {part.name for part in catalogue()} <= written | set(ELSEWHERE)


def test_rows_that_keep_everything_are_of_the_same_parts():
    for text, everything in METHODS.items():
        if everything is not None:
            assert type(parse(text).selector) is type(parse(everything).selector)
            assert type(parse(text).budget) is type(parse(everything).budget)
            assert type(parse(text).codec) is type(parse(everything).codec)
            assert type(parse(text).reader) is type(parse(everything).reader)


NO_PAPER = {"random", "uniform", "full", "jitter", "int4", "int8", "fp8", "mxfp4", "q4_0", "q8_0"}
"""A control, or what a server, a specification or a library has."""


@pytest.mark.parametrize("part", [part for part in catalogue() if part.__module__.startswith("kvsuite.")])
def test_a_part_says_its_source_its_formula_its_defaults_and_what_it_stores(part):
    """What its own parameters are set to, and by whom; a selector's `budget` is said once for all."""
    assert part.stores
    assert (part.name in NO_PAPER) != bool(re.search(r"\b20\d\d\b.*, arXiv \d{4}\.\d{5}", part.source))
    assert re.search(r"\w\.(py|c)\b|#\d+", part.source) or part.name in {"uniform", "mxfp4"}, "a repository's file"
    assert re.search(r"[=≈≥Σ√‖⌊·]", re.sub("``.*?``", "", part.__doc__)), "a formula, beside the spelling of options"
    own = [field.name for field in dataclasses.fields(part) if not field.kw_only and field.name != "budget"]
    assert not own or re.search(r"\bdefaults?\b", part.__doc__, re.IGNORECASE), own


def test_the_page_of_methods_says_what_their_docstrings_say():
    """Stale? sed -i '/^<!-- kvsuite/q' docs/methods.md; (echo; kvsuite methods --markdown) >> docs/methods.md"""
    own = [part for part in catalogue() if part.__module__.startswith("kvsuite.")]
    page = (ROOT / "docs" / "methods.md").read_text()
    assert page.partition("<!-- kvsuite methods --markdown -->\n\n")[2] == markdown(own) + "\n"


def test_the_survey_says_what_its_data_says():
    """Stale? kvsuite methods --survey > docs/survey.md"""
    own = {part.name for part in catalogue() if part.__module__.startswith("kvsuite.")}
    assert (ROOT / "docs" / "survey.md").read_text() == survey.markdown(own) + "\n"


def test_every_part_but_the_controls_is_in_a_row_of_the_survey():
    own = {part.name for part in catalogue() if part.__module__.startswith("kvsuite.")}
    here = {part for row in survey.rows() for part in row["here"].split()}
    assert own - here == {"full", "jitter", "random", "uniform"}


def test_a_row_of_the_survey_runs_here_or_says_why_not():
    for row in survey.rows():
        assert row["table"] == "benchmark" or row["here"] or row["reason"], row
        assert row["parity"] == "" or row["here"], row
