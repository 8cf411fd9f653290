"""Searches: cells that draw values of fields, by Optuna where it is installed.

Optuna's TPE sampler (arXiv:1907.10902) proposes the values, and successive halving over the cells'
evaluations (arXiv:1810.05934) ends those that fall behind. Without Optuna, values are drawn at
random and every cell runs to its end. A search goes on from <root>/.study/<cell>/trial.json, which
has a cell's values and result; only the launch that runs the cell, and so has its lease, writes it.
"""

import importlib.util
import json
import logging
import math
import zlib

import numpy as np

from vit_jax.errors import UserError
from vit_jax.storage.files import read_json_object, write_atomically
from vit_jax.studies import cells, pages

logger = logging.getLogger("vit_jax")

SEED = 0


class Search:
    """The values of a study's cells, and what became of them.

    Attributes:
        trials: {cell's name: {"values": {field: value}, "state", "value", "evaluations"}}.
    """

    def __init__(self, root, study: pages.Study):
        """Goes on with the search in the folder `root`."""
        self.root, self.study, self.trials = root, study, {}
        self.metric = study.collect[0]
        self.read()
        self.sampler = None
        if importlib.util.find_spec("optuna"):
            self.sampler = Sampler(self, study)
        else:
            logger.warning(
                "Optuna isn't installed (pip install optuna): values are drawn at random, and no "
                "cell is pruned"
            )

    def read(self) -> None:
        """Reads what launches, also others, have written of the cells."""
        for cell in self.study.cells:
            if cell.search and self.path(cell).exists():
                self.trials[cell.name] = read_json_object(self.path(cell))

    def values(self, cell: pages.Cell) -> dict:
        """Returns the values of a cell: {field: value}, drawn if it has none yet.

        The launch must have the cell's lease.
        """
        self.read()  # another launch may have drawn them
        if cell.name not in self.trials:
            if self.sampler is not None:
                self.sampler.learn(self.trials)
                values = self.sampler.draw(cell)
            else:
                rng = np.random.default_rng(seed(cell))
                values = {field: draw(rng, way) for field, way in cell.search.items()}
            self.trials[cell.name] = {"values": values}
            self.save(cell)
        return dict(self.trials[cell.name]["values"])

    def prunes(self, cell: pages.Cell, found: cells.Status) -> bool:
        """Whether a cell that runs has fallen behind others."""
        return self.sampler is not None and self.sampler.prunes(cell, found)

    def tell(self, cell: pages.Cell, found: cells.Status) -> None:
        """Records how a cell ended.

        Raises:
            UserError: it is finished, and has no value of the metric that decides.
        """
        if found.state == cells.FINISHED and self.metric not in found.values:
            raise UserError(
                f"{cell.name} has no {self.metric!r}, which decides which cell is the best: change "
                "'collect' in the study's page"
            )
        self.trials[cell.name] |= {
            "state": found.state,
            "value": found.values.get(self.metric),
            "evaluations": found.evaluations,
        }
        self.save(cell)
        if self.sampler is not None and found.state in (cells.FINISHED, cells.PRUNED):
            self.sampler.tell(cell, found)

    def path(self, cell: pages.Cell):
        return cells.folder_of_notes(self.root, cell) / "trial.json"

    def save(self, cell: pages.Cell) -> None:
        """Writes what is known of a cell."""
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.trials[cell.name]) + "\n")

    def best(self) -> str | None:
        """Returns the name of the best finished cell of all launches; None if there is none."""
        self.read()
        finished = {
            name: trial["value"]
            for name, trial in self.trials.items()
            if trial.get("state") == cells.FINISHED and trial.get("value") is not None
        }
        choose = cells.better(self.metric)
        return choose(finished, key=finished.get) if finished else None


def seed(cell: pages.Cell) -> int:
    """Returns the seed of a cell's values, from its name: that of no other cell, in any launch."""
    return zlib.crc32(f"{SEED} {cell.name}".encode())


def draw(rng: np.random.Generator, way: dict):
    """Returns a value of a distribution."""
    ((kind, values),) = way.items()
    if kind == "choices":
        return values[int(rng.integers(len(values)))]
    if kind == "uniform":
        return float(rng.uniform(*values))
    return float(math.exp(rng.uniform(*map(math.log, values))))


class Sampler:
    """Optuna's sampler and pruner, told what the search has found so far."""

    def __init__(self, search: Search, study: pages.Study):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.metric = optuna, search.metric
        self.open, self.known = {}, set()  # trials of this launch; names of cells that were added
        self.distributions = {}
        for cell in study.cells:
            self.distributions[cell.name] = {
                field: self.distribution(way) for field, way in cell.search.items()
            }
        direction = "minimize" if cells.better(search.metric) is min else "maximize"
        self.study = optuna.create_study(
            direction=direction,
            # After 1, 2, 4, ... evaluations the better half of the cells goes on.
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        )
        self.learn(search.trials)

    def learn(self, trials: dict) -> None:
        """Adds what has ended, in an earlier launch or in another one."""
        for name, trial in trials.items():
            has_ended = trial.get("state") in (cells.FINISHED, cells.PRUNED)
            if has_ended and name in self.distributions and name not in self.known:
                self.known.add(name)
                self.add(name, trial)

    def distribution(self, way: dict):
        ((kind, values),) = way.items()
        if kind == "choices":
            return self.optuna.distributions.CategoricalDistribution(values)
        return self.optuna.distributions.FloatDistribution(*values, log=kind == "log_uniform")

    def add(self, name: str, trial: dict) -> None:
        """Adds a trial of another launch."""
        states = self.optuna.trial.TrialState
        is_finished = trial["state"] == cells.FINISHED
        self.study.add_trial(
            self.optuna.trial.create_trial(
                state=states.COMPLETE if is_finished else states.PRUNED,
                params=trial["values"],
                distributions=self.distributions[name],
                value=trial["value"] if is_finished else None,
                intermediate_values=dict(trial["evaluations"]),
            )
        )

    def draw(self, cell: pages.Cell) -> dict:
        # Each cell has its own seed: launches that know the same mustn't propose the same.
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed(cell))
        trial = self.study.ask(self.distributions[cell.name])
        self.known.add(cell.name)
        self.open[cell.name] = trial
        return dict(trial.params)

    def prunes(self, cell: pages.Cell, found: cells.Status) -> bool:
        trial = self.open.get(cell.name)
        if trial is None:  # drawn by an earlier launch
            return False
        for number, (_, value) in enumerate(found.evaluations, start=1):
            trial.report(value, number)
        return found.step != found.total_steps and trial.should_prune()

    def tell(self, cell: pages.Cell, found: cells.Status) -> None:
        trial = self.open.pop(cell.name, None)
        if trial is not None:
            is_pruned = found.state == cells.PRUNED
            state = self.optuna.trial.TrialState.PRUNED if is_pruned else None
            self.study.tell(trial, None if is_pruned else found.values[self.metric], state=state)
