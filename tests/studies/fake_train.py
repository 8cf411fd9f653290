"""Stands in for train.py in tests of launches: leaves behind what a run does, at once.

The accuracy is best at a learning rate of 0.01. A depth of 13 is a mistake, one of 14 an error, and
a run of depth 15 goes on until it is stopped.
"""

import json
import math
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from configs import digits  # noqa: E402

flags = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
config = digits.get_config("quick")
for name, value in flags.items():
    if name.startswith("config."):
        group, _, field = name.removeprefix("config.").rpartition(".")
        target = config[group] if group else config
        target[field] = target.get_type(field)(value)

with open(os.environ["STARTED"], "a") as file:
    file.write(f"{workdir.name}\n")
if config.model.depth == 13:
    sys.exit("config.model.depth is 13")
if config.model.depth == 14:
    raise RuntimeError("the run broke")
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "config.json").write_text(config.to_json_best_effort())
while config.model.depth == 15:
    time.sleep(0.05)
rate = config.schedule.base_lr
rows = [
    {
        "step": step,
        "val/loss": 1.0,
        "val/accuracy": 1 - abs(math.log10(rate / 0.01)) / 10 - 1 / step,
    }
    for step in range(10, config.total_steps + 1, 10)
]
(workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
checkpoint = workdir / "checkpoints" / str(config.total_steps)
checkpoint.mkdir(parents=True, exist_ok=True)
(checkpoint / "_CHECKPOINT_METADATA").write_text("{}")
