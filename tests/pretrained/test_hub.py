"""Finding models, with the real Hub client talking to a small server on the loopback interface."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import save_file

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.pretrained import ModelCardFacts
from ear_vae.pretrained.conversion import convert
from ear_vae.pretrained.resolve import PUBLISHED_SHA256, resolve

TINY = EarVAEConfig(
    channels=4, channel_multipliers=(1, 2), strides=(2, 4), latent_dim=32, transformer_depth=1
)
OURS, OFFICIAL = "someone/ours", "earlab/EAR_VAE"
FIRST, SECOND = "1" * 40, "2" * 40
LARGE = (".safetensors", ".pyt")


class LoopbackHub(ThreadingHTTPServer):
    """The Hub's endpoints for downloads and commits, with faults to order.

    Attributes:
        commits: Files by repository and commit.
        refs: Commit by repository and branch or tag.
        faults: What goes wrong with the next downloads of large files, in order: "cut" breaks off in
            the middle, "drop" closes the connection without an answer, "corrupt" changes a byte.
        requests: Method, path, Authorization and Range of each request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.faults: list[str] = []
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.move_main_after_config: str | None = None
        self.refusal: int | None = None
        self.gated: set[str] = set()
        self.address = f"http://127.0.0.1:{self.server_port}"
        # By another name, as the Hub's large files lie on other hosts.
        self.cdn_address = f"http://localhost:{self.server_port}"

    def add(self, repo_id: str, folder: Path, commit: str = FIRST, refs: tuple[str, ...] = ("main",)) -> None:
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.commits.setdefault(repo_id, {})[commit] = files
        self.refs.setdefault(repo_id, {}).update(dict.fromkeys(refs, commit))

    def downloads(self, suffix: str) -> int:
        return sum(method == "GET" and path.endswith(suffix) for method, path, *_ in self.requests)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def note(self) -> None:
        headers = self.headers
        self.server.requests.append((self.command, self.path, headers["Authorization"], headers["Range"]))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.note()
        parts = self.path.lstrip("/").split("/", 4)
        if parts[0] == "api":
            self.answer(self.server.refusal or 404)
            return
        if parts[0] == "cdn":
            self.large(*parts[1:])
            return
        owner, name, _, revision, file = parts
        repo_id = f"{owner}/{name}"
        hub = self.server
        if repo_id not in hub.commits:
            # Without a token the Hub does not tell a missing repository from a private one.
            if self.headers["Authorization"]:
                self.answer(404, X_Error_Code="RepoNotFound")
            else:
                self.answer(401)
            return
        if repo_id in hub.gated:
            self.answer(403, X_Error_Code="GatedRepo")
            return
        commit = hub.refs[repo_id].get(revision, revision)
        if commit not in hub.commits[repo_id]:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        body = hub.commits[repo_id][commit].get(file)
        if body is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        elif file.endswith(LARGE):
            sha256 = hashlib.sha256(body).hexdigest()
            location = f"{hub.cdn_address}/cdn/{owner}/{name}/{commit}/{file}"
            self.answer(
                302,
                Location=location,
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{sha256}"',
                X_Linked_Size=len(body),
            )
        else:
            git_sha1 = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            self.answer(200, body, ETag=f'"{git_sha1}"', X_Repo_Commit=commit)
            if self.command == "GET" and hub.move_main_after_config:
                hub.refs[repo_id]["main"] = hub.move_main_after_config

    def large(self, owner: str, name: str, commit: str, file: str) -> None:
        body = self.server.commits[f"{owner}/{name}"][commit][file]
        fault = self.server.faults.pop(0) if self.server.faults and self.command == "GET" else None
        self.close_connection = fault in ("cut", "drop")
        if fault == "drop":
            return
        if fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start : len(body) // 2] if fault == "cut" else body[start:])

    def do_POST(self) -> None:
        self.note()
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub, parts = self.server, self.path.lstrip("/").split("/")
        if hub.refusal:
            self.answer(hub.refusal, b'{"error": "no right to write"}')
        elif self.path == "/api/repos/create":
            wanted = json.loads(content)
            repo_id = f"{wanted['organization']}/{wanted['name']}"
            known = repo_id in hub.commits
            hub.commits.setdefault(repo_id, {FIRST: {}})
            hub.refs.setdefault(repo_id, {"main": FIRST})
            body = json.dumps({"url": f"{hub.address}/{repo_id}"}).encode()
            self.answer(409 if known else 200, body)
        elif self.path == "/api/validate-yaml":
            self.answer(200, b'{"errors": [], "warnings": []}')
        elif parts[4:5] == ["preupload"]:
            paths = [file["path"] for file in json.loads(content)["files"]]
            answer = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer(200, json.dumps({"files": answer}).encode())
        else:
            repo_id, lines = "/".join(parts[2:4]), [json.loads(line) for line in content.splitlines()]
            files = dict(hub.commits[repo_id][hub.refs[repo_id]["main"]])
            for value in (line["value"] for line in lines if line["key"] == "file"):
                files[value["path"]] = base64.b64decode(value["content"])
            commit = str(len(hub.commits[repo_id]) + 1) * 40
            hub.commits[repo_id][commit], hub.refs[repo_id]["main"] = files, commit
            url = f"{hub.address}/{repo_id}/commit/{commit}"
            self.answer(200, json.dumps({"commitUrl": url, "commitOid": commit}).encode())


