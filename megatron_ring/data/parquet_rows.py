"""Read the rows of a Parquet file, of which one column holds the texts. Needs pyarrow."""

from collections.abc import Iterator
from pathlib import Path

from megatron_ring.data.compression import ExpansionLimit, damaged, needed, readable
from megatron_ring.data.document_text import SHOWN_CHARACTERS, not_utf8, null_text, too_long
from megatron_ring.errors import DataError

_MOST_ROWS_PER_BATCH = 256
_BATCH_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 20


def texts_of_rows(
    file: Path, column: str, max_bytes: int, limit: ExpansionLimit
) -> Iterator[str | DataError]:
    """Yield the text of each row, or an error with the row's number.

    Args:
        column: The column of the texts.
        max_bytes: The longest cell that is read.
        limit: Counts the bytes of all cells.
    """
    parquet = needed("pyarrow.parquet", str(file))
    arrow = needed("pyarrow", str(file))
    # Buffered reading keeps one page in memory instead of one row group.
    options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES}
    try:
        with readable(str(file)), parquet.ParquetFile(file, **options) as table:
            _refuse_missing_column(file, table.schema_arrow, column)
            for number, row in enumerate(_cells(table, column), start=1):
                try:
                    yield _cell_text(row, arrow, column, max_bytes, limit)
                except ValueError as error:
                    yield DataError(f"{file}:{number}: {error}")
    except arrow.ArrowException as error:
        raise damaged(str(file), f"{error} (or it is not a parquet file)") from error


def _cells(table: object, column: str) -> Iterator[object]:
    """Yield every value of a column, in batches of few rows.

    A dictionary-encoded column may repeat one long value in all rows, so that decoding many rows at
    once could take far more memory than the file has bytes.
    """
    index = table.schema_arrow.names.index(column)
    for group in range(table.num_row_groups):
        size = table.metadata.row_group(group).column(index).total_uncompressed_size
        rows = min(max(_BATCH_BYTES // max(size, 1), 1), _MOST_ROWS_PER_BATCH)
        for batch in table.iter_batches(rows, row_groups=[group], columns=[column]):
            yield from batch.column(0)


def _cell_text(
    row: object, arrow: object, column: str, max_bytes: int, limit: ExpansionLimit
) -> str:
    if isinstance(row, arrow.DictionaryScalar):
        row = row.value
    if row is None or not row.is_valid:
        raise ValueError(null_text(column))
    if not (arrow.types.is_string(row.type) or arrow.types.is_large_string(row.type)):
        raise ValueError(f"no text under {column!r}; found {row.type}. Set --json-key.")
    limit.count(row.as_buffer().size)
    if row.as_buffer().size > max_bytes:
        raise ValueError(too_long("a cell", max_bytes))
    try:
        return row.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error)) from error


def _refuse_missing_column(file: Path, schema: object, column: str) -> None:
    if column not in schema.names:
        found = ", ".join(map(repr, schema.names))
        raise DataError(
            f"{file} has no column {column!r}; found {found[:SHOWN_CHARACTERS]}. Set --json-key."
        )
