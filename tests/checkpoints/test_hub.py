"""Hub ids: from a cache filled beforehand with the network off, and from a server on the loopback."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastvae.checkpoints.files import commit_of, parse_address
from fastvae.models import AutoencoderKL

ROOT = Path(__file__).parents[2]
MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def cache(model, tmp_path):
    """Make huggingface_hub's cache as it is after a download of owner/vae at main."""
    repository = tmp_path / "cache" / "models--owner--vae"
    model.save_pretrained(repository / "snapshots" / MAIN)
    model.save_pretrained(repository / "snapshots" / MAIN / "vae", variant="fp16")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(MAIN)
    return tmp_path / "cache"


@pytest.mark.parametrize("options", [{}, {"revision": MAIN}, {"subfolder": "vae", "variant": "fp16"}])
def test_a_filled_cache_loads_offline(model, cache, options, layouts):
    loaded = AutoencoderKL.from_pretrained("owner/vae", cache_dir=cache, local_files_only=True, **options)
    layouts.assert_same_state(loaded.state_dict(), model.state_dict())
    assert loaded.load_report.commit == MAIN
    assert loaded.config._name_or_path == "owner/vae"


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/owner/vae/blob/main/diffusion_pytorch_model.safetensors",
        "https://huggingface.co/owner/vae/resolve/main/diffusion_pytorch_model.safetensors?download=true",
        "hf.co/owner/vae/diffusion_pytorch_model.safetensors",
        "owner/vae/diffusion_pytorch_model.safetensors",
        "owner/vae/vae/diffusion_pytorch_model.fp16.safetensors",
    ],
)
def test_a_single_files_address_is_read_from_the_cache(model, cache, address, layouts):
    loaded = AutoencoderKL.from_single_file(address, config=model.config, cache_dir=cache, local_files_only=True)
    layouts.assert_same_state(loaded.state_dict(), model.state_dict())


def test_a_config_for_a_single_file_may_be_a_hub_id(model, cache, tmp_path, layouts):
    path = layouts.write(tmp_path / "vae.safetensors", layouts.to_ldm(model.state_dict()))
    loaded = AutoencoderKL.from_single_file(path, config="owner/vae", cache_dir=cache, local_files_only=True)
    assert loaded.config.scaling_factor == model.config.scaling_factor


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("owner/none", {}, r"owner/none/config\.json: no such file in the local cache, and downloads are switched off"),
        ("owner/vae", {"variant": "ema"}, r"model\.ema\.safetensors: no such file in the local cache"),
        ("owner/vae", {"revision": "v2"}, "in the local cache"),
        ("owner/vae/extra", {}, r"no such directory, and not the id of a Hub repository \(owner/name\)"),
        ("./owner", {}, "no such directory"),
        ("what ever", {}, "not the id of a Hub repository"),
    ],
)
def test_files_missing_from_the_cache_are_named(cache, source, options, words):
    with pytest.raises(FileNotFoundError, match=words):
        AutoencoderKL.from_pretrained(source, cache_dir=cache, **options)


def test_a_cached_pipeline_is_refused_with_its_subfolder(cache):
    snapshot = cache / "models--owner--vae" / "snapshots" / MAIN
    (snapshot / "config.json").unlink()
    (snapshot / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match='owner/vae: this is a whole pipeline; pass subfolder="vae"'):
        AutoencoderKL.from_pretrained("owner/vae", cache_dir=cache)


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("https://huggingface.co/o/r/blob/main/a/b.safetensors", ("o/r", "main", "a/b.safetensors")),
        ("huggingface.co/o/r/resolve/v1.0/b.safetensors", ("o/r", "v1.0", "b.safetensors")),
        ("o/r/b.safetensors", ("o/r", None, "b.safetensors")),
        ("o/b.safetensors", None),
        ("../o/r/b.safetensors", None),
        ("o/r/../b.safetensors", None),
        ("b.safetensors", None),
        ("/o/r/b.safetensors", None),
    ],
)
def test_addresses_are_parsed(address, parsed):
    assert parse_address(address) == parsed


def test_an_address_elsewhere_is_refused(model):
    with pytest.raises(ValueError, match=r"only files on https://huggingface\.co"):
        AutoencoderKL.from_single_file("https://example.org/o/r/blob/main/b.safetensors", config=model.config)
    with pytest.raises(ValueError, match="the address says revision 'main', the argument 'v2'"):
        AutoencoderKL.from_single_file("hf.co/o/r/blob/main/b.safetensors", config=model.config, revision="v2")


def test_a_commit_is_read_from_the_name_of_a_snapshot():
    assert commit_of(Path(f"/c/models--o--r/snapshots/{MAIN}/vae/config.json")) == MAIN
    assert commit_of(Path("/c/snapshots/latest/config.json")) is None


class _Hub(BaseHTTPRequestHandler):
    """The part of the Hub that downloads need: files by repository, revision and path, and error codes."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body):
        hub = self.server.hub
        owner, name, resolve, revision, *path = self.path.split("?")[0].strip("/").split("/")
        commits = hub["repositories"].get(f"{owner}/{name}")
        hub["requests"].append(f"{self.command} {'/'.join(path)}")
        if commits is None or resolve != "resolve":
            return self._error(401, "RepoNotFound")
        if f"{owner}/{name}" == "owner/private" and self.headers.get("Authorization") != "Bearer hf_secret":
            return self._error(403, "GatedRepo")
        # In owner/moving a commit is pushed between the first file and the second.
        has_moved = name == "moving" and path != ["config.json"]
        commit = {"main": OLD if has_moved else MAIN, "old": OLD}.get(revision, revision)
        if commit not in commits:
            return self._error(404, "RevisionNotFound")
        file = Path(commits[commit], *path)
        if not file.is_file():
            return self._error(404, "EntryNotFound", commit)
        body = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)
        return None

    def _error(self, status, code, commit=None):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def _serving(repositories):
    hub = {"repositories": repositories, "requests": []}
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        server.hub = hub
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", hub["requests"]
        finally:
            server.shutdown()
            thread.join()


# Runs in its own process: huggingface_hub reads HF_ENDPOINT when it is imported.
_CLIENT = """
import json, sys, traceback
import torch
from fastvae.models import AutoencoderKL
torch.set_num_threads(1)
endpoint = sys.argv[1]

