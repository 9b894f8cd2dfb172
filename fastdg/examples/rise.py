"""RISE: embeddings of images go to where a language model has the words for them."""

import torch
from torch import Tensor
from torch.nn import functional as F

import fastdg

from . import data

WIDTH = 16


def encoder(sentences: list[str]) -> Tensor:
    """Stands for CLIP's text half; a model and its tokenizer of transformers go in its place."""
    letters = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(0))
    return torch.stack([letters[[ord(c) % 128 for c in text]].sum(0) for text in sentences])


def main() -> None:
    torch.manual_seed(0)
    model = data.network()
    teacher = data.network().eval()  # stands for CLIP's own prediction
    classes, anchors = fastdg.text_tables(["a cat", "a dog"], data.CAMERAS, encoder)
    embedding = model[4]  # its outputs are as wide as the sentences' vectors
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    opt = fastdg.RISE(base, embedding, classes, anchors)

    for x, y, domain in data.mixed():
        logits = model(x)
        losses = 0.1 * F.cross_entropy(logits, y, reduction="none")  # the paper's weight of it
        with torch.no_grad():
            taught = teacher(x)
        opt.zero_grad()
        opt.backward(losses, domain, labels=y, logits=logits, teacher_logits=taught)
        opt.step()
    for name in ("rise_absolute", "rise_relative", "rise_distillation"):
        print(f"{name} after {opt.steps} steps: {opt.statistics[name]:.4f}")


if __name__ == "__main__":
    main()
