"""Tables of text embeddings of classes, for language-guided algorithms."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ._torch import pytree
from .files import load_arrays, replace

# The seven CLIP templates that work best together on ImageNet, by its authors
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
# Anchors for domains whose names do not describe their look, as in VLCS and TerraIncognita
PHOTOS = ("bright photo", "corrupted photo", "dark photo", "good photo")
ANCHOR = "a {} of a {}"

Encoder = Callable[[list[str]], Tensor | np.ndarray]
BATCH = 256  # texts per call of the encoder
INSTEAD = (
    "Pass a function list[str] -> Tensor [n, E], a pair (model, tokenizer) of transformers or "
    "open_clip, or the path of a folder with a CLIP model that transformers saved."
)


class TextTables(NamedTuple):
    """Text embeddings of classes, as the encoder returns them (any norm), float32 on the CPU.

    Attributes:
        classes: ``[C, E]``, the mean over the templates.
        anchors: ``[C, A, E]``, each class in each domain; None without domains.
    """

    classes: Tensor
    anchors: Tensor | None


def text_tables(
    class_names: Iterable[str],
    domain_names: Iterable[str],
    encoder: Any,
    *,
    templates: Sequence[str] = TEMPLATES,
    cache: str | Path | None = None,
) -> TextTables:
    r"""Embed the names of classes, and of classes in domains, for `RISE`.

    .. math::
        T_c = \frac1{|\mathcal T|}\sum_{t\in\mathcal T} \operatorname{text}(t(c)), \qquad
        K_{ca} = \operatorname{text}(\text{"a } a \text{ of a } c\text{"})

    Args:
        class_names: C words or phrases, in the order of the labels; ``_`` is read as a space.
        domain_names: A words, such as "sketch"; ``fastdg.text.PHOTOS`` if the domains' names do
            not describe their look. ``()`` gives no anchors.
        encoder: one of

            - a function from ``list[str]`` to a tensor or NumPy array ``[n, E]``;
            - ``(model, tokenizer)`` of transformers: a ``CLIPModel`` or a
              ``CLIPTextModelWithProjection``, and its tokenizer or processor;
            - ``(model, tokenizer)`` of open_clip;
            - a name on the Hugging Face hub, or a folder, of a CLIP model for transformers
              (``pip install 'fastdg[text]'``).
        templates: sentences with ``{}`` in the place of the class; default: CLIP's seven.
        cache: folder for the tables. The file name is a hash of the texts and of the encoder's
            weights and tokens (of the encoder's name, for a name). A damaged or non-finite file is
            replaced; a folder that cannot be written gives a warning. A function has no identity
            to hash, so it needs ``cache=None``.

    Returns:
        ``TextTables(classes, anchors)``, which unpacks in ``fastdg.RISE(opt, layer, *tables)``.

    Raises:
        TypeError, ValueError: an argument is not as described.
        ImportError: the encoder is a name, and transformers is not installed.
        OSError: the encoder is a name, and the model is neither on disk nor downloadable.

    Reference:
        Huang et al.: A Sentence Speaks a Thousand Images: Domain Generalization through Distilling
        CLIP with Language Guidance, ICCV 2023. Radford et al.: Learning Transferable Visual Models
        From Natural Language Supervision, ICML 2021.

    Example:
        >>> tables = fastdg.text_tables(
        ...     ["dog", "guitar"], ["photo", "sketch"], "openai/clip-vit-base-patch32",
        ...     cache="text_tables",
        ... )
    """
    names, domains = _names("class_names", class_names), _names("domain_names", domain_names)
    if not names:
        raise ValueError("class_names: expected at least one class, got none.")
    texts = [_checked(t).replace("{}", name) for name in names for t in templates]
    if not texts:
        raise ValueError("templates: expected at least one sentence, got none.")
    texts += [ANCHOR.format(domain, name) for name in names for domain in domains]
    shape = len(names), len(templates), len(domains)
    kept: Path | None = None
    if cache is not None and isinstance(encoder, str) and not Path(encoder).exists():
        kept = _file(cache, shape, texts, [encoder.encode()])
        if (tables := _read(kept, shape)) is not None:
            return tables
    encode, identity = _encoder(encoder)
    if cache is not None and kept is None:
        kept = _file(cache, shape, texts, identity(texts))
        if (tables := _read(kept, shape)) is not None:
            return tables
    tables = _tables(_embed(encode, texts), shape)
    if kept is not None:
        arrays = {key: x.numpy() for key, x in tables._asdict().items() if x is not None}
        try:
            replace(kept, lambda file: np.savez(file, **arrays))
        except OSError as error:  # keep the tables, which may have taken long
            warnings.warn(f"cache: {error} The next call computes the tables again.", stacklevel=2)
    return tables


# -- texts --


def _names(argument: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{argument}: expected a list of strings, got {names!r}.")
    found: dict[str, int] = {}
    for k, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{argument}[{k}]: expected a name in words, got {name!r}.")
        words = " ".join(name.replace("_", " ").split())
        if words in found:
            raise ValueError(
                f"{argument}: expected distinct names, got {words!r} at {found[words]} and {k}. "
                "Rename one."
            )
        found[words] = k
    return list(found)


def _checked(template: Any) -> str:
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(
            f"templates: expected sentences with one {{}} for the class, got {template!r}."
        )
    return template


# -- encoders --


def _encoder(encoder: Any) -> tuple[Encoder, Callable[[list[str]], list[bytes]]]:
    """Return a function from texts to embeddings, and one from texts to the bytes to hash."""
    if isinstance(encoder, str):
        encoder = _load(encoder)
    if isinstance(encoder, (tuple, list)) and len(encoder) == 2:
        model, tokenizer = encoder
        if isinstance(model, nn.Module) and callable(tokenizer):
            if hasattr(model, "encode_text"):
                return _OpenCLIP(model, tokenizer), _Content(model, tokenizer)
            tokens = _Tokens(tokenizer)
            return _Transformers(model, tokens), _Content(model, tokens)
    elif callable(encoder) and not isinstance(encoder, nn.Module):
        return encoder, _refuse_function
    raise TypeError(f"encoder: expected an encoder, got {type(encoder).__name__}. {INSTEAD}")


def _refuse_function(texts: list[str]) -> list[bytes]:
    raise ValueError(
        "cache: expected None for an encoder that is a function, since a function has no identity "
        "to name the file by. Use cache=None, or pass a pair (model, tokenizer)."
    )


def _load(name: str) -> tuple[nn.Module, Any]:
    try:
        from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection
    except ImportError as error:
        raise ImportError(
            f"encoder: {name!r} needs transformers, which is not installed. Run "
            f"pip install 'fastdg[text]', or use another encoder. {INSTEAD}"
        ) from error
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind in ("clip", "clip_text_model"):
            return (
                CLIPTextModelWithProjection.from_pretrained(name),
                AutoTokenizer.from_pretrained(name),
            )
    except Exception as error:  # safetensors and tokenizers raise their own for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"encoder: {name!r} is not a folder with a complete CLIP model, and could not be "
            f"downloaded from the Hugging Face hub ({reason}). {INSTEAD}"
        ) from error
    # transformers would initialise missing weights at random
    raise ValueError(f"encoder: expected a CLIP model, got {name!r} of type {kind!r}. {INSTEAD}")


class _Tokens:
    """Tokenizer or processor of transformers, as a function of texts."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        tokens = self.tokenizer(text=texts, padding=True, truncation=True, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}


class _Transformers:
    def __init__(self, model: nn.Module, tokens: _Tokens) -> None:
        self.model, self.tokens = model, tokens

    def __call__(self, texts: list[str]) -> Tensor:
        device = next(self.model.parameters()).device
        tokens = {key: value.to(device) for key, value in self.tokens(texts).items()}
        if not hasattr(self.model, "get_text_features"):
            output = self.model(**tokens)
            if not hasattr(output, "text_embeds"):
                raise TypeError(
                    f"encoder: {type(self.model).__name__} returns no text_embeds. {INSTEAD}"
                )
            return output.text_embeds
        features: Any = self.model.get_text_features
        found = features(**tokens)
        return found if isinstance(found, Tensor) else found.pooler_output  # since version 5


class _OpenCLIP:
    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, texts: list[str]) -> Tensor:
        device = next(self.model.parameters()).device
        encode: Any = self.model.encode_text
        return encode(self.tokenizer(texts).to(device))


