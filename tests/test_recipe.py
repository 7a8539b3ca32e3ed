import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bakeoff.errors import RecipeError
from bakeoff.recipe import LOAD_OPTIONS, PRECISIONS, PartRecipe, Recipe, from_dict, from_toml, parse, to_dict

words = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True).filter(lambda w: w not in LOAD_OPTIONS)
part_recipes = st.builds(PartRecipe, words, st.sampled_from(PRECISIONS), st.dictionaries(words, words, max_size=2))
recipes = st.builds(Recipe, part_recipes, st.dictionaries(words, part_recipes, max_size=3))


@given(recipes)
def test_short_form_round_trips(recipe):
    assert parse(str(recipe))[0] == recipe


@given(recipes)
def test_long_form_round_trips(recipe):
    options = {key for part in (recipe.default, *recipe.parts.values()) for key in part.options}
    if not options & {"backend", "precision", "parts"}:
        assert from_dict(to_dict(recipe)) == recipe


def test_placement_is_no_part_of_the_recipe():
    plain, _ = parse("torch:bf16")
    placed, placement = parse("torch:bf16+compile+threads=3@cuda")
    assert placed == plain
    assert (placement.compile, placement.threads, placement.device) == (True, 3, "cuda")


def test_memory_options_are_placement():
    _, placement = parse("torch:bf16+offload=parts+vae_tiling=on+attention_slicing+token_merging=0.5")
    assert (placement.offload, placement.vae_tiling) == ("parts", "on")
    assert (placement.attention_slicing, placement.token_merging) == ("auto", 0.5)
    assert parse("torch:fp32+attention_slicing=4")[1].attention_slicing == 4


def test_parts_that_differ():
    recipe, _ = parse("openvino:bf16,vae_decoder=torch:fp32")
    resolved = recipe.resolve(["unet", "vae_decoder"])
    assert str(resolved["unet"]) == "openvino:bf16"
    assert str(resolved["vae_decoder"]) == "torch:fp32"


def test_toml():
    text = "backend = 'openvino'\nprecision = 'bf16'\n[parts.vae_decoder]\nbackend = 'torch'\nprecision = 'fp32'\n"
    assert from_toml(text) == parse("openvino:bf16,vae_decoder=torch:fp32")[0]
    assert tomllib.loads(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("onnx:fp3", "'fp32'"),
        ("onnx", "backend:precision"),
        ("", "backend:precision"),
        ("onnx:fp32,torch:fp32", "twice"),
        ("unet=onnx:fp32", "other parts"),
        ("torch:fp32+threads=no", "whole number"),
        ("torch:fp32+attention_slicing=0", "whole number from 1 or auto"),
        ("torch:fp32+token_merging=0.9", "from 0 to 0.75"),
        ("torch:fp32+token_merging=half", "from 0 to 0.75"),
        ("torch:fp32+compile+token_merging=0.5", "one or the other"),
        ("torch:fp32+offload=part", "Did you mean 'parts'"),
        ("torch:fp32+vae_tiling", "Known: auto, off, on"),
    ],
)
def test_bad_recipes_say_what_is_wrong(text, says):
    with pytest.raises(RecipeError, match=says):
        parse(text)


def test_unknown_part_has_a_hint():
    with pytest.raises(RecipeError, match="'vae_decoder'"):
        parse("onnx:fp32,vae_decode=torch:fp32")[0].resolve(["unet", "vae_decoder"])
