"""Writers of exports, one a layout: each takes rows by ``add`` and leaves whole files in its folder."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import numpy as np

from fastvae.data.datasets.dataset import ARRAYS
from fastvae.system.strict_json import json_bytes

PLACES = ("original_hw", "crop_tlhw", "bucket")
# Rows of one Parquet row group, which a reader of one row has to read whole.
GROUP = 64


@dataclass(frozen=True)
class Family:
    """How sd-scripts caches a family's latents: ``scaled`` as the model wants them, and with the size in each name."""

    scaled: bool
    several_sizes: bool


FAMILIES = {
    "sd": Family(scaled=False, several_sizes=False),
    "sdxl": Family(scaled=False, several_sizes=False),
    "sd3": Family(scaled=False, several_sizes=True),
    "flux": Family(scaled=True, several_sizes=True),
}


class Writer:
    """What all layouts share: a folder, and a ``with`` that finishes the last file, or after an error gives it back."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # the disk is full for these last bytes as well; the first error counts
            self.abandon()

    def close(self) -> None:
        """Finish the last file."""

    def abandon(self) -> None:
        """Give the system its file back as it is."""


class Kohya(Writer):
    """NAME_WIDTHxHEIGHT_FAMILY.npz in the folder of each image's key, as sd-scripts' load_latents_from_disk reads it.

    fp32 ``latents`` [L, h, w], ``original_size`` (width, height), ``crop_ltrb``, and ``latents_flipped`` for variant 1
    of a store with mirrored rows; for SD3 and FLUX each name ends in _HxW of the latents. Of a store with masks also
    ``alpha_mask``, fp32 from 0 to 1, at the bucket's size in pixels, which the trainer mirrors by itself.
    """

    def __init__(self, folder: Path, family: str, flip: bool):
        super().__init__(folder)
        self._flip = flip
        self._family, self._layout = family, FAMILIES[family]
        self._written: dict[Path, str] = {}

    def add(self, row: dict[str, Any]) -> None:
        """One image's file, or the mirrored half of one; raises ValueError for a key that is no relative path."""
        height, width = row["original_hw"]
        key = _relative(row["key"])
        path = self.folder / key.with_name(f"{key.stem}_{width:04d}x{height:04d}_{self._family}.npz")
        values = row["latents" if "latents" in row else "mean"].astype(np.float32)
        ending = "_{}x{}".format(*values.shape[-2:]) if self._layout.several_sizes else ""
        if row["variant"] > int(self._flip):
            raise ValueError(f"to must be another than npz-kohya, which holds one crop: {row['key']} has several")
        if row["variant"] == 1:
            if self._written.get(path) != row["key"]:
                raise ValueError(f"to must be another than npz-kohya: {row['key']} is there mirrored alone")
            with np.load(path) as there:
                arrays = {name: there[name] for name in there.files}
            arrays[f"latents_flipped{ending}"] = values
        elif path in self._written:
            raise ValueError(f"{self._written[path]} and {row['key']} would share the file {path.name}: rename one")
        else:
            arrays = {f"latents{ending}": values, f"original_size{ending}": np.array([width, height])}
            arrays[f"crop_ltrb{ending}"] = np.array(crop_ltrb((width, height), tuple(row["bucket"][::-1])))
            if "alpha" in row:
                arrays[f"alpha_mask{ending}"] = alpha_mask(row["alpha"], row["bucket"])
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_npz(path, arrays)
        self._written[path] = row["key"]


def _write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """What np.savez writes, but with masks deflated.

    Their equal pixels are sixteen times the bytes of SDXL's latents: 4 MiB, of which 47 KiB are left in 7 ms of one
    core of an AMD EPYC; NumPy's own compressed form takes 80 ms a file.
    """
    with zipfile.ZipFile(path, "w") as file:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            kind = zipfile.ZIP_DEFLATED if name.startswith("alpha_mask") else zipfile.ZIP_STORED
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), kind, 1)


