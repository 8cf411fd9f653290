"""The report of a run: one HTML file with its numbers, curves and pictures."""

import argparse
import datetime
import json
import logging
import sys
from collections.abc import Sequence

from etils import epath

from vit_jax.errors import UserError, first_line
from vit_jax.evaluation.classes import AVERAGES, MEASURES
from vit_jax.figures import curves
from vit_jax.report.elements import (
    details,
    figure_png,
    numbers,
    page,
    paragraph,
    picture,
    preformatted,
    section,
    table,
    text,
)
from vit_jax.report.results import TITLES, format_number
from vit_jax.runs import run_folder
from vit_jax.storage.files import absolute_path, open_path, write_atomically

MAX_CLASSES = 30  # listed at once; of more, those that are recognized worst
NAME = "report.html"
WIDE = ("mistakes", "attention")


def write(workdir, evaluation_folder=None, folder=None) -> epath.Path:
    """Writes report.html from the files of a run and of an evaluation, and returns its path.

    Args:
        workdir: the run's folder; None: the evaluation is of weights that aren't a run's.
        evaluation_folder: what evaluate.py --report wrote; None: <workdir>/evaluation.
        folder: where to write the page; None: the run's folder.

    Raises:
        UserError: the folder has no run, or can't be written.
    """
    config = run_folder.require_config(workdir) if workdir is not None else None
    evaluation_folder = open_path(evaluation_folder or epath.Path(workdir) / "evaluation")
    folder = epath.Path(folder or workdir)
    evaluation, run = read_evaluation(evaluation_folder), []
    title = evaluation.get("dataset", "")
    if workdir is not None:
        name = absolute_path(workdir).name
        title = (
            f"{name}: {config.model.variant} on {evaluation.get('dataset', config.dataset.name)}"
        )
        run = [
            section("Run", run_table(config, evaluation)),
            section("Curves", curves_picture(open_path(workdir))),
        ]
    contents = page(
        title,
        *header(title, evaluation),
        *run,
        *evaluation_sections(evaluation_folder, evaluation),
        section("Configuration", configuration(config)) if run else "",
    )
    try:
        write_atomically(folder / NAME, contents)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{folder / NAME} can't be written: {reason}") from None
    return folder / NAME


def is_current(workdir, evaluation_folder, step: int | None) -> bool:
    """Whether a run's page exists, and its evaluation is of a step."""
    evaluation = read_evaluation(open_path(evaluation_folder))
    exists = (open_path(workdir) / NAME).exists()
    return exists and "classes" in evaluation and evaluation.get("step") == step


def read_evaluation(folder: epath.Path) -> dict:
    """Returns the contents of evaluation.json; {} if the run wasn't evaluated."""
    path = folder / "evaluation.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({error}): write it anew by evaluate.py --report"
        ) from None


def header(title: str, evaluation: dict) -> list[str]:
    """Returns the title, and the most important numbers."""
    date = datetime.datetime.now().strftime("%B %d, %Y")
    parts = [f"<h1>{text(title)}</h1>", paragraph(f"Report of {date}")]
    if not evaluation:
        parts.append(
            paragraph("Not evaluated yet: evaluate.py --report adds the numbers and pictures")
        )
        return parts
    cards = []
    for name in ("accuracy", "accuracy_top5", "loss", "ece"):
        ends = [format_number(name, end) for end in evaluation["intervals"].get(name, ())]
        number = format_number(name, evaluation[name])
        cards.append((TITLES.get(name, name), number, " to ".join(ends)))
    parts += [
        numbers(cards),
        paragraph(
            f"On {evaluation['num_examples']:,} examples of {evaluation['dataset']}. Ranges are "
            "95% bootstrap intervals over these examples."
        ),
    ]
    return parts


def run_table(config, evaluation: dict) -> str:
    """Returns a table of what was trained, and how."""
    titles = {"width": "width", "depth": "depth", "num_heads": "heads", "patch_size": "patch size"}
    model = ((title, config.model.get(name)) for name, title in titles.items())
    fields = ", ".join(f"{title} {value}" for title, value in model if value is not None)
    size = config.image_size
    rows = [
        ("Model", " ".join(filter(None, (config.model.variant, fields and f"({fields})")))),
        ("Images", f"{size if isinstance(size, int) else 'x'.join(map(str, size))} pixels"),
        ("Dataset", f"{config.dataset.name}, split {config.dataset.train_split}"),
        ("Classes", f"{config.num_classes:,}"),
        ("Steps", f"{config.total_steps:,} of {config.batch_size:,} images"),
        ("Optimizer", f"{config.optimizer.name}, weight decay {config.optimizer.weight_decay:g}"),
        ("Learning rate", f"{config.schedule.base_lr:g}, {config.schedule.name}"),
        ("Seed", f"{config.seed}"),
    ]
    if evaluation.get("step") is not None:
        rows.append(("Checkpoint", f"step {evaluation['step']:,}"))
    return table(rows, style="text")


