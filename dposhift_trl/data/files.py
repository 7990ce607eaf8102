"""Which local files a source of rows names. A name is read as it is written; only `data_files` may be a pattern."""

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.data_files import FILES_TO_IGNORE, _get_data_files_patterns, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from fsspec.utils import glob_translate
from huggingface_hub import DatasetCard

from .config import DataSource
from .formats import BUILDERS, ENDINGS, FileFormat, format_of


MAGIC = re.compile(r"[*?\[]")


def local_path(name: str) -> Path:
    """The file or folder of this name; only if there is none, `~` is the home folder."""
    path = Path(name)
    return path if os.path.lexists(path) else path.expanduser()


def files_of_folder(
    folder: Path, name: str | None, data_files: Any
) -> tuple[dict[str, list[Path]], FileFormat, dict[str, Any]]:
    """
    Find the files of a folder as `load_dataset` does: by `data_files`, by the configurations in its README, or by
    the names of its files.

    Args:
        folder (`Path`):
            Folder.
        name (`str`, *optional*):
            One of the configurations in its README.
        data_files (`str`, `list[str]` or `dict[str, str]`, *optional*):
            Names and patterns, relative to the folder.

    Returns:
        `tuple[dict[str, list[Path]], FileFormat, dict[str, Any]]`: Files by split, their format, and settings of the
        builder from the README.

    Raises:
        ValueError: If there are none, or they are of different formats.
    """
    options: dict[str, Any] = {}
    configs = {} if data_files is not None else _configs(folder)
    if configs:
        options = _config(configs, name)
        folder /= options.pop("data_dir", None) or ""
        data_files = options.pop("data_files", None)
    if data_files is not None:
        files = named_files(folder, data_files)
    else:
        try:
            patterns = _get_data_files_patterns(lambda pattern: [str(path) for path in _matches(folder, pattern)])
        except FileNotFoundError:
            raise ValueError(f"The directory at {folder} doesn't contain any data files") from None
        files = {str(split): _unique(folder, patterns[split]) for split in patterns}
    of_format: dict[FileFormat, dict[str, list[Path]]] = {}
    for split, paths in files.items():
        for path in paths:
            file_format = format_of(path)
            if file_format is not None:
                of_format.setdefault(file_format, {}).setdefault(split, []).append(path)
    if not of_format:
        raise ValueError(f"it has no file whose name ends in {ENDINGS}")
    if len(of_format) > 1:
        examples = [next(iter(paths.values()))[0].name for paths in of_format.values()]
        raise ValueError(
            f"its files must be of one format, got {' and '.join(examples)}. Name the files to read in `data_files`"
        )
    ((file_format, found),) = of_format.items()
    return found, file_format, options


def named_files(folder: Path, data_files: Any) -> dict[str, list[Path]]:
    """
    Files by split that `data_files` names: a name of a file that exists is that file, any other may be a pattern.

    Raises:
        FileNotFoundError: If a name or a pattern leads to no file.
    """
    found: dict[str, list[Path]] = {}
    for split, names in sanitize_patterns(data_files).items():
        for name in names:
            base, pattern = literal_start(folder, name)
            paths = _matches(base, pattern) if pattern else [base]
            if not paths or not base.exists() or (not pattern and base.is_dir()):
                raise FileNotFoundError(f"`data_files` must name files, got {name!r}, which is none")
            found[str(split)] = list(dict.fromkeys([*found.get(str(split), []), *paths]))
    return found


def literal_start(folder: Path, name: str) -> tuple[Path, str]:
    """Split a name into the file or folder that it names literally, and the pattern that is left, if any."""
    base, parts = folder / Path(name).anchor, Path(name).relative_to(Path(name).anchor).parts
    for index, part in enumerate(parts):
        if MAGIC.search(part) and not os.path.lexists(base / part):
            return base, "/".join(parts[index:])
        base /= part
    return base, ""


def _matches(folder: Path, pattern: str) -> list[Path]:
    """Files in the folder that a pattern matches, in the order of their names."""
    regex = re.compile(glob_translate(pattern))
    return [
        folder / path
        for path in sorted(_walk(folder))
        if regex.match(path)
        and Path(path).name not in set(FILES_TO_IGNORE) - {Path(pattern).name}
        and _hidden_parts(path) == _hidden_parts(pattern)
    ]


def _unique(folder: Path, patterns: list[str]) -> list[Path]:
    return list(dict.fromkeys(path for pattern in patterns for path in _matches(folder, pattern)))


def _walk(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file():
                yield path.relative_to(folder).as_posix()


def _hidden_parts(path: str) -> int:
    """Number of hidden files and folders on the way, which a pattern has to name."""
    *folders, name = Path(path).parts
    return sum(part.startswith((".", "__")) and part != ".." for part in folders) + name.startswith(".")


def _configs(folder: Path) -> MetadataConfigs:
    readme = folder / "README.md"
    if not readme.is_file():
        return MetadataConfigs()
    return MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data)


def _config(configs: MetadataConfigs, name: str | None) -> dict[str, Any]:
    name = name or configs.get_default_config_name()
    if name not in configs:
        raise ValueError(f"`data.name` must be one of {', '.join(configs)}, got {name!r}")
    return {key: value for key, value in configs[name].items() if key != "default"}


def folder_conflict(source: DataSource, folder: Path) -> str | None:
    """
    Why a run must not write to a folder: its files would be read as rows, or it would write over the rows.

    Args:
        source ([`DataSource`]):
            Source of rows.
        folder (`Path`):
            Folder of the run; it need not exist.
    """
    assert source.path
    path, folder = local_path(source.path), folder.resolve()
    if source.data_files is not None and (path.is_dir() or source.path in BUILDERS.values()):
        base = path if path.is_dir() else Path()
        names = [name for names in sanitize_patterns(source.data_files).values() for name in names]
        starts = [literal_start(base, name) for name in names if "://" not in name]
    elif source.path == "demo" or not path.exists():
        return None
    else:
        starts = [(path, "**" if path.is_dir() and not is_saved(path) else "")]
    for start, pattern in starts:
        place = start.resolve()
        if place.is_relative_to(folder) and (place != folder or not pattern):
            return f"{start} is inside it. Move the data, or choose another folder"
        if pattern and folder.is_relative_to(place) and _reaches(pattern, folder.relative_to(place)):
            return f"the files of the run would be read as rows of {start}. Choose a folder outside of the data"
    return None


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _reaches(pattern: str, folder: Path) -> bool:
    """Whether a pattern can match a file somewhere inside a folder."""
    parts = pattern.split("/")
    if any("**" in part for part in parts):
        return True
    on_the_way = zip(folder.parts, parts, strict=False)
    return len(parts) > len(folder.parts) and all(fnmatch.fnmatchcase(name, part) for name, part in on_the_way)
