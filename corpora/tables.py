"""Pairs of sentences in parquet and arrow files, one row group at a time.

Arrow files may have the IPC file format or the stream format of `datasets`' cache; both are memory-mapped. Columns are
found by name: the two language codes or `source` and `target`, at the top level or inside a struct `translation`, as in
ALT and WMT on the hub.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from corpora.text import GZIP_MAGIC, display_name, open_binary, read_bytes
from minillama.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

ARROW_FILE_MAGIC = b"ARROW1"
PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class PairTable:
    """An open table of pairs: `group_rows[i]` is the row count of group i, `read_group(i)` returns its two columns."""

    name: str
    group_rows: tuple[int, ...]
    read_group: "Callable[[int], tuple[pa.ChunkedArray, pa.ChunkedArray]]"

    @property
    def rows(self) -> int:
        return sum(self.group_rows)

    def pairs(self, group: int, rows: Sequence[int] | None = None) -> list[tuple[str, str]]:
        """Text of all rows of a group, or of `rows` in their order; null becomes the empty string."""
        sides = []
        for column in self.read_group(group):
            if rows is not None:
                column = column.take(list(rows))
            sides.append(_to_text(column, f"{self.name}: row group {group}", rows))
        return list(zip(*sides))


def read_records(path: str | Path, source: str, target: str) -> Iterator[tuple[str, str]]:
    """All pairs of one parquet or arrow file, in file order."""
    table = open_table(path, source, target)
    for group in range(len(table.group_rows)):
        yield from table.pairs(group)


def open_table(path: str | Path, source: str, target: str) -> PairTable:
    """Open a parquet or arrow file without reading its rows.

    Raises InputError where it is neither, is damaged, or has no columns for the two languages.
    """
    import pyarrow as pa

    with open_binary(path) as stream:
        start = stream.read(6)
    with open(path, "rb") as raw:
        is_gzip = raw.read(2) == GZIP_MAGIC
    opener = _open_parquet if start.startswith(PARQUET_MAGIC) else _open_arrow
    try:
        data = pa.BufferReader(read_bytes(path)) if is_gzip else pa.memory_map(str(path))
        return opener(data, display_name(path), source, target)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read ({reason}), expected a whole parquet or arrow file") from error


def _open_parquet(data: "pa.NativeFile", name: str, source: str, target: str) -> PairTable:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(data)
    columns = _find_columns(file.schema_arrow, name, source, target)
    rows = tuple(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))

    def read_group(group: int) -> "tuple[pa.ChunkedArray, pa.ChunkedArray]":
        table = file.read_row_group(group, columns=[".".join(column) for column in columns])
        return _pick(table, columns[0]), _pick(table, columns[1])

    return PairTable(name, rows, read_group)


def _open_arrow(data: "pa.NativeFile", name: str, source: str, target: str) -> PairTable:
    import pyarrow as pa

    is_file = data.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
    data.seek(0)
    reader = pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data)
    columns = _find_columns(reader.schema, name, source, target)
    table = reader.read_all()  # memory-mapped: the rows stay on disk

    def read_group(group: int) -> "tuple[pa.ChunkedArray, pa.ChunkedArray]":
        return _pick(table, columns[0]), _pick(table, columns[1])

    return PairTable(name, (table.num_rows,), read_group)


def _find_columns(schema: "pa.Schema", name: str, source: str, target: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the two columns, such as ("translation", "ja")."""
    import pyarrow.types as types

    prefix: tuple[str, ...] = ()
    fields = {field.name: field.type for field in schema}
    if "translation" in fields and types.is_struct(fields["translation"]):
        prefix = ("translation",)
        fields = {field.name: field.type for field in fields["translation"].fields}
    for keys in ((source, target), ("source", "target")):
        if all(key in fields for key in keys):
            for key in keys:
                kind = fields[key]
                inner = kind.value_type if types.is_dictionary(kind) else kind
                if not (types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)):
                    raise InputError(f"{name}: column {key!r} is {kind}, expected text")
            return (*prefix, keys[0]), (*prefix, keys[1])
    found = ", ".join([*fields][:20]) or "none"
    raise InputError(f"{name}: expected columns {source!r} and {target!r}, or 'source' and 'target', found {found}")


def _pick(table: "pa.Table", column: tuple[str, ...]) -> "pa.ChunkedArray":
    import pyarrow.compute as pc

    values = table.column(column[0])
    return pc.struct_field(values, list(column[1:])) if len(column) > 1 else values


def _to_text(column: "pa.ChunkedArray", where: str, rows: Sequence[int] | None) -> list[str]:
    try:
        return [value or "" for value in column.to_pylist()]
    except UnicodeDecodeError as error:
        for index, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError:
                row = index if rows is None else rows[index]
                raise InputError(f"{where}, row {row}: not valid UTF-8, expected UTF-8 text") from error
        raise
