"""The command line: data to stdout, progress and errors to stderr."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    sys.exit("type bakeoff, not python cli.py: run as a script, the folder's modules would load twice")

from .bench.command import add_bench
from .doctor import add_doctor
from .errors import ArtifactError, BakeoffError, InputError, ParityError, ResourceError, UsageError
from .pictures import check_output, save
from .placement import ATTENTIONS
from .precisions import add_precisions
from .progress import Steps
from .recipe import LOAD_OPTIONS, OFFLOADS, SWITCHES, option_value, read
from .reports.command import add_compare, add_report
from .tuning.calibrate import add_calibrate
from .tuning.choose import add_recipe
from .tuning.sensitivity import add_sensitivity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .artifact import Artifact, PartEntry
    from .parity.budget import Gate
    from .plan import Plan
    from .recipe import Placement, Recipe

EXIT_CODES = """\
exit codes:
  0   done
  1   something that bakeoff has no name for
  2   a call, recipe or input that can't be meant as it is
  3   a model that isn't there, or whose weights are pickles
  4   a folder that isn't an artifact, or one that was changed
  5   a backend or device that can't be used here
  6   a part that a backend couldn't take
  7   a part that doesn't compute what its source computes
  8   too little memory or disk
  130 stopped on request
"""
_INTERRUPTED = 130
_WORTH_SHOWING_BYTES = 10_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    options = _parser().parse_args(arguments)
    _quiet_libraries()
    try:
        return int(options.run(options) or 0)
    except BakeoffError as error:
        return _report(error, options)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _report(_named(error), options)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return _INTERRUPTED


def _report(error: BakeoffError, options: argparse.Namespace) -> int:
    if getattr(options, "json", False):
        _print_json({"error": type(error).__name__, "message": error.message, "fix": error.fix})
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _named(error: OSError) -> BakeoffError:
    """Turn what the system refused into an error of ours."""
    message = f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return ResourceError(message, fix="free some space on that disk")
    return UsageError(message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bakeoff",
        description="Bake Diffusers pipelines into hardware artifacts, then hold a bake-off between them.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_doctor,
        add_precisions,
        _add_export,
        _add_plan,
        _add_inspect,
        _add_verify,
        _add_why_rebuild,
        _add_generate,
        add_calibrate,
        add_sensitivity,
        add_recipe,
        add_bench,
        add_report,
        add_compare,
        _add_demo,
    ):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _version() -> str:
    from importlib.metadata import version

    return f"bakeoff {version('bakeoff')}"


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=2))


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _add_export(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="bake a model into an artifact",
        description="Bake a model into an artifact folder, whole or not at all. The same export again does nothing.",
    )
    command.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="the artifact's folder")
    _add_source(command)
    command.add_argument("--no-prove", action="store_true", help="don't run the parts against eager fp32")
    _add_gate(command)
    command.add_argument("--force", action="store_true", help="replace what is at DIR")
    command.add_argument("--reuse", action="append", default=[], metavar="DIR", help="take unchanged parts from DIR")
    command.set_defaults(run=_export)
    return command


def _add_gate(command: argparse.ArgumentParser) -> None:
    """Add what says how far parts may be from eager fp32."""
    command.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="PART=DB",
        help="least SQNR of a part to eager fp32, such as unet=30dB; by default what the noise floors justify",
    )
    command.add_argument(
        "--budget-reason", metavar="TEXT", help="why a budget is looser than that; kept in the manifest"
    )
    command.add_argument(
        "--repair", action="store_true", help="put back as few layers as needed in higher precision to pass"
    )
    command.add_argument(
        "--allow-failing", action="store_true", help="keep an artifact that fails its budget, marked for good"
    )


def _gate(options: argparse.Namespace) -> Gate:
    from .parity.budget import Gate, parse

    return Gate(parse(options.budget, options.budget_reason), options.allow_failing)


def _add_plan(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="predict memory, disk and time of an export, and the memory of running it",
        description="Predict what an export takes from the model's headers, and refuse what can't fit. Writes nothing.",
    )
    command.add_argument("-o", "--output", type=Path, default=Path(), metavar="DIR", help="where it would be written")
    _add_source(command)
    command.set_defaults(run=_plan)
    return command


def _plan(options: argparse.Namespace) -> None:
    from .forecast import running, table
    from .memory import available_bytes
    from .plan import check_room, existing_parent

    planned, free = _planned(options), available_bytes()
    forecast = planned.forecast(existing_parent(options.output))
    if options.json:
        _print_json({**forecast.as_dict(), "available_bytes": free, "running": running(forecast, free)})
    else:
        print(f"{planned.source.family.name} from {planned.source.id}", *table(forecast, free), sep="\n")
    check_room(planned, options.output)


def _planned(options: argparse.Namespace) -> Plan:
    """Plan the export that `_add_source`'s options describe."""
    from .plan import plan

    return plan(
        options.model,
        _recipe(options)[0],
        revision=options.revision,
        config=options.config,
        weights=options.weights,
        loras=options.lora,
        controlnet=options.controlnet,
        calibration=options.calibration,
    )