def crop_ltrb(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the whole picture, (width, height), as it would lie inside its bucket.

    That is what sd-scripts stores: its trainer takes left and top of it as the crop, and the bucket's width less right
    as the left of a mirrored image.
    """
    aspect = size[0] / size[1]
    if bucket[0] / bucket[1] > aspect:
        width, height = bucket[1] * aspect, bucket[1]
    else:
        width, height = bucket[0], bucket[0] / aspect
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def alpha_mask(alpha: np.ndarray, bucket: list[int]) -> np.ndarray:
    """fp32 [H, W] from 0 to 1 of uint8 [h, w]: each latent's level at all of its pixels in ``bucket``, (H, W).

    sd-scripts stacks masks at that size, and weighs its loss by their means over each latent: these levels again.
    """
    down, across = (side // count for side, count in zip(bucket, alpha.shape, strict=True))
    return (alpha.astype(np.float32) / 255).repeat(down, 0).repeat(across, 1)


class Tar(Writer):
    """latents-000000.tar and so on, for webdataset.WebDataset: NNNNNNNNN.mean.npy, .logvar.npy or .latents.npy, .json.

    And .alpha.npy of a store with masks.

    A sample's name is its number, since WebDataset splits names at dots: the key is in its JSON.
    """

    def __init__(self, folder: Path, size: int):
        super().__init__(folder)
        self._size, self._files, self._rows = size, 0, 0
        self._tar: tarfile.TarFile | None = None

    def add(self, row: dict[str, Any]) -> None:
        """The members of one row."""
        if self._tar is None or self._tar.offset >= self._size:
            self.close()
            self._tar = tarfile.TarFile(self.folder / f"latents-{self._files:06d}.tar", "w", None, tarfile.USTAR_FORMAT)
            self._files += 1
        for name in ARRAYS:
            if name in row:
                content = io.BytesIO()
                np.save(content, row[name], allow_pickle=False)
                self._member(f"{name}.npy", content.getvalue())
        self._member("json", json_bytes({name: row[name] for name in ("key", "variant", *PLACES, "columns")}))
        self._rows += 1

    def close(self) -> None:
        """Finish the last tar."""
        if self._tar is not None:
            self._tar.close()

    def abandon(self) -> None:
        """Without the end that a tar has."""
        if self._tar is not None and self._tar.fileobj is not None:
            self._tar.fileobj.close()

    def _member(self, ending: str, content: bytes) -> None:
        member = tarfile.TarInfo(f"{self._rows:09d}.{ending}")
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))  # type: ignore[union-attr]


class Parquet(Writer):
    """rows-00000.parquet and so on; with ``card``, data/train-00000.parquet and a README.md for datasets.load_dataset.

    A row's latents are flat lists of their own dtype, in the order [L, h, w], with ``latent_shape`` beside them; of a
    store with masks so is ``alpha``, with ``alpha_shape``.
    """

    def __init__(self, folder: Path, about: dict[str, Any], size: int, card: bool):
        super().__init__(folder)
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError('Parquet needs pyarrow: pip install "fastvae[data]"') from error
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
        """Keep one row until a row group is full; raises ValueError for a key that is not UTF-8."""
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
        """Without the footer, which a writer that counts as open would write when it is collected."""
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
        whole = arrow.list_(arrow.int32())
        fields = [("key", arrow.string()), ("variant", arrow.int32()), *((name, whole) for name in PLACES)]
        fields += [("columns", arrow.string()), ("latent_shape", whole)]
        fields += [("alpha_shape", whole)] if "alpha" in row else []
        fields += [(name, arrow.list_(arrow.from_numpy_dtype(row[name].dtype))) for name in ARRAYS if name in row]
        return arrow.schema(fields, metadata={"fastvae": json.dumps(self._about)})


def _card(about: dict[str, Any]) -> str:
    """The README.md that tells datasets.load_dataset which files are rows, and people what they hold."""
    configs = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.parquet\n---\n"
    return (
        f"{configs}\n# Latents\n\n{about['rows']} rows, posterior {about['posterior']}, {about['space']}; reshape each "
        "to its latent_shape, and alpha, where it is there, to its alpha_shape: 255 is opaque. export.json has the "
        "scaling factor, the shift and the identity of the store.\n"
    )


def _relative(key: str) -> PurePosixPath:
    """The key as a path inside a folder; raises ValueError for one that leads out of it or that no file can have."""
    path = PurePosixPath(key)
    if not path.name or path.is_absolute() or ".." in path.parts or re.search(r"[\x00-\x1f\x7f\\:]", key):
        raise ValueError(
            f"to must be another than npz-kohya: the key {key!r} is no relative path that any system takes"
        )
    return path
