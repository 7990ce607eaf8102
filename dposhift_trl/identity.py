"""Which weights a folder holds, so that what was made from others is not taken for theirs."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .artifacts import ArtifactError, read_mapping


WHOLE = 1 << 28  # bytes up to which a file is read as a whole
SAMPLE = 1 << 14  # bytes that are read of a larger file at a time
ADAPTER_CONFIG = "adapter_config.json"


def weights_identity(folder: Path) -> str | None:
    """
    Hash the weights saved in a folder, with the base model of an adapter.

    Of files above 256 MB only the header, and the start, middle and end of each tensor are read: training moves every
    tensor that it trains, and a model of 16 GB takes less than a second.

    Args:
        folder (`Path`):
            Folder with a model or an adapter.

    Returns:
        `str` or `None`: 32 hexadecimal digits, or `None` if there are no safetensors in the folder.

    Raises:
        OSError: If a file cannot be read.
    """
    digest, paths = hashlib.blake2b(digest_size=16), sorted(folder.glob("*.safetensors"))
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start, length in [(0, size)] if size <= WHOLE else _samples(file, size):
                file.seek(start)
                while length > 0 and (piece := file.read(min(length, 1 << 24))):
                    digest.update(piece)
                    length -= len(piece)
    if paths and (folder / ADAPTER_CONFIG).is_file():
        digest.update(_base_identity(folder).encode())
    return digest.hexdigest() if paths else None


def _samples(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Start and length of what is read of a file: its header, and three places of each tensor."""
    length = int.from_bytes(file.read(8), "little")
    try:
        tensors = json.loads(file.read(length) if length < WHOLE else "")
        places = [value["data_offsets"] for name, value in tensors.items() if name != "__metadata__"]
        starts = [int(start) for first, last in places for start in (first, (first + last) // 2, last - SAMPLE)]
    except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        length, starts = 0, [0, size // 2, size - SAMPLE]  # no header, so the file as one piece
    yield 0, 8 + length
    yield from ((8 + length + min(max(start, 0), size), SAMPLE) for start in starts)


def _base_identity(folder: Path) -> str:
    """The base model of an adapter: of a folder its weights, from the Hub its name and revision."""
    try:
        settings = read_mapping(folder / ADAPTER_CONFIG)
    except ArtifactError as error:
        return error.reason
    name = str(settings.get("base_model_name_or_path"))
    for base in (Path(name), folder.parent / Path(name).name):  # a run's own base model moves with it
        if base.is_dir() and base.resolve() != folder.resolve():
            return str(weights_identity(base))
    return f"{name}@{settings.get('revision')}"
