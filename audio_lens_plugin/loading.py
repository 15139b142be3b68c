"""From a name to a loaded model: the shelf of toys, folders, repo ids, and modules that are loaded already."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from audio_lens_plugin import bridge, patches
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.patch import Family

SHELF = Path(__file__).parent / "toy_shelf"
TOY = "toy/"


class LoadError(ValueError):
    """A model that is not there, not known, or not whole."""


@cache
def families() -> dict[str, Family]:
    """Every known family by name: the files in patches/, then those of other packages.

    Another package adds a family by an entry point in the group ``audio_lens_plugin.families`` that names its
    `Family` object.
    """
    modules = [
        importlib.import_module(f"{patches.__name__}.{info.name}") for info in pkgutil.iter_modules(patches.__path__)
    ]
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    found += [entry.load() for entry in entry_points(group="audio_lens_plugin.families")]
    return {family.name: family for family in found}


def join_transformer_lens() -> None:
    """Make TransformerLens's own ``boot_transformers`` know every family; done when it is first called."""
    bridge.join_transformer_lens(families().values())


def toys() -> dict[str, Path]:
    """The toy models that ship with the package: name and folder."""
    return {TOY + folder.name: folder for folder in sorted(SHELF.iterdir()) if (folder / "config.json").is_file()}


def load(
    model: str | os.PathLike[str] | PreTrainedModel,
    processor: Any = None,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    **family_options: Any,
) -> LALM:
    """Load a large audio-language model.

    Args:
        model: a repo id (``Qwen/Qwen2-Audio-7B-Instruct``), a local folder, a toy (``toy/qwen2-audio``), or a
            transformers module that is loaded already.
        processor: the processor of a module that is loaded already.
        dtype: dtype of the weights; the checkpoint's own if None.
        device_map: as in transformers (``"cuda"``, ``"auto"``); the CPU if None.
        attn_implementation: ``"sdpa"``, ``"eager"``, ...; transformers' choice if None.
        revision: branch, tag or commit of a repo.
        family_options: what the model's family alone understands (`Family.options`), such as ``original_quirks``.

    Raises:
        LoadError: unknown model, family or option, or a checkpoint with missing or unexpected weights (these are
            listed).
    """
    if isinstance(model, PreTrainedModel):
        return _wrap(model, processor, revision)
    name, source = os.fspath(model), _locate(os.fspath(model))
    family = _family_of(source, revision)
    if unknown := sorted(set(family_options) - set(family.options)):
        raise LoadError(f"{family.name} models know no {', '.join(unknown)}; they know: {list(family.options)}.")
    given = {"device_map": device_map, "attn_implementation": attn_implementation, **family_options}
    loaded = family.load(
        source, revision, dtype=dtype or "auto", **{key: value for key, value in given.items() if value is not None}
    )
    _check_whole(name, loaded.report)
    commit = getattr(loaded.module.config, "_commit_hash", None)
    return LALM(loaded.module, loaded.processor, family, name, commit or revision)


def _locate(name: str) -> str:
    """A folder for a toy or a local path; a repo id as it is."""
    if name.startswith(TOY):
        if name not in toys():
            raise LoadError(f"there is no {name!r} on the shelf; toys are: {', '.join(toys())}.")
        return str(toys()[name])
    looks_local = name.startswith((".", os.sep, "~")) or name.count("/") != 1
    if looks_local and not os.path.isdir(os.path.expanduser(name)):
        raise LoadError(
            f"{name!r} is neither a folder here, nor a repo id (owner/name), nor a toy ({', '.join(toys())})."
        )
    return os.path.expanduser(name)


def _family_of(source: str, revision: str | None) -> Family:
    for family in families().values():
        if source in family.repo_ids:
            return family
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except OSError as error:
        raise LoadError(f"{source!r} has no configuration that transformers can read: {error}") from error
    return _serving(config, source)


def _serving(config: Mapping[str, Any], source: str) -> Family:
    for family in families().values():
        if family.serves(config):
            return family
    known = "; ".join(f"{family.name} ({', '.join(family.architectures)})" for family in families().values())
    kind = config.get("architectures") or config.get("model_type") or "no architecture"
    raise LoadError(f"{source!r} is of architecture {kind}, which no family serves. Families: {known}.")


def _wrap(module: PreTrainedModel, processor: Any, revision: str | None) -> LALM:
    if processor is None:
        raise LoadError("a loaded module needs its processor: load(module, processor).")
    architecture = type(module).__name__
    family = _serving({**module.config.to_dict(), "architectures": [architecture]}, architecture)
    name = getattr(module, "name_or_path", "") or type(module).__name__
    return LALM(module, processor, family, os.path.basename(name) if os.path.isdir(name) else name, revision)


def _check_whole(name: str, report: Mapping[str, Any]) -> None:
    faults = {
        kind: sorted(map(str, report.get(kind, ()))) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(faults.values()):
        listed = "\n".join(f"  {kind}: {', '.join(keys)}" for kind, keys in faults.items() if keys)
        raise LoadError(f"the weights of {name!r} do not fit the model, so its numbers would mean nothing:\n{listed}")
