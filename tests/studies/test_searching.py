"""Searches: values are drawn, kept, and drawn near the best ones; cells that fall behind end."""

import json

import pytest
from pages_of_tests import load, write_page
from test_launching import FAKE, root, started  # noqa: F401

from vit_jax.errors import UserError
from vit_jax.scaling import run as command
from vit_jax.studies import launching, searching

STUDY = {
    "search": {
        "schedule.base_lr": {"log_uniform": (1e-4, 1.0)},
        "model.dropout_rate": {"choices": (0.0, 0.1)},
    },
    "trials": 5,
}


@pytest.fixture(params=["random", "optuna"])
def sampler(request, monkeypatch):
    if request.param == "optuna":
        pytest.importorskip("optuna")
    else:
        monkeypatch.setattr(searching.importlib.util, "find_spec", lambda name: None)
    return request.param


def launch(folder, study):
    search = searching.Search(folder, study)
    run = launching.Launch(study, folder, 2, search)
    run.script = FAKE
    run.run(lambda _: None)
    return search


def trials(folder) -> dict:
    paths = sorted((folder / ".study").glob("*/trial.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def test_a_search_goes_on_where_it_ended(root, tmp_path, sampler):  # noqa: F811
    study = load(tmp_path, STUDY)
    search = launch(root, study)
    found = trials(root)
    assert list(found) == [f"trial=00{i}" for i in range(5)]
    rates = {name: trial["values"]["schedule.base_lr"] for name, trial in found.items()}
    assert len(set(rates.values())) == 5
    assert all(1e-4 <= rate <= 1 for rate in rates.values())
    done = {name: trial for name, trial in found.items() if trial["state"] == "finished"}
    assert search.best() == max(done, key=lambda name: done[name]["value"])
    for name, trial in done.items():
        config = json.loads((root / name / "config.json").read_text())
        assert config["schedule"]["base_lr"] == trial["values"]["schedule.base_lr"]

    more = load(tmp_path, STUDY | {"trials": 7})
    launch(root, more)
    assert {name: trials(root)[name] for name in found} == found
    assert sorted(started(root)) == [f"trial=00{i}" for i in range(7)]
    assert len({trial["values"]["schedule.base_lr"] for trial in trials(root).values()}) == 7


def test_two_launches_of_a_search_share_its_trials(root, tmp_path, sampler):  # noqa: F811
    """Values that another launch has drawn are kept, its results count, and no draw is repeated."""
    study = load(tmp_path, STUDY)
    first, second = (searching.Search(root, study) for _ in range(2))
    drawn = first.values(study.cells[0])
    assert second.values(study.cells[0]) == drawn
    others = [first.values(study.cells[1]), second.values(study.cells[2])]
    assert len({values["schedule.base_lr"] for values in (drawn, *others)}) == 3
    evaluated = ((10, 0.5), (20, 0.7))
    for search, cell, value in ((first, 1, 0.7), (second, 2, 0.8), (second, 3, None)):
        search.values(study.cells[cell])
        found = launching.cells.Status("finished", 20, 20, {"val/accuracy": value}, evaluated)
        if value is not None:
            search.tell(study.cells[cell], found)
    assert first.best() == second.best() == "trial=002"
    first.values(study.cells[4])  # knows what the second launch has found
    if sampler == "optuna":
        values = [trial.value for trial in first.sampler.study.trials]
        assert sorted(value for value in values if value is not None) == [0.7, 0.8]


def test_a_cell_that_falls_behind_is_pruned(root, tmp_path):  # noqa: F811
    pytest.importorskip("optuna")
    study = load(tmp_path, STUDY)
    search = searching.Search(root, study)
    good, bad = study.cells[:2]
    search.values(good)
    search.values(bad)

    def evaluated(value):
        steps = tuple((step, value) for step in range(1, 10))
        return launching.cells.Status("running", 9, 100, {"val/accuracy": value}, steps)

    assert not search.prunes(good, evaluated(0.9))
    assert search.prunes(bad, evaluated(0.1))


def test_the_best_command(root, tmp_path, capsys):  # noqa: F811
    study = load(tmp_path, STUDY)
    search = searching.Search(root, study)
    for number, cell in enumerate(study.cells[:2]):
        values = search.values(cell)
        search.trials[cell.name] |= {"state": "finished", "value": number / 10}
        search.save(cell)
    args = type("Args", (), {"root": "runs/study"})
    *table, best, line = "\n".join(command.best_of(study, search, search.best(), args)).splitlines()
    assert len(table) == 3
    assert best == "Best: trial=001"
    assert f"--config.schedule.base_lr={values['schedule.base_lr']!r}" in line
    assert line.endswith("--workdir=runs/study/trial=001")


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"normal": (0, 1)}, "it must have one of log_uniform, uniform, choices"),
        ((1, 2), "it must have one of"),
        ({"choices": ()}, "has no choices"),
        ({"log_uniform": (0, 1)}, r"it must be \(low, high\), 0 < low < high"),
        ({"uniform": (2, 1)}, r"it must be \(low, high\), low < high"),
        ({"uniform": ("1", "2")}, r"it must be \(low, high\), low < high"),
    ],
)
def test_mistakes_in_a_search(way, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(tmp_path, {"search": {"schedule.base_lr": way}})


def test_a_search_over_an_unknown_field(tmp_path):
    with pytest.raises(UserError, match="no field 'lrr' for an axis"):
        load(tmp_path, {"search": {"lrr": {"choices": (1,)}}})
    page = write_page(tmp_path, STUDY)
    from vit_jax.scaling import command as commands

    assert commands.main(["run", page, f"--root={tmp_path}/study", "--slurm"]) == 2
