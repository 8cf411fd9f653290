"""Pages of studies and the cells that they expand into."""

import importlib
import pathlib

import numpy as np
import pytest
from pages_of_tests import STUDIES, load, write_page

import configuration
from vit_jax.errors import UserError
from vit_jax.studies import pages

ON_DIGITS = ("digits", "digits_search", "growing")


def names(study: pages.Study) -> list[str]:
    return [cell.name for cell in study.cells]


def test_a_grid_and_a_list(tmp_path):
    axes = {"model.depth": (1, 2), "images": (640.0, 1e6)}
    study = load(tmp_path, {"axes": axes, "cells": [{"lr": 1e-3}, {"lr": 0.03}]})
    assert names(study)[:3] == [
        "lr=0.001_depth=1_images=640",
        "lr=0.001_depth=1_images=1e6",
        "lr=0.001_depth=2_images=640",
    ]
    assert len(study.cells) == 8
    fields = {"schedule.base_lr": 1e-3, "model.depth": 1, "total_steps": 15625}
    assert study.cells[1].fields == fields  # a batch has 64 images
    config = pages.configured(study.cells[1].config, fields)
    assert (config.total_steps, config.schedule.base_lr, config.model.width) == (15625, 1e-3, 64)


def test_values_of_several_fields_and_of_the_argument(tmp_path):
    axes = {"size": {"small": {"model.width": 32, "model.mlp_dim": 64}, "quick": {":quick": True}}}
    study = load(tmp_path, {"axes": axes, "set": {"batch_size": 32.0}})
    assert names(study) == ["size=small", "size=quick"]
    assert study.cells[0].fields == {"batch_size": 32, "model.width": 32, "model.mlp_dim": 64}
    assert study.cells[1].config.endswith("page.py:quick=True,quick")


def test_numbers_of_numpy(tmp_path):
    assert pages.plain({"a": (np.int64(3), [np.float32(0.5)]), "b": np.arange(2)}) == {
        "a": (3, [0.5]),
        "b": [0, 1],
    }
    page = pathlib.Path(write_page(tmp_path, {}).removesuffix(":quick"))
    axes = "{'lr': np.array([0.5, 0.25]), 'model.depth': [np.int64(2)]}"
    page.write_text(
        "import numpy as np\nfrom configs.digits import get_config\n"
        f"def get_study(arg=None): return {{'axes': {axes}}}\n"
    )
    study = pages.load(str(page))
    assert names(study) == ["lr=0.5_depth=2", "lr=0.25_depth=2"]
    assert [type(value) for value in study.cells[0].fields.values()] == [float, int]


def test_stages(tmp_path):
    stages = {
        "first": {"axes": {"model.depth": (1, 2)}},
        "second": {
            "after": "first",
            "inherit": ("model.depth",),
            "axes": {"lr": (0.1, 0.2)},
            "set": {"init_from": "{parent}"},
        },
        "third": {"best": "second", "over": ("lr",), "set": {"seed": 7}},
    }
    study = load(tmp_path, {"stages": stages})
    assert names(study) == [
        *("first/depth=1", "first/depth=2", "second/depth=1_lr=0.1", "second/depth=1_lr=0.2"),
        *("second/depth=2_lr=0.1", "second/depth=2_lr=0.2", "third/depth=1", "third/depth=2"),
    ]
    second, third = study.cells[4], study.cells[7]
    assert second.needs == (study.cells[1],)
    assert second.overrides("gs://bucket/study/") == {
        "init_from": "gs://bucket/study/first/depth=2",
        "schedule.base_lr": 0.1,
        "model.depth": 2,
    }
    assert third.candidates == study.cells[4:6]
    overrides = third.overrides("root", best=study.cells[5])
    assert overrides["schedule.base_lr"] == 0.2
    assert (overrides["seed"], overrides["init_from"]) == (7, "root/first/depth=2")


