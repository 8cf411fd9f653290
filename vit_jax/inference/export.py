"""Portable artifacts: a model that runs without this code's model, and without Flax.

    python -m vit_jax.inference.export runs/digits artifact/                  # for JAX
    python -m vit_jax.inference.export runs/digits digits_onnx/ --format=onnx

`vit_jax.Exported.load("artifact")` classifies images as the original does. A folder holds

- `program.jax_export`: the computation, (params, uint8 images (N, H, W, C)) -> probabilities
  (N, num_classes), as StableHLO that `jax.export` serialized, for CPUs, NVIDIA GPUs and TPUs and
  any number of images; with `--format=onnx` instead `model.onnx`, which includes the parameters
- `params.safetensors`: the parameters, float32
- `artifact.json`: class names, preprocessing, and the SHA-256 of the other files

Everything is computed in float32, whatever the run's dtype, as `Classifier.load` does. Attention
is the plain computation, which every device has.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from jax import export as jax_export

from vit_jax.checks import check_choice
from vit_jax.errors import UserError, first_line
from vit_jax.inference.predictor import Predictor
from vit_jax.paths import path_name
from vit_jax.storage.files import atomic_path, open_path, read_json_object
from vit_jax.weight_flags import add_weight_flags

logger = logging.getLogger("vit_jax")

VERSION = 1  # of the files; increased when an older reader would misunderstand them
PLATFORMS = ("cpu", "cuda", "tpu")
DESCRIPTION = "artifact.json"
PROGRAM, PARAMS, ONNX = "program.jax_export", "params.safetensors", "model.onnx"
FILES = {"jax": (PROGRAM, PARAMS), "onnx": (ONNX,)}  # of each format, besides DESCRIPTION
ONNX_TOLERANCE = 1e-4  # of probabilities


@dataclasses.dataclass(frozen=True)
class Exported(Predictor):
    """Classifies images by an exported artifact: `Exported.load("artifact")(images)`.

    It is called like a Classifier, and returns the same to float32 rounding.

    Attributes:
        program: (params, uint8 (N, H, W, C)) -> probabilities (N, num_classes).
        params: name -> float32 array.
        image_size: (height, width) that the model sees.
        channels: 1 or 3.
        num_classes: the number of classes.
        class_names: in the order of the labels, or None.
        eval_crop, eval_method: how the model sees images, see `evaluation_view`.
    """

    program: jax_export.Exported
    params: dict
    image_size: tuple[int, int]
    channels: int
    num_classes: int
    class_names: tuple[str, ...] | None
    eval_crop: float | str
    eval_method: str

    def __post_init__(self):
        self.check_classes()
        self.check_settings()

    @classmethod
    def load(cls, path) -> "Exported":
        """Loads the folder that `python -m vit_jax.inference.export` wrote; local or gs://.

        Raises:
            UserError: no such folder, a missing or damaged file, another version of the format, or
                a program that this version of JAX can't read.
        """
        folder = open_path(path)
        description = read_description(folder)
        if description.get("format") != "jax":
            raise UserError(
                f"{path} is an artifact for {description.get('format')}, not for JAX: export "
                "without --format"
            )
        try:
            files, names = description["files"], description["class_names"]
            program, params = (read_file(folder / name, files[name]) for name in FILES["jax"])
            settings = dict(
                image_size=tuple(description["image_size"]),
                channels=description["channels"],
                num_classes=description["num_classes"],
                class_names=None if names is None else tuple(names),
                eval_crop=description["eval_crop"],
                eval_method=description["eval_method"],
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / DESCRIPTION} is damaged: {error!r}") from None
        try:
            program = jax_export.deserialize(bytearray(program))
            program.mlir_module()  # StableHLO is read only here, or in the first call
        except Exception as error:  # of many kinds, by what a later version changed
            raise UserError(
                f"{path} was exported by JAX {description.get('jax')}, and JAX {jax.__version__} "
                f"can't read it ({first_line(error)}): export it again"
            ) from None
        params = jax.device_put(safetensors.numpy.load(params))
        exported = cls(program=program, params=params, **settings)
        expected = (*exported.image_size, exported.channels), exported.num_classes
        if (program.in_avals[-1].shape[1:], program.out_avals[0].shape[1]) != expected:
            raise UserError(f"{folder / DESCRIPTION} is damaged: its sizes aren't the program's")
        return exported

    @functools.cached_property
    def forward(self) -> Callable:
        """The compiled function (params, uint8 (N, H, W, C)) -> probabilities (N, num_classes)."""
        return jax.jit(self.program.call)


def is_artifact(path) -> bool:
    """Whether a folder is an exported artifact."""
    return (open_path(path) / DESCRIPTION).exists()


def read_description(folder: epath.Path) -> dict:
    """Returns the contents of artifact.json.

    Raises:
        UserError: it is missing, damaged, or of another version.
    """
    path = folder / DESCRIPTION
    if not folder.exists():
        raise UserError(f"There is no {folder}")
    if not path.exists():
        raise UserError(
            f"{folder} is no exported artifact: it has no {DESCRIPTION}, which `python -m "
            "vit_jax.inference.export` writes"
        )
    description = read_json_object(path)
    version = description.get("version")
    if version != VERSION:
        raise UserError(
            f"{path} has the version {version!r}; this code reads version {VERSION}: export the "
            "model again with this code, or load it with the code that exported it"
        )
    return description


def read_file(path: epath.Path, sha256: str) -> bytes:
    """Returns a file's contents; raises UserError if it is missing, or isn't what was written."""
    if not path.exists():
        raise UserError(f"{path.parent} is incomplete: {path.name} is missing; export it again")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} is damaged: its SHA-256 isn't that in {DESCRIPTION}")
    return content


def save(classifier, path, format: str = "jax") -> None:
    """Writes a portable artifact: all of its files, or none. One that is there is replaced.

    Args:
        classifier: a `Classifier`.
        path: the folder to write; local or gs://.
        format: "jax" or "onnx", which requires jax2onnx.

    Raises:
        UserError: a folder that is a run or has other files, a path that can't be written, or a
            model that jax2onnx can't convert.
    """
    check_choice("format", format, FILES)
    folder = check_target(path, format)
    model = classifier.model.clone(attention_impl="xla", dtype=jnp.float32)
    classifier = dataclasses.replace(classifier, model=model)
    files = {"jax": jax_files, "onnx": onnx_files}[format](classifier)
    description = {
        "version": VERSION,
        "format": format,
        "jax": jax.__version__,
        "dtype": "float32",
        "image_size": classifier.image_size,
        "channels": classifier.channels,
        "eval_crop": classifier.eval_crop,
        "eval_method": classifier.eval_method,
        "exif": True,  # images are turned upright, as their EXIF data says
        "num_classes": classifier.num_classes,
        "class_names": classifier.class_names,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files = {DESCRIPTION: json.dumps(description, indent=2).encode() + b"\n", **files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:  # replaces all at its end, the description last
            for name, content in files.items():
                stack.enter_context(atomic_path(folder / name)).write_bytes(content)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None


def check_target(path, format: str) -> epath.Path:
    """Returns the folder; raises UserError unless it's new, empty, or an artifact of the format."""
    from vit_jax.pretrained.export import resolve_target  # imports Flax

    folder = resolve_target(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{path} is a file: give a folder to write")
    known = {DESCRIPTION, *FILES[format]}
    known |= {f"{name}.tmp" for name in known}  # of an export that was killed
    others = [p.name for p in folder.iterdir() if p.name not in known] if folder.exists() else []
    if others:
        raise UserError(
            f"{path} has other files, such as {min(others)}: give a folder that is new, empty, or "
            f"an artifact for {format!r}"
        )
    return folder


def jax_files(classifier) -> dict[str, bytes]:
    """Returns the files of an artifact for JAX, {name: contents}."""
    leaves, tree = jax.tree.flatten_with_path(classifier.params)
    params = {path_name(path): np.ascontiguousarray(leaf) for path, leaf in leaves}

    @jax.jit
    def classify(params, images):
        in_order = [params[path_name(path)] for path, _ in leaves]
        return classifier.forward(tree.unflatten(in_order), images)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    export = jax_export.export(classify, platforms=PLATFORMS)
    with no_source_locations():
        program = export(shapes, views_shape(classifier)).serialize()
    return {PROGRAM: bytes(program), PARAMS: safetensors.numpy.save(params)}


@contextlib.contextmanager
def no_source_locations():
    """Keeps the path and line of each operation, on this machine, out of programs."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def views_shape(classifier) -> jax.ShapeDtypeStruct:
    """Returns the type of any number of views, uint8 (N, H, W, C)."""
    (n,) = jax_export.symbolic_shape("N")
    shape = (n, *classifier.image_size, classifier.channels)
    return jax.ShapeDtypeStruct(shape, np.uint8)


def onnx_files(classifier) -> dict[str, bytes]:
    """Returns the file of an ONNX model, {name: contents}, compared with the original."""
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"--format=onnx needs jax2onnx ({error}): pip install jax2onnx onnxruntime"
        ) from None
    logging.getLogger("jax2onnx").setLevel(logging.CRITICAL)  # about plugins for other libraries
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    shape = views_shape(classifier)
    classifier = with_position_table(classifier)
    # Only XLA's operations, without nested functions: jax2onnx replaces those of Flax and jax.numpy
    # by its own, which don't take all arguments, and doesn't know the nested ones of JAX 0.12.
    with jax.disable_jit():
        program = jax.make_jaxpr(functools.partial(classifier.forward, classifier.params))(shape)
    operations = jax.extend.core.jaxpr_as_fun(program)
    try:
        content = jax2onnx.to_onnx(
            lambda images: operations(images)[0],
            [shape],
            input_names=["images"],
            output_names=["probabilities"],
        ).SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        error = onnx_error(classifier, session)
    except Exception as error:  # of many kinds: what these libraries can't represent
        raise UserError(
            f"jax2onnx can't convert this model ({type(error).__name__}: {first_line(error)})"
        ) from None
    if error > ONNX_TOLERANCE:
        raise UserError(
            f"jax2onnx converted this model, but its probabilities differ by {error:.1e}, more "
            f"than {ONNX_TOLERANCE:.0e}"
        )
    logger.info(f"onnxruntime's probabilities differ by at most {error:.1e}")
    return {ONNX: content}


def with_position_table(classifier):
    """Returns a classifier whose fixed positions are a parameter, which jax2onnx can convert."""
    from vit_jax.models import posemb  # imports Flax

    model = classifier.model
    if model.posemb not in posemb.FIXED:
        return classifier
    grid = model.grid(classifier.image_size)
    table = posemb.table(model.posemb, *grid, model.width, model.num_prefix_positions)
    encoder = {**classifier.params["Transformer"], "posembed_input": {"pos_embedding": table}}
    return dataclasses.replace(
        classifier,
        model=model.clone(posemb="learned"),
        params={**classifier.params, "Transformer": encoder},
    )


def onnx_error(classifier, session) -> float:
    """Returns the largest difference in probability between an ONNX model and the original."""
    rng = np.random.default_rng(0)
    shape = (*classifier.image_size, classifier.channels)
    errors = []
    for n in (1, 4):
        images = rng.integers(0, 256, (n, *shape), np.uint8)
        (probabilities,) = session.run(None, {"images": images})
        errors.append(np.abs(probabilities - classifier.probabilities(images)).max())
    return float(max(errors))


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `load` takes."""
    parser.add_argument("run", help="a run's folder, or any weights: a file, hf:owner/name")
    add_weight_flags(parser)
    parser.add_argument("--class_names", help="a text file with the name of a class per line")


def load(args: argparse.Namespace):
    """Returns the Classifier that the arguments of `add_model_flags` describe."""
    from vit_jax.inference.classifier import Classifier  # imports Flax
    from vit_jax.pretrained.weights import read_class_names
    from vit_jax.runs.checkpoint_paths import at_step

    names = read_class_names(args.class_names) if args.class_names else None
    path = at_step(args.run, args.step)
    return Classifier.load(path, args.image_size, names, num_heads=args.num_heads, grid=args.grid)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.inference.export",
        description="Writes a model as a portable artifact.",
    )
    add_model_flags(parser)
    parser.add_argument("target", help="the folder to write")
    parser.add_argument("--format", choices=FILES, default="jax")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an artifact that is there"
    )
    args = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # it computes nothing that an accelerator would help
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        folder = check_target(args.target, args.format)
        if (folder / DESCRIPTION).exists() and not args.overwrite:
            raise UserError(f"{args.target} exists: write to another path, or add --overwrite")
        save(load(args), args.target, args.format)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    sizes = (f"{name} ({(folder / name).stat().length:,} bytes)" for name in FILES[args.format])
    print(f"{args.run} -> {args.target}: {', '.join(sizes)}, {DESCRIPTION}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
