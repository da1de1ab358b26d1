"""What `toast families` prints: the rows, what was verified of each, and what is refused."""

from __future__ import annotations

from toast.families.table import FAMILIES, REFUSED, Family

#: What `tests/families/test_table.py` shows for rows of a kind, on a tiny random model of the library.
VERIFIED: dict[str, tuple[str, ...]] = {
    "bits": ("decoder", "encoder", "vision"),
    "values": ("decoder", "encoder", "vision"),
    "gradients": ("decoder", "encoder", "vision"),
    "generation": ("decoder",),
    "saving": ("decoder", "encoder", "vision"),
    "checkpointing": ("decoder", "encoder", "vision"),
    "bfloat16": ("decoder", "encoder", "vision"),
}

#: Rows of language models inside multi-modal ones; the same is shown of the plain row that they resemble.
WITHIN = {"bits", "gradients", "generation"}

LEGEND = """\
verified, on a tiny random model of each row:
  bits           the output is unchanged, bit for bit, while signals are zero
  values         V is the value projection of x + s, by the block's own code; Q and K are unchanged
  gradients      they reach the trained groups and nothing else, full and Lite
  generation     with a cache as without: greedy, beams, padding on the left
  saving         a loaded adapter gives the output of the saved one
  checkpointing  activation checkpointing gives the same gradients
  bfloat16       runs, forward and backward
A model without a row is found by names and shapes if these are unambiguous, then verified by toast.probe.\
"""


def verified(row: Family) -> list[str]:
    """Returns what the tests show of a row."""
    checks = [name for name, kinds in VERIFIED.items() if row.kind in kinds]
    return [name for name in checks if name in WITHIN] if row.within else checks


def table() -> str:
    """Returns the table of families as text."""
    head = ("family", "library", "values from", "layout", "selector reads", "verified")
    rows = [(row.name, row.library, row.value, row.layout, row.taps, _short(row)) for row in FAMILIES]
    widths = [max(len(line[column]) for line in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)) for line in [head, *rows]]
    refused = [f"  {trunk.rpartition('.')[2]}: {reason}" for trunk, reason in REFUSED.items()]
    text = [line.rstrip() for line in lines]
    return "\n".join([*text, "", LEGEND, "", "refused:", *refused])


def _short(row: Family) -> str:
    return ", ".join(verified(row)) if row.within else "all that apply"
