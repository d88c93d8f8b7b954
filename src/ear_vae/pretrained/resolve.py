"""From a name to a local folder with a model: a folder, a file, a bundled checkpoint, or the Hub's."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ear_vae.config import ConfigSource, EarVAEConfig
from ear_vae.errors import EarVAEError, first_line
from ear_vae.limits import read_json, shown
from ear_vae.pretrained.bundled import bundled_checkpoints
from ear_vae.pretrained.conversion_cache import conversions_folder, file_sha256
from ear_vae.pretrained.folder import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, expected_shapes
from ear_vae.pretrained.layouts.bare import (
    WEIGHTS_SUFFIXES,
    GivenConfig,
    configs_in,
    convert_bare,
    given_configs,
    weights_in,
)
from ear_vae.pretrained.layouts.official_repository import VARIANTS_KEY, choose_variant, convert_variant
from ear_vae.pretrained.layouts.oobleck import (
    CLASS_KEY,
    DIFFUSERS_WEIGHTS_FILE,
    STABLE_AUDIO_CONFIG_FILE,
    STABLE_AUDIO_WEIGHTS_FILES,
    config_of_diffusers,
    config_of_stable_audio,
    convert_diffusers,
    convert_stable_audio,
    require_config,
)

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = _GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Where a pipeline of diffusers has its autoencoder.
_VAE_FOLDER = "vae/"

# The two published models; width tells them from others.
PUBLISHED_REPOSITORY = "earlab/EAR_VAE"
_PUBLISHED_CHANNELS = 128
# How alike a name is to one that may have been meant: ear_vae_tiny, ear-vae-44k, not ear.
_NEAR = 0.75
PUBLISHED_SHA256 = {
    "ear_vae_44k": "0362dc7e96566869747dbe079b0a6d71c090b0a3a5d5077779e7be17c096d9d5",
    "ear_vae_v2_48k": "cc53f3f043aaae01307ffe1439b3a1c9d9e019652e6c13e089cd18d6037c2d3f",
}
"""Checksums of the authors' weights by variant, as recorded by a public downstream project."""
PUBLISHED_NAMES = frozenset({PUBLISHED_REPOSITORY, *PUBLISHED_SHA256})
"""Names under which the authors' weights are loaded."""