def test_images_seen_are_divided_by_the_batch_size_that_a_cell_has(tmp_path):
    """Inherited, of the best candidate, or drawn: never by the batch size of another cell."""
    stages = {
        "first": {"axes": {"batch_size": (64, 16)}, "set": {"images": 6400}},
        "second": {"after": "first", "inherit": ("images",), "set": {"batch_size": 32}},
        "third": {"best": "first", "over": ("batch_size",)},
        "fourth": {"best": "first", "over": ("batch_size",), "set": {"total_steps": 7}},
        "durations": {"axes": {"images": (640, 1280)}, "set": {"batch_size": 64}},
        "longest": {"best": "durations", "over": ("images",), "set": {"batch_size": 32}},
    }
    study = load(tmp_path, {"stages": stages})
    cells = {cell.name: cell for cell in study.cells}

    def steps(name, **values):
        return cells[name].overrides("root", **values)["total_steps"]

    assert (steps("first/batch_size=64"), steps("first/batch_size=16")) == (100, 400)
    assert steps("second/batch_size=64") == steps("second/batch_size=16") == 200
    assert steps("third/run", best=cells["first/batch_size=16"]) == 400
    assert steps("fourth/run", best=cells["first/batch_size=16"]) == 7
    assert steps("longest/run", best=cells["durations/images=1280"]) == 40
    assert steps("first/batch_size=64", drawn={"batch_size": 8}) == 800


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (
            {"axes": {"model.depht": (1,)}},
            "no field 'model.depht' for an axis: did you mean 'model.d",
        ),
        ({"axes": {"width": (1,)}}, "no field 'width' for an axis: did you mean 'model.width'"),
        ({"axes": {"model": (1,)}}, "no field 'model' for an axis"),
        ({"axes": {"model.depth": ("x",)}}, "model.depth can't be 'x'"),
        ({"axes": {":quik": (1,)}}, "page.py, get_config: ValueError: unknown key 'quik'"),
        ({"cells": [{"seed": 1}, {"seed": 1}]}, "two cells have the name 'seed=1': they are equal"),
        (
            {"cells": [{"x": 1}], "axes": {"lr": (0.1, 0.1000001)}},
            "no field 'x'",
        ),
        ({"axes": {"lr": (0.1, 0.10000001)}}, "two cells .* they differ in schedule.base_lr"),
        ({"axis": {}}, "unknown key 'axis' in a stage: did you mean 'axes'"),
        ({"axes": {"lr": 0.1}}, "'lr' is 0.1; it must be a sequence"),
        ({"axes": {"variant": "B/16"}}, "'variant' is 'B/16'; it must be a sequence"),
        ({"axes": {"lr": ()}}, "the study has no cells"),
        ({"stages": {"a": {"after": "b"}}}, "'after' is 'b', which is no earlier stage"),
        ({"stages": {"a": {}}, "axes": {}}, "beside 'stages' there is axes"),
        (
            {"stages": {"a": {}, "b": {"after": "a", "inherit": ("lr",)}}},
            "'inherit' has 'lr', which the stage in 'after' doesn't set",
        ),
        (
            {"stages": {"a": {"axes": {"lr": (0.1,)}}, "b": {"best": "a", "over": ("seed",)}}},
            "'over' has 'seed', which is no axis there",
        ),
        ({"axes": ["lr"]}, r"'axes' is \['lr'\]; it must be a dictionary {axis: values}"),
        ({"set": ["lr"]}, "'set' is .* must be a dictionary"),
        ({"search": ["lr"]}, "'search' is .* must be a dictionary"),
        ({"stages": [{}]}, r"'stages' is \[{}\]; it must be a dictionary {name: stage}"),
        ({"cells": {"lr": 1}}, "'cells' is .* must be a list of dictionaries"),
        ({"cells": [1, 2]}, r"'cells' is \[1, 2\]; it must be a list of dictionaries"),
        ({"axes": {7: (1,)}}, "'axes' is .* must be a dictionary"),
        ({"search": {"lr": {"choices": (1,)}}, "trials": "3"}, "'trials' is '3'; .* whole number"),
        ({"set": {"images": "1e6"}}, "'images' is '1e6'; it must be a number above 0"),
        ({"axes": {"size": {"small": 3}}}, "'size' has 3 for 'small'; it must be a dictionary"),
        ({"collect": "val/loss"}, "'collect' is 'val/loss'; it must be a sequence of metrics"),
        ({"collect": ()}, r"'collect' is \(\); it must be a sequence of metrics"),
        ({"early_stopping": "no"}, "'early_stopping' is 'no'; it must be True or False"),
        (
            {"stages": {"a": {}, "b": {"best": "a", "over": ("lr",), "axes": {"seed": (1,)}}}},
            "a stage can't have both 'best' and 'axes'",
        ),
        (
            {"stages": {"a": {}, "b": {"best": "a", "after": "a"}}},
            "a stage can't have both 'best' and 'after'",
        ),
        ({"over": ("lr",)}, "'over' needs 'best' in the same stage"),
        ({"trials": 3}, "'trials' needs 'search' in the same stage"),
        ({"inherit": ("lr",)}, "'inherit' needs 'after' in the same stage"),
        ({"set": {"init_from": "{parent}"}}, "run has '{parent}', but its stage has no 'after'"),
        ([], r"get_study returns \[\]; it must return a dictionary"),
    ],
)
def test_mistakes_in_a_page(study, message, tmp_path):
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path, study)
    assert "\n" not in str(raised.value)


def test_pages_that_fail(tmp_path):
    with pytest.raises(UserError, match=r"There is no study .*nope.py; .* has digits.py, "):
        pages.load(str(tmp_path / "nope.py"))
    page = pathlib.Path(write_page(tmp_path, {}).removesuffix(":quick"))
    page.write_text("def get_config(arg=None): pass\n")
    with pytest.raises(UserError, match="page.py has no function get_study"):
        pages.load(str(page))
    page.write_text("import nothing_like_it\n")
    pages.import_page.cache_clear()
    with pytest.raises(UserError, match="page.py fails: ModuleNotFoundError"):
        pages.load(str(page))


@pytest.mark.parametrize("arg", ["", ":quick"])
@pytest.mark.parametrize("name", STUDIES)
def test_cells_of_studies_can_be_run(name, arg):
    """Every cell of every page, in full size and shrunk, passes the checks before training."""
    study = pages.load(f"configs/scaling/{name}.py{arg}")
    assert len(study.cells) > 1
    for cell in study.cells:
        config = pages.configured(cell.config, cell.overrides("root"))
        config.num_classes = 1000
        configuration.check(config)
    assert (config.dataset.name == "digits") == (bool(arg) or name in ON_DIGITS)
    module = importlib.import_module(f"configs.scaling.{name}")
    assert f"run configs/scaling/{name}.py --root=" in module.__doc__
