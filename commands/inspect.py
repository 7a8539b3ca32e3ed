"""`bakeoff inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..recipe import PartRecipe
from ..terminal import print_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from ..artifact import Artifact, PartEntry


_WORTH_SHOWING_BYTES = 10_000


def add_inspect(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser("inspect", help="show what an artifact is")
    command.add_argument("folder", type=Path)
    command.set_defaults(run=_inspect)
    return command


def _inspect(options: argparse.Namespace) -> None:
    from ..artifact import Artifact

    show(Artifact.open(options.folder), as_json=options.json)


def show(artifact: Artifact, *, as_json: bool) -> None:
    """Print what an artifact's manifest says."""
    manifest = artifact.manifest
    if as_json:
        print_json({"folder": str(artifact.folder), **json.loads(manifest.render())})
        return
    total = sum(file.size for file in manifest.files.values())
    print(
        f"{artifact.folder}: {manifest.family} from {manifest.source['id']}, {total / 1e6:.1f} MB, {proof_in_words(manifest.proof)}"
    )
    proofs = manifest.proof.get("parts", {})
    recipes = {name: str(PartRecipe.read(part.key_fields["recipe"])) for name, part in manifest.parts.items()}
    width = max(map(len, recipes.values()))
    for name, part in manifest.parts.items():
        worst = min((case["sqnr_db"] for case in proofs.get(name, {}).get("cases", [])), default=None)
        parity = f"{worst:6.1f} dB" if worst is not None else "unproved"
        weights = ", ".join(
            f"{size / 1e6:.1f} MB {dtype}" for dtype, size in part.weight_bytes.items() if size > _WORTH_SHOWING_BYTES
        )
        print(f"  {name:14} {recipes[name]:{width}} {parity}  {weights} ({part.weights})")
        for line in _shares(part):
            print(f"  {'':14} {line}")
    print(f"  key {manifest.key}")


def _shares(part: PartEntry) -> Iterator[str]:
    """Say how many of a part's weights are codes, of which kinds, and why others aren't."""
    from collections import Counter

    if part.stated_share is not None:
        codes = ", ".join(f"{share:.1%} {dtype}" for dtype, share in part.weight_shares.items())
        yield f"{part.stated_share:.1%} of its weights are as {part.precision} states: {codes}"
    if part.uncalibrated:
        yield f"{len(part.uncalibrated)} with weights alone rounded: no drawing reached them while calibrating"
    for reason, count in Counter(part.kept.values()).most_common():
        yield f"{count} left wide: {reason}"


def proof_in_words(proof: Any) -> str:  # noqa: ANN401 - a JSON object
    """Say whether an artifact is proved, what of it was left open, and what that took."""
    if proof["status"] != "proved":
        return f"{proof['status']}: {proof['reason']}"
    from ..reports.gates import MEANING_GATE

    peak = max(proof["peak_anon_bytes"], 0) / 1e9
    took = f"its child process took {proof['seconds']:.1f} s and {peak:.2f} GB of anonymous memory"
    gates = proof.get("trajectory", {}).get("gates", [])
    left = [
        gate["detail"]
        for gate in gates
        if gate["holds"] is None and not (gate["name"] == MEANING_GATE and "scorer" in proof)
    ]
    return f"proved ({'; '.join([took, *left])})"
