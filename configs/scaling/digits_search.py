r"""A search on the digits: learning rate, weight decay and dropout.

python -m vit_jax.scaling run configs/scaling/digits_search.py --root=runs/digits_search --workers=2

Sixteen cells of 500 steps, whose values are drawn at random or, after `pip install optuna`, by
Optuna, which also ends those that fall behind, after 100, 200 or 400 steps. They are evaluated on a
tenth of the training split, not on the test digits. The launch ends with a table of all cells and
the command of the best one.
"""

from configs import common
from configs.scaling import digits


def get_config(arg=None):
    options = common.parse_arg(arg)
    config = digits.get_config(arg)
    if not options.quick:
        config.total_steps = 500
        config.eval_every_steps = 100
    config.dataset.update(train_split="train[:90%]", eval_split="train[90%:]")
    return config


def get_study(arg=None):
    options = common.parse_arg(arg)
    return {
        "search": {
            "schedule.base_lr": {"log_uniform": (1e-4, 3e-2)},
            "optimizer.weight_decay": {"log_uniform": (1e-3, 1.0)},
            "model.dropout_rate": {"choices": (0.0, 0.1, 0.2)},
        },
        "trials": 3 if options.quick else 16,
    }