def curves_picture(folder: epath.Path) -> str:
    """Returns the run's curves, or why there are none."""
    try:
        figure = curves.curves([folder])
    except UserError as error:
        return paragraph(f"No curves: {error}")
    names = sorted({name for name, _ in curves.series(folder)})
    description = f"Curves of {', '.join(names)} against the step"
    caption = "Metrics of the run, from metrics.jsonl"
    return picture(figure_png(figure), description, caption, is_wide=True)


def evaluation_sections(folder: epath.Path, evaluation: dict) -> list[str]:
    """Returns the sections about the evaluation's numbers and pictures."""
    pairs = [
        (f"{pair['class']} taken for {pair['predicted']}", pair["count"])
        for pair in evaluation.get("most_confused", ())
    ]
    mistakes = evaluation.get("mistakes", ())
    words = ", ".join(f"{name} ({count})" for name, count in pairs[:3]) or "no mistakes"
    wrong = ", ".join(f"{m['class']} taken for {m['predicted']}" for m in mistakes[:5])
    return [
        section("Other evaluations", other_evaluations(evaluation)),
        section("Classes", class_tables(evaluation)),
        section(
            "Confusion",
            evaluation_picture(
                folder, "confusion", f"Confusion matrix; most frequent: {words}",
                "Each row shows what the examples of a class were taken for",
            ),
            table(pairs, header=("most confused", "examples")) if pairs else "",
        ),
        section(
            "Worst mistakes",
            evaluation_picture(
                folder, "mistakes", f"Images that were misclassified: {wrong}",
                "The wrong predictions with the highest confidence",
            ),
            mistakes_table(mistakes),
        ),
        section(
            "Where the model looks",
            evaluation_picture(
                folder, "attention", "Images, each beside its attention map",
                "How much each part of an image contributes to the output, by attention rollout",
            ),
        ),
        section(
            "Calibration",
            evaluation_picture(
                folder, "calibration", "Accuracy against confidence, and a histogram of confidence",
                "Points below the diagonal are predictions that are too confident",
            ),
        ),
    ]  # fmt: skip


def evaluation_picture(folder: epath.Path, name: str, description: str, caption: str) -> str:
    """Returns a picture of the evaluation in a folder; nothing if it wasn't drawn."""
    path = folder / f"{name}.png"
    if not path.exists():
        return ""
    if not path.stat().length:
        return paragraph(f"{path} is empty: evaluate.py --report draws it anew")
    return picture(path.read_bytes(), description, caption, is_wide=name in WIDE)


def other_evaluations(evaluation: dict) -> str:
    """Returns a table of the numbers of `config.evals`."""
    rows = [
        (name, key.replace("_", " "), format_number(key, value))
        for name, values in evaluation.get("evals", {}).items()
        for key, value in values.items()
    ]
    return table(rows, style="text") if rows else ""


def class_tables(evaluation: dict) -> str:
    """Returns the measures of each class; of many classes, the worst ones first."""
    if "classes" not in evaluation:
        return ""
    header = ("class", *MEASURES, "examples")
    rows = [
        (name, *(f"{row[measure]:.3f}" for measure in MEASURES), f"{row['support']:,}")
        for name, row in evaluation["classes"].items()
    ]
    averages = [
        (f"{name} average", *(f"{evaluation['averages'][name][m]:.3f}" for m in MEASURES), "")
        for name in AVERAGES
    ]
    if len(rows) <= MAX_CLASSES:
        return table([*rows, *averages], header)
    worst = sorted(rows, key=lambda row: float(row[1 + MEASURES.index("f1")]))[:MAX_CLASSES]
    return "\n".join(
        (
            table(averages, header),
            paragraph(f"The {MAX_CLASSES} classes with the lowest f1:"),
            table(worst, header),
            details(f"All {len(rows):,} classes", table(rows, header)),
        )
    )


def mistakes_table(mistakes) -> str:
    """Returns which files the worst mistakes are."""
    if not mistakes:
        return ""
    rows = [(m["example"], m["class"], m["predicted"], f"{m['confidence']:.1%}") for m in mistakes]
    header = ("example", "class", "predicted", "confidence")
    return details("Which examples these are", table(rows, header, style="text"))


def configuration(config) -> str:
    """Returns the run's whole configuration, hidden at first."""
    return details("Every field", preformatted(config.to_json_best_effort(indent=2)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.report",
        description=f"Writes {NAME} into a run's folder: its numbers, curves and pictures.",
    )
    parser.add_argument("run", help="the run's folder; evaluate.py --report evaluates it first")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        print(write(args.run))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0
