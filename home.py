"""Where bakeoff keeps what it can make again, and the hashes of files that it remembers there."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from .weights import sha256


def home() -> Path:
    """Return `$BAKEOFF_HOME`, by default `~/.cache/bakeoff`."""
    return Path(os.environ.get("BAKEOFF_HOME") or Path.home() / ".cache" / "bakeoff")


def remembered_sha256(file: Path) -> str:
    """Return a file's hash, remembered by path, inode, size and time of change."""
    stat = file.resolve().stat()
    key = f"{file.resolve()}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
    store = home() / "hashes.json"
    try:
        known: dict[str, str] = json.loads(store.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = sha256(file)
        with contextlib.suppress(OSError):  # what can't be remembered is hashed again
            store.parent.mkdir(parents=True, exist_ok=True)
            partial = store.with_suffix(f".partial-{os.getpid()}")
            partial.write_text(json.dumps(known, indent=0))
            partial.replace(store)
    return known[key]
