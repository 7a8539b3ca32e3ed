"""`bakeoff doctor`: what this machine is, and which devices and backends can be used on it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def add_doctor(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's subparsers have no public type
    command: argparse.ArgumentParser = commands.add_parser("doctor", help="show hardware, devices and backends")
    command.set_defaults(run=_doctor)
    return command


def _doctor(options: argparse.Namespace) -> None:
    from . import hardware, plugins
    from .memory import available_bytes

    machine = {**hardware.describe(), "available_bytes": available_bytes()}
    devices = hardware.devices()
    backends = {name: plugins.runtime(name).probe() for name in plugins.names("runtimes")}
    if options.json:
        groups = {"devices": devices, "backends": backends}
        told = {key: {name: found.as_dict() for name, found in group.items()} for key, group in groups.items()}
        print(json.dumps({"machine": machine, **told}, indent=2))
        return
    print(f"{machine['cpu']}, {machine['usable_cores']} cores to use, {', '.join(machine['instruction_sets'])}")
    print(f"{machine['memory_bytes'] / 1e9:.1f} GB of memory, {machine['available_bytes'] / 1e9:.1f} GB free")
    if not machine["exact_byte_products"]:
        print(f"{hardware.OVERFLOWS}: w8a8 runs exactly all the same, but slower than with it (docs/quantization.md)")
    for title, group in (("devices", devices), ("backends", backends)):
        print(f"\n{title}")
        for name, found in group.items():
            print(f"  {'yes' if found.ok else 'no ':3} {name:10} {found.reason}")
            if found.fix and not found.ok:
                print(f"      {'':10} hint: {found.fix}")
