"""Command line of the cache of reference log-probabilities: `python -m dposhift_trl.reference list` and `clear`."""

if __name__ == "__main__":
    from ..command import begin

    begin()  # before the imports, which take seconds

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import filelock

from ..command import call
from ..console import complain, say
from .cache import ReferenceCacheError, default_folder, entries, load_entry


def _row(folder: Path, key: str, files: list[re.Match[str]]) -> list[str]:
    """Key, rows, bytes, date and description of an entry. The date is empty if no file is readable."""
    paths = [path for file in files if (path := folder / file.string).exists()]
    row = [key, "?", f"{sum(path.stat().st_size for path in paths):,}", "", "unreadable, scored again when needed"]
    for path in paths:
        with contextlib.suppress(ValueError, OSError, TypeError, AttributeError, LookupError):
            header = load_entry(path)[0]
            row[3:] = header["date"][:16], ", ".join(f"{name} {x}" for name, x in header["description"].items())
            row[1] = str(header["rows"][2])
            if path.name != f"{key}.parquet":
                row[1] = f"{sum(int(file[3]) - int(file[2]) for file in files if file[2])} of {row[1]}"
    return row


def _clear(folder: Path, keys: Sequence[str], days: float) -> list[str]:
    """Remove entries. Returns one line for each entry that could not be removed."""
    found = entries(folder)
    problems = [f"{key}: no entry with this key in {folder}" for key in keys if key not in found]
    for key, files in found.items():
        row, written = _row(folder, key, files), max((folder / file.string).lstat().st_mtime for file in files)
        if (key not in keys if keys else not row[3]) or time.time() - written < days * 86400:
            continue
        lock = filelock.FileLock(folder / f"{key}.lock", timeout=0)
        try:
            with lock:
                for file in files:
                    (folder / file.string).unlink(missing_ok=True)
                Path(lock.lock_file).unlink()
            say(f"removed {key}: {row[2]} bytes, {row[4]}")
        except filelock.Timeout:
            problems.append(f"{key}: in use by a run, not removed")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """List or clear the cache. Returns 0 on success, 1 on failure, and 2 if no folder is known."""
    try:
        folder = default_folder()
    except ReferenceCacheError as error:
        complain(error)
        return 2
    parser = argparse.ArgumentParser(
        prog="python -m dposhift_trl.reference", description=f"Reference log-probabilities stored in {folder}."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the stored entries")
    clear = commands.add_parser("clear", help="remove entries; unreadable ones only if their key is given")
    clear.add_argument("keys", nargs="*", metavar="KEY", help="keys as listed (default: all)")
    clear.add_argument(
        "--older-than", type=float, default=0.0, metavar="DAYS", help="remove only entries written more than DAYS ago"
    )
    options = parser.parse_args(argv)
    try:
        if options.command == "clear":
            problems = _clear(folder, options.keys, options.older_than)
            complain(*problems)
            return 1 if problems else 0
        rows = [_row(folder, key, files) for key, files in entries(folder).items()]
    except OSError as error:
        complain(error)
        return 1
    for key, count, size, written, about in [["KEY", "ROWS", "BYTES", "WRITTEN (UTC)", "REFERENCE"], *rows]:
        say(f"{key:32}  {count:>18}  {size:>13}  {written:16}  {about}")
    say(f"{len(rows)} entries in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(call(main))
