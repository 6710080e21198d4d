"""Finding a checkpoint's files: in a directory, a Hub repository, or as a single file or its Hub address.

Downloads go through huggingface_hub, which honours HF_ENDPOINT, HF_HUB_OFFLINE and its cache. Source of the file
names: diffusers.models.modeling_utils and diffusers.utils.hub_utils.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

CONFIG_NAME = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A directory or a Hub repository, and the options of its downloads."""

    source: str
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    @property
    def directory(self) -> Path | None:
        """Local folder that holds the files, or None for a Hub repository."""
        root = Path(self.source).expanduser()
        return root / (self.subfolder or "") if root.is_dir() else None

    @property
    def is_offline(self) -> bool:
        """True if files of a Hub repository can come from the local cache alone."""
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE

    @property
    def searched(self) -> str:
        """End of a message that says where a file of a Hub repository was searched for; "" for a directory."""
        if self.directory is not None:
            return ""
        if self.is_offline:
            return " in the local cache, and downloads are switched off"
        return " in that repository" + (f" at revision {self.revision!r}" if self.revision else "")

    def where(self, name: str) -> str:
        """Return the file's full name for messages."""
        return str(self.directory / name) if self.directory else str(PurePosixPath(self.source, self._inside(name)))

    def find(self, name: str) -> Path | None:
        """Return the local path of a file, downloaded if needed, or None if the repository has no such file."""
        if self.directory is not None:
            path = self.directory / name
            return path if path.is_file() else None
        return _download(self, self._inside(name))

    def need(self, name: str) -> Path:
        """Return the local path of a file as ``find`` does. Raises FileNotFoundError if there is no such file."""
        path = self.find(name)
        if path is None:
            raise FileNotFoundError(f"{self.where(name)}: no such file{self.searched}")
        return path

    def pinned(self, path: Path) -> Repository:
        """Return this repository at the commit that ``path`` came from, so that all files come from one commit."""
        commit = commit_of(path)
        return replace(self, revision=commit) if commit and self.directory is None else self

    def _inside(self, name: str) -> str:
        return str(PurePosixPath(self.subfolder or "", name))


@dataclass(frozen=True)
class WeightFiles:
    """Weights of one model: one file, or shards with an index that maps each tensor to its shard."""

    repository: Repository
    single: Path | None = None
    weight_map: Mapping[str, str] | None = None
    index: Path | None = None

    def shard(self, name: str) -> Path:
        """Return the local path of a shard. Raises FileNotFoundError, which names the shard and the index."""
        path = self.repository.find(name)
        if path is None:
            raise FileNotFoundError(f"{self.repository.where(name)}: missing, but {self.index} lists this shard")
        return path


def weights_name(variant: str | None = None, suffix: str = ".safetensors", shard: str = "") -> str:
    """Return diffusers' name of a weights file, as in diffusion_pytorch_model.fp16-00001-of-00002.safetensors."""
    return WEIGHTS_STEM + (f".{variant}" if variant else "") + shard + suffix


def index_name(variant: str | None = None) -> str:
    """Return diffusers' name of a shard index, as in diffusion_pytorch_model.safetensors.index.fp16.json."""
    return f"{WEIGHTS_STEM}.safetensors.index" + (f".{variant}" if variant else "") + ".json"


def find_config(repository: Repository) -> Path:
    """Return the path of a model's config.json. Raises FileNotFoundError or ValueError, which say what to pass."""
    source = Path(repository.source).expanduser()
    if source.is_file():
        raise ValueError(f"{source}: this is a file; a model directory is taken here, from_single_file takes files")
    _check_exists(repository)
    directory = repository.directory
    if directory is not None and not (directory / CONFIG_NAME).is_file():
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: no such directory (subfolder={repository.subfolder!r})")
        if (directory / "model_index.json").is_file() and (directory / "vae").is_dir():
            raise ValueError(f'{directory}: this is a whole pipeline; pass subfolder="vae" to load its VAE')
    path = repository.find(CONFIG_NAME)
    is_hub_root = repository.directory is None and not repository.subfolder
    # A repository that exists and has no config at its root is most often a pipeline.
    if path is None and is_hub_root and repository.find("model_index.json") is not None:
        raise ValueError(f'{repository.source}: this is a whole pipeline; pass subfolder="vae" to load its VAE')
    return path or repository.need(CONFIG_NAME)


def find_weights(repository: Repository, variant: str | None = None, allow_pickle: bool = False) -> WeightFiles:
    """Find the weights of a model in diffusers' order: an index with shards before a single file.

    Raises FileNotFoundError, which names the missing file, and ValueError for a pickle without ``allow_pickle``.
    """
    legacy = (f"{WEIGHTS_STEM}.safetensors.{variant}.index.json",) if variant else ()
    for name in (index_name(variant), *legacy):
        path = repository.find(name)
        if path is not None:
            return WeightFiles(repository, weight_map=_read_index(path), index=path)
    single = repository.find(weights_name(variant))
    if single is not None:
        return WeightFiles(repository, single=single)
    pickle = weights_name(variant, ".bin")
    if allow_pickle and (path := repository.find(pickle)) is not None:
        return WeightFiles(repository, single=path)
    directory = repository.directory
    if directory is not None and (directory / pickle).is_file():
        check_pickle(directory / pickle, allow_pickle)
    others = _other_variants(directory, variant)
    message = f"{repository.where(weights_name(variant))}: no such file{others}{repository.searched}"
    raise FileNotFoundError(message)


