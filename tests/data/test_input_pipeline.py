"""Order, sharding, resuming and completeness of batches, for every kind of source."""

import collections
import dataclasses
import itertools
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from batches import assert_same, take, views

import input_pipeline
from input_pipeline import eval_batches, open_source, train_batches
from vit_jax.data import preprocess, shuffle
from vit_jax.errors import UserError

SOURCES = ("digits", "folder", "in_memory", "tfrecord", "array_record")


@pytest.fixture(params=SOURCES)
def source(request, image_folder, tfds_folders):
    names = {"digits": "digits", "folder": str(image_folder), **tfds_folders}
    if request.param == "in_memory":
        return open_source(tfds_folders["tfrecord"], None, "train").in_memory()
    split = "train[:53]" if request.param == "digits" else "train"
    return open_source(names[request.param], None, split)


def test_batches(source, data_config):
    batch = next(train_batches(source, data_config))
    assert batch["images"].shape == (8, 16, 16, 3)
    assert batch["images"].dtype == np.uint8
    assert batch["labels"].shape == (8,)
    assert batch["labels"].dtype == np.int32


def test_two_pipelines_give_the_same_bytes(source, data_config):
    data_config.augment.update(randaugment_layers=2, color_jitter=(0.4, 0.4, 0.4))
    steps = 2 * source.num_examples // 8 + 2
    assert_same(
        take(train_batches(source, data_config), steps),
        take(train_batches(source, data_config), steps),
    )


def test_a_pipeline_begins_at_any_step(source, data_config):
    """In the first epoch, at its end, and epochs later."""
    whole = take(train_batches(source, data_config), 24)
    for step in (1, 6, 7, 13, 20):
        resumed = take(train_batches(source, data_config, first_step=step), 24 - step)
        assert_same(resumed, whole[step:])


