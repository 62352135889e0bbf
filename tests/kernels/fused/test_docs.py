"""docs/fused.md shows the program's own table."""

from pathlib import Path

import torch

from megatron_ring.kernels.fused.libraries import COLUMNS, LIBRARIES, OFFERS, Offer

PAGE = (Path(__file__).parents[3] / "docs" / "fused.md").read_text()


def word(offer: Offer, notes: list[str]) -> str:
    """Return the word for a cell, its dtype if there is only one, and the numbers of its notes."""
    no_bfloat16 = offer.reason if torch.bfloat16 not in offer.dtypes else ""
    reasons = [reason for reason in (no_bfloat16, offer.varies) if reason]
    notes += [reason for reason in reasons if reason not in notes]
    text = offer.validation.value if offer.validation else "refused"
    if offer.dtypes == {torch.float32}:
        text += " in float32"
    numbers = ", ".join(str(notes.index(reason) + 1) for reason in reasons)
    return text + (f" ({numbers})" if numbers else "")


def test_the_page_has_the_programs_table_and_its_notes():
    notes: list[str] = []
    rows = [["operation", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for operation, offers in OFFERS.items():
        rows.append([operation.value, *(word(offers[name], notes) for name in COLUMNS)])
    table = ["| " + " | ".join(row) + " |" for row in rows]
    expected = "\n".join([*table, "", *(f"{n}. {note}." for n, note in enumerate(notes, 1))])
    assert expected in PAGE, expected


def test_the_page_has_every_library_and_how_to_install_it():
    for library in LIBRARIES.values():
        assert library.install.split(":")[0] in PAGE.replace("\n", " ")
