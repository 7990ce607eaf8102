"""`python -m dposhift_trl.reference list` shows the stored scores of references, `clear` removes them."""

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import filelock

from .cache import default_folder, entries, load_entry


def _row(folder: Path, key: str, names: list[re.Match[str]]) -> list[str]:
    """Key, rows, bytes, date and description as `list` shows them; no date where no file is readable."""
    paths = [path for name in names if (path := folder / name.string).exists()]
    row = [key, "?", f"{sum(path.stat().st_size for path in paths):,}", "", "unreadable, scored again when needed"]
    for path in paths:
        with contextlib.suppress(ValueError, FileNotFoundError):
            header = load_entry(path)[0]
            row[3:] = header["date"][:16], ", ".join(f"{name} {x}" for name, x in header["description"].items())
            row[1] = str(header["rows"][2])
            if path.name != f"{key}.parquet":
                row[1] = f"{sum(int(name[3]) - int(name[2]) for name in names if name[2])} of {row[1]}"
    return row


def _clear(folder: Path, keys: Sequence[str], days: float) -> list[str]:
    """Remove entries, and say which were not and why."""
    found = entries(folder)
    faults = [f"{key}: nothing of that key in {folder}" for key in keys if key not in found]
    for key, names in found.items():
        row, written = _row(folder, key, names), max((folder / name.string).stat().st_mtime for name in names)
        if (key not in keys if keys else not row[3]) or time.time() - written < days * 86400:
            continue
        lock = filelock.FileLock(folder / f"{key}.lock", timeout=0)
        try:
            with lock:
                for name in names:
                    (folder / name.string).unlink(missing_ok=True)
                Path(lock.lock_file).unlink()
            print(f"removed {key}: {row[2]} bytes, {row[4]}")
        except filelock.Timeout:
            faults.append(f"{key}: in use by a run, not removed")
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    """List or clear the folder; 0 if all was done, 1 if something was not, 2 for a wrong command line."""
    folder = default_folder()
    parser = argparse.ArgumentParser(
        prog="python -m dposhift_trl.reference", description=f"Reference log-probabilities kept in {folder}."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show what is stored")
    clear = commands.add_parser("clear", help="remove what is stored; what is unreadable, only where its key is given")
    clear.add_argument("keys", nargs="*", metavar="KEY", help="keys as listed (default: all)")
    clear.add_argument("--older-than", type=float, default=0.0, metavar="DAYS", help="only what was written before")
    options = parser.parse_args(argv)
    try:
        if options.command == "clear":
            faults = _clear(folder, options.keys, options.older_than)
            for fault in faults:
                print(fault, file=sys.stderr)
            return 1 if faults else 0
        rows = [_row(folder, key, names) for key, names in entries(folder).items()]
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    for key, count, size, written, about in [["KEY", "ROWS", "BYTES", "WRITTEN (UTC)", "REFERENCE"], *rows]:
        print(f"{key:32}  {count:>18}  {size:>13}  {written:16}  {about}")
    print(f"{len(rows)} entries in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
