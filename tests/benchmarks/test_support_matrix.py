from pathlib import Path

from benchmarks import support_matrix


def test_the_matrix_in_the_docs_is_the_table_that_the_program_asks(tmp_path):
    support_matrix.main(tmp_path / "support.md")
    kept = Path(__file__).parents[2] / "docs" / "support.md"
    assert (tmp_path / "support.md").read_text() == kept.read_text()
