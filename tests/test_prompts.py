import pytest

from bakeoff.errors import UsageError
from bakeoff.models.prompts import draw_prompt_set, prompt_set
from bakeoff.models.scenes import is_held_out
from bakeoff.models.scorer import parse_caption


@pytest.mark.parametrize(("name", "count"), [("shapes-64", 64), ("shapes-256", 256), ("shapes-1024", 1024)])
def test_sets_are_what_their_seed_draws(name, count):
    prompts = prompt_set(name)
    assert [prompt.text for prompt in prompts] == draw_prompt_set(name)
    assert len({prompt.text for prompt in prompts}) == len({prompt.id for prompt in prompts}) == count
    assert prompts[0].id == f"{name}/0000"


def test_every_prompt_of_the_held_out_set_is_held_out():
    assert all(is_held_out(parse_caption(prompt.text)) for prompt in prompt_set("shapes-256"))


def test_an_unknown_set_lists_the_known():
    with pytest.raises(UsageError, match="shapes-1024"):
        prompt_set("shapes-512")
