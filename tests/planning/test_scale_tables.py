"""docs/scale.md holds what `toast plan` says now."""

from __future__ import annotations

import pytest

from scripts.scale_tables import PAGE, SECTIONS, part, section, sections


def test_the_page_has_every_section() -> None:
    assert list(sections(PAGE.read_text())) == list(SECTIONS)


def test_the_smallest_section_is_fresh() -> None:
    assert part("vit-l16", "toast") in PAGE.read_text(), "run python scripts/scale_tables.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_is_fresh(name: str) -> None:
    assert sections(PAGE.read_text())[name] == section(name), "run python scripts/scale_tables.py"
