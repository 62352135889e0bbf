"""docs/reference/options.md is current and explains every option."""

from dataclasses import fields, is_dataclass
from pathlib import Path

from megatron_ring.config import (
    Config,
    GenerationConfig,
    InferenceConfig,
    NeedlesConfig,
    PositionsConfig,
)
from tools import write_option_reference

OF_TOOLS = InferenceConfig(), GenerationConfig(), NeedlesConfig(), PositionsConfig()
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "options.md"


def test_the_reference_in_the_docs_is_current(tmp_path):
    write_option_reference.main(tmp_path / "options.md")
    assert PAGE.read_text() == (tmp_path / "options.md").read_text()


def test_the_reference_has_a_row_with_help_for_every_option():
    lines = PAGE.read_text().splitlines()
    rows = dict(line.removeprefix("| `").split("`", 1) for line in lines if line.startswith("| `"))
    sections = [getattr(Config(), field.name) for field in fields(Config)]
    options = [
        field.name
        for section in (Config(), *filter(is_dataclass, sections), *OF_TOOLS)
        for field in fields(section)
        if not is_dataclass(getattr(section, field.name))
    ]
    assert {name.removeprefix("--").replace("-", "_") for name in rows} == set(options)
    assert all(len(row.split("|")[-2].strip()) > 10 for row in rows.values())
