"""Order, sharding, resuming and completeness of batches, for every kind of source."""

import collections
import itertools

import numpy as np
import pytest
from datasets import picture
from PIL import Image

import input_pipeline
import preprocess
from input_pipeline import eval_batches, open_source, train_batches
from vit_jax.errors import UserError

SOURCES = ("digits", "folder", "tfrecord", "array_record")


@pytest.fixture(params=SOURCES)
def source(request, image_folder, tfds_folders):
    names = {"digits": "digits", "folder": str(image_folder), **tfds_folders}
    split = "train[:53]" if request.param == "digits" else "train"
    return open_source(names[request.param], None, split)


@pytest.fixture
def config(tiny_config):
    tiny_config.batch_size = 8
    tiny_config.image_size = 16
    tiny_config.dataset.shuffle_buffer = 10
    return tiny_config


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_batches(source, config):
    batch = next(train_batches(source, config))
    assert batch["images"].shape == (8, 16, 16, 3)
    assert batch["images"].dtype == np.uint8
    assert batch["labels"].shape == (8,)
    assert batch["labels"].dtype == np.int32


def test_two_pipelines_give_the_same_bytes(source, config):
    config.augment.update(randaugment_layers=2, color_jitter=(0.4, 0.4, 0.4))
    steps = 2 * source.num_examples // 8 + 2
    assert_same(
        take(train_batches(source, config), steps), take(train_batches(source, config), steps)
    )


def test_a_pipeline_begins_at_any_step(source, config):
    """In the first epoch, at its end, and epochs later."""
    whole = take(train_batches(source, config), 24)
    for step in (1, 6, 7, 13, 20):
        resumed = take(train_batches(source, config, first_step=step), 24 - step)
        assert_same(resumed, whole[step:])


def test_the_seed_changes_order_and_crops(source, config):
    one = take(train_batches(source, config), 3)
    config.seed = 1
    other = take(train_batches(source, config), 3)
    assert any(
        not np.array_equal(a["labels"], b["labels"]) for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def plain(config):
    """Resizing alone, so that a view stands for its example."""
    config.augment.update(crop="none", flip=False)
    return config


def test_every_epoch_of_every_seed_has_an_order_of_its_own(source, plain):
    orders = []
    n = source.num_examples
    for seed in range(3):
        plain.seed = seed
        seen = views(take(train_batches(source, plain), 3 * n // 8 + 1))
        orders += [tuple(seen[epoch * n : (epoch + 1) * n]) for epoch in range(3)]
    assert len(set(orders)) == 9


def views(batches):
    return [image.tobytes() for batch in batches for image in batch["images"]]


def every_view(source):
    """The view of each example, once."""
    return collections.Counter(
        preprocess.resize(preprocess.decode(encoded, 3), (16, 16)).numpy().tobytes()
        for _, encoded, _ in source.in_order(0, source.num_examples)
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
            first, last = input_pipeline.process_part(n, i, count)
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


def test_a_file_that_is_no_image_is_named(tmp_path, config):
    for i in range(30):
        path = tmp_path / "train" / "cat" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(path)
    (tmp_path / "train" / "cat" / "17.png").write_text("not an image")
    source = open_source(str(tmp_path), None, "train")
    for batches in (train_batches(source, config), eval_batches(source, config)):
        with pytest.raises(UserError, match=r"cat/17\.png can't be decoded"):
            take(batches, 8)
    (tmp_path / "train" / "cat" / "17.png").unlink()
    with pytest.raises(UserError, match=r"Reading .* failed: .*17\.png"):
        take(train_batches(source, config), 8)


def test_a_truncated_jpeg_is_named(tmp_path, config):
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    for i in range(8):
        Image.fromarray(picture(i)).save(folder / f"{i}.jpg")
    whole = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(whole[: len(whole) // 4])
    source = open_source(str(tmp_path), None, "train")
    with pytest.raises(UserError, match=r"cat/3\.jpg can't be decoded"):
        take(train_batches(source, config), 4)


def test_batches_that_processes_cannot_share(source, config):
    with pytest.raises(UserError, match="batch_size 8 is not divisible by 3 processes"):
        train_batches(source, config, process_count=3)


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
        ({"augment.pad": -1}, "augment.pad is -1"),
        ({"augment.randaugment_layers": -1}, "augment.randaugment_layers is -1"),
        ({"augment.color_jitter": (0.1,)}, "augment.color_jitter is .* takes the strengths"),
        ({"augment.eval_crop": 1.5}, "augment.eval_crop is 1.5"),
        ({"augment.crop_area": (0.5, 0.1)}, "augment.crop_area"),
    ],
)
def test_mistakes_in_the_configuration(change, message, config):
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        input_pipeline.check(config)
