"""docs/fused.md says what the program's own table says."""

from pathlib import Path

import torch

from megatron_ring.kernels.fused.support import COLUMNS, LIBRARIES, OFFERS, Offer, Validation

PAGE = (Path(__file__).parents[3] / "docs" / "fused.md").read_text()
WORDS = {
    Validation.TESTED: "tested",
    Validation.INTERPRETED: "interpreted",
    Validation.STAND_IN: "stand-in",
    None: "refused",
}


def cell(offer: Offer, notes: list[str]) -> str:
    """One word, what it is limited to, and the numbers of its notes."""
    reasons = [
        reason
        for reason in (offer.reason if torch.bfloat16 not in offer.dtypes else "", offer.varies)
        if reason
    ]
    notes += [reason for reason in reasons if reason not in notes]
    limit = " in float32" if offer.dtypes == {torch.float32} else ""
    numbers = ", ".join(str(notes.index(reason) + 1) for reason in reasons)
    return WORDS[offer.proof] + limit + (f" ({numbers})" if numbers else "")


def test_the_table_is_the_one_that_the_program_asks():
    notes: list[str] = []
    rows = [
        [operation.value, *(cell(offers[name], notes) for name in COLUMNS)]
        for operation, offers in OFFERS.items()
    ]
    table = ["| " + " | ".join(row) + " |" for row in [["operation", *COLUMNS], ["---"] * 5, *rows]]
    written = "\n".join([*table, "", *(f"{n}. {note}." for n, note in enumerate(notes, 1))])
    assert written in PAGE, written


def test_every_library_is_there_with_the_way_to_get_it():
    for library in LIBRARIES.values():
        assert library.install.split(":")[0] in PAGE.replace("\n", " ")
