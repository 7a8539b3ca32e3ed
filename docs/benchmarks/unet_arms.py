"""The arms of `unet_precisions.py`: each made once, in a child process whose memory is watched, and opened and kept."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bakeoff.components.component import Sizes
from bakeoff.components.modules.unet_2d_condition import UNet2DCondition
from bakeoff.memory import Watch, in_child, rss_bytes
from bakeoff.models import fullsize

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch import Tensor

    from bakeoff.recipe import PartRecipe, Placement
    from bakeoff.runtimes.runtime import Runtime

HERE = Path(__file__).parent
TOOK = "took.json"
PART = "unet"
SIZES = {"sd-1.5": Sizes(2, 64, 64, 77), "sdxl": Sizes(2, 128, 128, 77)}
CALIBRATED = Sizes(2, 24, 24, 77)
TIMESTEPS = (981.0, 721.0, 461.0, 201.0)
"""Of the steps that are calibrated on."""
_CHANNELS = {2: -1, 3: -1, 4: 1}
"""Dimensions of an activation -> which of them is that of its channels."""
PLAIN = "plain-"
"""What the name of an arm starts with that OpenVINO compiles as the file is, without what our runtime changes for it."""
RUNTIME_PRECISIONS = {
    "nncf-int8": "int8",
    "nncf-w8a8": "w8a8",
    f"{PLAIN}nncf-w8a8": "w8a8",
    "ort-dynamic": "w8a8-dynamic",
    "ort-static": "w8a8",
}
"""One call of another tool -> the recipe that its file is opened like."""


@dataclass(frozen=True)
class Arm:
    """`backend` and a precision of recipes, or a one-call quantization of `RUNTIME_PRECISIONS`."""

    backend: str
    precision: str
    options: str = ""
    """Of a recipe or a placement, as in the short form: `+outputs=rounded`, `+attention=math`."""

    @classmethod
    def read(cls, backend: str, text: str) -> Arm:
        precision, plus, options = text.partition("+")
        return cls(backend, precision, plus + options)

    @property
    def name(self) -> str:
        return f"{self.backend}:{self.precision}"

    def parsed(self) -> tuple[PartRecipe, Placement]:
        from bakeoff.recipe import parse

        recipe, placement = parse(f"{self.backend}:{self.opened_as}{self.options}")
        return recipe.default, placement

    def folder(self, source: Path, work: Path) -> Path:
        """Return the arm's folder, which arms share that differ in their placement alone."""
        options = self.parsed()[0].options
        return work / "-".join([source.name, self.backend, self.made_as, *map("=".join, sorted(options.items()))])

    @property
    def made_as(self) -> str:
        return self.precision.removeprefix(PLAIN)

    @property
    def opened_as(self) -> str:
        return RUNTIME_PRECISIONS.get(self.precision, self.precision)


def source(model: str, work: Path) -> Path:
    """Return the folder of the UNet's random float32 weights, written on the spot unless it is there."""
    folder = work / model
    if not folder.exists():
        fullsize.write_module(*fullsize.config(model, PART), folder)
    return folder


def inputs(folder: Path, sizes: Sizes, seed: int, timestep: float) -> dict[str, Tensor]:
    import torch

    made = UNet2DCondition().example(_config(folder), sizes, seed)
    return {**made, "timestep": torch.tensor(timestep)}


def calibration(folder: Path, work: Path) -> Path:
    """Watch the UNet's layers in eager float32; return a folder with what was seen and given, and what that took."""
    made = work / f"{folder.name}-calibration"
    if not made.exists():
        started = time.perf_counter()
        arguments = {"folder": str(folder), "output": str(made)}
        _, peak = in_child("unet_arms:calibrate_here", arguments, extra_path=str(HERE))
        took = {
            "calibration_seconds": round(time.perf_counter() - started, 1),
            "calibration_peak_anon_bytes": peak.anon_bytes,
        }
        (made / TOOK).write_text(json.dumps(took))
    return made