class _Content:
    """Bytes of the tokens and of the text weights."""

    def __init__(self, model: nn.Module, tokens: Callable[[list[str]], Any]) -> None:
        self.model, self.tokens = model, tokens

    def __call__(self, texts: list[str]) -> list[bytes]:
        found = pytree.tree_leaves(self.tokens(texts))
        weights = [
            (name, x)
            for name, x in self.model.state_dict().items()
            if not name.startswith(("vision", "visual"))
        ]
        parts = [type(self.model).__name__.encode(), *(_bytes("tokens", x) for x in found)]
        return parts + [_bytes(name, x) for name, x in weights]


def _bytes(name: str, x: Tensor) -> bytes:
    head = f"{name} {x.dtype} {tuple(x.shape)} ".encode()
    return head + x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def _embed(encode: Encoder, texts: list[str]) -> Tensor:
    model = getattr(encode, "model", None)
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        parts = []
        for k in range(0, len(texts), BATCH):
            part = texts[k : k + BATCH]
            found = encode(part)
            if isinstance(found, np.ndarray):
                found = torch.from_numpy(found)
            if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(part):
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"encoder: expected a tensor [{len(part)}, E] for {len(part)} texts, got {got}."
                )
            parts.append(found.detach().float().cpu())
    finally:
        if isinstance(model, nn.Module):
            model.train(training)
    found = torch.cat(parts)
    length = found.norm(dim=1)
    for k in (~(length > 0) | ~length.isfinite()).nonzero().flatten().tolist():
        raise ValueError(
            f"encoder: the embedding of {texts[k]!r} is all zeros or not finite, so it has no "
            "direction. Check the encoder's weights."
        )
    return found