# Before 1.0 a broken-off download ends in an error instead of going on, and its part stays; an upload asks
# for more than the loopback server knows.
since_1_0 = pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 1, reason="clients before 1.0 behave otherwise here"
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """The server, with the client of this process pointed at it and at empty caches."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name)
    server = LoopbackHub()
    home = tmp_path / "home"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    # Clients before 1.0 keep a copy of the second.
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stop()
    thread.join()


def random_model(seed: int, *, sample_rate: int = 44_100, name: str = "model") -> EarVAE:
    torch.manual_seed(seed)
    config = EarVAEConfig(**{**TINY.to_dict(), "sample_rate": sample_rate})
    return EarVAE(config, name=name).eval().requires_grad_(False)


def write_official(folder: Path, *variants: str) -> dict[str, EarVAE]:
    """An official folder with several variants, and the models in it."""
    entries, models = {}, {}
    for seed, name in enumerate(variants):
        models[name] = random_model(seed, sample_rate=44_100 + seed, name=name)
        models[name].save_pretrained(folder.parent / "staged" / name)
        convert(folder.parent / "staged" / name, folder, overwrite=True, to="official")
        entries.update(json.loads((folder / "config.json").read_text())["variants"])
    (folder / "config.json").write_text(json.dumps({"variants": entries}))
    return models


@pytest.fixture
def ours(tmp_path: Path, hub: LoopbackHub) -> EarVAE:
    vae = random_model(7)
    vae.save_pretrained(tmp_path / "ours")
    hub.add(OURS, tmp_path / "ours")
    return vae


@pytest.fixture
def official(tmp_path: Path, hub: LoopbackHub) -> dict[str, EarVAE]:
    models = write_official(tmp_path / "official", "ear_vae_44k", "ear_vae_v2_48k")
    hub.add(OFFICIAL, tmp_path / "official")
    return models


def assert_same(loaded: EarVAE, expected: EarVAE) -> None:
    assert loaded.config == expected.config
    state = expected.state_dict()
    assert set(loaded.state_dict()) == set(state)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-7, msg=name)


def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_our_layout_from_the_hub_then_from_the_cache(
    ours: EarVAE, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = EarVAE.from_pretrained(OURS)
    assert_same(loaded, ours)
    assert loaded.name == OURS
    assert loaded.weights_sha256 == ours.weights_sha256
    assert not any("README" in path for _, path, *_ in hub.requests)
    assert_same(EarVAE.from_pretrained(OURS), ours)
    assert hub.downloads("model.safetensors") == 1
    hub.stop()
    no_waiting(monkeypatch)
    assert_same(EarVAE.from_pretrained(OURS), ours)
    assert_same(EarVAE.from_pretrained(OURS, local_files_only=True), ours)


def test_official_layout_from_the_hub_then_from_the_cache_without_unpickling(
    official: dict[str, EarVAE], hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, expected in official.items():
        loaded = EarVAE.from_pretrained(OFFICIAL, variant=name)
        assert_same(loaded, expected)
        assert loaded.name == f"{OFFICIAL}:{name}"
        assert hub.downloads(f"{name}.pyt") == 1
    hub.stop()
    no_waiting(monkeypatch)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled again"))
    for name, expected in official.items():
        assert_same(EarVAE.from_pretrained(OFFICIAL, variant=name), expected)
        assert_same(EarVAE.from_pretrained(OFFICIAL, variant=name, local_files_only=True), expected)


def test_a_pipeline_of_diffusers_from_the_hub_then_from_the_cache(
    ours: EarVAE, hub: LoopbackHub, tmp_path: Path
) -> None:
    """Of a whole pipeline only the autoencoder's folder is fetched."""
    folder = tmp_path / "pipeline"
    (folder / "vae").mkdir(parents=True)
    config = {
        "_class_name": "AutoencoderEarVAE",
        "encoder_hidden_size": 4,
        "decoder_channels": 4,
        "decoder_input_channels": 32,
        "channel_multiples": [1, 2],
        "downsampling_ratios": [2, 4],
        "transformer_depth": 1,
    }
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    (folder / "model_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"a diffusion model")
    state = {f"vae.{name}": tensor for name, tensor in ours.state_dict().items()}
    save_file(state, folder / "vae" / "diffusion_pytorch_model.safetensors")
    hub.add("someone/pipeline", folder)
    vae = EarVAE.from_pretrained("someone/pipeline")
    assert (vae.name, vae.weights_sha256) == ("someone/pipeline", ours.weights_sha256)
    assert hub.downloads("model.safetensors") == hub.downloads("vae/diffusion_pytorch_model.safetensors") == 1
    assert hub.downloads("model_config.json") == 0
    hub.requests.clear()
    again = EarVAE.from_pretrained("someone/pipeline", local_files_only=True)
    assert again.weights_sha256 == ours.weights_sha256
    assert hub.requests == []


def test_only_the_files_of_the_variant_are_fetched(official: dict[str, EarVAE], hub: LoopbackHub) -> None:
    EarVAE.from_pretrained(OFFICIAL, variant="ear_vae_v2_48k")
    assert not any("ear_vae_44k" in path for _, path, *_ in hub.requests)


def test_variants_must_be_named_and_known(official: dict[str, EarVAE], ours: EarVAE, tmp_path: Path) -> None:
    for source in (OFFICIAL, tmp_path / "official"):
        with pytest.raises(
            EarVAEError, match=r"choose one of 'ear_vae_44k', 'ear_vae_v2_48k' \(variant=\.\.\.\)"
        ):
            EarVAE.from_pretrained(source)
        with pytest.raises(EarVAEError, match=r"no variant 'ear_vae_96k'; it has 'ear_vae_44k', 'ear_vae_v2"):
            EarVAE.from_pretrained(source, variant="ear_vae_96k")
    for source in (OURS, tmp_path / "ours"):
        with pytest.raises(EarVAEError, match=r"no variants; leave it out \(variant='ear_vae_44k'\)"):
            EarVAE.from_pretrained(source, variant="ear_vae_44k")


def test_an_only_variant_needs_no_name(tmp_path: Path, hub: LoopbackHub) -> None:
    expected = write_official(tmp_path / "official", "mine")["mine"]
    loaded = EarVAE.from_pretrained(tmp_path / "official")
    assert_same(loaded, expected)
    assert loaded.name == "mine"


@since_1_0
def test_a_download_that_breaks_off_is_resumed(
    ours: EarVAE, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_waiting(monkeypatch)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # less than this is lost with the connection
    hub.faults = ["cut"]
    assert_same(EarVAE.from_pretrained(OURS), ours)
    size = len(hub.commits[OURS][FIRST]["model.safetensors"])
    assert f"bytes={size // 2 // 1024 * 1024}-" in [requested for *_, requested in hub.requests]


@since_1_0
@pytest.mark.parametrize("source", [OURS, OFFICIAL])
def test_a_download_that_stays_broken_leaves_nothing_half(
    source: str,
    ours: EarVAE,
    official: dict[str, EarVAE],
    hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_waiting(monkeypatch)
    variant = "ear_vae_44k" if source == OFFICIAL else None
    hub.faults = ["cut", *["drop"] * 50]
    with pytest.raises(EarVAEError, match=rf"{source}: the download of .* failed: .*; try again"):
        EarVAE.from_pretrained(source, variant=variant)
    left = [path.name for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith((*LARGE, ".incomplete"))]
    hub.faults.clear()
    assert_same(EarVAE.from_pretrained(source, variant=variant), official[variant] if variant else ours)


@pytest.mark.parametrize("source", [OURS, OFFICIAL])
def test_a_wrong_checksum_is_refused_and_cured_by_force_download(
    source: str, ours: EarVAE, official: dict[str, EarVAE], hub: LoopbackHub
) -> None:
    variant = "ear_vae_44k" if source == OFFICIAL else None
    hub.faults = ["corrupt"] * 4
    for _ in range(2):
        with pytest.raises(EarVAEError, match=r"damaged .*also when fetched again.*force_download"):
            EarVAE.from_pretrained(source, variant=variant)
        hub.faults = hub.faults[:1]
    loaded = EarVAE.from_pretrained(source, variant=variant, force_download=True)
    assert_same(loaded, official[variant] if variant else ours)
    assert_same(EarVAE.from_pretrained(source, variant=variant), official[variant] if variant else ours)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "change"])
def test_what_is_damaged_in_the_cache_is_fetched_again_once(
    file: str, damage: str, ours: EarVAE, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EarVAE.from_pretrained(OURS)
    path = tmp_path / "home/hub/models--someone--ours/snapshots" / FIRST / file
    content = path.read_bytes()
    changed = content.replace(b"44100", b"48000") if file == "config.json" else content[:-1] + b"\x01"
    damaged = content[: len(content) // 2] if damage == "truncate" else changed
    path.resolve().write_bytes(damaged)
    with pytest.raises(EarVAEError, match=rf"{file}: the download is damaged .*force_download=True"):
        EarVAE.from_pretrained(OURS, local_files_only=True)
    before = hub.downloads(file)
    assert_same(EarVAE.from_pretrained(OURS), ours)
    assert hub.downloads(file) == before + 1
    assert path.read_bytes() == content
    path.resolve().write_bytes(damaged)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EarVAEError, match=rf"{file}: the download is damaged .*fetching it again: "):
        EarVAE.from_pretrained(OURS)


def test_force_download_fetches_again(ours: EarVAE, hub: LoopbackHub) -> None:
    EarVAE.from_pretrained(OURS)
    EarVAE.from_pretrained(OURS, force_download=True)
    assert hub.downloads("model.safetensors") == 2


def test_what_the_hub_does_not_have(ours: EarVAE, hub: LoopbackHub) -> None:
    for token in (None, "hf_secret"):
        with pytest.raises(EarVAEError, match=r"someone/else: no such folder, and no such repository"):
            EarVAE.from_pretrained("someone/else", token=token)
    with pytest.raises(EarVAEError, match=r"no such repository"):
        EarVAE.from_pretrained("someone/else", force_download=True)
    with pytest.raises(EarVAEError, match=r"someone/ours: the repository has no revision 'v9'"):
        EarVAE.from_pretrained(OURS, revision="v9")
    hub.gated = {OURS}
    with pytest.raises(EarVAEError, match=r"someone/ours: access is restricted"):
        EarVAE.from_pretrained(OURS)
    hub.gated.clear()
    del hub.commits[OURS][FIRST]["model.safetensors"]
    with pytest.raises(EarVAEError, match=r"someone/ours: the repository has no file model\.safetensors"):
        EarVAE.from_pretrained(OURS)


def test_a_repository_of_another_kind_is_refused_before_its_weights_are_fetched(
    ours: EarVAE, hub: LoopbackHub
) -> None:
    hub.commits[OURS][FIRST]["config.json"] = b'{"model_type": "bert"}'
    with pytest.raises(EarVAEError, match=r"config\.json.*unknown \['model_type'\]"):
        EarVAE.from_pretrained(OURS)
    assert hub.downloads("model.safetensors") == 0


def test_without_a_connection_or_with_local_files_only(
    ours: EarVAE, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        EarVAEError, match=r"config\.json is not in the local cache and local_files_only=True"
    ):
        EarVAE.from_pretrained(OURS, local_files_only=True)
    assert hub.requests == []
    with pytest.raises(EarVAEError, match="contradict"):
        EarVAE.from_pretrained(OURS, local_files_only=True, force_download=True)
    hub.stop()
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(
        EarVAEError, match=r"config\.json is not in the local cache and the Hub cannot be asked"
    ):
        EarVAE.from_pretrained(OURS)
    with pytest.raises(EarVAEError, match=r"someone/ours: the download of config\.json failed: .*refused"):
        EarVAE.from_pretrained(OURS, force_download=True)
    # The client by itself tries again for half a minute, with two lines each time.
    assert waits == []
    assert caplog.messages == []


def test_the_token_is_sent_to_the_hub_alone(ours: EarVAE, hub: LoopbackHub) -> None:
    EarVAE.from_pretrained(OURS, token="hf_secret")
    sent = {(path.startswith("/cdn/"), authorization) for _, path, authorization, _ in hub.requests}
    assert sent == {(False, "Bearer hf_secret"), (True, None)}


def test_revisions(ours: EarVAE, hub: LoopbackHub, tmp_path: Path) -> None:
    newer = random_model(8)
    newer.save_pretrained(tmp_path / "newer")
    hub.add(OURS, tmp_path / "newer", commit=SECOND)
    hub.refs[OURS]["v1"] = FIRST
    assert_same(EarVAE.from_pretrained(OURS), newer)
    assert_same(EarVAE.from_pretrained(OURS, revision="v1"), ours)
    assert_same(EarVAE.from_pretrained(OURS, revision=FIRST), ours)
    with pytest.raises(EarVAEError, match=r"for Hub repositories only; leave it out \(revision='v1'\)"):
        EarVAE.from_pretrained(tmp_path / "ours", revision="v1")


def test_all_files_are_of_one_commit(ours: EarVAE, hub: LoopbackHub, tmp_path: Path) -> None:
    random_model(8).save_pretrained(tmp_path / "newer")
    hub.add(OURS, tmp_path / "newer", commit=SECOND, refs=())
    hub.move_main_after_config = SECOND
    assert_same(EarVAE.from_pretrained(OURS), ours)


def test_the_cache_folder_holds_downloads_and_conversions(
    official: dict[str, EarVAE], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    EarVAE.from_pretrained(OFFICIAL, variant="ear_vae_44k", cache_dir=cache)
    assert (cache / "models--earlab--EAR_VAE").is_dir()
    assert len(list((cache / "ear-vae" / "conversions").glob("*/model.safetensors"))) == 1
    assert not (tmp_path / "home").exists()


def test_a_snapshot_of_the_hubs_cache_is_a_local_folder(official: dict[str, EarVAE], tmp_path: Path) -> None:
    EarVAE.from_pretrained(OFFICIAL, variant="ear_vae_44k")
    snapshot = tmp_path / "home/hub/models--earlab--EAR_VAE/snapshots" / FIRST
    assert (snapshot / "pretrained_weight/ear_vae_44k.pyt").is_symlink()
    assert_same(EarVAE.from_pretrained(snapshot, variant="ear_vae_44k"), official["ear_vae_44k"])


def test_through_the_environment_in_a_process_of_its_own(
    official: dict[str, EarVAE], hub: LoopbackHub, tmp_path: Path
) -> None:
    """Nothing patched: HF_ENDPOINT and HF_HOME as a user would set them."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "elsewhere")}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    code = f"import ear_vae; v = ear_vae.EarVAE.from_pretrained({OFFICIAL!r}, variant='ear_vae_v2_48k'); "
    code += "print(v.sample_rate, v.weights_sha256)"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    here = EarVAE.from_pretrained(tmp_path / "official", variant="ear_vae_v2_48k")
    assert result.stdout.split() == ["44101", here.weights_sha256]
    assert list((tmp_path / "elsewhere/ear-vae/conversions").glob("*/model.safetensors"))


def test_a_local_folder_goes_before_a_bundled_name_and_that_before_the_hub(
    ours: EarVAE, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled, local = random_model(20), random_model(21)
    bundled.save_pretrained(tmp_path / "package" / "it")
    monkeypatch.setattr(
        "ear_vae.pretrained.resolve.bundled_checkpoints", lambda: {OURS: tmp_path / "package" / "it"}
    )
    monkeypatch.chdir(tmp_path)
    loaded = EarVAE.from_pretrained(OURS)
    assert_same(loaded, bundled)
    assert loaded.name == OURS
    local.save_pretrained(tmp_path / OURS)
    assert_same(EarVAE.from_pretrained(OURS), local)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["no-such-model", "./no/such", "a/b/c", "", "someone/name with spaces"])
def test_other_names_list_what_would_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ear_vae.pretrained.resolve.bundled_checkpoints", lambda: {"small": tmp_path})
    with pytest.raises(EarVAEError, match=r"model\.safetensors .*bundled checkpoint \(small\).*'owner/name'"):
        resolve(name)


def test_folders_and_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(EarVAEError, match=r"is not the folder of a model: it has no config\.json"):
        resolve(tmp_path)
    for content in ("{", "[" * 100_000, "1" * 5000):  # too deep and too long for Python's parser
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(EarVAEError, match=r"config\.json: cannot read the config"):
            resolve(tmp_path)
    with pytest.raises(EarVAEError, match=r"config\.json: is a file"):
        resolve(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    with pytest.raises(EarVAEError, match=r"model\.safetensors: the file is missing"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    "path", ["../x.pyt", "/etc/passwd", "a/../../x", "C:x.pyt", "C:/x", "\\\\host\\x", "a\\b", "", "a\0b"]
)
@pytest.mark.parametrize("field", ["config", "weights"])
def test_paths_in_a_config_stay_inside(
    path: str, field: str, official: dict[str, EarVAE], hub: LoopbackHub, tmp_path: Path
) -> None:
    config = tmp_path / "official" / "config.json"
    values = json.loads(config.read_text())
    values["variants"]["ear_vae_44k"][field] = path
    config.write_text(json.dumps(values))
    hub.add(OFFICIAL, tmp_path / "official")
    for source in (tmp_path / "official", OFFICIAL):
        with pytest.raises(EarVAEError, match=rf"'{field}' of variant 'ear_vae_44k' must be a relative path"):
            resolve(source, variant="ear_vae_44k")


def test_a_folder_that_only_looks_like_a_snapshot_is_not_followed_outside(
    ours: EarVAE, tmp_path: Path
) -> None:
    EarVAE.from_pretrained(OURS)
    shutil.move(tmp_path / "home/hub/models--someone--ours", tmp_path / "gift/models--someone--ours")
    snapshot = tmp_path / "gift/models--someone--ours/snapshots" / FIRST
    assert (snapshot / "config.json").is_symlink()
    with pytest.raises(EarVAEError, match=r"config\.json: leads out of its folder through a link"):
        EarVAE.from_pretrained(snapshot)
    assert_same(EarVAE.from_pretrained(snapshot, cache_dir=tmp_path / "gift"), ours)


def test_links_may_not_lead_outside(official: dict[str, EarVAE], tmp_path: Path) -> None:
    weights = tmp_path / "official/pretrained_weight/ear_vae_44k.pyt"
    weights.rename(tmp_path / "outside.pyt")
    weights.symlink_to(tmp_path / "outside.pyt")
    with pytest.raises(EarVAEError, match=r"ear_vae_44k\.pyt: leads out of its folder"):
        resolve(tmp_path / "official", variant="ear_vae_44k")
    weights.unlink()
    (tmp_path / "outside.pyt").rename(tmp_path / "official/inside.pyt")
    weights.symlink_to("../inside.pyt")
    assert_same(EarVAE.from_pretrained(tmp_path / "official", variant="ear_vae_44k"), official["ear_vae_44k"])


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"sample_rate": "44100"}, "'sample_rate' of variant 'ear_vae_44k' must be an integer, got '44100'"),
        ({"sample_rate": True}, "must be an integer, got True"),
        ({"downsampling_ratio": 8.0}, "'downsampling_ratio' of variant 'ear_vae_44k' must be an integer"),
        ({"downsampling_ratio": 16}, "downsampling_ratio of 8, config.json says 16"),
        ({"weights": 3}, "'weights' of variant 'ear_vae_44k' must be a path, got 3"),
        ({"config": "nowhere.json"}, "nowhere.json: the file is missing"),
        (None, "variant 'ear_vae_44k' must be an object"),
    ],
)
def test_entries_of_a_config(
    entry: dict[str, object] | None, problem: str, official: dict[str, EarVAE], tmp_path: Path
) -> None:
    config = tmp_path / "official" / "config.json"
    values = json.loads(config.read_text())
    variants = values["variants"]
    variants["ear_vae_44k"] = entry and {**variants["ear_vae_44k"], **entry}
    config.write_text(json.dumps(values))
    with pytest.raises(EarVAEError) as caught:
        resolve(tmp_path / "official", variant="ear_vae_44k")
    assert problem in str(caught.value)


def test_an_entry_without_a_field_and_variants_that_are_none(
    official: dict[str, EarVAE], tmp_path: Path
) -> None:
    config = tmp_path / "official" / "config.json"
    values = json.loads(config.read_text())
    del values["variants"]["ear_vae_44k"]["sample_rate"]
    config.write_text(json.dumps(values))
    with pytest.raises(EarVAEError, match="variant 'ear_vae_44k' has no 'sample_rate'"):
        resolve(tmp_path / "official", variant="ear_vae_44k")
    for nothing in ({}, [], "x", None):
        config.write_text(json.dumps({"variants": nothing}))
        with pytest.raises(EarVAEError, match="'variants' must be an object with one entry per model"):
            resolve(tmp_path / "official")


def test_the_rate_must_not_contradict_the_variants_own_config(
    official: dict[str, EarVAE], tmp_path: Path
) -> None:
    config = tmp_path / "official/config/ear_vae_44k.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_rate": 22_050}))
    with pytest.raises(
        EarVAEError, match=r"ear_vae_44k\.json: .*sample_rate is 22050, config\.json says 44100"
    ):
        resolve(tmp_path / "official", variant="ear_vae_44k")


def test_conversions_go_by_content(tmp_path: Path, hub: LoopbackHub) -> None:
    first = write_official(tmp_path / "official", "one")["one"]
    folder = resolve(tmp_path / "official").folder
    shutil.copytree(tmp_path / "official", tmp_path / "copy")
    assert resolve(tmp_path / "copy").folder == folder
    torch.manual_seed(99)
    other = EarVAE(TINY, name="one").eval()
    other.save_pretrained(tmp_path / "other" / "one")
    weights = tmp_path / "official/pretrained_weight/one.pyt"
    before = weights.stat()
    convert(tmp_path / "other" / "one", weights, overwrite=True, to="official")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_same(EarVAE.from_pretrained(tmp_path / "official"), other)
    assert_same(EarVAE.from_pretrained(tmp_path / "copy"), first)
    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text().replace("44100", "32000"))
    assert EarVAE.from_pretrained(tmp_path / "copy").sample_rate == 32_000


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "sha256.json"])
@pytest.mark.parametrize("damage", ["delete", "truncate", "change"])
def test_a_damaged_conversion_is_made_again(
    file: str, damage: str, official: dict[str, EarVAE], tmp_path: Path
) -> None:
    path = resolve(tmp_path / "official", variant="ear_vae_44k").folder / file
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        flipped = bytes([content[-2] ^ 1])
        path.write_bytes(content[:-20] if damage == "truncate" else content[:-2] + flipped + content[-1:])
    assert_same(EarVAE.from_pretrained(tmp_path / "official", variant="ear_vae_44k"), official["ear_vae_44k"])


def test_conversions_at_the_same_time(official: dict[str, EarVAE], tmp_path: Path) -> None:
    barrier, loaded, problems = threading.Barrier(4), [], []

    def load() -> None:
        barrier.wait()
        try:
            loaded.append(EarVAE.from_pretrained(tmp_path / "official", variant="ear_vae_44k"))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(loaded) == 4
    for vae in loaded:
        assert_same(vae, official["ear_vae_44k"])


def test_a_cache_that_cannot_be_written_names_the_cure(official: dict[str, EarVAE], tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(EarVAEError, match=r"a file.*HF_HOME \(cache_dir=\.\.\.\)"):
        resolve(tmp_path / "official", variant="ear_vae_44k", cache_dir=tmp_path / "a file")
    with pytest.raises(EarVAEError, match=r"earlab/EAR_VAE: the download of config\.json failed: .*a file"):
        resolve(OFFICIAL, variant="ear_vae_44k", cache_dir=tmp_path / "a file")


def test_full_size_weights_that_are_not_the_published_ones_warn(
    official: dict[str, EarVAE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(tmp_path / "official", variant="ear_vae_44k")  # narrow: no warning, which would be an error
    wide = EarVAE(EarVAEConfig(**{**TINY.to_dict(), "channels": 128, "channel_multipliers": (1, 1)}))
    for name in ("ear_vae_44k", "somebody's"):
        wide.save_pretrained(tmp_path / name)
        convert(tmp_path / name, tmp_path / f"official {name}", to="official")
    resolve(tmp_path / "official somebody's")
    for _ in range(2):  # converting, and from the cache
        with pytest.warns(UserWarning, match=r"ear_vae_44k are not the known published ones: .*0362dc7e9656"):
            resolve(tmp_path / "official ear_vae_44k")
    weights = tmp_path / "official ear_vae_44k" / "pretrained_weight" / "ear_vae_44k.pyt"
    monkeypatch.setitem(PUBLISHED_SHA256, "ear_vae_44k", hashlib.sha256(weights.read_bytes()).hexdigest())
    resolve(tmp_path / "official ear_vae_44k")


@since_1_0
def test_push_and_load_again(hub: LoopbackHub) -> None:
    vae = random_model(30, name="mine")
    card = ModelCardFacts(license="mit")
    address = vae.push_to_hub(
        "someone/new", token="hf_secret", private=True, commit_message="First", card=card
    )
    assert address == f"{hub.address}/someone/new/commit/{SECOND}"
    assert {authorization for _, _, authorization, _ in hub.requests} == {"Bearer hf_secret"}
    files = hub.commits["someone/new"][SECOND]
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert_same(EarVAE.from_pretrained("someone/new"), vae)
    assert b"\nlicense: mit\n" in files["README.md"]
    files["README.md"] = b"a card written with care"
    changed = random_model(31)
    changed.push_to_hub("someone/new", token="hf_secret")
    latest = hub.commits["someone/new"][hub.refs["someone/new"]["main"]]
    assert latest["README.md"] == b"a card written with care"
    with pytest.raises(EarVAEError, match=r"^someone/new: a card is there already, and stays"):
        vae.push_to_hub("someone/new", token="hf_secret", card=card)
    assert_same(EarVAE.from_pretrained("someone/new"), changed)


def test_a_refused_push(hub: LoopbackHub) -> None:
    hub.refusal = 403
    with pytest.raises(EarVAEError, match=r"someone/new: the upload failed: .*403.*a token with the right"):
        random_model(30).push_to_hub("someone/new", token="hf_secret")


def test_the_authors_models_have_short_names(
    official: dict[str, EarVAE], hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = EarVAE.from_pretrained("ear_vae_v2_48k")
    assert_same(loaded, official["ear_vae_v2_48k"])
    assert loaded.name == f"{OFFICIAL}:ear_vae_v2_48k"
    with pytest.raises(EarVAEError, match=r"names a variant already.*\(variant='ear_vae_44k'\)"):
        EarVAE.from_pretrained("ear_vae_v2_48k", variant="ear_vae_44k")
    monkeypatch.chdir(tmp_path)
    mine = random_model(9)
    mine.save_pretrained("ear_vae_44k")
    assert_same(EarVAE.from_pretrained("ear_vae_44k"), mine)
    assert hub.downloads("ear_vae_44k.pyt") == 0


def test_the_command_line_takes_short_names_and_downloads_again_when_asked(
    official: dict[str, EarVAE], hub: LoopbackHub, tmp_path: Path
) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "another home")}
    command = [sys.executable, "-m", "ear_vae", "info", "ear_vae_44k", "--json"]
    for options, downloads in (([], 1), ([], 1), (["--force-download"], 2)):
        result = subprocess.run([*command, *options], capture_output=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["name"] == f"{OFFICIAL}:ear_vae_44k"
        assert hub.downloads("ear_vae_44k.pyt") == downloads
