"""Order, sharding, resuming and completeness of batches, for every kind of source."""

import collections
import dataclasses
import functools
import itertools
import pathlib
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tensorflow as tf
from batches import assert_same, take, views
from datasets import picture
from PIL import Image, ImageOps

import input_pipeline
from input_pipeline import eval_batches, open_source, train_batches
from vit_jax.data import preprocess, shuffle
from vit_jax.data.batches import close_batches
from vit_jax.data.sources import read_labels, subset
from vit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


slow = pytest.mark.slow
KINDS = ("folder", "tfrecord", "array_record")
SLOW_KINDS = (pytest.param(kind, marks=slow) for kind in ("digits", "in_memory"))


@pytest.fixture(scope="module", params=[*KINDS, *SLOW_KINDS])
def source(request, image_folder, tfds_folders):
    if request.param == "in_memory":
        return open_source(tfds_folders["tfrecord"], None, "train").read_into_memory()
    names = {"digits": "digits", "folder": str(image_folder), **tfds_folders}
    split = "train[:53]" if request.param == "digits" else "train"
    return open_source(names[request.param], None, split)


def all_views(source) -> collections.Counter:
    """Returns the resized view of each example, once."""
    resize = functools.partial(preprocess.resize, size=(16, 16))
    examples = source.in_order(0, source.num_examples).map(
        lambda _, handle: resize(
            preprocess.EncodedImage(source.fetch(handle)[0], 3, False).decode()
        )
    )
    return collections.Counter(view.tobytes() for view in examples.as_numpy_iterator())


def test_batches_from_any_step_on(source, data_config):
    """A pipeline that starts in the first epoch, at its end or later gives the same batches."""
    whole = take(train_batches(source, data_config), 24)
    assert whole[0]["images"].shape == (8, 16, 16, 3)
    assert whole[0]["images"].dtype == np.uint8
    assert whole[0]["labels"].shape == (8,)
    assert whole[0]["labels"].dtype == np.int32
    buffered = isinstance(source, input_pipeline.RecordFiles)
    for step in (1, 6, 13) if buffered else (1, 20):
        resumed = take(train_batches(source, data_config, first_step=step), 24 - step)
        assert_same(resumed, whole[step:])


def test_all_augmentation_is_reproducible(image_folder, data_config):
    """Two pipelines give the same bytes, also if one of them would skip corrupt examples."""
    source = open_source(str(image_folder), None, "train")
    data_config.augment.update(randaugment_layers=1, color_jitter=(0.4, 0.4, 0.4))
    batches = take(train_batches(source, data_config), 8)
    data_config.dataset.on_error = "skip"
    assert_same(take(train_batches(source, data_config, first_step=3), 5), batches[3:])
    assert not source.corrupt


def test_the_seed_changes_crops(image_folder, data_config):
    """In two epochs of each seed no crop appears twice."""
    source, seen = open_source(str(image_folder), None, "train"), []
    for data_config.seed in range(2):
        seen += views(take(train_batches(source, data_config), 5))
    assert len(set(seen)) == len(seen) == 80


