"""The training steps in PyTorch that `train_step.py` measures."""

import time

import torch

from benchmarks.peers import (
    CLIP_NORM,
    LEARNING_RATE,
    NUM_CLASSES,
    WEIGHT_DECAY,
    Settings,
    fields,
    num_cores,
    random_batch,
)


class TorchPeer:
    """A model in PyTorch, on the GPU if there is one.

    Attributes:
        compile_seconds: how long the first step took, less the second, if it is compiled; or None.
        num_params: the number of parameters.
    """

    def __init__(self, model, settings: Settings, compiles: bool = False):
        """Takes two steps.

        Args:
            model: a module, images (N, 3, H, W) -> logits (N, NUM_CLASSES).
            settings: what is measured.
            compiles: whether to compile it with `torch.compile`.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(num_cores())
        if settings.dtype == "float32":
            torch.backends.cudnn.allow_tf32 = False
        model.to(self.device).train()
        self.num_params = sum(parameter.numel() for parameter in model.parameters())
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim > 1]},
                {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        self.model = torch.compile(model) if compiles else model
        self.settings = settings
        batch = random_batch(settings)
        self.images = torch.from_numpy(batch["images"]).permute(0, 3, 1, 2).contiguous()
        self.images = self.images.to(self.device)
        self.labels = torch.from_numpy(batch["labels"]).long().to(self.device)
        first, second = self.time_step(), self.time_step()
        self.compile_seconds = first - second if compiles else None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def time_step(self) -> float:
        start = time.perf_counter()
        self.run("step", 1)
        return time.perf_counter() - start

    def run(self, part: str, steps: int) -> None:
        """Runs a part of the step so many times, and waits until it is done."""
        for _ in range(steps):
            getattr(self, part)()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def loss(self):
        is_bfloat16 = self.settings.dtype == "bfloat16"
        images = self.images.float() / 127.5 - 1.0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bfloat16):
            logits = self.model(images)
        return torch.nn.functional.cross_entropy(logits.float(), self.labels)

    def forward(self) -> None:
        with torch.no_grad():
            self.loss()

    def gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()

    def step(self) -> None:
        self.gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()

    def peak_bytes(self) -> int | None:
        """Returns the GPU's most memory in use since the first steps; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def timm(settings: Settings, compiles: bool = False) -> TorchPeer:
    """timm's VisionTransformer."""
    declare_torchvision_operators()
    from timm.models.vision_transformer import VisionTransformer

    sizes = fields(settings)
    model = VisionTransformer(
        img_size=settings.image_size,
        patch_size=sizes["patch_size"],
        num_classes=NUM_CLASSES,
        embed_dim=sizes["width"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        mlp_ratio=sizes["mlp_dim"] / sizes["width"],
        act_layer="gelu_tanh",
    )
    return TorchPeer(model, settings, compiles)


def declare_torchvision_operators() -> None:
    """Declares operators that torchvision needs and lacks if it was built for another PyTorch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        declare_torchvision_operators.library = library  # they go when it goes
    except ImportError:
        pass


def transformers(settings: Settings) -> TorchPeer:
    """transformers' ViTForImageClassification, with PyTorch's fused attention."""
    declare_torchvision_operators()
    from transformers import ViTConfig, ViTForImageClassification

    sizes = fields(settings)
    config = ViTConfig(
        image_size=settings.image_size,
        patch_size=sizes["patch_size"],
        num_labels=NUM_CLASSES,
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["num_heads"],
        intermediate_size=sizes["mlp_dim"],
        hidden_act="gelu_pytorch_tanh",
        attn_implementation="sdpa",
    )

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ViTForImageClassification(config)

        def forward(self, images):
            return self.model(pixel_values=images).logits

    return TorchPeer(Logits(), settings)