def check_pickle(path: Path, allow_pickle: bool) -> None:
    """Raise ValueError for a pickle file unless ``allow_pickle``."""
    if path.suffix in PICKLE_SUFFIXES and not allow_pickle:
        raise ValueError(
            f"{path}: this is a pickle file, which can run code when it is read; safetensors is taken, or "
            "allow_pickle=True for a file you trust (it is then read with weights_only=True)"
        )


def find_single_file(source: str, repository: Repository) -> Path:
    """Return the local path of a single-file checkpoint, given as a path or as a Hub address.

    Addresses, as in diffusers: https://huggingface.co/owner/repo/blob/main/x.safetensors, the same under HF_ENDPOINT,
    without the scheme, or owner/repo/x.safetensors. Raises FileNotFoundError or ValueError, which name ``source``.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{source}: this is a directory; from_pretrained takes directories")
    address = parse_address(source)
    if address is None:
        raise FileNotFoundError(f"{source}: no such file, and not the address of a file on the Hub")
    repo_id, revision, name = address
    if revision and repository.revision and revision != repository.revision:
        raise ValueError(f"{source}: the address says revision {revision!r}, the argument {repository.revision!r}")
    return replace(repository, source=repo_id, subfolder=None, revision=revision or repository.revision).need(name)


def parse_address(address: str) -> tuple[str, str | None, str] | None:
    """Split a Hub file address into (repository id, revision or None, file name), or None if it is not one.

    Raises ValueError for an address on a host that is neither the Hub nor HF_ENDPOINT.
    """
    from huggingface_hub import constants

    text = address.strip().split("?")[0].split("#")[0]
    endpoint = constants.ENDPOINT.rstrip("/")
    if text.startswith(endpoint + "/"):
        text = text[len(endpoint) + 1 :]
    elif "://" in text:
        parts = urlsplit(text)
        if parts.scheme not in ("https", "http") or parts.hostname not in _HUB_HOSTS:
            raise ValueError(f"{address}: only files on {', '.join(dict.fromkeys((endpoint, *_HUB_HOSTS)))} are taken")
        text = parts.path.lstrip("/")
    else:
        host, _, rest = text.partition("/")
        text = rest if host in _HUB_HOSTS else text
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)/(?:(?:blob|resolve)/([^/]+)/)?([^/].*\.\w+)", text)
    if match is None or ".." in text.split("/") or text.startswith("."):
        return None
    return match.group(1), match.group(2), match.group(3)


def commit_of(path: Path) -> str | None:
    """Return the commit of a cached Hub file, from the name of its snapshot folder; None for other files."""
    parts = path.parts
    for folder, commit in itertools.pairwise(parts):
        if folder == "snapshots" and _COMMIT.fullmatch(commit):
            return commit
    return None


def _check_exists(repository: Repository) -> None:
    source = repository.source
    is_path = source.startswith(("/", "./", "../", "~")) or not _HUB_ID.fullmatch(source)
    if repository.directory is None and is_path:
        raise FileNotFoundError(f"{source}: no such directory, and not the id of a Hub repository (owner/name)")


def _download(repository: Repository, name: str) -> Path | None:
    from huggingface_hub import errors, hf_hub_download

    source = repository.source
    try:
        path = hf_hub_download(
            source,
            name,
            revision=repository.revision,
            token=repository.token,
            cache_dir=repository.cache_dir,
            local_files_only=repository.local_files_only,
        )
    except errors.LocalEntryNotFoundError as error:
        # Offline it means that the file is not in the cache, online that the Hub did not answer.
        if repository.is_offline:
            return None
        raise ConnectionError(
            f"{source}/{name}: {source} is no folder, the Hub did not answer, and the file is not cached"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError as error:
        raise PermissionError(f"{source}: this repository is gated; accept its terms and pass token=") from error
    except errors.RepositoryNotFoundError as error:
        message = f"{source}: no such directory, and no such repository on the Hub (a private one needs token=)"
        raise FileNotFoundError(message) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{source}: the repository has no revision {repository.revision!r}") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{source}: not the id of a Hub repository ({error})") from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"{source}/{name}: the Hub answered with an error ({error})") from error
    return Path(path)


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        entries = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f'{path}: not a shard index (a JSON object with a "weight_map" is taken)') from None
    for tensor, shard in entries:
        if not isinstance(shard, str) or not shard or "/" in shard or "\\" in shard or shard in (".", ".."):
            raise ValueError(f"{path}: {tensor} is in {shard!r}; only plain file names beside the index are taken")
        if not shard.endswith(".safetensors"):
            raise ValueError(f"{path}: {tensor} is in {shard!r}; only safetensors shards are taken")
    return dict(entries)


def _other_variants(directory: Path | None, variant: str | None) -> str:
    if directory is None:
        return ""
    pattern = re.compile(
        rf"{WEIGHTS_STEM}(?:\.safetensors\.index)?(?:\.([^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|json)"
    )
    matches = [pattern.fullmatch(path.name) for path in directory.iterdir()]
    found = sorted({match.group(1) or "" for match in matches if match} - {variant or "", "index"})
    if not found:
        return ""
    return "; there is " + ", ".join(
        f"variant={name!r}" if name else "the plain variant (variant=None)" for name in found
    )
