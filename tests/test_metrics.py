"""Metrics from stand-in weights: tiny and random, since what is tested is what is computed from them."""

import json
import math
import shutil
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeoff.bench.metrics import METRICS, known, open_metric
from bakeoff.bench.metrics import metric as metric_file
from bakeoff.errors import InputError, PickleError, SourceError, UsageError

PROMPTS = [
    "a large red circle on a white background",
    "a small blue star on a gray background",
    "a small yellow square on a black background",
]
SIDE = 32


def noise(count, *, seed=0, height=64, width=64):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def flat(count, *, seed=0):
    """Pictures of one colour each: unlike noise, to any network."""
    colors = np.random.default_rng(seed).integers(0, 256, (count, 1, 1, 3), dtype=np.uint8)
    return np.broadcast_to(colors, (count, 64, 64, 3)).copy()


def distorted(pictures, levels):
    wrong = np.random.default_rng(1).normal(0, levels, pictures.shape)
    return (pictures + wrong).clip(0, 255).astype(np.uint8)


def randomised(module):
    """Give a module weights at which no layer dies or explodes, and no two tensors are equal."""
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(0, math.sqrt(2 / tensor[0].numel()))
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "running_var")) else tensor.normal_(0, 0.1)
    return module.eval()


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    from bakeoff.bench.metrics.alexnet import AlexNet

    folder = tmp_path_factory.mktemp("alexnet")
    unneeded = {"classifier.1.weight": torch.zeros(2, 2)}
    save_file(randomised(AlexNet()).state_dict() | unneeded, folder / "alexnet.safetensors")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory, shapes):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    for file in (shapes / "tokenizer").iterdir():
        shutil.copy(file, folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=sizes | text,
        vision_config=sizes | {"image_size": SIDE, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    randomised(CLIPModel(config)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    from bakeoff.bench.metrics.inception import Inception

    folder = tmp_path_factory.mktemp("inception")
    save_file(randomised(Inception()).state_dict(), folder / "inception.safetensors")
    return folder


def blip_tensors():
    """Tensors under the names of ImageReward's authors, at a width of 32 and with 2 layers each."""
    torch.manual_seed(0)
    found = {}

    def layer(name, *shape):
        found[f"{name}.weight"] = torch.randn(*shape) / math.sqrt(math.prod(shape[1:]))
        found[f"{name}.bias"] = torch.randn(shape[0]) / 10

    def norm(name):
        found[f"{name}.weight"], found[f"{name}.bias"] = torch.rand(32) + 0.5, torch.randn(32) / 10

    see, read = "blip.visual_encoder", "blip.text_encoder"
    found[f"{see}.cls_token"], found[f"{see}.pos_embed"] = torch.randn(1, 1, 32), torch.randn(1, 17, 32)
    layer(f"{see}.patch_embed.proj", 32, 3, 8, 8)
    norm(f"{see}.norm")
    for block in (f"{see}.blocks.{i}" for i in range(2)):
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        layer(f"{block}.attn.qkv", 96, 32)
        layer(f"{block}.attn.proj", 32, 32)
        layer(f"{block}.mlp.fc1", 64, 32)
        layer(f"{block}.mlp.fc2", 32, 64)
    found[f"{read}.embeddings.word_embeddings.weight"] = torch.randn(len(VOCABULARY), 32)
    found[f"{read}.embeddings.position_embeddings.weight"] = torch.randn(40, 32)
    found[f"{read}.embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{read}.embeddings.LayerNorm")
    for block in (f"{read}.encoder.layer.{i}" for i in range(2)):
        for attention in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                layer(f"{block}.{attention}.self.{part}", 32, 32)
            layer(f"{block}.{attention}.output.dense", 32, 32)
            norm(f"{block}.{attention}.output.LayerNorm")
        layer(f"{block}.intermediate.dense", 64, 32)
        layer(f"{block}.output.dense", 32, 64)
        norm(f"{block}.output.LayerNorm")
    layer("blip.vision_proj", 8, 32)
    layer("blip.text_proj", 8, 32)
    for index, (inputs, outputs) in {0: (32, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        layer(f"mlp.layers.{index}", outputs, inputs)
    return found


VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *sorted({word for line in PROMPTS for word in line.split()}),
]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "model_type": "blip",
        "text_config": sizes | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 40, "bos_token_id": 2},
        "vision_config": sizes | {"image_size": SIDE, "patch_size": 8, "layer_norm_eps": 1e-6},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(blip_tensors(), folder / "ImageReward.safetensors")
    return folder


@pytest.fixture
def changed(tmp_path):
    """Copy a folder's weights with some of their tensors changed or, if None, left out."""

    def change(folder, changes):
        copy = shutil.copytree(folder, tmp_path / "changed")
        [file] = copy.glob("*.safetensors")
        found = load_file(file) | changes
        save_file({name: tensor for name, tensor in found.items() if tensor is not None}, file)
        return str(copy)

    return change


@pytest.fixture(scope="module")
def lpips(alexnet):
    return open_metric("lpips", str(alexnet))


@pytest.fixture(scope="module")
def clip_score(clip):
    return open_metric("clip_score", str(clip))


@pytest.fixture(scope="module")
def cmmd(clip):
    return open_metric("cmmd", str(clip))


@pytest.fixture(scope="module")
def image_reward(blip):
    return open_metric("image_reward", str(blip))


class TestOpening:
    def test_facts_need_neither_torch_nor_transformers(self):
        code = "import sys; from bakeoff.bench.metrics import METRICS, known; assert known() == list(METRICS)"
        code += "; print([m for m in ('torch', 'transformers', 'numpy', 'torchmetrics') if m in sys.modules])"
        found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == "[]"

    @pytest.mark.parametrize("name", METRICS)
    def test_each_has_the_name_that_opens_it(self, name):
        from bakeoff.bench.metrics.metric import Metric

        opened = getattr(import_module(f"bakeoff.bench.metrics.{name}"), METRICS[name].class_name)
        assert issubclass(opened, Metric)
        assert opened.name == name

    def test_distributions_need_many_pictures(self):
        assert {name: METRICS[name].fewest for name in known() if METRICS[name].kind == "distribution"} == {
            "cmmd": 1000,
            "fid": 5000,
        }

    def test_an_unknown_metric(self):
        with pytest.raises(UsageError, match="unknown metric 'clipscore'. Did you mean 'clip_score'?"):
            open_metric("clipscore", ".")

    @pytest.mark.parametrize("name", METRICS)
    def test_an_empty_folder(self, tmp_path, name):
        with pytest.raises(UsageError, match="has nothing, expected") as caught:
            open_metric(name, str(tmp_path))
        assert f"into {tmp_path}" in caught.value.fix

    @pytest.mark.parametrize("weights", ["nowhere", "./no/where", "a/b/c"])
    def test_no_folder(self, weights):
        with pytest.raises(UsageError, match="expected a folder or a hub id"):
            open_metric("lpips", weights)

    def test_a_file_in_place_of_its_folder(self, alexnet):
        with pytest.raises(UsageError) as caught:
            open_metric("lpips", str(alexnet / "alexnet.safetensors"))
        assert caught.value.fix == f"give the folder {alexnet}"

    def test_a_hub_that_cannot_be_reached(self):
        with pytest.raises(SourceError, match="owner/name is not in the cache"):
            open_metric("clip_score", "owner/name")

    def test_no_pickle_is_run(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        torch.save({"features.0.weight": Payload()}, tmp_path / "alexnet.pth")
        with pytest.raises(PickleError):
            open_metric("lpips", str(tmp_path))
        assert not (tmp_path / "ran").exists()

    def test_a_pickle_of_tensors_alone(self, alexnet, tmp_path):
        torch.save(load_file(alexnet / "alexnet.safetensors"), tmp_path / "alexnet.pth")
        a, b = noise(1), noise(1, seed=1)
        expected = open_metric("lpips", str(alexnet)).values(a, b, [""])
        assert open_metric("lpips", str(tmp_path)).values(a, b, [""]) == expected

    @pytest.mark.parametrize("content", [b"", b"no weights"])
    @pytest.mark.parametrize("name", ["alexnet.safetensors", "alexnet.pth"])
    def test_a_broken_file(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=name):
            open_metric("lpips", str(tmp_path))


class TestInput:
    @pytest.mark.parametrize(
        "pictures",
        [
            noise(1).astype(np.float32),
            noise(1)[0],
            noise(1)[..., :1],
            noise(0),
            noise(1, height=63),
            noise(1, width=80),
        ],
        ids=["float", "one", "gray", "none", "small", "another size"],
    )
    def test_pictures(self, lpips, pictures):
        with pytest.raises(InputError, match="expected"):
            lpips.values(noise(1), pictures, [""])

    def test_prompts(self, lpips):
        with pytest.raises(InputError, match="got 2 prompts for 1 pictures"):
            lpips.values(noise(1), noise(1), ["", ""])


class TestLpips:
    def test_equal_pictures_are_0_apart(self, lpips):
        assert lpips.values(noise(2), noise(2), PROMPTS[:2]) == [0, 0]

    def test_it_grows_with_distortion(self, lpips):
        pictures = flat(2)
        found = [lpips.values(pictures, distorted(pictures, levels), ["", ""]) for levels in (2, 10, 50)]
        assert (np.diff(found, axis=0) > 0).all()

    def test_it_is_symmetric(self, lpips):
        a, b = noise(2), flat(2)
        assert lpips.values(a, b, ["", ""]) == pytest.approx(lpips.values(b, a, ["", ""]))

    def test_torchmetrics_finds_the_same(self, lpips, monkeypatch):
        from torchmetrics.functional.image import lpips as reference

        features = lpips._network.features
        monkeypatch.setattr(reference, "_get_tv_model_features", lambda *_, **__: features)
        a, b = noise(3, height=64, width=96), distorted(noise(3, height=64, width=96), 40)
        planes = [torch.tensor(pictures).permute(0, 3, 1, 2) / 255 for pictures in (a, b)]
        expected = reference._LPIPS()(*planes, normalize=True).flatten().tolist()
        assert lpips.values(a, b, PROMPTS) == pytest.approx(expected, rel=1e-4)

    def test_linear_weights_of_ones_own(self, lpips, alexnet, changed):
        own = {name: 2 * tensor for name, tensor in lpips._linear.state_dict().items()}
        doubled = open_metric("lpips", changed(alexnet, own))
        a, b = noise(1), noise(1, seed=1)
        assert doubled.values(a, b, [""]) == pytest.approx([2 * lpips.values(a, b, [""])[0]])

    def test_a_missing_layer(self, alexnet, changed):
        with pytest.raises(SourceError, match="lacks features.3.bias"):
            open_metric("lpips", changed(alexnet, {"features.3.bias": None}))


class TestClip:
    def cosines(self, folder, pictures, prompts):
        """One at a time, and with nothing of ours."""
        from PIL import Image
        from transformers import CLIPModel, CLIPTokenizer

        model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
        mean, deviation = (
            np.float32([0.48145466, 0.4578275, 0.40821073]),
            np.float32([0.26862954, 0.26130258, 0.27577711]),
        )
        found = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            small = np.asarray(
                Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32
            )
            pixels = torch.tensor((small / 255 - mean) / deviation).permute(2, 0, 1)[None]
            with torch.inference_mode():
                out = model(pixel_values=pixels, **tokenizer([prompt], return_tensors="pt"))
            found.append(float(torch.cosine_similarity(out.image_embeds, out.text_embeds)))
        return found

    def test_clip_score_is_the_cosine_computed_by_hand(self, clip, clip_score):
        pictures = np.concatenate([noise(6), flat(6)])
        cosines = self.cosines(clip, pictures, PROMPTS * 4)
        assert min(cosines) < 0 < max(cosines)
        expected = [100 * max(cosine, 0) for cosine in cosines]
        assert clip_score.values(pictures, pictures, PROMPTS * 4) == pytest.approx(expected, abs=1e-3)

    def test_hpsv2_keeps_its_sign(self, clip):
        pictures = np.concatenate([noise(6), flat(6)])
        expected = [100 * cosine for cosine in self.cosines(clip, pictures, PROMPTS * 4)]
        assert open_metric("hpsv2", str(clip)).values(pictures, pictures, PROMPTS * 4) == pytest.approx(
            expected, abs=1e-3
        )

    def test_hpsv2_sees_all_of_an_oblong_picture(self, clip):
        hpsv2 = open_metric("hpsv2", str(clip))
        oblong = noise(1, height=64, width=96)
        square = np.zeros((1, 96, 96, 3), np.uint8)
        square[:, 16:80] = oblong
        assert hpsv2.values(oblong, oblong, PROMPTS[:1]) == hpsv2.values(square, square, PROMPTS[:1])

    def test_each_picture_is_held_against_its_own_prompt(self, clip, monkeypatch):
        metric = open_metric("hpsv2", str(clip))
        pictures = np.concatenate([noise(3), flat(3)])
        alone = [metric.values(pictures[[i]], pictures[[i]], [PROMPTS[i % 3]])[0] for i in range(6)]
        monkeypatch.setattr(metric_file, "BATCH", 4)
        assert len(set(alone)) == 6
        assert metric.values(pictures, pictures, PROMPTS * 2) == pytest.approx(alone, abs=1e-3)

    def test_a_config_of_another_model(self, clip, tmp_path):
        folder = shutil.copytree(clip, tmp_path / "clip")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"projection_dim": 8}))
        with pytest.raises(SourceError, match="can't be opened as a CLIPModel"):
            open_metric("clip_score", str(folder))

    def test_a_long_prompt_is_cut(self, clip_score):
        assert len(clip_score.values(noise(1), noise(1), [" and ".join(PROMPTS * 9)])) == 1

    def test_a_missing_tensor(self, clip, changed):
        with pytest.raises(SourceError, match="lacks visual_projection.weight"):
            open_metric("clip_score", changed(clip, {"visual_projection.weight": None}))

    def test_a_missing_tokenizer(self, clip, tmp_path):
        folder = shutil.copytree(clip, tmp_path / "clip", ignore=shutil.ignore_patterns("vocab.json", "tokenizer.json"))
        with pytest.raises(UsageError, match=r"expected tokenizer\.json or vocab\.json as well"):
            open_metric("clip_score", str(folder)).values(noise(1), noise(1), PROMPTS[:1])


class TestCmmd:
    def test_a_set_is_0_from_itself_and_far_from_another(self, cmmd):
        a, b = noise(12), flat(12)
        assert cmmd.values(a, a[::-1], [""] * 12) == pytest.approx([0], abs=1e-9)
        [near], [far] = cmmd.values(a, noise(12, seed=1), [""] * 12), cmmd.values(a, b, [""] * 12)
        assert 0 < near < far

    def test_all_pairs_by_hand(self, cmmd, clip, monkeypatch):
        from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

        from bakeoff.bench.metrics import cmmd as cmmd_file

        model = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
        squeeze = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
        sets = noise(5, width=96), np.concatenate([flat(4), noise(3, seed=2)])
        with torch.inference_mode():
            found = [model(**squeeze(list(each), return_tensors="pt")).image_embeds.double() for each in sets]
        x, y = ([vector / vector.norm() for vector in vectors] for vectors in found)

        def mean(a, b):
            return sum(math.exp(-float(((i - j) ** 2).sum()) / (2 * 10**2)) for i in a for j in b) / (len(a) * len(b))

        monkeypatch.setattr(cmmd_file, "_ROWS", 2)
        expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
        assert cmmd.values(*sets, [""] * 7) == pytest.approx([expected], rel=1e-4)


class TestFid:
    def test_the_network_is_inception_v3_with_1008_classes(self):
        from bakeoff.bench.metrics.inception import Inception

        with torch.device("meta"):
            network = Inception()
        assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960
        assert sum(isinstance(module, torch.nn.Conv2d) for module in network.modules()) == 94

    def test_the_distance_is_frechets(self, inception):
        fid = open_metric("fid", str(inception))
        sets = noise(2), flat(3)
        a, b = (fid._network(torch.tensor(each).permute(0, 3, 1, 2)).double() for each in sets)
        assert a.shape == (2, 2048)
        # Of so few pictures, the root of the covariances' product has a short form: the singular values of one matrix.
        centered = [(each - each.mean(0)) / math.sqrt(len(each) - 1) for each in (a, b)]
        root = torch.linalg.svdvals(centered[0] @ centered[1].T).sum()
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((each**2).sum() for each in centered) - 2 * root
        [far] = fid.values(*sets, [""] * 3)
        assert far == pytest.approx(float(expected), rel=1e-3)
        [near] = fid.values(sets[0], sets[0], [""] * 2)
        assert abs(near) < 1e-4 * far

    def test_imagenets_weights_are_refused(self, inception, changed):
        imagenet = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
        with pytest.raises(SourceError, match=r"has fc.bias of \(1000,\), expected \(1008,\)"):
            open_metric("fid", changed(inception, imagenet))

    def test_a_single_picture(self, inception):
        with pytest.raises(InputError, match="expected at least 2 of each"):
            open_metric("fid", str(inception)).values(noise(1), noise(2), ["", ""])


class TestImageReward:
    def test_the_authors_computation(self, image_reward):
        pictures = noise(3)
        found = image_reward.values(pictures, pictures, PROMPTS)
        assert found == pytest.approx([by_hand(*pair) for pair in zip(pictures, PROMPTS, strict=True)], abs=1e-4)
        assert len({round(value, 3) for value in found}) == 3

    def test_a_prompt_changes_its_pictures_reward_alone(self, image_reward):
        before = image_reward.values(noise(2), noise(2), PROMPTS[:2])
        after = image_reward.values(noise(2), noise(2), [PROMPTS[0], PROMPTS[2]])
        assert before[0] == pytest.approx(after[0])
        assert before[1] != pytest.approx(after[1])

    def test_every_tensor_is_loaded(self, image_reward):
        loaded = {tensor.sum().item() for tensor in image_reward._network.state_dict().values()}
        unused = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
        kept = {tensor.sum().item() for name, tensor in blip_tensors().items() if not name.startswith(unused)}
        assert loaded == kept

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"blip.visual_encoder.blocks.1.attn.qkv.bias": None}, "lacks vision.encoder.layers.1.self_attn.qkv.bias"),
            ({"mlp.layers.7.weight": torch.zeros(2, 16)}, r"mlp.layers.7.weight of \(2, 16\), expected \(1, 16\)"),
            ({"blip.visual_encoder.head.weight": torch.zeros(1)}, "has vision.head.weight, which is none"),
        ],
    )
    def test_other_weights(self, blip, changed, changes, told):
        with pytest.raises(SourceError, match=told):
            open_metric("image_reward", changed(blip, changes))


