"""Classifiers of frozen features: few-shot, nearest neighbors and the linear probe."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from vit_jax.errors import UserError
from vit_jax.evaluation import fewshot, knn, probe
from vit_jax.evaluation.embeddings import Embeddings


@pytest.fixture(scope="module")
def sets():
    """Training and test features (64 each) of ten overlapping classes."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(10, 64))

    def draw(count):
        labels = np.arange(count) % 10
        features = np.tanh(centers[labels] + 2 * rng.normal(size=(count, 64)))
        return Embeddings(features.astype(np.float32), labels.astype(np.int32))

    return draw(600), draw(300)


def whitened(features, by):
    by = by.astype(np.float64)
    return (features - by.mean(axis=0)) / (by.std(axis=0) + 1e-5)


@pytest.mark.parametrize("shots", [5, 25])  # fewer and more examples than features
@pytest.mark.parametrize("l2", [1.0, 1024.0])
def test_few_shot_is_ridge_regression(sets, shots, l2):
    train, test = sets
    rows = fewshot.draw(train.labels, 10, shots, seed=0)
    few = train.select(rows)

    def inputs(features):
        x = whitened(features, few.features)
        return np.concatenate([x, np.ones((len(x), 1))], axis=1)

    ridge = Ridge(alpha=l2, fit_intercept=False)
    ridge.fit(inputs(few.features), 2 * np.eye(10)[few.labels] - 1)
    expected = ridge.predict(inputs(test.features))
    classifier = fewshot.fit(few.features, few.labels, 10, l2)
    np.testing.assert_allclose(fewshot.scores(classifier, test.features), expected, atol=1e-4)
    accuracy = np.mean(expected.argmax(axis=1) == test.labels)
    result = fewshot.evaluate(train, test, 10, shots=(shots,), seeds=1, l2=l2)
    assert result == {f"accuracy_{shots}shot": accuracy, f"accuracy_{shots}shot_std": 0.0}


def test_shots_are_nested_and_balanced(sets):
    train, _ = sets
    one, five = (fewshot.draw(train.labels, 10, shots, seed=3) for shots in (1, 5))
    assert np.bincount(train.labels[five]).tolist() == [5] * 10
    assert set(one) <= set(five)
    assert set(five) != set(fewshot.draw(train.labels, 10, 5, seed=4))


@pytest.mark.parametrize("neighbors", [1, 7, 20])
def test_neighbors_vote_as_in_scikit_learn(sets, neighbors, monkeypatch):
    train, test = sets

    def normalize(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    theirs = KNeighborsClassifier(neighbors).fit(normalize(train.features), train.labels)
    monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", 70 * len(train.labels))  # several parts
    result = knn.evaluate(train, test, 10, neighbors=neighbors)
    assert result["accuracy"] == pytest.approx(
        theirs.score(normalize(test.features), test.labels), abs=1e-4
    )


@pytest.mark.slow
def test_probe_is_logistic_regression(sets):
    train, test = sets
    theirs = LogisticRegression(C=1 / (0.01 * len(train.labels)), tol=1e-8, max_iter=1000)
    theirs.fit(whitened(train.features, train.features), train.labels)
    expected = theirs.predict_proba(whitened(test.features, train.features))
    logits = probe.logits(probe.fit(train, 10, l2=0.01, max_iterations=500), test.features)
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=2e-3)
    result = probe.evaluate(train, test, 10, l2=(1e-8, 0.01))
    assert result["l2"] == 0.01  # 480 examples for 650 weights: the other overfits
    assert result["accuracy"] == np.mean(expected.argmax(axis=1) == test.labels)


def test_too_few_training_examples_are_named(sets):
    train, test = sets
    with pytest.raises(UserError, match="Class 0 has 60 training examples, and 61 shots need 61"):
        fewshot.evaluate(train, test, 10, shots=(1, 61))
    with pytest.raises(UserError, match="Class 10 has no training example"):
        probe.evaluate(train, test, 11)
    with pytest.raises(UserError, match="neighbors is 601, and there are 600 training examples"):
        knn.evaluate(train, test, 10, neighbors=601)
