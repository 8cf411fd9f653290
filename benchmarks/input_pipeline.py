"""Measures the images per second that one host core prepares, and the memory of a global shuffle.

    python -m benchmarks.input_pipeline

Compares, in turns in the same run, the input pipeline with decoding alone, with decoding and
cropping in one operation, and with the tf.data pipeline that one would write first. Prints the
tables of docs/benchmarks.md.
"""

import concurrent.futures
import datetime
import io
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import tempfile
import time

BATCH_SIZE, ROUNDS, BATCHES_PER_ROUND = 128, 9, 5
SIZES = ("Ti/16", "S/32", "S/16", "B/32", "B/16", "L/32", "L/16", "H/14")
# Rows that others are compared with.
DECODE_AND_CROP = "decoding and cropping in one operation, alone"
PLAIN = "plain tf.data"
CROP_FLIP = "vit_jax: crop, flip"
RANDAUGMENT = f"{CROP_FLIP}, RandAugment(2, 10)"
PEAK_FLOPS, UTILIZATION = 989e12, 0.4  # dense bfloat16 on an NVIDIA H100 or H200 (SXM)


def make_jpegs(count: int) -> list[bytes]:
    """Returns 500x375 JPEGs of 60 to 110 kB, crops of scikit-learn's two sample photographs."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    jpegs = []
    while len(jpegs) < count:
        photo = photos[len(jpegs) % 2]  # 640x427
        width = int(rng.integers(400, 570))
        height = width * 3 // 4
        left, top = rng.integers(0, 641 - width), rng.integers(0, 428 - height)
        photo = photo.crop((left, top, left + width, top + height)).resize((500, 375))
        target = rng.uniform(60e3, 110e3)
        for quality in range(80, 101):
            buffer = io.BytesIO()
            photo.save(buffer, "JPEG", quality=quality)
            if buffer.tell() >= target:
                break
        if 60e3 <= buffer.tell() <= 110e3:
            jpegs.append(buffer.getvalue())
    return jpegs


def pipelines(jpegs) -> dict:
    """Returns name -> function that returns an endless iterator of batches of BATCH_SIZE images."""
    import tensorflow as tf

    import input_pipeline
    from configs import common
    from vit_jax.data.sources import RandomAccess

    encoded = tf.constant(jpegs)
    labels = tf.range(len(jpegs), dtype=tf.int64) % 1000
    source = RandomAccess(
        name="generated JPEGs, repeated",
        num_examples=1_000_000,
        class_names=tuple(map(str, range(1000))),
        describe=str,
        fetch=lambda index: (encoded[index % len(jpegs)], labels[index % len(jpegs)]),
    )
    config = common.get_config()
    config.update(batch_size=BATCH_SIZE, image_size=224)

    def train_batches(on_error="stop", **augment):
        changed = config.copy_and_resolve_references()
        changed.dataset.on_error = on_error
        changed.augment.update(augment)
        return input_pipeline.train_batches(source, changed)

    def random_window(shape):
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros((0, 0, 4)),
            min_object_covered=0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.05, 1.0),
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        return begin, extent

    def decode_and_crop(jpeg):
        begin, extent = random_window(tf.io.extract_jpeg_shape(jpeg))
        corners = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        return tf.io.decode_and_crop_jpeg(jpeg, corners, channels=3)

    def plain(jpeg, label):
        image = tf.io.decode_jpeg(jpeg, channels=3)
        begin, extent = random_window(tf.shape(image))
        image = tf.slice(image, begin, extent)
        image = tf.image.resize(tf.cast(image, tf.float32), (224, 224))
        image = tf.image.random_flip_left_right(image)
        return image / 127.5 - 1.0, tf.one_hot(label, 1000)

    def tf_data(function):
        """Returns the maker of a tf.data pipeline that maps `function` over (JPEG, label)."""

        def make():
            examples = tf.data.Dataset.from_tensor_slices((encoded, labels)).shuffle(1000).repeat()
            views = examples.map(function, num_parallel_calls=tf.data.AUTOTUNE)
            batches = views.batch(BATCH_SIZE, drop_remainder=True)
            return batches.prefetch(2).as_numpy_iterator()

        return make

    # Images of different sizes can't be batched. Their shapes can, and need the decoded images.
    return {
        "decoding alone, with libjpeg": tf_data(
            lambda j, _: tf.shape(tf.io.decode_jpeg(j, channels=3))
        ),
        DECODE_AND_CROP: tf_data(lambda j, _: tf.shape(decode_and_crop(j))),
        "the same, then `tf.image.resize`": tf_data(
            lambda j, _: tf.image.resize(decode_and_crop(j), (224, 224))[0, 0]
        ),
        PLAIN: tf_data(plain),
        CROP_FLIP: train_batches,
        RANDAUGMENT: lambda: train_batches(randaugment_layers=2),
        f"{CROP_FLIP}, with `on_error=skip`": lambda: train_batches("skip"),
        "vit_jax: evaluation": lambda: input_pipeline.eval_batches(source, config),
    }


def measure_speed() -> dict[str, float]:
    """Returns the images per second of each pipeline, the median over rounds."""
    jpegs = make_jpegs(512)
    kilobytes = [len(jpeg) / 1e3 for jpeg in jpegs]
    print(
        f"{len(jpegs)} JPEGs of {min(kilobytes):.0f} to {max(kilobytes):.0f} kB, "
        f"{statistics.mean(kilobytes):.0f} on average; batches of {BATCH_SIZE}\n"
    )
    makers = pipelines(jpegs)
    seconds = {name: [] for name in makers}
    for _ in range(ROUNDS):
        for name, make in makers.items():
            batches = make()
            for _ in range(2):
                next(batches)
            start = time.perf_counter()
            for _ in range(BATCHES_PER_ROUND):
                next(batches)
            seconds[name].append(time.perf_counter() - start)
            del batches  # stops its threads, so that the next pipeline has the core to itself
    images = BATCH_SIZE * BATCHES_PER_ROUND
    return {name: images / statistics.median(times) for name, times in seconds.items()}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def current_mb() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure_memory(kind: str) -> tuple[float, float, int]:
    """Shuffles a million examples globally.

    Returns:
        (MB that the data takes, MB that the shuffle adds at its peak, number of examples that one
        epoch has exactly once).
    """
    import numpy as np
    import tensorflow as tf

    import input_pipeline
    from configs import common
    from vit_jax.data.shuffle import global_shuffle
    from vit_jax.data.sources import RandomAccess

    million, batch_size = 1_000_000, 4096
    config = common.get_config()
    config.update(batch_size=batch_size, image_size=8)
    config.dataset.channels = 1
    with tempfile.TemporaryDirectory() as folder:
        before = current_mb()
        if kind == "held in memory":
            image = tf.io.encode_png(tf.zeros((8, 8, 1), tf.uint8))
            images = tf.repeat(tf.strings.join([image]), million)
            source = RandomAccess(
                name=kind,
                num_examples=million,
                class_names=("0",),
                describe=str,
                fetch=lambda index: (images[index], tf.constant(0, tf.int64)),
            )
            data_mb = current_mb() - before
        else:
            make_folder(pathlib.Path(folder), million)
            before, data_mb = current_mb(), 0.0  # the files stay on the disk
            source = input_pipeline.open_source(folder, None, "train")
        batches = input_pipeline.train_batches(source, config, first_step=1_000_000)
        for _ in range(3):
            next(batches)
        order = global_shuffle(source, 0, batch_size, 0, np.arange(batch_size)).take(million)
        seen = np.zeros(million, np.uint8)
        for _, indices, _ in order.batch(batch_size).as_numpy_iterator():
            seen[indices] += 1
        added = peak_mb() - before - data_mb
    return data_mb, added, int((seen == 1).sum())


def make_folder(root: pathlib.Path, count: int) -> None:
    """Makes a folder of `count` images in 1,000 classes; they are hard links to 1,000 files."""
    import tensorflow as tf

    image = tf.io.encode_png(tf.zeros((8, 8, 1), tf.uint8)).numpy()
    classes = 1000
    for c in range(classes):
        folder = root / "train" / f"n{c:08d}"
        folder.mkdir(parents=True)
        first = folder / f"n{c:08d}_0.png"
        first.write_bytes(image)
        for i in range(1, count // classes):
            os.link(first, folder / f"n{c:08d}_{i}.png")


def print_speed(speed: dict[str, float]) -> None:
    print("| on one core | images/s ", end="")
    print("| relative to decode-and-crop alone | relative to plain tf.data |")
    print("| --- | --- | --- | --- |")
    for name, value in speed.items():
        print(f"| {name} | {value:,.0f} | {value / speed[DECODE_AND_CROP]:.0%} ", end="")
        print(f"| {value / speed[PLAIN]:.2f} x |")


def print_cores(speed: dict[str, float]) -> None:
    """Prints how many cores keep one accelerator busy; computed from FLOPs, not measured."""
    from vit_jax import models
    from vit_jax.scaling import flops

    plain = speed[CROP_FLIP]
    randaugment = speed[RANDAUGMENT]
    print(f"\n{UTILIZATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s:\n")
    print("| size | images/s in training | cores | cores with RandAugment(2, 10) |")
    print("| --- | --- | --- | --- |")
    for size in SIZES:
        model = models.create(size, num_classes=1000)
        rate = UTILIZATION * PEAK_FLOPS / (3 * flops.forward_flops(model, (224, 224, 3)))
        print(f"| {size} | {rate:,.0f} | {rate / plain:.1f} | {rate / randaugment:.1f} |")


def machine() -> str:
    import tensorflow as tf

    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return (
        f"{name or platform.processor()}, {os.cpu_count()} cores, TensorFlow {tf.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today()}"
    )


def main():
    spawn = multiprocessing.get_context("spawn")
    print("| a million examples | memory of the data | added by the shuffle | seen once an epoch |")
    print("| --- | --- | --- | --- |")
    for kind in ("held in memory", "a folder of files"):
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
            data_mb, added, seen = process.submit(measure_memory, kind).result()
        print(f"| {kind} | {data_mb:,.0f} MB | {added:,.0f} MB | {seen:,} |", flush=True)
    print()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    speed = measure_speed()
    print_speed(speed)
    print_cores(speed)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
