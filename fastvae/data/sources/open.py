"""Opening any source of images: a folder, a pattern, an archive, a table, a manifest or a URL."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Sequence

from fastvae.data.sources.folder import FolderSource
from fastvae.data.sources.patterns import expand_braces, fixed_folder, is_pattern
from fastvae.data.sources.source import Source
from fastvae.data.sources.storage import LocalStorage, RemoteStorage, Storage, common_folder, open_remote, scheme_of

# What an archive or a table is told by. What is compressed as a whole cannot be read by seek.
ARCHIVES = {".tar": "tar", ".parquet": "parquet", ".pq": "parquet", ".jsonl": "manifest", ".ndjson": "manifest"}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".jsonl.gz", ".jsonl.zst")


def open_source(
    src: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    image_column: str = "image",
    key_column: str = "key",
    schemes: Collection[str] = (),
) -> Source:
    """The source that ``src`` names.

    A folder; a pattern of image files such as ``photos/**/*.{jpg,png}``; tar files in WebDataset's layout, Parquet
    files or JSONL manifests, one, a list of them, or a pattern such as ``shards/{000..127}.tar``; any of these under a
    URL whose file system fsspec knows. ``image_column`` and ``key_column`` name a table's columns; ``schemes`` are
    those of URLs that a manifest may name, by default none.
    Raises ValueError for what is none of these, and where a package that it needs is not installed.
    """
    given = [src] if isinstance(src, str | os.PathLike) else list(src)
    texts = [os.fspath(text) for text in given]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"src must be a path, a pattern or a list of them, got {src!r}")
    kinds = {_kind(text) for text in texts}
    if len(kinds) > 1 or (kinds == {"images"} and len(texts) > 1):
        raise ValueError(
            f"src must be one folder or pattern, or .tar, .parquet or .jsonl files of one kind, got {given}"
        )
    (kind,) = kinds
    if kind == "images":
        if scheme_of(texts[0]):
            from fastvae.data.sources.remote import RemoteSource

            return RemoteSource(texts[0])
        from fastvae.data.sources.folder import PatternSource
        from fastvae.data.sources.patterns import is_pattern

        is_folder = not is_pattern(texts[0]) or os.path.isdir(texts[0])
        return FolderSource(texts[0]) if is_folder else PatternSource(texts[0])
    from fastvae.data.sources.open import located

    storage, places = located(texts)
    name = ", ".join(texts)
    if kind == "tar":
        from fastvae.data.sources.tar import TarSource

        return TarSource(storage, places, name)
    if kind == "parquet":
        from fastvae.data.sources.parquet import ParquetSource

        return ParquetSource(storage, places, name, image_column, key_column)
    from fastvae.data.sources.jsonl import ManifestSource

    return ManifestSource(storage, places, name, image_column, key_column, schemes)


def _kind(text: str) -> str:
    if text.lower().endswith(COMPRESSED):
        raise ValueError(f"{text} is compressed as a whole, and its images cannot be found by seek: unpack it first")
    kind = ARCHIVES.get(os.path.splitext(text)[1].lower(), "images")
    return "images" if kind == "images" or os.path.isdir(text) else kind


def located(texts: Sequence[str]) -> tuple[Storage, list[str]]:
    """The storage in which the files that ``texts`` name lie, and each one's place in it, sorted within a pattern.

    Raises ValueError for a pattern that matches nothing and for files of different systems.
    """
    schemes = {scheme_of(text) for text in texts}
    if len(schemes) > 1:
        raise ValueError(f"src must name files of one file system, got {list(texts)}")
    if schemes != {None}:
        return _located_remotely(texts)
    from glob import glob

    paths, folders = [], []
    for text in texts:
        if os.path.exists(text) or not is_pattern(text):
            paths.append(text)
            folders.append(os.path.dirname(text))
            continue
        found = [path for name in expand_braces(text) for path in (sorted(glob(name)) if is_pattern(name) else [name])]
        if not found:
            raise ValueError(f"no file matches {text!r}")
        paths += found
        folders.append(fixed_folder(text))
    root = common_folder(folders)
    return LocalStorage(root), [
        os.path.relpath(path, root or ".").replace(os.sep, "/") for path in dict.fromkeys(paths)
    ]


def _located_remotely(texts: Sequence[str]) -> tuple[RemoteStorage, list[str]]:
    scheme = scheme_of(texts[0])
    bare = [text.split("://", 1)[1] for text in texts]
    folders = [fixed_folder(text) if is_pattern(text) else posixpath.dirname(text) for text in bare]
    root = common_folder(folders)
    storage = open_remote(f"{scheme}://{root}")
    top = storage.path("").strip("/")
    places: list[str] = []
    for name in (name for text in bare for name in expand_braces(text)):
        if not is_pattern(name):
            places.append(posixpath.relpath(name, root or "."))
            continue
        # What a file system finds it names in its own way: some keep the scheme, some start with a slash.
        found = sorted(path.strip("/") for path in storage.files.glob(f"{scheme}://{name}"))
        if not found:
            raise ValueError(f"no file matches {scheme}://{name}")
        places += [posixpath.relpath(path, top) if top else path for path in found]
    return storage, list(dict.fromkeys(places))
