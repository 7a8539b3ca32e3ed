"""`bakeoff verify`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, ParityError, UsageError
from ..terminal import print_json, say
from .inspect import proof_in_words
from .source_options import add_config, add_lora

if TYPE_CHECKING:
    import argparse
    from contextlib import AbstractContextManager

    from ..artifact import Artifact
    from ..sources.source import Source


def add_verify(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser(
        "verify", help="check an artifact's files; with --parity what it computes; with --explain where it departs"
    )
    command.add_argument("folder", type=Path)
    command.add_argument(
        "--parity", action="store_true", help="prove each part, and what it draws, against what eager fp32 gave, too"
    )
    command.add_argument(
        "--scorer",
        type=int,
        metavar="N",
        help="with --parity, of the embedded model: judge N prompts of shapes-1024 by what pictures show, against "
        "eager fp32; the gate of low-bit recipes needs 1024 (minutes)",
    )
    command.add_argument(
        "--explain", action="store_true", help="find where it departs from eager fp32, and why: needs --source"
    )
    command.add_argument("--source", help="the model, to record what eager fp32 gives if the artifact has no record")
    command.add_argument("--controlnet", metavar="DIR", help="where the ControlNet lies, if it isn't where it was")
    add_lora(command, "add to --source, as it was baked in")
    add_config(command)
    command.set_defaults(run=_verify)
    return command


def _verify(options: argparse.Namespace) -> int:
    from ..artifact import Artifact
    from ..parity import prover

    if options.scorer is not None and not options.parity:
        message = "got --scorer without --parity, which it belongs to"
        raise UsageError(message, fix=f"bakeoff verify {options.folder} --parity --scorer {options.scorer}")
    if options.lora and not options.source:
        message = "got --lora without --source, to whose weights it is added"
        raise UsageError(message, fix="add --source MODEL")
    artifact = Artifact.open(options.folder)
    if options.explain:
        return _explain(artifact, options)
    problems = _hash_all(artifact)
    if options.parity and not problems:
        with _source(artifact, options) if options.source else contextlib.nullcontext() as source:
            artifact = prover.prove_in_place(artifact, source, scorer_prompts=options.scorer)
    if options.json:
        print_json({"folder": str(options.folder), "problems": problems, "proof": artifact.manifest.proof})
    elif not problems:
        _show_sound(artifact, parity=options.parity)
    for problem in problems:
        say(f"error: {problem}")
    if problems:
        say(
            f"hint: export it again: bakeoff export {artifact.manifest.source['id']} -o {options.folder} --force --recipe …"
        )
    return ArtifactError.exit_code if problems else 0


def _show_sound(artifact: Artifact, *, parity: bool) -> None:
    """Print what the proof is of an artifact whose files are as written."""
    from ..parity import prover
    from ..runtimes.opening import of_artifact, proved_elsewhere

    manifest = artifact.manifest
    print(f"{artifact.folder}: all {len(manifest.files)} files are as written; {proof_in_words(manifest.proof)}")
    note = proved_elsewhere(of_artifact(artifact))
    if note:
        say(f"note: {note}")
    if parity:
        print(*(f"  {line}" for line in prover.in_words(manifest.proof)), sep="\n")


def _explain(artifact: Artifact, options: argparse.Namespace) -> int:
    """Explain it whatever its hashes: what was changed in it may be why."""
    if not options.source:
        message = "--explain got no --source: it runs the model in eager fp32 beside the artifact"
        raise UsageError(message, fix=f"add --source {artifact.manifest.source['id']}")
    from ..parity.explain import as_json, explain, in_words

    problems = _hash_all(artifact)
    with _source(artifact, options) as source:
        found = explain(artifact, source)
    drawn = artifact.manifest.proof.get("trajectory", {}).get("problem")
    for problem in problems:
        say(f"warning: {problem}")
    if options.json:
        parts = [as_json(each) for each in found]
        print_json({"folder": str(options.folder), "problems": problems, "parts": parts, "pictures": drawn})
    else:
        print("\n".join(line for each in found for line in in_words(each)))
        if drawn:
            print(f"pictures: {drawn}; the part above is the one that is farthest, for its tolerance")
    if drawn or any(each.departs for each in found):
        return ParityError.exit_code
    return ArtifactError.exit_code if problems else 0


def _source(artifact: Artifact, options: argparse.Namespace) -> AbstractContextManager[Source]:
    from ..parity.origin import source_of

    return source_of(artifact, options.source, options.config, options.controlnet, options.lora)


def _hash_all(artifact: Artifact) -> list[str]:
    from tqdm import tqdm

    total = sum(file.size for file in artifact.manifest.files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=None, leave=False) as bar:
        return artifact.verify(bar.update)