def _tables(embeddings: Tensor, shape: tuple[int, int, int]) -> TextTables:
    C, templates, A = shape
    E = embeddings.shape[1]
    classes = embeddings[: C * templates].view(C, templates, E).mean(1)
    return TextTables(classes, embeddings[C * templates :].view(C, A, E) if A else None)


# -- files --


def _file(
    folder: str | Path, shape: tuple[int, int, int], texts: list[str], content: list[bytes]
) -> Path:
    digest = hashlib.sha256(repr((shape, texts)).encode())
    for part in content:
        digest.update(f"\0{len(part)}\0".encode())
        digest.update(part)
    return Path(folder) / f"{digest.hexdigest()}.npz"


def _read(path: Path, shape: tuple[int, int, int]) -> TextTables | None:
    """Return the tables at ``path``; None if the file is missing or damaged."""
    C, _, A = shape
    names = ("classes", "anchors") if A else ("classes",)
    try:
        found = load_arrays(path, *names, remedy="It is computed again.")
    except (OSError, ValueError):
        return None
    if any(array.dtype != np.float32 or array.ndim < 2 for array in found.values()):
        return None
    tables = {name: torch.from_numpy(array) for name, array in found.items()}
    E = tables["classes"].shape[-1]
    shapes = {"classes": (C, E), "anchors": (C, A, E)}
    whole = all(x.shape == shapes[name] and _has_angles(x) for name, x in tables.items())
    return TextTables(tables["classes"], tables.get("anchors")) if whole else None


def _has_angles(embeddings: Tensor) -> bool:
    """Whether each embedding ``[..., E]`` is finite and not all zeros."""
    length = embeddings.norm(dim=-1)
    return bool(((length > 0) & length.isfinite()).all())