@dataclass(frozen=True)
class _Source:
    """Where a model's files come from.

    Attributes:
        where: Name of the source in messages.
        name: Name of a model in our layout.
        variant_prefix: Prefix of a variant's name in the name of an official model.
        fetch: Function that returns the local path of a file, by its relative path.
        find: The same, but returns None where there is no such file.
        folder: The folder, where they are in a local one.
    """

    where: str
    name: str
    variant_prefix: str
    fetch: Callable[[str], Path]
    find: Callable[[str], Path | None]
    folder: Path | None = None


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    config: ConfigSource | None = None,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
) -> Checkpoint:
    """Finds a model on disk, among the bundled ones or on the Hub; returns a local folder in our layout.

    Args:
        name_or_path: Model to find: a folder in our layout, in the official one, a clone of the authors'
            repository, or with an Oobleck of diffusers or of stable-audio-tools; a bare file of weights; the
            name of a bundled checkpoint, a Hub repository id `owner/name`, or `ear_vae_44k` or
            `ear_vae_v2_48k` for the authors' model of that name in `earlab/EAR_VAE`.
        config: Config of a bare file of weights, see `EarVAE.from_pretrained`.
        variant: Name of the model in an official repository with several.
        revision: Branch, tag or commit on the Hub.
        local_files_only: Do not go to the network.
        token: Access token for the Hub.
        cache_dir: Folder for downloads and conversions instead of the Hub's usual one.
        force_download: Fetch from the Hub again even if cached.

    Raises:
        EarVAEError: There is no model of that name, the variant is missing or unknown, a file is
            missing or damaged, the Hub cannot be reached, or the cache cannot be written to.
    """
    text = os.path.expanduser(os.fspath(name_or_path))
    bundled = bundled_checkpoints()
    if text in PUBLISHED_SHA256 and not os.path.exists(text):
        if variant not in (None, text):
            raise EarVAEError(
                f"{text}: names a variant already; choose no other", argument="variant", value=variant
            )
        variant, name_or_path = text, PUBLISHED_REPOSITORY
        text = name_or_path
    if os.path.isfile(text) and Path(text).suffix.lower() in WEIGHTS_SUFFIXES:
        _require_no_revision(text, revision)
        path = Path(text)
        if config is not None or path.name != WEIGHTS_FILE or not path.with_name(CONFIG_FILE).is_file():
            return _open_file(path, config=config, variant=variant, cache_dir=cache_dir)
        text = str(path.parent)  # the file of a model's folder
    if os.path.isdir(text):
        _require_no_revision(text, revision)
        source = _local_source(Path(text), Path(text).resolve().name, _hub_cache(cache_dir))
    elif isinstance(name_or_path, str) and name_or_path in bundled:
        _require_no_revision(text, revision)
        source = _local_source(bundled[name_or_path], name_or_path, _hub_cache(cache_dir))
    elif isinstance(name_or_path, str) and _REPO_ID.fullmatch(name_or_path) and not os.path.exists(text):
        source = _hub_source(
            name_or_path,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
        )
    else:
        problem = (
            "is a file, but none of weights" if os.path.exists(text) else "is no folder or file that exists"
        )
        names = [*sorted(bundled), *PUBLISHED_SHA256]
        near = " or ".join(difflib.get_close_matches(text.lower(), names, n=2, cutoff=_NEAR))
        raise EarVAEError(
            f"{text}: {problem}; {f'did you mean {near}? ' if near else ''}"
            f"expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE} (or in the official layout), a file of "
            f"weights ({', '.join(WEIGHTS_SUFFIXES)}), a bundled checkpoint "
            f"({', '.join(sorted(bundled)) or 'there are none'}), one of the authors' "
            f"({', '.join(PUBLISHED_SHA256)}), or a Hub repository 'owner/name'"
        )
    return _open(source, config=config, variant=variant, cache_dir=cache_dir)


def _is_clone(source: _Source) -> bool:
    """Whether a folder without a config has files of weights, as a clone of the authors' repository has."""
    others = (f"{_VAE_FOLDER}{CONFIG_FILE}", STABLE_AUDIO_CONFIG_FILE)
    return not any(source.find(name) for name in others) and bool(weights_in(source.folder or Path()))


def _require_no_revision(text: str, revision: str | None) -> None:
    if revision is not None:
        raise EarVAEError(
            f"{text}: revisions are for Hub repositories only; leave it out",
            argument="revision",
            value=revision,
        )


