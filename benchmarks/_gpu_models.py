"""The models of the GPU benchmark, and small models of the same kinds for tests of its code."""

from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks._models import GPT, Task, images, resnet18, texts


def resnet50() -> nn.Module:
    from torchvision.models import resnet50 as build  # imported here because the import is slow

    return build(num_classes=1000)


def vit(name: str, size: int) -> nn.Module:
    """Return a Vision Transformer of timm."""
    from timm import create_model

    return create_model(name, img_size=size, num_classes=1000)


class Logits(nn.Module):
    """A language model of transformers that maps tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def gpt2(vocab: int, length: int, width: int, depth: int, heads: int) -> nn.Module:
    """Return the GPT-2 of transformers with random weights, without dropout to compare plans."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab,
        n_positions=length,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Logits(GPT2LMHeadModel(config))


class Recomputed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def checkpointed(task: Task) -> Task:
    """Return a task whose model has a checkpoint around each of its blocks."""

    def build() -> nn.Module:
        model = task.model()
        model.blocks = nn.Sequential(*map(Recomputed, model.blocks))
        return model

    return replace(task, title=f"{task.title}, checkpointed", model=build)


def tasks(*, quick: bool) -> dict[str, Task]:
    """Return all models, each with the size (M, B) that is measured."""
    if quick:
        return {
            "resnet18": Task("ResNet18", resnet18, images(100), ((2, 2),)),
            "resnet50": Task("ResNet50", resnet50, images(1000, 64), ((2, 2),)),
            "vit": Task(
                "ViT-Ti", partial(vit, "vit_tiny_patch16_224", 32), images(1000), ((2, 2),)
            ),
            **_language(50, 8, 16, 2, 2, (2, 2)),
        }
    return {
        "resnet18": Task("ResNet18, 32 x 32", resnet18, images(100), ((8, 100),)),
        "resnet50": Task("ResNet50, 224 x 224", resnet50, images(1000, 224), ((8, 16),)),
        "vit": Task(
            "ViT-S/16, 224 x 224",
            partial(vit, "vit_small_patch16_224", 224),
            images(1000, 224),
            ((8, 16),),
        ),
        **_language(50257, 512, 768, 12, 12, (8, 2)),
    }


def _language(
    vocab: int, length: int, width: int, depth: int, heads: int, size: tuple[int, int]
) -> dict[str, Task]:
    shape = (vocab, length, width, depth, heads)
    data = texts(vocab, length)
    about = f"T = {length}"
    return {
        "gpt2": Task(
            f"GPT-2 of transformers, {about}",
            partial(gpt2, *shape),
            data,
            (size,),
            classifies=False,
        ),
        "gpt": Task(
            f"GPT of that size, {about}", partial(GPT, *shape), data, (size,), classifies=False
        ),
    }
