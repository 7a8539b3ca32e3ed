"""What commands print: data to stdout, all else to stderr."""

from __future__ import annotations

import json
import sys


def print_json(data: object) -> None:
    print(json.dumps(data, indent=2))


def say(message: str) -> None:
    print(message, file=sys.stderr)