def digest(model):
    return {name: tensor.double().sum().item() for name, tensor in model.state_dict().items()}

def attempt(function, *args, **options):
    try:
        model = function(*args, **options)
    except (ValueError, OSError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"commit": model.load_report.commit, "digest": digest(model)}

load, single = AutoencoderKL.from_pretrained, AutoencoderKL.from_single_file
file = "owner/vae/blob/main/diffusion_pytorch_model.safetensors"
results = {
    "main": attempt(load, "owner/vae"),
    "old": attempt(load, "owner/vae", revision="old"),
    "moving": attempt(load, "owner/moving"),
    "encoder": attempt(load, "owner/shards", subfolder="vae", parts=("encoder",)),
    "private": attempt(load, "owner/private", token="hf_secret"),
    "by_huggingface": attempt(single, "https://huggingface.co/" + file, config="owner/vae"),
    "by_endpoint": attempt(single, endpoint + "/" + file, config="owner/vae"),
    "gated": attempt(load, "owner/private", token=False),
    "no_repository": attempt(load, "owner/none"),
    "no_revision": attempt(load, "owner/vae", revision="v9"),
    "no_variant": attempt(load, "owner/vae", variant="ema"),
    "no_config": attempt(load, "owner/shards"),
}
print(json.dumps(results))
"""


def _run_client(endpoint, home):
    ours = ("HF_", "HUGGING", "http_", "https_", "HTTP_", "HTTPS_", "ALL_PROXY", "all_proxy")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    environment |= {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", _CLIENT, endpoint]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_models_load_from_a_hub_on_the_loopback(model, tmp_path):
    other = AutoencoderKL.from_config(model.config)
    model.save_pretrained(tmp_path / "main")
    other.save_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "shards" / "vae", max_shard_size="100KB")
    index_name = "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads((tmp_path / "shards" / "vae" / index_name).read_text())["weight_map"]
    repositories = {
        "owner/vae": {MAIN: tmp_path / "main", OLD: tmp_path / "old"},
        "owner/moving": {MAIN: tmp_path / "main", OLD: tmp_path / "old"},
        "owner/private": {MAIN: tmp_path / "main"},
        "owner/shards": {MAIN: tmp_path / "shards"},
    }
    with _serving(repositories) as (endpoint, requests):
        results = _run_client(endpoint, tmp_path / "home")

    def digest(weights, roots=("",)):
        return {n: t.double().sum().item() for n, t in weights.state_dict().items() if n.startswith(roots)}

    for name in ("main", "moving", "private", "by_huggingface", "by_endpoint"):
        assert results[name] == {"commit": MAIN, "digest": digest(model)}, name
    assert results["old"] == {"commit": OLD, "digest": digest(other)}
    assert results["encoder"]["digest"] == digest(model, ("encoder.", "quant_conv."))
    fetched = {request.rsplit("/", 1)[-1] for request in requests if request.startswith("GET vae/")}
    of_the_encoder = {shard for name, shard in index.items() if name.startswith(("encoder.", "quant_conv."))}
    assert fetched == of_the_encoder | {"config.json", index_name}
    assert of_the_encoder < set(index.values())
    errors = {
        "gated": ("PermissionError", "this repository is gated"),
        "no_repository": ("FileNotFoundError", "no such repository on the Hub"),
        "no_revision": ("FileNotFoundError", "the repository has no revision 'v9'"),
        "no_variant": ("FileNotFoundError", "diffusion_pytorch_model.ema.safetensors: no such file in that repository"),
        "no_config": ("FileNotFoundError", "owner/shards/config.json: no such file in that repository"),
    }
    for name, (kind, message) in errors.items():
        assert results[name]["error"] == kind, results[name]
        assert message in results[name]["message"]
        assert "\n" not in results[name]["message"]


def test_a_hub_that_does_not_answer_is_a_connection_error(monkeypatch):
    """The error that huggingface_hub raises after half a minute of retries is raised at once."""
    import huggingface_hub

    def no_answer(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot connect")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_answer)
    with pytest.raises(ConnectionError, match="is no folder, the Hub did not answer, and the file is not cached"):
        AutoencoderKL.from_pretrained("owner/vae")


def test_a_mistyped_name_is_refused_without_a_request(monkeypatch):
    import huggingface_hub

    from fastvae.checkpoints.loading import locate

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *given, **options: pytest.fail("a request was made"))
    with pytest.raises(
        FileNotFoundError, match="tinny is no folder, and not the id of a Hub repository, such as OWNER/NAME"
    ):
        locate("tinny")
    with pytest.raises(FileNotFoundError, match=r"sdxl is no folder, .*; a preset has no weights"):
        locate("sdxl")
    with pytest.raises(FileNotFoundError, match=r"the model must be a folder, .*, got an empty name"):
        locate("")