def _add_source(command: argparse.ArgumentParser) -> None:
    """Add what says which model is baked into what."""
    command.add_argument("model", help="a Diffusers folder, a hub id, a .safetensors checkpoint, or: shapes")
    _add_recipe(command)
    command.add_argument(
        "--weights",
        default="auto",
        help="auto (default): share unchanged weights with the source where the file system can; link: insist on it; "
        "copy: never, so that any tool may open the folder",
    )
    _add_lora(command)
    command.add_argument(
        "--controlnet", metavar="DIR", help="a ControlNet's folder or hub id, to bake beside the pipeline"
    )
    command.add_argument(
        "--calibration", type=Path, metavar="FILE", help="what bakeoff calibrate wrote, for recipes such as onnx:w8a8"
    )


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--recipe",
        required=True,
        help="backend:precision, parts that differ after commas (openvino:bf16,vae_decoder=torch:fp32), or a .toml file",
    )
    command.add_argument("--revision", help="revision of a hub model")
    _add_config(command)
    command.add_argument(
        "--timestep",
        choices=("ecosystem", "f32"),
        default="ecosystem",
        help="f32: a float timestep port in OpenVINO UNets, for schedulers with fractional timesteps",
    )


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        metavar="DIR",
        help="of a .safetensors checkpoint: Diffusers folder or hub id with its tokenizers, scheduler and configs",
    )


def _add_lora(command: argparse.ArgumentParser, purpose: str = "bake in") -> None:
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help=f"a LoRA in safetensors to {purpose}, such as style.safetensors:0.8; may be given several times",
    )


def _recipe(options: argparse.Namespace) -> tuple[Recipe, Placement]:
    recipe, placement = read(options.recipe)
    if options.timestep == "f32":
        recipe = recipe.with_option("openvino", "timestep", "f32")
    return recipe, placement


def _export(options: argparse.Namespace) -> None:
    recipe, placement = _recipe(options)
    from .bake import export

    if placement.as_dict() != type(placement)().as_dict():
        _say(f"note: @device, +{', +'.join(LOAD_OPTIONS)} are given when an artifact is loaded; ignored here")
    with Steps() as progress:
        if Path(options.model).suffix == ".safetensors":
            progress(f"reading {options.model}, which is hashed and converted once")
        details: dict[str, Any] = {
            "revision": options.revision,
            "config": options.config,
            "weights": options.weights,
            "gate": _gate(options),
            "loras": options.lora,
            "controlnet": options.controlnet,
            "calibration": options.calibration,
            "progress": progress,
            "reuse": options.reuse,
            "force": options.force,
        }
        if options.repair:
            from .tuning.repair import export_repaired

            artifact, repaired = export_repaired(options.model, options.output, recipe, **details)
        else:
            artifact, repaired = (
                export(options.model, options.output, recipe, prove=not options.no_prove, **details),
                None,
            )
    for line in repaired.in_words() if repaired else []:
        _say(line)
    _show(artifact, as_json=options.json)