def test_every_epoch_has_every_example_once_in_a_new_order(source, plain):
    """For two seeds and three epochs, which follow each other without a gap."""
    n, expected, orders = source.num_examples, all_views(source), set()
    for plain.seed in range(2):
        seen = views(take(train_batches(source, plain), 3 * n // 8 + 1))
        for start in range(0, 3 * n, n):
            assert collections.Counter(seen[start : start + n]) == expected
            orders.add(tuple(seen[start : start + n]))
    assert len(orders) == 6


@pytest.mark.parametrize("n", [1, 10, 1442, 50_000])
def test_permutations(n):
    """Every (seed, epoch) has a permutation of its own, without a pattern."""
    seeds = [(seed, epoch) for seed in (0, 1, 256, 65536) for epoch in (0, 1, 2, 256, 300, 4096)]
    positions = tf.range(n, dtype=tf.int64)
    seeds = [tf.constant(seed, tf.int64) for seed in seeds]
    orders = [shuffle.permuted_index(positions, seed, n).numpy() for seed in seeds]
    assert shuffle.permuted_index(positions[n // 2], seeds[0], n) == orders[0][n // 2]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(n))
    if n > 10:
        assert len({order.tobytes() for order in orders}) == len(seeds)
    if n > 10_000:  # as in any permutation, 4 / n of the adjacent pairs are close in value
        close = np.mean([(np.abs(np.diff(order)) <= 2).mean() for order in orders])
        assert close == pytest.approx(4 / n, rel=0.3)


def shares(source, config, count):
    """Returns the training batches of each of `count` processes."""
    return [train_batches(source, config, share_index=i, num_shares=count) for i in range(count)]


def whole_steps(source, config, count, steps) -> list:
    """Returns the views of the global batches that `count` processes load."""
    batches = take(zip(*shares(source, config, count), strict=True), steps)
    return views(itertools.chain(*batches))


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_the_order_does_not_depend_on_the_number_of_processes(source, plain, count):
    """In four parts of TFRecord files; eight processes then read each part twice."""
    plain.dataset.parts = 4
    whole = views(take(train_batches(source, plain), 16))
    assert whole_steps(source, plain, count, 16) == whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_processes_share_a_sub_split(tfds_folders, plain, kind):
    """Neither the processes nor the batch size divide it; each part has every example once."""
    plain.batch_size, plain.dataset.parts = 6, 3
    source = open_source(tfds_folders[kind], None, "train[3:40]")
    assert source.num_examples == 37
    found = np.array(whole_steps(source, plain, 3, 7), object).reshape(
        7, 3, 2
    )  # steps, parts, rows
    if kind == "array_record":
        seen = found.ravel()[:37]
    else:
        sizes = np.diff([*(shuffle.share_range(37, i, 3)[0] for i in range(3)), 37])
        seen = np.concatenate([found[:, i].ravel()[:size] for i, size in enumerate(sizes)])
    assert collections.Counter(seen.tolist()) == all_views(source)


@pytest.mark.slow
def test_interleaved_rows_of_a_process(tfds_folders, plain):
    """As on a TPU slice, whose mesh follows the torus."""
    source = open_source(tfds_folders["tfrecord"], None, "train")
    plain.dataset.parts = 2
    rows = np.array([0, 1, 4, 5, 7])
    examples = input_pipeline.train_examples(source, plain, 3, rows).take(5 * 5)
    expected = input_pipeline.train_examples(source, plain, 3, np.arange(8)).take(5 * 8)
    index, wanted = (
        np.array([int(i) for _, i, _ in dataset.as_numpy_iterator()])
        for dataset in (examples, expected)
    )
    assert np.array_equal(index.reshape(5, 5), wanted.reshape(5, 8)[:, rows])


def test_parts_of_equal_sizes_have_different_orders(tfds_folders, plain):
    source = open_source(tfds_folders["tfrecord"], None, "train")
    size = source.num_examples // 2
    source = open_source(tfds_folders["tfrecord"], None, f"train[:{2 * size}]")
    plain.batch_size, plain.dataset.parts = 2, 2
    pairs = input_pipeline.train_examples(source, plain, 0, np.arange(2)).take(2 * size)
    index = np.array([int(i) for _, i, _ in pairs.as_numpy_iterator()]).reshape(size, 2)
    assert np.mean(index[:, 0] == index[:, 1] - size) < 0.5


@pytest.mark.parametrize(
    "kind", ["folder", *(pytest.param(k, marks=pytest.mark.slow) for k in ("parts", "buffer"))]
)
def test_repeated_examples_come_in_a_row_with_views_of_their_own(
    kind, image_folder, tfds_folders, data_config
):
    """An epoch has as many views as examples; resumed, and on two processes, they are the same."""
    name = str(image_folder) if kind == "folder" else tfds_folders["tfrecord"]
    source = open_source(name, None, "train")
    n, repeats = source.num_examples, 3
    data_config.dataset.update(repeats=repeats, parts=1, order=None if kind == "folder" else kind)
    steps = 2 * n // 8
    examples = input_pipeline.train_examples(source, data_config, 0, np.arange(8))
    stream = [(int(s), int(i)) for s, i, _ in examples.take(8 * steps).as_numpy_iterator()]
    assert len(set(stream)) == len(stream)  # so that each view has a seed of its own
    for epoch in range(2):
        found = [index for _, index in stream[epoch * n : (epoch + 1) * n]]
        assert all(len(set(found[i : i + repeats])) == 1 for i in range(0, len(found), repeats))
        assert len(set(found)) == len(range(0, len(found), repeats))
    whole = take(train_batches(source, data_config), steps)
    assert len(set(views(whole))) > 0.9 * len(stream)
    for step in (1, steps - 2):
        assert_same(take(train_batches(source, data_config, first_step=step), 2), whole[step:][:2])
    assert whole_steps(source, data_config, 2, steps) == views(whole)


@pytest.mark.slow
def test_repeats_do_not_depend_on_the_number_of_processes_in_parts(tfds_folders, data_config):
    source = open_source(tfds_folders["tfrecord"], None, "train")
    data_config.dataset.update(repeats=3, parts=4)
    whole = views(take(train_batches(source, data_config), 12))
    assert whole_steps(source, data_config, 8, 12) == whole


def test_the_number_of_parts():
    """As many as divide the batch, but not of a small split."""
    for num_examples, batch_size, parts in (
        (1_281_167, 4096, 64),
        (1_281_167, 1000, 50),
        (1_281_167, 509, 1),
        (5_000, 4096, 4),
        (53, 8, 1),
    ):
        assert shuffle.num_parts(num_examples, batch_size) == parts


@pytest.mark.parametrize("parts", [1, 2])
def test_runs_of_earlier_versions_keep_their_order(tfds_folders, plain, parts):
    """Each of their processes shuffled a part of its own through a whole buffer."""
    source = open_source(tfds_folders["tfrecord"], None, "train")
    plain.dataset.update(order="buffer", parts=parts)
    n, rows = source.num_examples, 8 // parts
    found = input_pipeline.train_examples(source, plain, 2, np.arange(8)).take(10 * 8)
    found = np.array([int(index) for _, index, _ in found.as_numpy_iterator()]).reshape(10, 8)
    for i in range(parts):
        first, last = shuffle.share_range(n, i, parts)
        stream = shuffle.buffer_shuffle(source, plain.seed, 2 * rows, 10, first, last)
        expected = [int(index) for _, index, _ in stream.take(10 * rows).as_numpy_iterator()]
        assert found[:, i * rows : (i + 1) * rows].ravel().tolist() == expected


def real_images(batches):
    return [image.tobytes() for b in batches for image in b["images"][b["mask"]]]


def test_evaluation_counts_every_example_once(source, plain):
    """Whatever the batch size and the number of processes, and in order."""
    in_order = None
    for batch_size, count in ((1, 1), (8, 2), (64, 4)):
        parts = [
            list(
                eval_batches(source, plain, batch_size=batch_size, share_index=i, num_shares=count)
            )
            for i in range(count)
        ]
        assert len({len(part) for part in parts}) == 1
        for batch in itertools.chain(*parts):
            assert len(batch["images"]) == len(batch["mask"]) == batch_size // count
        images = real_images(itertools.chain(*parts))
        in_order = in_order or images
        assert images == in_order
        assert len(images) == source.num_examples


def counting(source):
    """Returns the source, and the list to which it adds an item for each example it fetches."""
    fetched = []

    def fetch(handle):
        tf.py_function(lambda: fetched.append(1), [], [])
        return source.fetch(handle)

    return dataclasses.replace(source, fetch=fetch), fetched


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [2, 1])
def test_small_evaluation_sets_are_decoded_once(image_folder, plain, megabytes):
    """53 examples in seven batches of eight images of 28 kB: 1.5 MB."""
    plain.image_size = 96
    plain.dataset.update(eval_cache_mb=megabytes, on_error="skip")
    source, fetched = counting(open_source(str(image_folder), None, "train+val+train"))
    assert source.num_examples == 53
    batches = input_pipeline.EvalBatches(source, plain)
    next(iter(batches))  # an evaluation that was interrupted
    fetched.clear()
    first = list(batches)
    assert len(fetched) == 53
    assert_same(list(batches), first)
    assert_same(list(batches), list(eval_batches(source, plain)))
    assert len(fetched) == (2 * 53 if megabytes == 2 else 4 * 53)


def test_evaluation_on_more_processes_than_examples(tfds_folders, image_folder, plain):
    plain.batch_size = 4
    for name in (tfds_folders["tfrecord"], str(image_folder)):
        source = open_source(name, None, "train[:3]")
        parts = [list(eval_batches(source, plain, share_index=i, num_shares=4)) for i in range(4)]
        assert [len(part) for part in parts] == [1, 1, 1, 1]
        assert len(real_images(itertools.chain(*parts))) == 3


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_on_error_skip_changes_nothing_without_corrupt_examples(kind, tfds_folders, data_config):
    source = open_source(tfds_folders[kind], None, "train")
    expected = take(train_batches(source, data_config), 4)
    data_config.dataset.on_error = "skip"
    assert_same(take(train_batches(source, data_config), 4), expected)
    assert not source.corrupt


def test_small_tfrecord_splits_are_read_into_memory(tfds_folders, data_config):
    """Their order is then the global one, as that of ArrayRecord."""
    source = open_source(tfds_folders["tfrecord"], None, "train")
    data_config.dataset.in_memory_mb = 1
    assert input_pipeline.shuffle_order(source, data_config) == ("global", 1)
    in_memory = take(train_batches(source, data_config), 10)
    assert_same(take(train_batches(source.read_into_memory(), data_config), 10), in_memory)
    array_record = open_source(tfds_folders["array_record"], None, "train")
    assert_same(take(train_batches(array_record, data_config), 10), in_memory)
    data_config.dataset.in_memory_mb = 0
    assert input_pipeline.shuffle_order(source, data_config) == ("parts", 1)
    buffered = take(train_batches(source, data_config), 10)
    assert views(buffered) != views(in_memory)


def test_starting_at_a_late_step_is_immediate(source, plain):
    """The millionth step fetches its own examples and few others."""
    if not isinstance(source, input_pipeline.RandomAccess):
        pytest.skip("TFRecord files are read from the start of an epoch")
    counted, fetched = counting(source)
    late, expected = (take(train_batches(s, plain, first_step=10**6), 2) for s in (counted, source))
    assert_same(late, expected)
    assert len(fetched) < 200


def test_open_batches_are_closed_at_exit(tfds_folders, data_config):
    source = open_source(tfds_folders["array_record"], None, "train")
    training, evaluation = train_batches(source, data_config), eval_batches(source, data_config)
    next(training)
    next(evaluation)
    close_batches()
    with pytest.raises(StopIteration):
        next(training)
    assert not next(evaluation)["mask"].any()


@pytest.mark.slow
def test_a_program_ends_with_unread_batches(tfds_folders):
    """Threads that read ArrayRecord files in Python don't keep it from ending."""
    code = (
        "import input_pipeline; from configs import common\n"
        "config = common.get_config(); config.update(image_size=16, batch_size=8)\n"
        f"source = input_pipeline.open_source({tfds_folders['array_record']!r}, None, 'train')\n"
        "batches = input_pipeline.train_batches(source, config); next(batches)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False)
    assert result.returncode == 0


def test_a_batch_that_cannot_be_divided_among_processes(data_config):
    source = open_source("digits", None, "train")
    message = "config.batch_size is 8; it must be a multiple of the 3 processes"
    with pytest.raises(UserError, match=message):
        train_batches(source, data_config, num_shares=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": "big"}, "image_size is 'big'"),
        ({"image_size": (16,)}, r"image_size is \(16,\)"),
        ({"image_size": 0}, "image_size is 0; it must be a number of pixels above 0"),
        ({"dataset.channels": 2}, "dataset.channels is 2; it must be 1 or 3"),
        ({"dataset.repeats": 0}, "dataset.repeats is 0; it must be a whole number >= 1"),
        ({"dataset.repeats": 8}, "dataset.repeats is 8; it must be below the batch size"),
        ({"augment.crop_distribution": "uniform"}, "is 'uniform'; it must be 'tensorflow', 'area'"),
        ({"augment.crop_beta": (1.0, 0.0)}, r"crop_beta is \(1.0, 0.0\); it must be the two"),
        ({"augment.resize_method": "area"}, "resize_method is 'area'; it must be 'bilinear' or"),
        ({"augment.randaugment_kind": "torch"}, "randaugment_kind is 'torch'; it must be 'pillow'"),
        ({"augment.crop": "simple", "augment.pad": 16}, "augment.pad is 16; it must be a whole"),
        ({"augment.mean": (0.1, 0.2)}, "augment.mean .* must have one number, or one for each of"),
        ({"dataset.on_error": "ignore"}, "on_error is 'ignore'; it must be 'stop' or 'skip'"),
        ({"dataset.shuffle_buffer": 0}, "dataset.shuffle_buffer is 0; it must be a whole number"),
        ({"dataset.in_memory_mb": -1}, "dataset.in_memory_mb is -1; it must be a number >= 0"),
        ({"augment.crop": "centre"}, "augment.crop is 'centre'; it must be 'inception'"),
        ({"augment.crop_keep": 0.0}, "augment.crop_keep is 0.0; it must be a number > 0"),
        ({"augment.pad": -1}, "augment.pad is -1"),
        ({"augment.randaugment_layers": -1}, "augment.randaugment_layers is -1"),
        ({"augment.color_jitter": (0.1,)}, "augment.color_jitter is .* must be the strengths"),
        ({"augment.eval_crop": 1.5}, "augment.eval_crop is 1.5; .* <= 1, or 'squeeze'"),
        ({"augment.eval_crop": "squash"}, "augment.eval_crop is 'squash'"),
        ({"augment.eval_method": "box"}, "augment.eval_method is 'box'; it must be 'bilinear',"),
        ({"augment.crop_area": (0.5, 0.1)}, "augment.crop_area"),
    ],
)
def test_mistakes_in_the_configuration(change, message, data_config):
    data_config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        input_pipeline.check(data_config)


def test_the_next_epoch_is_read_while_one_ends(tfds_folders):
    """Its buffer fills before its first record is needed, but not before the last one drains."""
    tfrecord = open_source(tfds_folders["tfrecord"], None, "train")
    started = set()

    class Watched(type(tfrecord)):
        def shuffled(self, first, last, seed, epoch, *args, **reading):
            def note(index, record):
                tf.py_function(lambda e: started.add(int(e)), [epoch], [])
                return index, record

            return super().shuffled(first, last, seed, epoch, *args, **reading).map(note)

    fields = {field.name: getattr(tfrecord, field.name) for field in dataclasses.fields(tfrecord)}
    records = iter(shuffle.buffer_shuffle(Watched(**fields), 0, 0, 20, 0, 53))
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


def test_photographs_of_folders_are_turned_upright(tmp_path, plain):
    """In training and evaluation, unless the configuration says otherwise."""
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(3, (16, 16))).save(folder / "a.jpg", exif=exif)
    with Image.open(folder / "a.jpg") as photo:
        expected = {None: ImageOps.exif_transpose(photo), False: photo}
        expected = {exif: np.asarray(image).astype(int) for exif, image in expected.items()}
    source = open_source(str(tmp_path), None, "train")
    assert np.abs(next(train_batches(source, plain))["images"][0] - expected[None]).mean() < 3
    plain.augment.eval_crop = 1.0
    for plain.dataset.exif, pixels in expected.items():
        assert np.abs(next(eval_batches(source, plain))["images"][0] - pixels).mean() < 3
    assert not open_source("digits", None, "test").exif


def test_a_label_outside_the_classes_is_named():
    """It would be trained on as no class at all."""
    source = types.SimpleNamespace(name="photos, split train", num_classes=3)
    good, bad = (dict(labels=np.array(labels)) for labels in ([0, 2], [1, -1]))
    batches = input_pipeline.check_labels(iter([good, bad]), source)
    assert next(batches) is good
    with pytest.raises(UserError, match="photos, split train has an example with the label -1"):
        next(batches)


@pytest.mark.parametrize("kind", ["folder", "tfrecord", "array_record"])
def test_selected_examples_are_those_of_the_whole_split(kind, plain, image_folder, tfds_folders):
    name = image_folder if kind == "folder" else tfds_folders[kind]
    source = open_source(str(name), None, "train")
    (whole,) = eval_batches(source, plain, batch_size=source.num_examples)
    rows = [7, 2, 5]
    np.testing.assert_array_equal(
        input_pipeline.load_images(source, plain, rows), whole["images"][rows]
    )
    batches = input_pipeline.open_eval_batches(plain, "train", name=str(name), max_examples=4)
    assert batches.source.num_examples == 4
    spaced = np.arange(4) * source.num_examples // 4
    (part,) = batches.make(batch_size=4)
    np.testing.assert_array_equal(part["images"], whole["images"][spaced])
    assert batches.source.describe(1) == source.describe(int(spaced[1]))


def chosen(source, examples, seed=0, balanced=False) -> list[bytes]:
    """The resized views of a subset, in order."""
    return sorted(all_views(subset(source, examples, seed, balanced)).elements())


def test_a_smaller_subset_is_a_part_of_a_larger_one(source):
    some, more = (collections.Counter(chosen(source, n)) for n in (9, 0.5))
    assert sum(some.values()) == 9
    assert sum(more.values()) == round(source.num_examples / 2)
    assert some <= more <= all_views(source)
    assert chosen(source, 9) != chosen(source, 9, seed=1)
    with pytest.raises(UserError, match="which would be 1,000 examples; .* has"):
        subset(source, 1000, 0, False)
    with pytest.raises(UserError, match="is 1, which could be all examples or one: for all, leave"):
        subset(source, 1.0, 0, False)
    with pytest.raises(UserError, match="is 1.7; it must be a whole number, or a share below 1"):
        subset(source, 1.7, 0, False)


def test_balanced_subsets(source):
    labels = read_labels(source)
    few, more = (read_labels(subset(source, n, 3, True)) for n in (7, 8))
    for found in (few, more):
        counts = np.bincount(found, minlength=source.num_classes)
        at_most = np.bincount(labels, minlength=source.num_classes)
        assert all(counts == np.minimum(at_most, counts.max() - (counts < counts.max())))
    assert collections.Counter(few.tolist()) <= collections.Counter(more.tolist())


def test_an_epoch_has_each_example_of_a_subset_once(source, plain):
    part = subset(source, 16, 0, False)
    batches = take(train_batches(part, plain), 2)
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert sorted(labels) == sorted(read_labels(part))
    assert sorted(views(batches)) == chosen(source, 16)
    assert {part.describe(i) for i in range(16)} <= {
        source.describe(i) for i in range(source.num_examples)
    }
