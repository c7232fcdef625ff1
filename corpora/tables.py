"""Pairs of sentences in parquet and arrow files, one row group at a time.

Arrow files may have the IPC file format or the stream format of `datasets`' cache; both are memory-mapped. Columns are
found by name: the two language codes or `source` and `target`, at the top level or inside a struct `translation`, as in
ALT and WMT on the hub.
"""

import gzip
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from corpora.text import open_binary
from minillama.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

ARROW_FILE_MAGIC = b"ARROW1"
PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class RowGroup:
    """Rows of an open file that are read at once, by `read`; `columns` are the paths of the two sides."""

    where: str
    rows: int
    columns: tuple[tuple[str, ...], ...]
    read: "Callable[[], pa.Table]"

    def pairs(self, rows: Sequence[int] | None = None) -> list[tuple[str, str]]:
        """Text of all rows, or of `rows` in their order; null becomes the empty string."""
        import pyarrow.compute as pc

        table, sides = self.read(), []
        for name, *inner in self.columns:
            column = pc.struct_field(table.column(name), inner) if inner else table.column(name)
            sides.append(_to_text(column if rows is None else column.take(list(rows)), self.where, rows))
        return list(zip(*sides))


def read_records(path: str | Path, source: str, target: str) -> Iterator[tuple[str, str]]:
    """All pairs of one parquet or arrow file, in file order."""
    for group in open_table(path, source, target):
        yield from group.pairs()


def open_table(path: str | Path, source: str, target: str) -> list[RowGroup]:
    """Open a parquet or arrow file without reading its rows; an arrow file is one group.

    Raises InputError where it is neither, is damaged, or has no columns for the two languages.
    """
    import pyarrow as pa

    try:
        with open_binary(path) as stream:
            is_gzip = isinstance(stream, gzip.GzipFile)
            data = pa.BufferReader(stream.read()) if is_gzip else pa.memory_map(str(path))
        start = data.read(len(ARROW_FILE_MAGIC))
        data.seek(0)
        if start.startswith(PARQUET_MAGIC):
            return _open_parquet(data, str(path), source, target)
        reader = pa.ipc.open_file(data) if start == ARROW_FILE_MAGIC else pa.ipc.open_stream(data)
        columns = _find_columns(reader.schema, str(path), source, target)
        table = reader.read_all()  # memory-mapped: the rows stay on disk
        return [RowGroup(f"{path}: row group 0", table.num_rows, columns, lambda: table)]
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read ({reason}), expected a whole parquet or arrow file") from error


def _open_parquet(data: "pa.NativeFile", name: str, source: str, target: str) -> list[RowGroup]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(data)
    columns = _find_columns(file.schema_arrow, name, source, target)
    names = [".".join(column) for column in columns]
    groups = []
    for number in range(file.num_row_groups):
        rows, read = file.metadata.row_group(number).num_rows, partial(file.read_row_group, number, columns=names)
        groups.append(RowGroup(f"{name}: row group {number}", rows, columns, read))
    return groups


def _find_columns(schema: "pa.Schema", name: str, source: str, target: str) -> tuple[tuple[str, ...], ...]:
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


def _to_text(column: "pa.ChunkedArray", where: str, rows: Sequence[int] | None) -> list[str]:
    texts: list[str] = []
    for index, value in enumerate(column):
        try:
            texts.append(value.as_py() or "")
        except UnicodeDecodeError as error:
            row = index if rows is None else rows[index]
            raise InputError(f"{where}, row {row}: not valid UTF-8, expected UTF-8 text") from error
    return texts
