"""Accuracy of a linear probe: multinomial logistic regression on frozen features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.checks import COUNT, NON_NEGATIVE
from vit_jax.errors import UserError
from vit_jax.evaluation.embeddings import Embeddings, Whitening

RANGES = {"l2": NON_NEGATIVE, "max_iterations": COUNT}
HELD_OUT = 10  # one of so many training examples selects the regularization
TOLERANCE = 1e-5  # of the gradient's largest entry


def evaluate(
    train: Embeddings,
    test: Embeddings,
    num_classes: int,
    *,
    l2: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2),
    max_iterations: int = 500,
) -> dict[str, float]:
    """Returns the accuracy on `test` of a linear classifier fitted to all of `train`.

    Features are whitened. The weight of the regularization is the one that is best on a tenth
    of the training examples, for a classifier fitted to the rest.

    Args:
        train: the examples to fit.
        test: the examples to classify.
        num_classes: how many classes the labels number.
        l2: weights of the regularization to choose from.
        max_iterations: of L-BFGS, for each fit.

    Returns:
        `accuracy`, and the chosen `l2`.

    Raises:
        UserError: a class has no training example.
    """
    if missing := np.setdiff1d(np.arange(num_classes), train.labels).tolist():
        raise UserError(
            f"Class {missing[0]} has no training example: choose a larger train_split or "
            "train_examples"
        )
    best = l2[0]
    if len(l2) > 1:
        held_out = np.random.default_rng(0).permutation(len(train.labels)) % HELD_OUT == 0
        fitted, selection = train.select(~held_out), train.select(held_out)
        accuracies = [
            accuracy(fit(fitted, num_classes, weight, max_iterations), selection) for weight in l2
        ]
        best = l2[int(np.argmax(accuracies))]
    classifier = fit(train, num_classes, best, max_iterations)
    return {"accuracy": accuracy(classifier, test), "l2": best}


def check(num_examples: int, num_classes: int, **_) -> None:
    """Raises UserError if there are fewer training examples than classes."""
    if num_examples < num_classes:
        raise UserError(
            f"There are {num_examples} training examples of {num_classes} classes: choose a larger "
            "train_split or train_examples"
        )


def accuracy(classifier, examples: Embeddings) -> float:
    predictions = jnp.argmax(logits(classifier, examples.features), axis=-1)
    return float(np.mean(np.asarray(predictions) == examples.labels))


def fit(train: Embeddings, num_classes: int, l2: float, max_iterations: int):
    """Minimizes the mean cross-entropy plus l2 / 2 times the sum of the squared weights.

    Returns:
        The features' whitening, and kernel (D, C) and bias (C,) for the whitened features.
    """
    whitening = Whitening.of(train.features)
    features = whitening(train.features)
    return whitening, minimize(features, train.labels, num_classes, l2, max_iterations)


@functools.partial(jax.jit, static_argnames=("num_classes", "max_iterations"))
def minimize(features, labels, num_classes: int, l2: float, max_iterations: int) -> dict:
    """Fits kernel and bias to features (N, D) and labels (N,) by L-BFGS."""
    solver = optax.lbfgs()

    def loss(params):
        outputs = linear(params, features)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()
        return cross_entropy + 0.5 * l2 * jnp.sum(params["kernel"] ** 2)

    value_and_grad = optax.value_and_grad_from_state(loss)

    def iterate(carry):
        params, state, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state, optax.tree.norm(grad, ord=jnp.inf)

    def goes_on(carry):
        _, state, grad_norm = carry
        count = optax.tree.get(state, "count")
        return (count < max_iterations) & (grad_norm > TOLERANCE)

    width = features.shape[1]
    params = {"kernel": jnp.zeros((width, num_classes)), "bias": jnp.zeros(num_classes)}
    carry = params, solver.init(params), jnp.inf
    return jax.lax.while_loop(goes_on, iterate, carry)[0]


def linear(params: dict, features):
    """Returns features (N, D) times the kernel plus the bias, (N, C)."""
    return jnp.matmul(features, params["kernel"], precision="float32") + params["bias"]


@jax.jit
def logits(classifier, features):
    """Returns the logits of features (N, D), (N, C)."""
    whitening, params = classifier
    return linear(params, whitening(features))