def calibrate_here(folder: str, output: str) -> None:
    import numpy as np

    from bakeoff.quantize.calibration import Calibration
    from bakeoff.tuning.calibrate import watch

    seen, given = Calibration({"model": Path(folder).name}), {}
    with opened(Arm("torch", "fp32"), Path(folder), Path(folder), threads=1) as runtime:
        watch(seen, PART, runtime.module())
        for seed, timestep in enumerate(TIMESTEPS):
            step = inputs(Path(folder), CALIBRATED, seed, timestep)
            runtime.run(step)
            given |= {f"{seed}.{name}": tensor.numpy() for name, tensor in step.items()}
    Path(output).mkdir()
    seen.save(Path(output) / "seen.safetensors")
    np.savez(Path(output) / "inputs.npz", **given)


def make(arm: Arm, folder: Path, work: Path, nncf_python: str | None) -> dict[str, Any]:
    """Make an arm's folder unless it is there; return what that took, which stays beside it."""
    output = arm.folder(folder, work)
    told = output.with_name(f"{output.name}.json")
    if told.exists():
        found: dict[str, Any] = json.loads(told.read_text())
        return found
    calibrated = calibration(folder, work)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    shutil.copy(folder / "config.json", output)
    started = time.perf_counter()
    if arm.made_as.startswith("nncf"):
        peak = _by_nncf(arm, folder, work, str(nncf_python))
    elif arm.precision.startswith("ort"):
        arguments = {"source": str(Arm("onnx", "fp32").folder(folder, work)), "output": str(output)}
        arguments |= {"kind": arm.precision, "inputs": str(calibrated / "inputs.npz")}
        _, made = in_child("ort_quantize:quantize_here", arguments, extra_path=str(HERE))
        peak = made.anon_bytes
    else:
        arguments = {"source": str(folder), "output": str(output), "arm": asdict(arm)}
        arguments |= {"seen": str(calibrated / "seen.safetensors")}
        _, made = in_child("unet_arms:lower_here", arguments, extra_path=str(HERE))
        peak = made.anon_bytes
    row = {
        "export_seconds": round(time.perf_counter() - started, 1),
        "export_peak_anon_bytes": peak,
        "disk_bytes": sum(file.stat().st_size for file in output.iterdir()),
    }
    if arm.precision == "w8a8" and (calibrated / TOOK).exists():
        row |= json.loads((calibrated / TOOK).read_text())
    told.write_text(json.dumps(row))
    return row


def _by_nncf(arm: Arm, folder: Path, work: Path, python: str) -> int:
    """Run NNCF in its own environment on the fp32 IR; return its peak of anonymous memory."""
    command = [python, str(HERE / "nncf_quantize.py")]
    command += [str(a.folder(folder, work) / "openvino_model.xml") for a in (Arm("openvino", "fp32"), arm)]
    if arm.opened_as == "w8a8":
        command.append(str(calibration(folder, work) / "inputs.npz"))
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=log, text=True) as process,  # noqa: S603 - our own script
        Watch(process.pid) as watch,
    ):
        if process.wait() == -signal.SIGKILL:
            message = f"killed for memory, of which it held {watch.peak.anon_bytes / 1e9:.1f} GB"
            raise MemoryError(message)
        if process.returncode:
            log.seek(0)
            message = f"NNCF failed: {log.read()[-2000:]}"
            raise SystemExit(message)
    return watch.peak.anon_bytes


def lower_here(source: str, output: str, arm: dict[str, str], seen: str) -> None:
    """Export the UNet in this process."""
    from bakeoff import plugins
    from bakeoff.bake import activations
    from bakeoff.exporters.capture import module_on_hollow, on_hollow
    from bakeoff.exporters.exporter import Subject
    from bakeoff.quantize.calibration import Calibration
    from bakeoff.weights import Checkpoint

    made, folder, config = UNet2DCondition(), Path(source), _config(Path(source))
    recipe, _ = Arm(**arm).parsed()
    checkpoint = Checkpoint.open(folder)
    found = Calibration.open(Path(seen))
    with tempfile.TemporaryDirectory(dir=Path(output).parent) as work:
        subject = Subject(
            part=PART,
            mixture=plugins.mixture(recipe.precision),
            activations=activations(found, PART, recipe, checkpoint) if recipe.precision == "w8a8" else {},
            inputs=made.inputs(config),
            outputs=made.outputs(config),
            source=folder,
            checkpoint=checkpoint,
            capture=on_hollow(PART, made, config, folder, Path(work) / "hollow"),
            module=module_on_hollow(made, folder, Path(work) / "hollow"),
            weights="copy",
            options=recipe.options,
        )
        plugins.exporter(recipe.backend).lower(subject, Path(output))