def by_hand(picture, prompt):
    """ImageReward as its authors compute it, from their tensors: BLIP's vision transformer, BERT, the perceptron."""
    from PIL import Image
    from torch.nn.functional import conv2d, gelu, layer_norm

    found = blip_tensors()

    def linear(name, x):
        return x @ found[f"{name}.weight"].T + found[f"{name}.bias"]

    def norm(name, x, epsilon):
        return layer_norm(x, (32,), found[f"{name}.weight"], found[f"{name}.bias"], epsilon)

    def attend(q, k, v):
        q, k, v = (x.reshape(len(x), 2, 16).transpose(0, 1) for x in (q, k, v))
        return ((q @ k.transpose(1, 2) / 4).softmax(dim=-1) @ v).transpose(0, 1).reshape(-1, 32)

    small = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, deviation = np.float32([0.48145466, 0.4578275, 0.40821073]), np.float32([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor((small - mean) / deviation).permute(2, 0, 1)[None]
    see, read = "blip.visual_encoder", "blip.text_encoder"
    patches = (
        conv2d(pixels, found[f"{see}.patch_embed.proj.weight"], found[f"{see}.patch_embed.proj.bias"], stride=8)
        .flatten(2)[0]
        .T
    )
    seen = torch.cat([found[f"{see}.cls_token"][0], patches]) + found[f"{see}.pos_embed"][0]
    for block in (f"{see}.blocks.{i}" for i in range(2)):
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", seen, 1e-6))
        seen = seen + linear(f"{block}.attn.proj", attend(*qkv.split(32, dim=1)))
        inner = gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", seen, 1e-6)))
        seen = seen + linear(f"{block}.mlp.fc2", inner)
    seen = norm(f"{see}.norm", seen, 1e-6)

    ids = [2, *(VOCABULARY.index(word) for word in prompt.split()), 3]  # no padding: what is masked mustn't count
    embeddings = f"{read}.embeddings"
    text = found[f"{embeddings}.word_embeddings.weight"][ids]
    text = norm(f"{embeddings}.LayerNorm", text + found[f"{embeddings}.position_embeddings.weight"][: len(ids)], 1e-12)
    for block in (f"{read}.encoder.layer.{i}" for i in range(2)):
        for attention, keys in (("attention", None), ("crossattention", seen)):
            source = text if keys is None else keys
            name = f"{block}.{attention}"
            heard = attend(
                linear(f"{name}.self.query", text), *(linear(f"{name}.self.{x}", source) for x in ("key", "value"))
            )
            text = norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", heard) + text, 1e-12)
        inner = linear(f"{block}.output.dense", gelu(linear(f"{block}.intermediate.dense", text)))
        text = norm(f"{block}.output.LayerNorm", inner + text, 1e-12)
    reward = text[0]
    for index in (0, 2, 4, 6, 7):
        reward = linear(f"mlp.layers.{index}", reward)
    return (float(reward) - 0.16717362830052426) / 1.0333394966054072
