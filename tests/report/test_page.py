"""The report of a run: a page with everything in it, that runs nothing."""

import html.parser
import json
import re

import pytest
from whole_runs import quick_config

import evaluate
import train
from vit_jax.errors import UserError
from vit_jax.report import elements, page
from vit_jax.runs import run_folder

HOSTILE = "<script>alert(1)</script> & $x_1$ \udcff"  # and a byte that isn't UTF-8


class Checker(html.parser.HTMLParser):
    """Records the tags of a page, what its pictures show, and whether every tag is closed."""

    VOID = ("meta", "img")

    def __init__(self, contents):
        super().__init__()
        self.tags, self.open, self.pictures = set(), [], []
        self.feed(contents)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        assert not any(name.startswith("on") for name in attrs)
        if tag == "img":
            assert attrs["src"].startswith("data:image/png;base64,")
            self.pictures.append(attrs["alt"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    """A run with a report."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, evaluate):
            patch.setattr(module, "create_mesh", lambda **_: one_device)
        train.train(quick_config(total_steps=20), workdir)
        evaluate.report(workdir)
    return workdir


@pytest.mark.slow
def test_it_contains_the_evaluation_and_its_pictures(run):
    contents = (run / "report.html").read_text()
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert f"{evaluation['accuracy']:.2%}" in contents
    assert f"{evaluation['classes']['7']['recall']:.3f}" in contents
    checked = Checker(contents)
    assert not checked.open
    assert len(checked.pictures) == 5  # curves, confusion, mistakes, attention, calibration
    assert page.is_current(run, run / "evaluation", 20)
    assert not page.is_current(run, run / "evaluation", 30)
    assert all(checked.pictures)


@pytest.mark.slow
def test_nothing_is_loaded_or_executed(run):
    """Names of classes and files are text, whatever is in them."""
    path = run / "evaluation" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["classes"][HOSTILE] = evaluation["classes"].pop("3")
    evaluation["mistakes"][0] |= {"example": HOSTILE, "class": HOSTILE}
    evaluation["most_confused"][0]["predicted"] = HOSTILE
    path.write_text(json.dumps(evaluation))
    contents = page.write(run).read_text()
    assert elements.text(HOSTILE) in contents
    assert "script" not in Checker(contents).tags
    assert not re.search(r"https?://|url\(", contents)
    assert "default-src 'none'" in contents


def test_a_run_without_an_evaluation(tmp_path):
    run_folder.record(tmp_path, quick_config(num_classes=10), (), "none")
    contents = page.write(tmp_path).read_text()
    assert "Not evaluated yet" in contents
    assert not Checker(contents).open


def test_many_classes_are_listed_worst_first():
    measures = dict(precision=1.0, recall=1.0, f1=1.0, support=5)
    classes = {f"class {i}": measures | {"f1": i / 100} for i in range(100)}
    averages = dict.fromkeys(("micro", "macro", "weighted"), measures)
    text = page.class_tables({"classes": classes, "averages": averages})
    first, everything = text.split("<details>")
    assert "class 29<" in first
    assert "class 30<" not in first
    assert "class 99<" in everything


def test_mistakes_are_named(tmp_path, capsys):
    assert page.main([str(tmp_path)]) == 2
    assert "is not a run's folder: it has no config.json" in capsys.readouterr().err
    run_folder.record(tmp_path, quick_config(num_classes=10), (), "none")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match="evaluation.json can't be read"):
        page.write(tmp_path)
