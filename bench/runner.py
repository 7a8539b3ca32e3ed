"""Runs an experiment: bakes what isn't there, takes pictures and judges them, then memory and stages, then the blocks."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import hardware
from ..artifact import MANIFEST, Artifact
from ..errors import BakeoffError, UsageError
from ..hardware import usable_cores
from ..memory import in_child
from ..reports.record import REFERENCE
from . import measurements
from .lineup import UNTIMED, Entry, entries, lineup, precisions
from .metrics import METRICS
from .opening import Opener, size_name
from .outlook import Outlook
from .process import ArmFailedError
from .record import open_record, refuse_other_work, write_record
from .work import prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from .experiment import Arm, Experiment

    Progress = Callable[[str, int, int], None]
    """Called with what is being done, how many jobs are done, and of how many."""


_FIGURES = "bakeoff.bench.quality:figures_of_all"
_PICTURES_A_CHILD = 512
"""Fewer are judged sooner than another process has started."""


def run(experiment: Experiment, folder: Path, progress: Progress = lambda *_: None, jobs: int = 1) -> dict[str, Any]:
    """Run an experiment, or go on with it, and return its record; `record.json` and the pictures are in `folder`.

    Args:
        experiment: what was declared.
        folder: where its record is, or will be.
        progress: told of each step.
        jobs: with more than one, so many arms draw their judged pictures at once, which are judged before anything is
            timed. For machines that have room for so many: each arm has the experiment's threads.

    Raises:
        UsageError: the folder holds another experiment, or the experiment can't be meant.
    """
    if jobs < 1:
        message = f"got {jobs} jobs, expected 1 or more"
        raise UsageError(message, fix="--jobs 2")
    folder.mkdir(parents=True, exist_ok=True)
    record = open_record(folder, experiment)
    with Opener(experiment, folder, record) as opener:
        return _Run(opener, record, progress, jobs).all()


class _Run:
    def __init__(self, opener: Opener, record: dict[str, Any], progress: Progress, jobs: int = 1) -> None:
        self._opener = opener
        self._declared = opener.declared
        self._folder = opener.folder
        self._record = record
        self._report = progress
        self._jobs = jobs
        self._entries = entries(self._declared)
        self._timed = [entry for entry in self._entries if entry.arm.name not in UNTIMED]
        self._arms = lineup(self._declared)
        self._done = 0
        self._total = len(self._arms) + len(self._entries) + len(self._timed) * self._declared.blocks

    def all(self) -> dict[str, Any]:
        drawn = prompts(self._declared.prompts, self._prompt_count())
        found = {"machine": hardware.describe(), "prompts": [{"id": each, "text": text} for each, text in drawn]}
        refuse_other_work(self._folder, self._record, found)
        self._record.update(found)
        self._record["command"] = [Path(sys.argv[0]).name, *sys.argv[1:]]
        self._check_metrics()
        self._draw_latents()
        for arm in self._arms:
            self._bake(arm)
        if self._jobs > 1:
            self._draw_at_once()
            self._judge()
        for entry in self._entries:
            self._profile(entry)
        self._judge()
        for entry in self._entries:
            self._share(entry)
        self._run_blocks()
        return self._record

    def _prompt_count(self) -> int:
        return max(self._declared.timed_prompts, self._declared.quality_prompts)

    def _progress(self, text: str) -> None:
        self._report(text, self._done, self._total)

    def _write(self) -> None:
        write_record(self._folder, self._record)

    def _check_metrics(self) -> None:
        """Note what is known of every metric, and see that the weights of those that are wanted can be opened."""
        wanted = self._declared.metrics
        self._record["metrics"] = {name: asdict(fact) | {"weights": wanted.get(name)} for name, fact in METRICS.items()}
        if wanted:
            self._progress(f"opening the weights of {', '.join(wanted)}")
            in_child("bakeoff.bench.quality:check_metrics", {"metrics": wanted})

    def _draw_latents(self) -> None:
        drawn = self._record.setdefault("latents", {})
        ids = [prompt["id"] for prompt in self._record["prompts"]]
        for point in self._declared.points().values():
            name = size_name(point)
            file = self._folder / "latents" / f"{name}.npy"
            if name not in drawn or not file.exists():
                self._progress(f"drawing latents for {name}")
                size = {"height": point.height, "width": point.width}
                arguments = {"model": point.model, "config": point.config, "ids": ids, **size}
                drawn[name], _ = in_child("bakeoff.bench.work:write_latents", {**arguments, "file": str(file)})
                self._write()

    def _bake(self, arm: Arm) -> None:
        """Export an arm's recipe if that hasn't been done; note where its artifact lies and what it is."""
        self._done += 1
        about = self._record["arms"].setdefault(arm.name, {"entries": {}, "precisions": sorted(precisions(arm))})
        if arm.folder and "artifact" in about:
            self._refuse_other_artifact(arm, about["artifact"])
        if "artifact" in about or "failure" in about or arm.adapter:
            return
        twin = next((each for each in self._arms if (each.recipe, each.folder) == (arm.recipe, arm.folder)), arm)
        if twin.name != arm.name:  # added under another name, after the one that it is
            theirs = self._record["arms"][twin.name]
            about.update({name: dict(theirs[name]) for name in ("artifact", "failure") if name in theirs})
            return
        self._progress(f"baking {arm.name}")
        try:
            if arm.folder:
                about["artifact"], _ = in_child("bakeoff.bench.work:found", {"folder": arm.folder})
            else:
                names = ("model", "config", "calibration", "prove")
                arguments = {name: getattr(self._declared, name) for name in names} | {"recipe": arm.recipe}
                about["artifact"], peak = in_child("bakeoff.bench.work:bake", arguments)
                about["artifact"]["export_peak_anon_bytes"] = peak.anon_bytes
        except BakeoffError as error:
            about["failure"] = {"during": "export", "reason": error.message, "stderr": ""}
            self._progress(f"{arm.name} failed: {error.message}")
        self._write()

    def _refuse_other_artifact(self, arm: Arm, begun: dict[str, Any]) -> None:
        """Refuse to go on with a folder that was exported again since.

        Raises:
            UsageError: naming it.
        """
        folder = Path(begun["folder"])
        if (folder / MANIFEST).is_file() and Artifact.open(folder).manifest.key != begun["key"]:
            message = f"{folder} of {arm.name} is another artifact than the one that {self._folder} was begun with"
            raise UsageError(message, fix="give another folder with -o")

    def _about(self, entry: Entry) -> dict[str, Any]:
        about: dict[str, Any] = self._record["arms"][entry.arm.name]["entries"].setdefault(entry.name, {})
        return about

    def _failed(self, entry: Entry) -> bool:
        return "failure" in self._record["arms"][entry.arm.name] or "failure" in self._about(entry)

    def _draw_at_once(self) -> None:
        """Draw the judged pictures of several arms at a time, each in a worker of its own."""
        pending = [entry for entry in self._entries if not (entry.shares or self._failed(entry) or self._drawn(entry))]
        with ThreadPoolExecutor(self._jobs) as pool:
            drawing = {pool.submit(measurements.pictures, self._opener, entry): entry for entry in pending}
            try:
                self._progress(f"pictures of {len(pending)} arms, {self._jobs} at once")
                for future in as_completed(drawing):
                    self._progress(f"pictures: {drawing[future].name}")
                    self._take(drawing[future], "pictures", future.result)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._opener.kill()
                raise

    def _profile(self, entry: Entry) -> None:
        """Take all but the timed runs, unless the record has it."""
        self._done += 1
        if entry.shares or self._failed(entry) or self._profiled(entry):
            return
        if entry.arm.name in UNTIMED:
            self._progress(f"pictures: {entry.name}")
            self._take(entry, "pictures", partial(measurements.pictures, self._opener, entry))
            return
        drawn = self._drawn(entry)
        self._progress(f"{'memory, stages' if drawn else 'memory, stages, pictures'}: {entry.name}")
        self._take(entry, "profile", partial(measurements.profile, self._opener, entry, is_drawn=drawn))

    def _take(self, entry: Entry, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Keep what is measured of an entry; a failure is the entry's own."""
        try:
            self._about(entry).update(measure())
        except ArmFailedError as error:
            self._fail(entry, what, error)
        self._write()

    def _drawn(self, entry: Entry) -> bool:
        return "quality" in self._about(entry)

    def _profiled(self, entry: Entry) -> bool:
        return self._drawn(entry) and (entry.arm.name in UNTIMED or "memory" in self._about(entry))

    def _own(self, entry: Entry) -> Entry:
        """Return the entry that makes an entry's pictures: most often itself."""
        return next(each for each in self._entries if each.name == (entry.shares or entry.name))

    def _share(self, entry: Entry) -> None:
        """Give an entry the judged pictures, or the failure, of the one that it is under another name."""
        if entry.shares and not self._failed(entry) and "quality" not in self._about(entry):
            theirs = self._about(self._own(entry))
            self._about(entry).update({name: dict(theirs[name]) for name in ("quality", "failure") if name in theirs})
            self._write()

    def _fail(self, entry: Entry, during: str, error: ArmFailedError) -> None:
        self._opener.drop(entry)
        self._about(entry)["failure"] = {"during": during, "reason": error.reason, "stderr": error.stderr}
        self._progress(f"{entry.name} failed: {error.reason}")

    def _judge(self) -> None:
        """Compare each entry's pictures with the reference's, and with what their prompts say."""
        reference = {entry.point: self._own(entry) for entry in self._entries if entry.arm.name == REFERENCE}
        pending = [
            entry
            for entry in self._entries
            if not entry.shares
            and not self._failed(entry)
            and not self._failed(reference[entry.point])
            and "figures" not in self._about(entry)["quality"]
        ]
        if not pending:
            return
        self._progress(f"judging the pictures of {len(pending)} arms")
        found = self._figures([[self._files(each) for each in (reference[entry.point], entry)] for entry in pending])
        for entry, figures in zip(pending, found, strict=True):
            self._about(entry)["quality"]["figures"] = figures
        self._write()

    def _figures(self, pairs: list[list[dict[str, str | None]]]) -> list[dict[str, Any]]:
        """Return each pair's figures, from a child on every core where there are enough pictures for that."""
        texts = [prompt["text"] for prompt in self._record["prompts"][: self._declared.quality_prompts]]
        cores = usable_cores()
        worth = 1 if self._declared.metrics else len(pairs) * len(texts) // _PICTURES_A_CHILD  # weights are opened once
        count = max(1, min(cores, len(pairs), worth))
        common = {
            "prompts": texts,
            "scorer": self._declared.model == "shapes",
            "metrics": self._declared.metrics,
            "threads": cores // count,
        }

        def judge(some: list[Any]) -> list[dict[str, Any]]:
            figures: list[dict[str, Any]] = in_child(_FIGURES, {**common, "pairs": some})[0]
            return figures

        with ThreadPoolExecutor(count) as pool:
            dealt = list(pool.map(judge, [pairs[number::count] for number in range(count)]))
        return [dealt[number % count][number // count] for number in range(len(pairs))]

    def _files(self, entry: Entry) -> dict[str, str | None]:
        """Return where an entry's pictures lie, and its latents after each step if it could tell them."""
        traced = self._about(entry)["quality"]["traced"]
        return {
            "pictures": str(self._opener.file(entry)),
            "steps": str(self._opener.file(entry, "steps")) if traced else None,
        }

    def _run_blocks(self) -> None:
        finished = len(self._record["blocks"])
        self._done += finished * len(self._timed)
        outlook = Outlook()
        for block in range(finished, self._declared.blocks):
            self._run_block(block, outlook)

    def _run_block(self, block: int, outlook: Outlook) -> None:
        """Run every entry once, in an order of this block's own; write the record at its end."""
        order = [entry for entry in self._timed if not self._failed(entry)]
        random.Random(f"{self._declared.seed}/{block}").shuffle(order)
        runs: dict[str, Any] = {}
        for number, entry in enumerate(order, 1):
            left = (self._declared.blocks - block) * len(order) - number + 1
            at = f"block {block + 1} of {self._declared.blocks}, {number} of {len(order)}: {entry.name}"
            self._progress(at + outlook.text(left))
            try:
                runs[entry.name] = measurements.repetitions(self._opener, entry, block)
                outlook.took(runs[entry.name]["samples_s"])
            except ArmFailedError as error:
                self._fail(entry, f"block {block + 1}", error)
            self._done += 1
        self._record["blocks"].append({"index": block, "order": [entry.name for entry in order], "runs": runs})
        self._write()
