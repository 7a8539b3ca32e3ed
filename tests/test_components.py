import shutil

import pytest
import torch

from bakeoff import plugins
from bakeoff.components.component import CAPTURE_SIZES, PROOF_SIZES, Port, Sizes, solve_sizes
from bakeoff.components.modules.unet_2d_condition import UNet2DCondition, _feed
from bakeoff.errors import InputError
from bakeoff.parity.distance import relative_error
from bakeoff.sources.source import Source, read_json


@pytest.fixture(scope="module")
def source():
    return Source.open("shapes")


def parts():
    """Each component once, with the first family that has it: (family, variant, part)."""
    found = {}
    for family in plugins.families():
        for variant in (None, *family.variants):
            for part in family.variant(variant).parts:
                found.setdefault(part.component.name, (family.name, variant, part))
    return [pytest.param(*each, id=name) for name, each in found.items()]


def module_of(tiny, family, variant, part):
    """Config and folder of a part's module in a tiny pipeline."""
    folder = tiny(family, variant) / part.module
    return read_json(folder / "config.json"), folder


@pytest.mark.parametrize(("family", "variant", "part"), parts())
def test_examples_fit_the_ports(tiny, family, variant, part):
    config, _ = module_of(tiny, family, variant, part)
    for seed, sizes in enumerate((CAPTURE_SIZES, *PROOF_SIZES)):
        example = part.component.example(config, part.component.limit(config, sizes), seed)
        assert solve_sizes(part.name, part.component.inputs(config), example)
        for port in part.component.inputs(config):
            assert example[port.name].dtype == getattr(torch, port.dtype)


@pytest.mark.parametrize(("family", "variant", "part"), parts())
def test_the_flat_module_gives_the_ports(tiny, family, variant, part):
    config, folder = module_of(tiny, family, variant, part)
    flat = part.component.flat(part.component.load(folder, torch.float32))
    example = part.component.example(config, part.component.limit(config, Sizes(2, 8, 16, 7)), seed=1)
    sizes = solve_sizes(part.name, part.component.inputs(config), example)
    with torch.no_grad():
        results = flat(*example.values())
    for port, result in zip(part.component.outputs(config), results, strict=True):
        assert tuple(result.shape) == port.shape(sizes)


def test_the_time_embedding_is_diffusers_bit_for_bit(source):
    unet = UNet2DCondition().load(source.folder / "unet", torch.float32)
    sample = torch.zeros(3, 4, 8, 8)
    expected = {t: unet.get_time_embed(sample, torch.tensor(t)) for t in (981, 0, 500.25)}
    flat = UNet2DCondition().flat(unet)
    for timestep, embedding in expected.items():
        assert torch.equal(flat._time_embed(sample, torch.tensor(float(timestep))), embedding)


@pytest.mark.parametrize(
    "changes", [{"interpolation_scale": 1.0}, {"qk_norm": "rms_norm_across_heads"}, {"norm_elementwise_affine": True}]
)
def test_sanas_later_models_are_diffusers(tmp_path, changes):
    """With positions (2K and 4K), and with norms before attention (1.5)."""
    from diffusers import SanaTransformer2DModel

    from bakeoff.components.modules.sana_transformer_2d import TINY, SanaTransformer2D

    plain = SanaTransformer2DModel(**{**TINY, **changes}).eval()
    plain.save_pretrained(tmp_path)
    component, config = SanaTransformer2D(), read_json(tmp_path / "config.json")
    inputs = component.example(config, Sizes(2, 6, 10, 7), seed=1)
    with torch.no_grad():
        expected = plain(**inputs, return_dict=False)[0]
        (got,) = component.flat(component.load(tmp_path, torch.float32))(*inputs.values())
    assert relative_error(got, expected) < 1e-6


def test_solve_sizes_refuses_what_does_not_fit():
    ports = (Port("a", "float32", ("batch", 3, "8*height")), Port("b", "float32", ("batch",)))
    good = {"a": torch.zeros(2, 3, 16), "b": torch.zeros(2)}
    assert solve_sizes("part", ports, good) == {"batch": 2, "height": 2}
    for bad in (
        {"a": good["a"]},
        {**good, "c": good["b"]},
        {**good, "b": torch.zeros(3)},
        {**good, "b": torch.zeros(2, 1)},
        {"a": torch.zeros(2, 3, 17), "b": good["b"]},
        {"a": torch.zeros(2, 4, 16), "b": good["b"]},
    ):
        with pytest.raises(InputError, match="part got"):
            solve_sizes("part", ports, bad)


def test_timesteps_are_never_truncated():
    integer, plain = Port("timestep", "int64", ("steps",)), Port("timestep", "float32", ())
    assert _feed(torch.tensor(981), integer).tolist() == [981]
    assert _feed(torch.tensor(981.0), integer).tolist() == [981]
    assert _feed(torch.tensor(980.5), plain).item() == 980.5
    with pytest.raises(InputError, match="--timestep f32"):
        _feed(torch.tensor(980.5), integer)


def test_folders_and_files_are_named_as_optimum_names_them():
    from optimum.utils import constant

    from bakeoff.exporters import onnx

    (family,) = [family for family in plugins.families() if family.name == "stable-diffusion"]
    assert {part.name for part in family.parts} == {
        constant.DIFFUSION_MODEL_TEXT_ENCODER_SUBFOLDER,
        constant.DIFFUSION_MODEL_UNET_SUBFOLDER,
        constant.DIFFUSION_MODEL_VAE_ENCODER_SUBFOLDER,
        constant.DIFFUSION_MODEL_VAE_DECODER_SUBFOLDER,
    }
    assert onnx.FILE == constant.ONNX_WEIGHTS_NAME


@pytest.mark.parametrize(("family", "variant", "part"), parts())
def test_all_of_a_part_runs_on_the_device_of_its_inputs(tiny, family, variant, part):
    """On the meta device a tensor left on the CPU raises, as it would on a GPU."""
    config, folder = module_of(tiny, family, variant, part)
    if any(port.name == "attention_mask" for port in part.component.inputs(config)):
        pytest.skip("Transformers looks at the mask's values, which meta tensors don't have")
    flat = part.component.flat(part.component.load(folder, torch.float32)).to("meta")
    example = part.component.example(config, part.component.limit(config, Sizes(2, 8, 16, 7)), seed=1)
    with torch.no_grad():
        results = flat(*(tensor.to("meta") for tensor in example.values()))
    assert all(result.is_meta for result in results)


@pytest.mark.parametrize(("family", "variant", "part"), parts())
def test_a_lacking_tensor_is_an_error(tiny, family, variant, part, tmp_path):
    from safetensors.torch import load_file, save_file

    from bakeoff.errors import SourceError

    shutil.copytree(module_of(tiny, family, variant, part)[1], tmp_path / "module")
    (file,) = (tmp_path / "module").glob("*.safetensors")
    tensors = load_file(file)
    lost = max(name for name in tensors if name.endswith("weight"))
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match="lacks"):
        part.component.load(tmp_path / "module", torch.float32)


def test_the_embedded_model_is_small_and_fits_low_bit_kernels(source):
    """At most 16 MB; Linear layers take multiples of 64 and give multiples of 32."""
    checkpoints = [source.checkpoint(module) for module in ("text_encoder", "unet", "vae")]
    assert sum(file.stat().st_size for checkpoint in checkpoints for file in checkpoint.files) <= 16_000_000
    for checkpoint in checkpoints:
        for entry in checkpoint.entries.values():
            if len(entry.shape) == 2 and "embedding.weight" not in entry.name:
                assert entry.shape[0] % 32 == entry.shape[1] % 64 == 0, entry
