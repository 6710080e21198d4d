"""Export as Parquet files, with a dataset card for the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastvae.data.datasets.dataset import ARRAYS
from fastvae.data.exporting.writer import PLACES, Writer

# Rows of one Parquet row group; a reader of one row reads the whole group.
GROUP = 64


class Parquet(Writer):
    """rows-00000.parquet and so on; with ``card``, data/train-00000.parquet and a README.md for datasets.load_dataset.

    A row's latents are flat lists of their own dtype, in the order [L, h, w], with ``latent_shape``; so is ``alpha`` of
    a store with masks, with ``alpha_shape``.
    """

    def __init__(self, folder: Path, about: dict[str, Any], size: int, card: bool):
        super().__init__(folder)
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError("Parquet needs pyarrow: pip install pyarrow") from error
        self._arrow, self._parquet = pyarrow, pyarrow.parquet
        self._about, self._size, self._card = about, size, card
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        self._sink: Any = None
        self._files = self._bytes = 0
        if card:
            (folder / "data").mkdir()
            (folder / "README.md").write_text(_card(about), "utf-8")

    def add(self, row: dict[str, Any]) -> None:
        """Add one row, written when a row group is full; raises ValueError for a key that is not UTF-8."""
        try:
            row["key"].encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"to must be wds or npz-kohya: the key {row['key']!r} is not UTF-8") from None
        flat = {name: row[name].reshape(-1) for name in ARRAYS if name in row}
        shapes = {"latent_shape": list(row["latents" if "latents" in row else "mean"].shape)}
        if "alpha" in row:
            shapes["alpha_shape"] = list(row["alpha"].shape)
        places = {name: row[name] for name in ("key", "variant", *PLACES)}
        columns = json.dumps(row["columns"], ensure_ascii=True)
        self._rows.append({**places, "columns": columns, **shapes, **flat})
        self._bytes += sum(values.nbytes for values in flat.values())
        if len(self._rows) == GROUP:
            self._flush()
        if self._bytes >= self._size:
            self.close()

    def close(self) -> None:
        """Finish the last file."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
        self._writer, self._bytes = None, 0

    def abandon(self) -> None:
        """Close the file without a footer, which an open writer would write when it is garbage collected."""
        if self._writer is not None:
            self._writer.is_open = False
        if self._sink is not None:
            self._sink.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        schema = self._schema(self._rows[0])
        if self._writer is None:
            name = f"data/train-{self._files:05d}.parquet" if self._card else f"rows-{self._files:05d}.parquet"
            # Latents do not compress: 8 % by zstd.
            self._sink = self._arrow.OSFile(str(self.folder / name), "wb")
            self._writer = self._parquet.ParquetWriter(self._sink, schema, compression="none")
            self._files += 1
        columns = {name: [row[name] for row in self._rows] for name in schema.names}
        self._writer.write_table(self._arrow.Table.from_pydict(columns, schema=schema))
        self._rows = []

    def _schema(self, row: dict[str, Any]) -> Any:
        arrow = self._arrow
        integers = arrow.list_(arrow.int32())
        fields = [("key", arrow.string()), ("variant", arrow.int32()), *((name, integers) for name in PLACES)]
        fields += [("columns", arrow.string()), ("latent_shape", integers)]
        fields += [("alpha_shape", integers)] if "alpha" in row else []
        fields += [(name, arrow.list_(arrow.from_numpy_dtype(row[name].dtype))) for name in ARRAYS if name in row]
        return arrow.schema(fields, metadata={"fastvae": json.dumps(self._about)})


def _card(about: dict[str, Any]) -> str:
    """Return README.md: the data files for datasets.load_dataset, and a description for people."""
    configs = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.parquet\n---\n"
    return (
        f"{configs}\n# Latents\n\n{about['rows']} rows, posterior {about['posterior']}, {about['space']}; reshape each "
        "to its latent_shape, and alpha, if there is one, to its alpha_shape: 255 is opaque. export.json has the "
        "scaling factor, the shift and the identity of the store.\n"
    )