def _add_inspect(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser("inspect", help="show what an artifact is")
    command.add_argument("folder", type=Path)
    command.set_defaults(run=_inspect)
    return command


def _inspect(options: argparse.Namespace) -> None:
    from .artifact import Artifact

    _show(Artifact.open(options.folder), as_json=options.json)


def _show(artifact: Artifact, *, as_json: bool) -> None:
    manifest = artifact.manifest
    if as_json:
        _print_json({"folder": str(artifact.folder), **json.loads(manifest.render())})
        return
    total = sum(file.size for file in manifest.files.values())
    print(
        f"{artifact.folder}: {manifest.family} from {manifest.source['id']}, {total / 1e6:.1f} MB, {_proof(manifest.proof)}"
    )
    proofs = manifest.proof.get("parts", {})
    for name, part in manifest.parts.items():
        worst = min((case["sqnr_db"] for case in proofs.get(name, {}).get("cases", [])), default=None)
        parity = f"{worst:6.1f} dB" if worst is not None else "unproved"
        weights = ", ".join(
            f"{size / 1e6:.1f} MB {dtype}" for dtype, size in part.weight_bytes.items() if size > _WORTH_SHOWING_BYTES
        )
        print(f"  {name:14} {part.backend}:{part.precision:6} {parity}  {weights} ({part.weights})")
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


def _proof(proof: Any) -> str:  # noqa: ANN401 - a JSON object
    if proof["status"] != "proved":
        return f"{proof['status']}: {proof['reason']}"
    peak = max(proof["peak_anon_bytes"], 0) / 1e9
    return f"proved (its child process took {proof['seconds']:.1f} s and {peak:.2f} GB of anonymous memory)"


def _add_verify(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser(
        "verify", help="check that an artifact's files are those that were written"
    )
    command.add_argument("folder", type=Path)
    command.add_argument(
        "--parity", action="store_true", help="prove each part, and what it draws, against what eager fp32 gave, too"
    )
    command.add_argument(
        "--scorer",
        type=int,
        default=0,
        metavar="N",
        help="with --parity, of the embedded model: judge N prompts of shapes-1024 by what pictures show, against "
        "eager fp32; the gate of low-bit recipes needs 1024 (minutes)",
    )
    command.add_argument(
        "--explain", action="store_true", help="find where it departs from eager fp32, and why: needs --source"
    )
    command.add_argument("--source", help="the model, to record what eager fp32 gives if the artifact has no record")
    _add_config(command)
    command.set_defaults(run=_verify)
    return command


def _verify(options: argparse.Namespace) -> int:
    from .artifact import Artifact
    from .parity import prover

    if options.scorer and not options.parity:
        message = "got --scorer without --parity, which it belongs to"
        raise UsageError(message, fix=f"bakeoff verify {options.folder} --parity --scorer {options.scorer}")
    artifact = Artifact.open(options.folder)
    if options.explain:
        return _explain(artifact, options)
    problems = _hash_all(artifact)
    if options.parity and not problems:
        source = prover.source_of(artifact, options.source, options.config) if options.source else None
        artifact = prover.prove_in_place(artifact, source, scorer_prompts=options.scorer)
    if options.json:
        _print_json({"folder": str(options.folder), "problems": problems, "proof": artifact.manifest.proof})
    elif not problems:
        print(
            f"{options.folder}: all {len(artifact.manifest.files)} files are as written; {_proof(artifact.manifest.proof)}"
        )
        if options.parity:
            print(*(f"  {line}" for line in prover.in_words(artifact.manifest.proof)), sep="\n")
    for problem in problems:
        _say(f"error: {problem}")
    if problems:
        _say(
            f"hint: export it again: bakeoff export {artifact.manifest.source['id']} -o {options.folder} --force --recipe …"
        )
    return ArtifactError.exit_code if problems else 0


def _explain(artifact: Artifact, options: argparse.Namespace) -> int:
    """Explain it whatever its hashes: what was changed in it may be why."""
    if not options.source:
        message = "--explain got no --source: it runs the model in eager fp32 beside the artifact"
        raise UsageError(message, fix=f"add --source {artifact.manifest.source['id']}")
    from .parity.explain import as_json, explain, in_words
    from .parity.prover import source_of

    problems = _hash_all(artifact)
    found = explain(artifact, source_of(artifact, options.source, options.config))
    for problem in problems:
        _say(f"warning: {problem}")
    if options.json:
        parts = [as_json(each) for each in found]
        _print_json({"folder": str(options.folder), "problems": problems, "parts": parts})
    else:
        print("\n".join(line for each in found for line in in_words(each)))
    if any(each.departs for each in found):
        return ParityError.exit_code
    return ArtifactError.exit_code if problems else 0


def _hash_all(artifact: Artifact) -> list[str]:
    from tqdm import tqdm

    total = sum(file.size for file in artifact.manifest.files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=None, leave=False) as bar:
        return artifact.verify(bar.update)


def _add_why_rebuild(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser(
        "why-rebuild", help="say which fields of an artifact's key an export would change"
    )
    command.add_argument("folder", type=Path)
    _add_source(command)
    command.set_defaults(run=_why_rebuild)
    return command


def _why_rebuild(options: argparse.Namespace) -> None:
    from .artifact import Artifact
    from .plan import why_rebuild

    reasons = why_rebuild(Artifact.open(options.folder), _planned(options))
    if options.json:
        _print_json({"rebuild": bool(reasons), "fields": reasons})
        return
    print("\n".join(reasons) if reasons else f"{options.folder} is up to date")


def _add_generate(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser("generate", help="make pictures with an artifact")
    command.add_argument("folder", type=Path, help="an artifact, or an Optimum or Diffusers folder")
    command.add_argument("prompts", nargs="+", metavar="prompt")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="PNG", help="several: PNG-0, PNG-1…")
    command.add_argument("--negative-prompt")
    command.add_argument("--seed", type=int, help="of the first prompt; the next ones follow")
    command.add_argument("--guidance-scale", type=float)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--height", type=int)
    command.add_argument("--width", type=int)
    command.add_argument("--max-batch", type=int, default=8)
    command.add_argument("--image", type=Path, help="a picture to start from: image-to-image")
    command.add_argument("--mask", type=Path, help="of the picture's size; what is white is painted anew: inpainting")
    command.add_argument("--control-image", type=Path, help="what the artifact's ControlNet follows")
    command.add_argument("--control-scale", type=float, default=1.0, help="how strongly (1)")
    _add_lora(command, "add to the weights as they are loaded")
    command.add_argument("--strength", type=float, help="over 0 to 1: how much of the picture is noised away")
    _add_device_options(command)
    _add_memory_options(command)
    command.set_defaults(run=_generate)
    return command


def _add_device_options(command: argparse.ArgumentParser) -> None:
    device = command.add_argument_group("device", "where parts run, and how")
    device.add_argument("--device", default="auto")
    device.add_argument(
        "--devices", default="", metavar="PART@DEVICE,…", help="parts that run elsewhere: vae_decoder@cpu"
    )
    device.add_argument("--threads", type=int)
    device.add_argument(
        "--compile", nargs="?", const=True, default=False, metavar="HOW",
        help="torch: torch.compile; full, or regional: repeated blocks alone",
    )  # fmt: skip
    device.add_argument("--cuda-graphs", action="store_true", help="record launches on a GPU, and replay them")
    device.add_argument("--attention", choices=ATTENTIONS, help="torch: the attention kernel")
    device.add_argument("--channels-last", choices=SWITCHES, default="auto", help="torch: the layout of convolutions")
    device.add_argument("--static", action="store_true", help="OpenVINO: compile for the shapes that parts get")
    device.add_argument("--provider", help="ONNX Runtime: an execution provider, by name")
    device.add_argument("--provider-options", metavar="NAME=VALUE;…", help="ONNX Runtime: of that provider")


def _add_memory_options(command: argparse.ArgumentParser) -> None:
    memory = command.add_argument_group("memory", "what is decided by the memory that is there unless it is said here")
    memory.add_argument(
        "--offload",
        choices=OFFLOADS,
        default="auto",
        help="none: parts stay open; parts: those that are done are closed before others are opened; mapped: and weights "
        "stay in their files, where the runtime can; blocks: torch on a GPU, weights come a block at a time",
    )
    memory.add_argument("--vae-tiling", choices=SWITCHES, default="auto", help="decode in tiles (lossy: seams)")
    memory.add_argument("--vae-slicing", choices=SWITCHES, default="auto", help="decode a picture at a time")
    memory.add_argument("--attention-slicing", metavar="N", help="torch: N heads at a time, or auto")
    memory.add_argument(
        "--token-merging", metavar="SHARE", help="torch: merge tokens in UNets, to 0.75 of them (lossy)"
    )


def _placement(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `load` that were given; text as in recipes."""
    given = {name: getattr(options, name) for name in ("device", "devices", *LOAD_OPTIONS)}
    return {
        name: option_value(name, value) if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }


def _generate(options: argparse.Namespace) -> None:
    check_output(options.output)
    if (options.height is None) != (options.width is None):
        message = "got one of --height and --width, expected both or none"
        raise UsageError(message)
    from .runtimes.engine import load

    with load(options.folder, **_placement(options), loras=options.lora) as engine:
        if not engine.proved:
            _say(f"note: {options.folder} is {_proof(engine.proof)}")
        result = engine.generate(
            options.prompts,
            negative_prompts=options.negative_prompt,
            seeds=options.seed,
            guidance_scale=options.guidance_scale,
            steps=options.steps,
            size=None if options.height is None else (options.height, options.width),
            image=_picture(options.image),
            mask=_picture(options.mask),
            strength=options.strength,
            control_image=_picture(options.control_image),
            control_scale=options.control_scale,
            max_batch=options.max_batch,
            progress=sys.stderr.isatty(),
        )
        configuration = engine.configuration
    files = save(result.images, options.output)
    for part, found in configuration.items():
        if found.get("fallback"):
            _say(f"note: {part}: {found['fallback']}")
    for note in result.notes:
        _say(f"note: {note}")
    if options.json:
        _print_json(
            {
                "files": [str(file) for file in files],
                "seeds": result.seeds,
                "seconds": dict(result.seconds),
                "proved": engine.proved,
                "configuration": configuration,
                "notes": result.notes,
            }
        )
        return
    for file, seed in zip(files, result.seeds, strict=True):
        print(f"{file} (seed {seed})")


def _picture(file: Path | None) -> Any:  # noqa: ANN401 - a PIL image, imported late
    if file is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file)
    except (OSError, UnidentifiedImageError) as error:
        message = f"{file} can't be read as a picture: {error}"
        raise InputError(message, fix="give a PNG or JPEG file") from error


def _add_demo(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser(
        "demo", help="bake the embedded model for each backend and compare the pictures"
    )
    command.add_argument("-o", "--output", type=Path, default=Path("demo"), metavar="DIR")
    command.set_defaults(run=_demo)
    return command


def _demo(options: argparse.Namespace) -> None:
    from . import demo

    artifacts = demo.bake(options.output, _say)
    rows = demo.run(options.output, artifacts, _say)
    if not options.json:
        print(demo.table(rows), f"\npictures: {options.output / 'contact-sheet.png'}\n", sep="\n", flush=True)
    verdict = demo.bench(options.output, artifacts)
    if options.json:
        _print_json({"pictures": rows, "verdict": verdict})
        return
    print("", *verdict, f"\nreport: {options.output / 'bench' / 'report.html'}", sep="\n")


def _quiet_libraries() -> None:
    """Keep what libraries say of themselves off the terminal; without importing them, so that errors come at once."""
    import warnings

    warnings.filterwarnings("ignore")
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


if __name__ == "__main__":
    sys.exit(main())
