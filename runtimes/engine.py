"""One `generate()` over all backends."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .. import plugins
from ..errors import ParityError
from ..recipe import Placement
from ..sources.lora import Lora, deltas_of
from .callback import after_step, step_end
from .guidance import RowGuidance
from .idle import refuse_idle_options
from .image import as_pictures
from .keeper import Keeper
from .offload import DENOISING_STAGE, stage_of
from .opening import Baked, proved_elsewhere, read_folder
from .pipeline import build_pipeline, for_task
from .request import Limits, row_generator, task_of
from .station import Station

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor, nn

    from .callback import Callback
    from .request import Request

    Picture = Image | NDArray[np.uint8] | Sequence[Image | NDArray[np.uint8]]

DEFAULT_STEPS = 20
DEFAULT_MAX_BATCH = 8


@dataclass(frozen=True)
class Result:
    """Pictures and how they came about."""

    images: NDArray[np.uint8]
    """(B, H, W, 3)."""
    seeds: tuple[int, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Host clock, by part, and `total`."""
    notes: tuple[str, ...] = ()
    """What was done about memory, and what of it is lossy; that the proof is of another processor. In sentences."""


class Engine:
    """An opened artifact. A context manager; `generate` answers alike whatever the parts run on."""

    def __init__(self, baked: Baked, placement: Placement) -> None:
        self.folder = baked.folder
        self.family = baked.family
        self.recipe = baked.recipe
        self.proof = baked.proof
        self._proved_elsewhere = proved_elsewhere(baked)
        refuse_idle_options(baked, placement)
        self._baked = baked
        self._configs = {module: baked.config(module) for module in baked.modules}
        self._stations = {
            part.name: Station(baked, part, placement) for part in baked.family.parts if part.name in baked.parts
        }
        self._keeper = Keeper(self._stations, self._configs, placement)
        self._task = self.family.only(self._configs) or "text-to-image"
        self.pipeline = build_pipeline(baked, self._stations, self._task, _home(self._stations.values()))
        """A genuine Diffusers pipeline around the runtimes, for text-to-image unless the model is for another task."""
        self._others: dict[str, Any] = {}
        for hook in plugins.hooks("on_load"):
            hook(self)

    @property
    def proved(self) -> bool:
        return self.proof.get("status") == "proved"

    @property
    def task(self) -> str:
        """What the model is asked for where nothing is there to start from: text-to-image, or the one task that it can do."""
        return self._task

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels, for which no size is asked."""
        return self.family.default_size(self._configs)

    @property
    def configuration(self) -> dict[str, dict[str, Any]]:
        """What each part read back that has been open: device, threads, precision executed, fallback, what is lossy.

        `unloaded` says how often it was closed to make room, `mapped` whether its weights stayed in their files.
        """
        told = {name: station.configuration for name, station in self._stations.items()}
        return {name: found for name, found in told.items() if found is not None}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def set_loras(self, *loras: str) -> None:
        """Add LoRAs to the parts, instead of those that were added before; none takes all off.

        Parts whose weights change are closed, and opened with the next `generate`; the artifact stays as it is, so
        going back to earlier LoRAs gives the same pictures bit for bit.

        Args:
            loras: `FILE.safetensors` or `FILE.safetensors:SCALE` each, with Diffusers', PEFT's or Kohya's keys.

        Raises:
            UsageError: no such file, a LoRA that is baked in already, or parts whose backend takes none.
            PickleError: one is a pickle.
            SourceError: one isn't a LoRA, or is for another family.
        """
        opened = [Lora.open(text, self._baked) for text in loras]
        for lora in opened:
            self._baked.refuse_twice(lora)
        for station in self._stations.values():
            station.adapt(deltas_of(opened, station.part.module))

    def visit(self, visitor: Callable[[str, nn.Module], None]) -> None:
        """Call `visitor(part, module)` with the module of each torch part whenever one is opened."""
        self.close()
        for station in self._stations.values():
            station.visitor = visitor

    def watch(self, watcher: Callable[[str, Mapping[str, Tensor]], None] | None) -> None:
        """Call `watcher(part, inputs)` before each run of a part; None: no more. Inputs may lie on a device."""
        for station in self._stations.values():
            station.watcher = watcher

    @property
    def largest_bytes(self) -> int:
        """Predicted anonymous memory of the largest part: what there must be, parts taking turns."""
        return max((station.need.held_bytes for station in self._stations.values()), default=0)

    @property
    def all_bytes(self) -> int:
        """Predicted anonymous memory of all parts: what there must be, none giving way to another."""
        return sum(station.need.held_bytes for station in self._stations.values())

    def close(self) -> None:
        """Release the runtimes. Opening them again is a matter of the next `generate`."""
        for station in self._stations.values():
            station.close()

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompts: str | Sequence[str] | None = None,
        seeds: int | Sequence[int] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        steps: int = DEFAULT_STEPS,
        size: tuple[int, int] | None = None,
        latents: Tensor | None = None,
        image: Picture | None = None,
        mask: Picture | None = None,
        strength: float | None = None,
        control_image: Picture | None = None,
        control_scale: float = 1.0,
        callback: Callback | None = None,
        max_batch: int = DEFAULT_MAX_BATCH,
        stages: bool = False,
        progress: bool = False,
    ) -> Result:
        """Make a picture a prompt.

        Args:
            prompts: one, or a sequence.
            negative_prompts: one for all, or one a prompt.
            seeds: the first of consecutive ones, or one a prompt; random by default. Each prompt has its own CPU
                generator, so its picture doesn't depend on the others.
            guidance_scale: as in the family's own pipeline, whose default is the default; one for all, or one a prompt.
            steps: denoising steps.
            size: height and width in pixels; by default the image's, or the model's own.
            latents: unit-normal noise, float32, in the family's latent shape, instead of the seeds'.
            image: a picture to start from (image-to-image): PIL's, or (H, W, 3) uint8; one for all, or one a prompt.
            mask: of the image's size; what is white is painted anew (inpainting).
            strength: over 0 to 1, how much of the image is noised away; by default as in the family's own pipeline.
            control_image: what the ControlNet follows, where the artifact has one; resized where `size` differs.
            control_scale: how strongly it is followed.
            callback: called after each step with (step, timestep, this batch's latents, in host memory); False stops.
            max_batch: most prompts in one batch; 1 makes a prompt's picture bitwise independent of the others.
            stages: wait for devices after each part, so that `seconds` is exact by part.
            progress: show Diffusers' progress bar.

        Raises:
            ParityError: the picture has NaN or infinite pixels.
            InputError: an argument can't be meant as it is.
            Cancelled: the callback returned False.
        """
        scale = self.default_guidance(image, mask) if guidance_scale is None else guidance_scale
        request = Limits(self.family, self._configs).check(
            prompts,
            negative_prompts,
            seeds,
            scale,
            steps,
            size,
            latents,
            max_batch,
            image,
            mask,
            strength,
            control_image,
            control_scale,
        )
        pipeline = self.pipeline_for(request.task)
        for hook in plugins.hooks("before"):
            hook(request)
        started = time.perf_counter()
        for station in self._stations.values():
            station.seconds, station.stages = 0.0, stages
        pipeline.set_progress_bar_config(disable=not progress)
        images: dict[int, Any] = {}
        notes = dict.fromkeys(filter(None, [self._proved_elsewhere]))
        for rows in self._batches(request, max_batch):
            images |= zip(rows, self._make(pipeline, request.rows(rows), callback), strict=True)
            notes |= dict.fromkeys(self._keeper.notes)
        result = self._result(request, images, time.perf_counter() - started, tuple(notes))
        for hook in plugins.hooks("after"):
            hook(request, result)
        return result

    def _result(self, request: Request, images: dict[int, Any], total: float, notes: tuple[str, ...]) -> Result:
        import numpy as np

        seconds = {name: station.seconds for name, station in self._stations.items() if station.seconds}
        pictures = np.stack([images[row] for row in range(len(request.prompts))])
        return Result(pictures, request.seeds, {**seconds, "total": total}, notes)

    def _batches(self, request: Request, max_batch: int) -> list[list[int]]:
        """Cut the rows into batches; where rows can't differ in guidance, into batches of equal guidance."""
        groups: dict[float | None, list[int]] = defaultdict(list)
        for row, scale in enumerate(request.guidance):
            groups[None if self.family.row_guidance else scale].append(row)
        return [rows[i : i + max_batch] for rows in groups.values() for i in range(0, len(rows), max_batch)]

    def pipeline_for(self, task: str) -> Any:  # noqa: ANN401 - some Diffusers pipeline
        """Return the genuine Diffusers pipeline for a task, made of the same runtimes and the same scheduler."""
        if task == self._task:
            return self.pipeline
        if task not in self._others:
            self._others[task] = for_task(self.pipeline, self.family.pipeline_class(task))
        self._others[task].scheduler = self.pipeline.scheduler
        return self._others[task]

    def _make(self, pipeline: Any, request: Request, callback: Callback | None) -> NDArray[np.uint8]:  # noqa: ANN401
        """Run the pipeline on one batch; return (B, H, W, 3) uint8."""
        import numpy as np
        import torch

        arguments = {
            "prompt": list(request.prompts),
            "negative_prompt": self._negative_prompts(request),
            "height": request.height,
            "width": request.width,
            "num_inference_steps": request.steps,
            self.family.guidance_argument: self._guidance(request),
            "output_type": "np",
            "callback_on_step_end": step_end(callback),
            "callback": after_step(callback),
            **_start(request),
        }
        taken = inspect.signature(pipeline.__call__).parameters
        if request.control_image is not None:
            name = "control_image" if "control_image" in taken else "image"
            arguments |= {
                name: as_pictures(request.control_image),
                "controlnet_conditioning_scale": request.control_scale,
            }
        given = {name: value for name, value in arguments.items() if name in taken and value is not None}
        with torch.no_grad(), self._keeper.batch(pipeline, request), self._steady():
            pictures = pipeline(**given).images
        if not np.isfinite(pictures).all():
            message = "the pipeline produced NaN or infinite pixels"
            raise ParityError(message, fix="try a recipe in fp32; bakeoff verify --parity names a part that overflows")
        uint8: NDArray[np.uint8] = (pictures * 255).round().astype(np.uint8)
        return uint8

    @contextlib.contextmanager
    def _steady(self) -> Iterator[None]:
        """Let what the pipeline gives a part at every step, such as the prompt's embeddings, go to its device once."""
        for station in self._stations.values():
            station.in_batch(same=True)
        try:
            yield
        finally:
            for station in self._stations.values():
                station.in_batch(same=False)

    def _guidance(self, request: Request) -> float | RowGuidance:
        if len(set(request.guidance)) == 1:
            return request.guidance[0]
        return RowGuidance(request.guidance, self.family.unguided_at_most, request.latents.ndim)

    def _negative_prompts(self, request: Request) -> list[str] | None:
        if request.negative_prompts is not None:
            return list(request.negative_prompts)
        unguided = self.family.unconditional is None or max(request.guidance) <= self.family.unguided_at_most
        return None if unguided else [str(self.family.unconditional)] * len(request.prompts)

    def default_guidance(self, image: object = None, mask: object = None) -> float:
        """Return the guidance scale of the pipeline for a task, which is what is there to start from."""
        task = self._task if image is None else task_of(image, mask)
        name = self.family.pipelines.get(task)
        pipeline = self.pipeline_for(task) if name else self.pipeline
        default: float = inspect.signature(pipeline.__call__).parameters[self.family.guidance_argument].default
        return default


def _home(stations: Iterable[Station]) -> str:
    """Return where a pipeline's tensors lie: where all that denoises takes them, so that latents stay there between steps."""
    homes = {each.home for each in stations if stage_of(each.part) == DENOISING_STAGE}
    return homes.pop() if len(homes) == 1 else "cpu"


def _start(request: Request) -> dict[str, Any]:
    """Return what the pipeline starts from: latents, or a picture and the generators that noise it."""
    import torch

    if request.image is None:
        generators = [row_generator(seed, request.latents.shape[1:])[0] for seed in request.seeds]
        return {"latents": request.latents, "generator": generators}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
    started = {"image": request.image, "mask_image": request.mask, "strength": request.strength}
    return {"generator": generators, **{name: value for name, value in started.items() if value is not None}}


def load(
    folder: str | Path,
    *,
    device: str = "auto",
    devices: Mapping[str, str] | str = "",
    threads: int | None = None,
    compile: bool | str = False,  # noqa: A002 - torch's own word
    cuda_graphs: bool = False,
    attention: str | None = None,
    channels_last: str = "auto",
    static: bool = False,
    provider: str | None = None,
    provider_options: str | None = None,
    offload: str = "auto",
    vae_tiling: str = "auto",
    vae_slicing: str = "auto",
    attention_slicing: int | str | None = None,
    token_merging: float = 0.0,
    loras: Sequence[str] = (),
) -> Engine:
    """Open an artifact, or an Optimum or Diffusers folder (which is `unproved`).

    Args:
        folder: the artifact.
        device: `cpu`, `cuda`, `rocm`, `xpu`, `mps`, `directml`, OpenVINO's `gpu` and `npu`, or `auto`.
        devices: part -> its device, where that is another: `{"vae_decoder": "cpu"}`, or `vae_decoder@cpu,…`.
        threads: CPU threads of every runtime; by default the physical cores that this process may use.
        compile: run torch parts through torch.compile: `full` (or True), or `regional`, their repeated blocks alone.
        cuda_graphs: record what torch or ONNX Runtime launches on a GPU once a shape, and replay it.
        attention: the kernel of attention: `flash`, `efficient`, `cudnn` or `math` in torch, `flash` or `math` in ONNX Runtime.
        channels_last: `on`, `off`, or `auto`: lay out convolutions of torch parts channels-last.
        static: compile OpenVINO parts for the shapes that they get; the last two sets of shapes are kept.
        provider: an execution provider for ONNX Runtime, by name.
        provider_options: that provider's options, as ONNX Runtime names them: `name=value;name=value`.
        offload: `none` keeps parts open; `parts` closes those that are done before others are opened; `mapped` also
            leaves weights in their files, where the runtime can; `blocks`: torch on a GPU, weights come from host memory
            a block at a time; `auto` does what the memory that is there asks for.
        vae_tiling: `on`, `off`, or `auto`: decode in tiles where a picture's activations wouldn't fit (lossy).
        vae_slicing: `on`, `off`, or `auto`: decode a picture at a time where a batch's wouldn't fit.
        attention_slicing: torch: heads (of batch × heads) whose attention is computed at a time, or `auto`.
        token_merging: torch: share of tokens that UNets merge before self-attention, to 0.75 (lossy).
        loras: added to the weights as in `Engine.set_loras`.

    Raises:
        ArtifactError: the folder can't be opened.
        CorruptError: a file is missing or has another size than was written.
        UnavailableError: a backend isn't installed.
        UsageError: an option would do nothing here.
    """
    placement = Placement(
        device=device,
        devices=devices,
        threads=threads,
        compile=compile,
        cuda_graphs=cuda_graphs,
        attention=attention,
        channels_last=channels_last,
        static=static,
        provider=provider,
        provider_options=provider_options,
        offload=offload,
        vae_tiling=vae_tiling,
        vae_slicing=vae_slicing,
        attention_slicing=attention_slicing,
        token_merging=token_merging,
    )
    engine = Engine(read_folder(Path(folder)), placement)
    engine.set_loras(*loras)
    return engine