class Resident:
    """An arm in a process of its own, opened once, which takes a step at once and waits between later ones."""

    def __init__(self, arm: Arm, folder: Path, work: Path, model: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        given = (there, arm, folder, arm.folder(folder, work), SIZES[model], threads)
        self._process = context.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        opened: dict[str, Any] = self._here.recv()
        self.first = self._watched()
        """Of the step that it took at once, what `step` returns."""
        self.opened = opened | self._here.recv()
        self.output: Tensor = self._here.recv()

    def step(self) -> tuple[float, int]:
        """Take one step; return its seconds and the most anonymous memory that the process held meanwhile."""
        self._here.send("step")
        return self._watched()

    def _watched(self) -> tuple[float, int]:
        with Watch(self._process.pid) as watch:
            seconds = float(self._here.recv())
        return seconds, watch.peak.anon_bytes

    def close(self) -> None:
        self._here.send("end")
        self._process.join()


def _serve(connection: Connection, arm: Arm, source: Path, folder: Path, sizes: Sizes, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    given = inputs(source, sizes, 7, 501.0)
    before = rss_bytes("RssAnon")
    started = time.perf_counter()
    with opened(arm, source, folder, threads) as runtime:
        took = round(time.perf_counter() - started, 1)
        fed = fed_to(runtime, given)
        connection.send({"open_seconds": took, "before_anon_bytes": before, "ran": runtime.configuration})
        output = _timed(connection, runtime, fed)
        connection.send({"opened_anon_bytes": rss_bytes("RssAnon") - before})
        connection.send(output.numpy())
        while connection.recv() == "step":
            _timed(connection, runtime, fed)


def fed_to(runtime: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ANN401 - some runtime
    """Return inputs in the shapes that a runtime takes, of whose ports a timestep's has no or one dimension."""
    return {
        port.name: given[port.name].reshape(port.shape({})) if not port.rank else given[port.name]
        for port in runtime.inputs
    }


def _timed(connection: Connection, runtime: Any, fed: dict[str, Tensor]) -> Tensor:  # noqa: ANN401 - some runtime
    """Take a step, tell its seconds and return what it predicted."""
    started = time.perf_counter()
    output: Tensor = runtime.run(fed)["out_sample"]
    connection.send(time.perf_counter() - started)
    return output


def opened(arm: Arm, source: Path, folder: Path, threads: int) -> Any:  # noqa: ANN401 - some runtime
    import torch

    from bakeoff import plugins
    from bakeoff.runtimes.runtime import PartFiles

    made, config = UNet2DCondition(), _config(source)
    files = PartFiles(
        name=PART,
        folder=folder,
        precision=arm.opened_as,
        inputs=made.inputs(config),
        outputs=made.outputs(config),
        build=lambda dtype: made.flat(made.load(folder, getattr(torch, dtype))).eval(),
    )
    runtime = as_it_is() if arm.precision.startswith(PLAIN) else plugins.runtime(arm.backend)
    return runtime(files, replace(arm.parsed()[1], device="cpu", threads=threads))


def as_it_is() -> type[Runtime]:
    """Return OpenVINO's runtime without what ours changes of a model before it is compiled."""
    from bakeoff.runtimes.openvino import OpenVINORuntime

    class AsItIs(OpenVINORuntime):
        def _copy(self, *, split: bool) -> Any:  # noqa: ANN401, ARG002 - as its
            return self._model.clone()

    return AsItIs


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
