"""Where the places lie that a sweep's record names: its runs folder may have moved, and commands run in any folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from raystar.base.errors import RaystarError
from raystar.config.load import get_value, override, to_mapping
from raystar.config.schema import Config
from raystar.data.listing import data_root
from raystar.tracking.mlflow.address import absolute_uri, sqlite_file, sqlite_uri

RUNS = "{runs}"
"""What a place inside of the runs folder begins with in a record."""

KEYS = ("data.data_root", "data.eval_data_root", "data.cache_dir", "ruler.features")
"""Of the configuration: places where what lies there is known by its content; `--set` gives `--resume` others."""

_NEEDED = ("data.data_root", "data.eval_data_root", "ruler.features")


def keep(place: str, out: Path) -> str:
    """A path or URI as a record holds it: beginning with `RUNS` inside of the runs folder `out`, else absolute."""
    if (file := sqlite_file(place := absolute_uri(place))) is not None and place == sqlite_uri(file):
        kept = keep(str(file), out)
        return f"sqlite:///{kept}" if kept.startswith(RUNS) else place
    if "://" in place:
        return place
    path, runs = Path(os.path.abspath(Path(place).expanduser())), out.resolve()
    if (real := path.resolve()).is_relative_to(runs):
        return f"{RUNS}/{real.relative_to(runs)}"
    return str(path)


def find(text: str, out: Path) -> str:
    """What `keep` gave, as it lies in the runs folder `out` now; what earlier versions wrote as it is."""
    scheme = "sqlite:///" if text.startswith(f"sqlite:///{RUNS}") else ""
    place = text.removeprefix(scheme)
    if not place.startswith(f"{RUNS}/"):
        return text
    path = out.resolve() / place.removeprefix(f"{RUNS}/")
    return sqlite_uri(path) if scheme else str(path)


def keep_config(asked: Config, found: Config, out: Path) -> dict[str, Any]:
    """A configuration for a record: nested mappings, with what lies inside of the runs folder as `keep` gives it.

    Args:
        found: the same with its places as they are found in this working folder (`Origins.config`).
    """
    kept = to_mapping(asked)
    for key in KEYS:
        section, name = key.split(".")
        value = get_value(found, key)
        if value is not None and (place := keep(value, out)).startswith(RUNS):
            kept[section][name] = place
    return kept


def find_config(content: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The same back, wherever the runs folder lies."""
    found = deepcopy(dict(content))
    for section, name in (key.split(".") for key in KEYS):
        value = found.get(section, {}).get(name)
        if isinstance(value, str):
            found[section][name] = find(value, out)
    return found


def began_in(out: Path, before: Mapping[str, Any] | None = None) -> list[str]:
    """For a record: the folders that relative paths may start at, the first that holds one counts.

    The first command's, by its way from the runs folder where it holds that, since both are moved together, and as it
    is.
    """
    if before is not None and "began_in" in before:
        return list(before["began_in"])
    folder, runs = Path.cwd(), out.resolve()
    together = [f"{RUNS}/{os.path.relpath(folder, runs)}"] if runs.is_relative_to(folder) else []
    return [*together, str(folder)]


def moved(assignments: Sequence[str]) -> list[str]:
    """What `--set` says of places, in whatever folder it is read again."""
    pairs = [(key.strip(), value) for key, _, value in (text.partition("=") for text in assignments)]
    return [f"{key}={os.path.abspath(Path(value).expanduser()) if value else value}" for key, value in pairs]


class Origins:
    """Finds what the relative paths of a sweep's record mean, in whatever folder the command runs.

    Args:
        record: of the sweep that is resumed; what 0.1 wrote names no folder, and this command's counts.
    """

    def __init__(self, record: Mapping[str, Any], out: Path) -> None:
        self.name = str(record.get("name"))
        self.folders = [Path(find(text, out)) for text in record.get("began_in", [])] + [Path.cwd()]

    def path(self, text: str) -> str:
        """A relative path, made absolute where another folder than this command's holds it; any other as it is."""
        path = Path(text).expanduser()
        if path.is_absolute():
            return text
        there = next((folder / path for folder in self.folders if (folder / path).exists()), None)
        if there is None or (path.exists() and path.samefile(there)):
            return text  # what is packed under this name already is not packed again
        return os.path.abspath(there)

    def files(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What a command asked for, with its space file and its configuration's files where they are found."""
        found = {key: self.path(asked[key]) for key in ("space", "config")}
        return {**asked, **found, "overlay": [self.path(file) for file in asked["overlay"]]}

    def config(self, config: Config) -> Config:
        """A configuration whose places are where they are found.

        Raises:
            RaystarError: latents or features are not there, with where they were looked for.
        """
        found = {key: self.path(value) for key in KEYS if (value := get_value(config, key)) is not None}
        for key in _NEEDED:
            if key in found and not data_root(found[key]).exists():
                relative = not Path(found[key]).expanduser().is_absolute()
                looked = ", ".join(dict.fromkeys(os.path.abspath(f / found[key]) for f in self.folders))
                raise RaystarError(
                    f"--resume {self.name}: {key}: {found[key]} is not there"
                    f"{f' (looked for {looked})' if relative else ''}; say where it lies now with --set {key}=PATH"
                )
        vae = "visualization.vae_model_name_or_path"  # a folder, or a name that is looked up elsewhere
        if (value := get_value(config, vae)) is not None:
            found[vae] = self.path(value)
        return override(config, found)
