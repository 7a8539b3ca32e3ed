"""Models from the hub: the real client, against a server on this machine that answers as the hub does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bakeoff.bake import export
from bakeoff.errors import SourceError, UsageError
from bakeoff.recipe import parse
from bakeoff.sources import hub
from bakeoff.sources.source import Source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHILD = """
import json, sys
from bakeoff.errors import BakeoffError
from bakeoff.sources.source import Source
found = []
for arguments in json.loads(sys.argv[1]):
    try:
        source = Source.open(**arguments)
        files = [file.name for module in source.modules for file in source.checkpoint(module).files]
        found.append({"id": source.id, "revision": source.revision, "folder": str(source.folder), "files": files})
    except BakeoffError as error:
        found.append({"error": type(error).__name__, "message": error.message, "fix": error.fix})
print(json.dumps(found))
"""
ANSWERS = {
    "owner/gated": (403, "GatedRepo"),
    "owner/missing": (401, "RepoNotFound"),
    "owner/disabled": (403, "DisabledRepo"),
}
"""Model -> status and code of what it answers to everything."""


class Hub(BaseHTTPRequestHandler):
    """Serves `server.folder` as owner/open; owner/asks lets its files be listed, but not read."""

    def do_GET(self):
        path = self.path.partition("?")[0].lstrip("/").removeprefix("api/models/")
        model = "/".join(path.split("/")[:2])
        rest = path.removeprefix(model).lstrip("/")
        if model in ANSWERS:
            self.refuse(*ANSWERS[model])
        elif model not in {"owner/open", "owner/asks"}:
            self.refuse(404, "RepoNotFound")
        elif rest.startswith("tree/"):
            self.answer([self.listed(file) for file in sorted(self.server.folder.rglob("*")) if file.is_file()])
        elif rest.startswith("resolve/"):
            self.send_file(self.server.folder / rest.split("/", 2)[2], gated=model == "owner/asks")
        elif rest in {"", "revision/main", f"revision/{COMMIT}"}:
            self.answer({"id": model, "sha": COMMIT, "siblings": []})
        else:
            self.refuse(404, "RevisionNotFound")

    do_HEAD = do_GET  # noqa: N815 - the name that the server looks for

    def listed(self, file):
        name = file.relative_to(self.server.folder).as_posix()
        return {
            "type": "file",
            "path": name,
            "size": file.stat().st_size,
            "oid": hashlib.sha256(name.encode()).hexdigest()[:40],
        }

    def send_file(self, file, gated):
        if gated:
            self.refuse(403, "GatedRepo")
        else:
            etag = hashlib.sha256(str(file).encode()).hexdigest()[:40]
            self.answer(file.read_bytes(), {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def refuse(self, status, code):
        self.answer({"error": code}, {"X-Error-Code": code, "X-Error-Message": code}, status)

    def answer(self, content, headers=None, status=200):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """A tiny pipeline whose UNet is there as fp16 alone, with what nobody wants beside it; its server's address."""
    folder = Path(shutil.copytree(tiny("stable-diffusion"), tmp_path_factory.mktemp("served") / "open"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    )
    shutil.copytree(folder / "vae", folder / "vae_old")
    for name in (
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "whole.safetensors",
    ):
        (folder / name).write_bytes(b"unwanted")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = folder
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


def open_all(models, cache, endpoint):
    """Open models in a process of its own, whose hub is at the endpoint."""
    plain = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    own = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-P", "-c", CHILD, json.dumps(models)]
    done = subprocess.run(command, env={**plain, **own}, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def opened(served, cache):
    """What a hub that can be reached answers."""
    names = ("open", "gated", "asks", "missing", "none", "disabled")
    models = [{"model": f"owner/{name}"} for name in names] + [{"model": "owner/open@no-such"}]
    return dict(zip((*names, "revision"), open_all(models, cache, served), strict=True))


@pytest.fixture
def offline(opened, cache, monkeypatch):
    """This process, which has no hub, with the cache that the other one filled."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_configs_and_safetensors_are_fetched_and_nothing_else(opened, cache):
    assert opened["open"]["revision"] == COMMIT
    assert opened["open"]["files"] == ["model.safetensors", *["diffusion_pytorch_model.safetensors"] * 2]
    there = {file.name for file in Path(opened["open"]["folder"]).rglob("*") if file.is_file()}
    assert "diffusion_pytorch_model.fp16.safetensors" in there
    assert not there & {"whole.safetensors", "diffusion_pytorch_model.bin"}
    assert not (Path(opened["open"]["folder"]) / "vae" / "diffusion_pytorch_model.fp16.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "says", "fix"),
    [
        ("gated", "owner/gated is gated", "https://huggingface.co/owner/gated, then: hf auth login"),
        ("asks", "owner/asks is gated", "https://huggingface.co/owner/asks, then: hf auth login"),
        ("missing", "no model owner/missing", "hf auth login"),
        ("none", "no model owner/none", "https://huggingface.co/owner/none"),
        ("disabled", "owner/disabled couldn't be had", "https://huggingface.co/owner/disabled"),
        ("revision", "owner/open has no revision 'no-such'", "https://huggingface.co/owner/open/commits/main"),
    ],
)
def test_what_the_hub_refuses_is_said(opened, name, says, fix):
    assert opened[name]["error"] == "SourceError"
    assert says in opened[name]["message"]
    assert fix in opened[name]["fix"]


def test_a_hub_that_cannot_be_reached(opened, cache):
    models = [{"model": "owner/open"}, {"model": "owner/other", "revision": "v2"}]
    cached, other = open_all(models, cache, "http://127.0.0.1:9")
    assert cached == opened["open"]
    assert "owner/other at v2 is not in the cache" in other["message"]
    assert "the hub can't be reached" in other["message"]
    assert other["fix"].endswith("hf download owner/other --revision v2")


@pytest.mark.parametrize("given", [{}, {"revision": "main"}, {"revision": COMMIT}])
def test_offline_the_cache_is_used_and_the_commit_recorded(offline, tmp_path, given):
    artifact = export("owner/open", tmp_path / "artifact", parse("null:fp32")[0], prove=False, **given)
    assert artifact.manifest.source == {"id": "owner/open", "revision": COMMIT}


def test_a_revision_may_be_a_part_of_the_id(offline):
    assert Source.open(f"owner/open@{COMMIT}").revision == COMMIT
    with pytest.raises(UsageError, match="got the revisions"):
        Source.open("owner/open@main", "other")
    with pytest.raises(SourceError, match="owner/open at other is not in the cache.*HF_HUB_OFFLINE is set"):
        Source.open("owner/open", "other")


@pytest.mark.parametrize(("module", "needed"), [("vae_old", False), ("vae", True)])
def test_a_cache_without_all_files_serves_if_it_has_what_is_needed(offline, tmp_path, module, needed):
    """Diffusers leaves out what a pipeline doesn't name, and a download may stop half-way."""
    file = offline / "models--owner--open" / "snapshots" / COMMIT / module / "diffusion_pytorch_model.safetensors"
    target = file.readlink()
    file.unlink()
    try:
        if needed:
            with pytest.raises(SourceError, match=f"the cache has owner/open without the weights of {module}"):
                Source.open("owner/open")
        else:
            assert Source.open("owner/open").revision == COMMIT
    finally:
        file.symlink_to(target)


def test_a_controlnet_of_the_hub_is_in_the_manifest(offline, tiny, tmp_path):
    storage = offline / "models--owner--edges"
    (storage / "refs").mkdir(parents=True, exist_ok=True)
    (storage / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny("stable-diffusion", "controlnet") / "controlnet", storage / "snapshots" / COMMIT)
    artifact = export(
        str(tiny("stable-diffusion")),
        tmp_path / "artifact",
        parse("null:fp32")[0],
        prove=False,
        controlnet="owner/edges@main",
    )
    assert artifact.manifest.source["controlnet"] == {"id": "owner/edges", "revision": COMMIT}


@pytest.mark.parametrize("model", ["a/b/c", "./a/b", "/a/b", "~/b", "ab"])
def test_what_is_no_id(model):
    assert not hub.is_id(model)