def _open_file(
    path: Path,
    *,
    config: ConfigSource | None,
    variant: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Checkpoint:
    if variant is not None:
        raise EarVAEError(
            f"{path}: is one model, and variants are of repositories; leave it out",
            argument="variant",
            value=variant,
        )
    if problem := _damage(path):
        raise EarVAEError(f"{path}: {problem}; fetch it again", argument="force_download")
    return _open_weights(path, given_configs(path, config), cache_dir=cache_dir)


def _open_clone(
    source: _Source,
    folder: Path,
    *,
    config: ConfigSource | None,
    variant: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Checkpoint:
    weights = weights_in(folder)
    choices = ", ".join(shown(name) for name in list(weights)[:20])
    if variant is None and len(weights) > 1:
        raise EarVAEError(
            f"{folder}: holds several models; choose one of {choices}", argument="variant", value=...
        )
    if variant is not None and variant not in weights:
        raise EarVAEError(f"{folder}: has no variant {shown(variant)}; it has {choices}")
    path = source.fetch(str(weights[variant or next(iter(weights))].as_posix()))
    configs = configs_in(folder, path) if config is None else given_configs(path, config)
    return _open_weights(path, configs, cache_dir=cache_dir)


def _open_weights(
    path: Path, configs: Sequence[GivenConfig], *, cache_dir: str | os.PathLike[str] | None
) -> Checkpoint:
    sha256, name = file_sha256(path), path.stem
    folder = convert_bare(path, configs, sha256=sha256, name=name, cache=conversions_folder(cache_dir))
    _warn_unless_published(str(path), name, EarVAEConfig.from_json(folder / CONFIG_FILE), sha256)
    return Checkpoint(folder, name)


def _warn_unless_published(where: str, name: str, config: EarVAEConfig, sha256: str) -> None:
    published = PUBLISHED_SHA256.get(name, sha256)
    if config.channels == _PUBLISHED_CHANNELS and sha256 != published:
        warnings.warn(
            f"{where}: the weights of {name} are not the known published ones: their sha256 is "
            f"{sha256}, that of the published ones {published}",
            stacklevel=5,
        )


def _open(
    source: _Source,
    *,
    config: ConfigSource | None,
    variant: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Checkpoint:
    """Fetches the files of a model and converts them if they are official ones."""
    config_path = source.find(CONFIG_FILE)
    if config_path is None and source.folder is not None and _is_clone(source):
        return _open_clone(source, source.folder, config=config, variant=variant, cache_dir=cache_dir)
    if config is not None:
        raise EarVAEError(
            f"{source.where}: has its own config; one is for bare files of weights only, leave it out",
            argument="config",
            value=...,
        )
    if config_path is None:
        if (oobleck := _open_oobleck(source, variant=variant, cache_dir=cache_dir)) is not None:
            return oobleck
        config_path = source.fetch(CONFIG_FILE)  # says what is missing
    values = read_json(config_path)  # of a download it has been tried already
    if isinstance(values, dict) and CLASS_KEY in values:
        return _open_diffusers(source, "", config_path, variant=variant, cache_dir=cache_dir)
    if not isinstance(values, dict) or VARIANTS_KEY not in values:
        _require_no_variant(source, variant)
        # Before a large download.
        expected_shapes(EarVAEConfig.from_json(config_path), path=config_path)
        return Checkpoint(source.fetch(WEIGHTS_FILE).parent, source.name)
    entry = choose_variant(values, variant, where=f"{source.where}/{CONFIG_FILE}")
    variant_config, weights = source.fetch(entry.config), source.fetch(entry.weights)
    sha256 = file_sha256(weights)
    folder, architecture = convert_variant(
        entry, variant_config, weights, weights_sha256=sha256, cache=conversions_folder(cache_dir)
    )
    _warn_unless_published(source.where, entry.name, architecture, sha256)
    return Checkpoint(folder, source.variant_prefix + entry.name)


def _require_no_variant(source: _Source, variant: str | None) -> None:
    if variant is not None:
        raise EarVAEError(
            f"{source.where}: holds one model and no variants; leave it out",
            argument="variant",
            value=variant,
        )


def _open_oobleck(
    source: _Source, *, variant: str | None, cache_dir: str | os.PathLike[str] | None
) -> Checkpoint | None:
    """A model without a `config.json` at its root: a pipeline of diffusers, or one of stable-audio-tools.

    The first is preferred where both are there, as in Stable Audio Open: its VAE is a file of its own.
    """
    if (config_path := source.find(f"{_VAE_FOLDER}{CONFIG_FILE}")) is not None:
        return _open_diffusers(source, _VAE_FOLDER, config_path, variant=variant, cache_dir=cache_dir)
    if (config_path := source.find(STABLE_AUDIO_CONFIG_FILE)) is None:
        return None
    _require_no_variant(source, variant)
    require_config(config_of_stable_audio, config_path)  # before a large download
    names = STABLE_AUDIO_WEIGHTS_FILES
    weights = next((found for name in names if (found := source.find(name))), None)
    folder = convert_stable_audio(
        config_path, weights or source.fetch(names[0]), name=source.name, cache=conversions_folder(cache_dir)
    )
    return Checkpoint(folder, source.name)


def _open_diffusers(
    source: _Source,
    folder: str,
    config_path: Path,
    *,
    variant: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Checkpoint:
    _require_no_variant(source, variant)
    require_config(config_of_diffusers, config_path)  # before a large download
    converted = convert_diffusers(
        config_path,
        source.fetch(folder + DIFFUSERS_WEIGHTS_FILE),
        name=source.name,
        cache=conversions_folder(cache_dir),
    )
    return Checkpoint(converted, source.name)


def _hub_cache(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Returns where the Hub's client keeps what it downloads."""
    if cache_dir is None:
        # Imported here and below because it takes a second, which `EarVAE` does not need.
        from huggingface_hub import constants

        cache_dir = constants.HF_HUB_CACHE
    return Path(os.path.expanduser(cache_dir))


def _local_source(folder: Path, name: str, hub_cache: Path) -> _Source:
    def fetch(relative: str) -> Path:
        path = folder / relative
        if not _stays_inside(folder, path, hub_cache):
            raise EarVAEError(f"{path}: leads out of its folder through a link; put the file itself there")
        if not path.is_file():
            missing = f"{path}: the file is missing"
            if relative == CONFIG_FILE:
                missing = f"{folder}: is not the folder of a model: it has no {CONFIG_FILE}"
            raise EarVAEError(
                f"{missing}; a model's folder has {CONFIG_FILE} and {WEIGHTS_FILE}, "
                f"an official one {CONFIG_FILE} and the files it names"
            )
        if problem := _damage(path):
            raise EarVAEError(f"{path}: {problem}; fetch it again", argument="force_download")
        return path

    def find(relative: str) -> Path | None:
        return fetch(relative) if os.path.lexists(folder / relative) else None

    return _Source(where=str(folder), name=name, variant_prefix="", fetch=fetch, find=find, folder=folder)


def _stays_inside(folder: Path, path: Path, hub_cache: Path) -> bool:
    folder = folder.resolve()
    if path.resolve().is_relative_to(folder):
        return True
    # A snapshot in the Hub's cache consists of links to the blobs beside it. Any folder can look like one:
    # it has to lie where the Hub's client puts them.
    snapshot = folder.parent.name == "snapshots" and folder.parent.parent.parent == hub_cache.resolve()
    inside = path.parent.resolve().is_relative_to(folder) and path.is_symlink()
    return snapshot and inside and _link_target(path).parent == folder.parent.parent / "blobs"


def _link_target(path: Path) -> Path:
    """Follows a link by one step: its target may be another link."""
    return Path(os.path.normpath(path.parent.resolve() / os.readlink(path)))


def _hub_source(
    repo_id: str,
    *,
    revision: str | None,
    local_files_only: bool,
    token: str | None,
    cache_dir: str | os.PathLike[str] | None,
    force_download: bool,
) -> _Source:
    if local_files_only and force_download:
        raise EarVAEError("local_files_only=True and force_download=True contradict each other; choose one")
    commit: str | None = None
    asked = local_files_only
    offline: Exception | None = None

    def download(relative: str, *, force: bool) -> Path:
        nonlocal asked, offline
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cache = None if cache_dir is None else os.path.expanduser(cache_dir)
        at = commit or revision
        try:
            # Of a file in the cache the client itself asks once only.
            if not asked and (force or not try_to_load_from_cache(repo_id, relative, cache, at)):
                asked, offline = True, why_offline(repo_id, relative, revision=at, token=token)
            if force and offline is not None:
                raise offline
            return Path(
                hf_hub_download(
                    repo_id,
                    relative,
                    revision=at,
                    cache_dir=cache,
                    token=token,
                    local_files_only=local_files_only or offline is not None,
                    force_download=force,
                )
            )
        except Exception as error:  # the client lets through whatever its HTTP library of the day raises
            raise _hub_problem(error, repo_id, relative, revision, local_files_only, offline) from error

    def fetch(relative: str) -> Path:
        nonlocal commit
        path = download(relative, force=force_download)
        if problem := _problem(path):
            # A broken file would stay in the cache for ever.
            if local_files_only:
                raise EarVAEError(
                    f"{path}: {problem}; fetch it again, without local_files_only", argument="force_download"
                )
            try:
                path = download(relative, force=True)
            except EarVAEError as error:
                raise EarVAEError(f"{path}: {problem}; fetching it again: {error}") from error
            if problem := _problem(path):
                raise EarVAEError(
                    f"{path}: {problem}, also when fetched again; try later", argument="force_download"
                )
        root = path.parents[relative.count("/")]
        if commit is None and _COMMIT.fullmatch(root.name):
            # The other files are to be of the same commit, even if somebody pushes meanwhile.
            commit = root.name
        return path

    def find(relative: str) -> Path | None:
        from huggingface_hub import errors

        try:
            return fetch(relative)
        except EarVAEError as error:
            if isinstance(error.__cause__, errors.EntryNotFoundError):
                return None
            raise

    return _Source(where=repo_id, name=repo_id, variant_prefix=f"{repo_id}:", fetch=fetch, find=find)


def why_offline(
    repo_id: str, file: str, *, revision: str | None = None, token: str | None = None
) -> Exception | None:
    """Asks the Hub once for a file; returns why it cannot be reached, None where it answers anything at all.

    Without a connection the Hub's client asks six times for a file that it does not have, in half a minute.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repo_id, file, revision=revision), token=token)
    except (errors.HfHubHTTPError, ValueError):  # for the download itself to say
        return None
    except Exception as error:  # whatever the client's HTTP library of the day raises
        return error
    return None


def _hub_problem(
    error: Exception,
    repo_id: str,
    file: str,
    revision: str | None,
    local_files_only: bool,
    offline: Exception | None,
) -> EarVAEError:
    """Says in one sentence why a download failed, and what to do."""
    from huggingface_hub import errors

    if type(error) is ValueError and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why force_download failed
    at_revision = f" at revision {revision!r}" if revision else ""
    if isinstance(error, errors.GatedRepoError):
        return EarVAEError(
            f"{repo_id}: access is restricted; ask for it on the repository's page and give a token"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return EarVAEError(
            f"{repo_id}: no such folder, and no such repository on the Hub (or a private one); check the "
            "spelling, or give the token of an account that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return EarVAEError(f"{repo_id}: the repository has no revision {revision!r}")
    if isinstance(error, errors.LocalEntryNotFoundError):
        if local_files_only:
            return EarVAEError(
                f"{repo_id}: {file}{at_revision} is not in the local cache and local_files_only=True "
                "forbids downloading it; load it once without"
            )
        return EarVAEError(
            f"{repo_id}: {file}{at_revision} is not in the local cache and the Hub cannot be asked for it "
            f"({what_the_hub_says(offline or error.__cause__ or error)}); check the connection, or name a "
            "local folder instead, or the bundled ear-vae-tiny",
            argument="name_or_path",
            value="ear-vae-tiny",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return EarVAEError(
            f"{repo_id}: the repository has no file {file}{at_revision}; is it an εar-VAE model?"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return EarVAEError(f"{repo_id}: the Hub refused {file}{at_revision}: {what_the_hub_says(error)}")
    return EarVAEError(
        f"{repo_id}: the download of {file}{at_revision} failed: {what_the_hub_says(error)}; try again"
    )


def what_the_hub_says(error: BaseException) -> str:
    """Returns the two lines in which the Hub's client says what failed, as one."""
    return first_line(error, most=2).rstrip(".")


def _problem(path: Path) -> str | None:
    """Says what is wrong with a downloaded file: its checksum, or for a config that it is not JSON."""
    if (damage := _damage(path)) is not None:
        return damage
    if path.suffix == ".json":
        try:
            read_json(path)
        except EarVAEError as error:
            return str(error).removeprefix(f"{path}: ")
    return None


def _damage(path: Path) -> str | None:
    """Checks a file in the Hub's cache against the checksum in its blob's name; returns None if all is well.

    The Hub's client compares sizes only, and those only while it downloads.
    """
    if not path.is_symlink() or (blob := _link_target(path)).parent.name != "blobs":
        return None  # a cache without links, as on Windows, has no checksums
    if _SHA256.fullmatch(blob.name):
        kind, found = "sha256", file_sha256(path)
    elif _GIT_SHA1.fullmatch(blob.name):
        content = path.read_bytes()  # the Hub keeps files of some MB at most this way
        kind, found = "git sha1", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:
        return None
    if found == blob.name:
        return None
    return f"the download is damaged ({kind} {found}, the Hub says {blob.name})"
