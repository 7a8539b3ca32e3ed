import itertools
import random

import numpy as np

from bakeoff.models.scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, Item, Scene, is_held_out, random_scene


def test_scenes_are_seeded():
    def draw(seed):
        rng = random.Random(seed)
        scene = random_scene(rng)
        return scene, np.asarray(scene.render(rng))

    (scene, picture), (again, same) = draw(1), draw(1)
    assert scene == again
    assert np.array_equal(picture, same)
    assert picture.shape == (64, 64, 3)


def test_the_caption_says_everything():
    scene = Scene("gray", (Item("small", "red", "star"), Item("large", "blue", "ring")), "left of")
    assert scene.caption == "a small red star left of a large blue ring on a gray background"


def centre(picture, color):
    close = np.abs(picture.astype(int) - COLORS[color]).sum(axis=2) < 60
    rows, columns = np.nonzero(close)
    return rows.mean(), columns.mean(), close.sum()


def test_relations_hold_in_the_picture():
    rng = random.Random(0)
    for relation in RELATIONS:
        for _ in range(25):
            items = (Item("large", "red", rng.choice(SHAPES)), Item(rng.choice(["small", "large"]), "blue", "circle"))
            scene = Scene(rng.choice(list(BACKGROUNDS)), items, relation)
            picture = np.asarray(scene.render(rng))
            (y1, x1, _), (y2, x2, _) = centre(picture, "red"), centre(picture, "blue")
            along, across = (x2 - x1, y2 - y1) if relation in {"left of", "right of"} else (y2 - y1, x2 - x1)
            assert (along > 0) == (relation in {"left of", "above"})
            assert abs(along) > abs(across)


def test_sizes_and_backgrounds_differ_in_the_picture():
    rng = random.Random(0)
    for background, color in BACKGROUNDS.items():
        areas = [
            centre(np.asarray(Scene(background, (Item(s, "red", "circle"),)).render(rng)), "red")[2]
            for s in ("small", "large")
        ]
        assert areas[0] * 2 < areas[1]
        picture = np.asarray(Scene(background, (Item("small", "red", "circle"),)).render(rng))
        assert tuple(np.median(picture.reshape(-1, 3), axis=0)) == color


def test_held_out_combinations_leave_every_pair_of_attributes_to_learn_from():
    items = [Item("small", color, shape) for color in COLORS for shape in SHAPES]
    scenes = [Scene("gray", pair, relation) for pair in itertools.permutations(items, 2) for relation in RELATIONS]
    seen = [scene for scene in scenes if not is_held_out(scene)]
    assert 0.7 < len(seen) / len(scenes) < 0.95
    for part in (lambda s: s.items[0].color, lambda s: s.items[0].shape):
        assert len({(part(scene), scene.relation) for scene in seen}) == len({(part(s), s.relation) for s in scenes})
    for scene in scenes:
        opposite = RELATIONS[RELATIONS.index(scene.relation) ^ 1]
        assert is_held_out(Scene("gray", scene.items[::-1], opposite)) == is_held_out(scene)