def test_the_seed_changes_order_and_crops(source, data_config):
    one = take(train_batches(source, data_config), 3)
    data_config.seed = 1
    other = take(train_batches(source, data_config), 3)
    assert any(
        not np.array_equal(a["labels"], b["labels"]) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("n", [1, 10, 1442, 50_000])
def test_orders_of_many_epochs_and_seeds(n):
    """Permutations without repeats, as far as n has them, and without a pattern."""
    seeds = [(seed, epoch) for seed in (0, 1, 256, 65536) for epoch in (0, 1, 2, 256, 300, 4096)]
    places = tf.range(n, dtype=tf.int64)
    order = tf.function(lambda seed: tf.map_fn(lambda p: shuffle.permuted(p, seed, n), places))
    orders = [order(tf.constant(seed, tf.int64)).numpy() for seed in seeds]
    for one in orders:
        assert np.array_equal(np.sort(one), np.arange(n))
    if n > 10:
        assert len({one.tobytes() for one in orders}) == len(seeds)
    if n > 10_000:  # neighbours are as seldom as in any permutation: 4 / n of the pairs
        near = np.mean([(np.abs(np.diff(one)) <= 2).mean() for one in orders])
        assert near == pytest.approx(4 / n, rel=0.3)


def test_every_epoch_of_every_seed_has_an_order_of_its_own(source, plain):
    orders = []
    n = source.num_examples
    for seed in range(3):
        plain.seed = seed
        seen = views(take(train_batches(source, plain), 3 * n // 8 + 1))
        orders += [tuple(seen[epoch * n : (epoch + 1) * n]) for epoch in range(3)]
    assert len(set(orders)) == 9


def every_view(source):
    """The view of each example, once."""
    return collections.Counter(
        preprocess.resize(preprocess.decode(source.fetch(handle)[0], 3), (16, 16)).numpy().tobytes()
        for _, handle in source.in_order(0, source.num_examples)
    )


def test_an_epoch_has_every_example_once(source, plain):
    """Epochs follow on each other without a gap, each in another order."""
    n = source.num_examples
    seen = views(take(train_batches(source, plain), 2 * n // 8 + 1))
    assert collections.Counter(seen[:n]) == every_view(source)
    assert collections.Counter(seen[n : 2 * n]) == every_view(source)
    assert seen[:n] != seen[n : 2 * n]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_an_epoch(source, plain, count):
    """Together they read every example once an epoch; random access keeps the global order too."""
    parts = [
        train_batches(source, plain, process_index=i, process_count=count) for i in range(count)
    ]
    n = source.num_examples
    if isinstance(source, input_pipeline.RandomAccess):
        steps = take(zip(*parts, strict=True), 2 * n // 8)
        together = [image for step in steps for image in views(step)]
        assert together == views(take(train_batches(source, plain), 2 * n // 8))
    else:
        seen = collections.Counter()
        for i, part in enumerate(parts):
            first, last = shuffle.process_part(n, i, count)
            local = views(take(part, (last - first) // (8 // count) + 1))
            seen.update(local[: last - first])
        assert seen == every_view(source)


def real_images(batches):
    return [image.tobytes() for b in batches for image in b["images"][b["mask"]]]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 8, 64])
def test_evaluation_counts_every_example_once(source, plain, batch_size, count):
    plain.batch_size = 1
    everything = real_images(eval_batches(source, plain))
    plain.batch_size = batch_size
    parts = [
        list(eval_batches(source, plain, process_index=i, process_count=count))
        for i in range(count)
    ]
    assert len({len(part) for part in parts}) == 1
    for batch in itertools.chain(*parts):
        assert len(batch["images"]) == len(batch["mask"]) == batch_size // count
    assert real_images(itertools.chain(*parts)) == everything
    assert len(everything) == source.num_examples


def test_evaluation_on_more_processes_than_examples(tfds_folders, image_folder, plain):
    plain.batch_size = 4
    for name in (*tfds_folders.values(), str(image_folder)):
        source = open_source(name, None, "train[:3]")
        parts = [
            list(eval_batches(source, plain, process_index=i, process_count=4)) for i in range(4)
        ]
        assert [len(part) for part in parts] == [1, 1, 1, 1]
        assert len(real_images(itertools.chain(*parts))) == 3


def test_skipping_changes_nothing_where_nothing_is_damaged(source, data_config):
    data_config.augment.randaugment_layers = 1
    stopping = take(train_batches(source, data_config), 4)
    data_config.dataset.on_error = "skip"
    assert_same(take(train_batches(source, data_config), 4), stopping)
    assert not source.damaged


def test_small_tfrecord_splits_are_held_in_memory(tfds_folders, data_config):
    """Then their order is the global one, as that of ArrayRecord."""
    tfrecord = open_source(tfds_folders["tfrecord"], None, "train")
    data_config.dataset.in_memory_mb = 1
    held = take(train_batches(tfrecord, data_config), 10)
    assert_same(take(train_batches(tfrecord.in_memory(), data_config), 10), held)
    data_config.dataset.in_memory_mb = 0
    buffered = take(train_batches(tfrecord, data_config), 10)
    assert any(
        not np.array_equal(a["labels"], b["labels"]) for a, b in zip(held, buffered, strict=True)
    )


def test_a_sub_split_of_any_size_over_any_processes(tfds_folders, image_folder, plain):
    """Over an epoch every example of the part is read once, and none of the rest."""
    names = [(name, "train[:93%]", 49) for name in tfds_folders.values()]
    names += [(name, "train[3:40]", 37) for name in tfds_folders.values()]
    names += [(str(image_folder), "train[:75%]", 15)]
    plain.batch_size = 6
    for name, split, n in names:
        source = open_source(name, None, split)
        assert source.num_examples == n
        for count in (1, 3):
            parts = [
                train_batches(source, plain, process_index=i, process_count=count)
                for i in range(count)
            ]
            if isinstance(source, input_pipeline.RandomAccess):
                together = views(b for step in take(zip(*parts, strict=True), 10) for b in step)
                seen = collections.Counter(together[:n])
            else:
                seen = collections.Counter()
                for i, part in enumerate(parts):
                    first, last = shuffle.process_part(n, i, count)
                    seen.update(views(take(part, 10))[: last - first])
            assert seen == every_view(source)


def test_a_step_far_away_is_there_at_once(source, plain):
    """The millionth step's examples, and how few the source is asked for until then."""
    if not isinstance(source, input_pipeline.RandomAccess):
        pytest.skip("TFRecord reads an epoch from its beginning")
    fetched = []

    def fetch(index):
        tf.py_function(lambda i: fetched.append(int(i)), [index], [])
        return source.fetch(index)

    watched = dataclasses.replace(source, fetch=fetch)
    one, other = (take(train_batches(s, plain, first_step=10**6), 2) for s in (watched, source))
    assert_same(one, other)
    assert len(fetched) < 200


def test_the_next_epoch_is_read_while_one_ends(tfds_folders):
    """Its buffer fills before its first record is asked for, and not before the last one drains."""
    tfrecord = open_source(tfds_folders["tfrecord"], None, "train")
    started = set()

    class Watched(type(tfrecord)):
        def shuffled(self, first, last, seed, epoch, *args):
            def note(index, record):
                tf.py_function(lambda e: started.add(int(e)), [epoch], [])
                return index, record

            return super().shuffled(first, last, seed, epoch, *args).map(note)

    fields = {field.name: getattr(tfrecord, field.name) for field in dataclasses.fields(tfrecord)}
    records = iter(shuffle.buffer_shuffled(Watched(**fields), 0, 0, 20, 0, 53))
    for _ in range(30):
        assert next(records)[0] == 0
    assert started == {0}
    for _ in range(53 - 30):
        assert next(records)[0] == 0
    deadline = time.monotonic() + 30
    while started == {0} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started == {0, 1}
    assert next(records)[0] == 1


def test_a_program_ends_with_its_batches_unread(tfds_folders):
    """Threads that read in Python don't keep it from ending."""
    code = (
        "import input_pipeline; from configs import common\n"
        "config = common.get_config(); config.update(image_size=16, batch_size=8)\n"
        f"source = input_pipeline.open_source({tfds_folders['array_record']!r}, None, 'train')\n"
        "batches = input_pipeline.train_batches(source, config); next(batches)"
    )
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120, check=False)
    assert done.returncode == 0


def test_batches_that_processes_cannot_share(source, data_config):
    with pytest.raises(UserError, match="batch_size 8 is not divisible by 3 processes"):
        train_batches(source, data_config, process_count=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": "big"}, "image_size is 'big'"),
        ({"image_size": (16,)}, r"image_size is \(16,\)"),
        ({"image_size": 0}, "image_size is 0; it takes whole numbers above 0"),
        ({"dataset.channels": 2}, "dataset.channels is 2"),
        (
            {"augment.mean": (0.1, 0.2)},
            "augment.mean .* takes one number, or one for each of the 3",
        ),
        ({"dataset.on_error": "ignore"}, "on_error is 'ignore'; it can be 'stop', 'skip'"),
        ({"dataset.shuffle_buffer": 0}, "dataset.shuffle_buffer is 0; it is 1 or more"),
        ({"dataset.in_memory_mb": -1}, "dataset.in_memory_mb is -1; it is 0 or more"),
        ({"augment.crop_keep": 0.0}, "augment.crop_keep is 0.0; it lies in"),
        ({"augment.pad": -1}, "augment.pad is -1"),
        ({"augment.randaugment_layers": -1}, "augment.randaugment_layers is -1"),
        ({"augment.color_jitter": (0.1,)}, "augment.color_jitter is .* takes the strengths"),
        ({"augment.eval_crop": 1.5}, "augment.eval_crop is 1.5"),
        ({"augment.crop_area": (0.5, 0.1)}, "augment.crop_area"),
    ],
)
def test_mistakes_in_the_configuration(change, message, data_config):
    data_config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        input_pipeline.check(data_config)
