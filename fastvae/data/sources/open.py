"""Opens any source of images: a folder, a pattern, tar, Parquet or JSONL files, or a URL."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Sequence
from glob import glob

from fastvae.data.sources.captions import CAPTIONS
from fastvae.data.sources.folder import FolderSource, PatternSource
from fastvae.data.sources.jsonl import ManifestSource
from fastvae.data.sources.parquet import ParquetSource
from fastvae.data.sources.patterns import expand_braces, fixed_folder, is_pattern
from fastvae.data.sources.remote import RemoteSource
from fastvae.data.sources.several import SeveralSources
from fastvae.data.sources.source import KINDS, Source
from fastvae.data.sources.storage import LocalStorage, RemoteStorage, Storage, common_folder, open_remote, scheme_of
from fastvae.data.sources.tar import FIRST_DOT, TarSource
from fastvae.system.arguments import check_choices
from fastvae.system.terminal import first_few

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".jsonl.gz", ".jsonl.zst")


def open_source(
    src: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    image_column: str | None = None,
    key_column: str | None = None,
    schemes: Collection[str] = (),
    tar_rule: str = FIRST_DOT,
    captions: str = "beside",
) -> Source:
    """Return the source that ``src`` names.

    ``src`` is a folder or a pattern of image files such as ``photos/**/*.{jpg,png}``, or a list of them; tar files in
    WebDataset's layout, Parquet files or JSONL manifests (one, a list, or a pattern such as ``shards/{000..127}.tar``);
    or any of these under a URL whose file system fsspec knows. ``image_column`` and ``key_column`` name the columns of
    Parquet files and manifests, by default "image" and "key"; ``image_column`` is also the extension of the image in
    tar samples that have several. ``schemes`` are the schemes of URLs that a manifest may name, by default none.
    ``tar_rule``: see TarSource. ``captions``: "beside" adds those beside the images of a folder or pattern to their
    columns, "none" not.
    Raises ValueError for anything else, and if a package that the source needs is not installed.
    """
    check_choices(captions=(captions, CAPTIONS))
    given = [src] if isinstance(src, str | os.PathLike) else list(src)
    texts = [os.fspath(text) for text in given]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"src must be a path, a pattern or a list of them, got {src!r}")
    kinds = {_kind(text) for text in texts}
    if len(kinds) > 1:
        raise ValueError(
            f"src must be folders and patterns, or .tar, .parquet or .jsonl files of one kind, got {first_few(texts)}"
        )
    (kind,) = kinds
    if kind == "images":
        sources = [_image_files(text, captions == "beside") for text in texts]
        return sources[0] if len(sources) == 1 else SeveralSources(sources)
    storage, places = locate_files(texts)
    name = first_few(texts)
    if kind == "tar":
        return TarSource(storage, places, name, tar_rule, image_column)
    if kind == "parquet":
        return ParquetSource(storage, places, name, image_column or "image", key_column)
    return ManifestSource(storage, places, name, image_column or "image", key_column, schemes)


def _image_files(text: str, captions: bool) -> Source:
    """Return the source of one folder, pattern or URL; raises ValueError for a file: a shell expands patterns."""
    if scheme_of(text):
        return RemoteSource(text, captions)
    if os.path.isfile(text):
        raise ValueError(
            f"src must be folders and patterns, {text!r} is a file: quote a pattern, as in 'photos/*.jpg', so that the "
            "shell does not expand it"
        )
    is_folder = not is_pattern(text) or os.path.isdir(text)
    return (FolderSource if is_folder else PatternSource)(text, captions)


def _kind(text: str) -> str:
    # A member of a compressed archive cannot be read by seek.
    if text.lower().endswith(COMPRESSED_SUFFIXES):
        raise ValueError(f"{text} is compressed as a whole, and its images cannot be found by seek: unpack it first")
    kind = KINDS.get(os.path.splitext(text)[1].lower(), "images")
    return "images" if kind == "images" or os.path.isdir(text) else kind


def locate_files(texts: Sequence[str]) -> tuple[Storage, list[str]]:
    """Return the storage of the files that ``texts`` name, and the place of each in it, sorted within a pattern.

    Raises ValueError for a pattern that matches nothing and for files of different file systems.
    """
    schemes = {scheme_of(text) for text in texts}
    if len(schemes) > 1:
        raise ValueError(f"src must name files of one file system, got {first_few(list(texts))}")
    if schemes != {None}:
        return _locate_remote_files(texts)
    paths, folders = [], []
    for text in texts:
        if os.path.exists(text) or not is_pattern(text):
            paths.append(text)
            folders.append(os.path.dirname(text))
            continue
        names = expand_braces(text)
        found = [path for name in names for path in (_matches(name) if is_pattern(name) else [name])]
        if not found:
            raise ValueError(f"src must match a file, {text!r} matches none")
        paths += found
        folders.append(fixed_folder(text))
    root = common_folder(folders)
    return LocalStorage(root), [
        os.path.relpath(path, root or ".").replace(os.sep, "/") for path in dict.fromkeys(paths)
    ]


def _matches(pattern: str) -> list[str]:
    """Return the files that ``pattern`` matches, sorted; ``**`` crosses folders, as in patterns of images."""
    return sorted(glob(pattern, recursive=True))


def _locate_remote_files(texts: Sequence[str]) -> tuple[RemoteStorage, list[str]]:
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
        # fsspec file systems differ in the paths that glob returns: some keep the scheme, some start with a slash.
        found = sorted(path.strip("/") for path in storage.files.glob(f"{scheme}://{name}"))
        if not found:
            raise ValueError(f"src must match a file, '{scheme}://{name}' matches none")
        places += [posixpath.relpath(path, top) if top else path for path in found]
    return storage, list(dict.fromkeys(places))
