"""Kinds of models of transformers: small, with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zoo_cases import Case, N, each_of, tensor_of, words

VOCABULARY, TOKENS, PIXELS = 40, 8, 32
# What configurations call the same things; a model is given those that its configuration has.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "d_model": 16,
    "n_embd": 16,
    "dim": 16,
    "emb_dim": 16,
    "embedding_size": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_heads": 2,
    "n_head": 2,
    "n_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "intermediate_size": 24,
    "d_ff": 24,
    "hidden_dim": 24,
    "d_inner": 24,
    "n_inner": 24,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "ffn_dim": 24,
    "max_position_embeddings": 32,
    "n_positions": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "image_size": PIXELS,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
TEXT = words(
    "albert bert big_bird biogpt bloom camembert canine convbert ctrl deberta deberta-v2 "
    "distilbert electra ernie esm falcon fnet gemma gemma2 gemma3_text gpt2 gpt_bigcode gpt_neo "
    "gpt_neox gptj glm granite ibert layoutlm llama longformer luke mamba mamba2 megatron-bert "
    "mistral mixtral mobilebert modernbert mpnet mpt nystromformer olmo olmo2 openai-gpt opt "
    "phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe rembert roberta roberta-prelayernorm roformer "
    "rwkv squeezebert stablelm starcoder2 xglm xlm xlm-roberta xlnet xmod yoso"
)
ENCODER_DECODER = words(
    "bart bigbird_pegasus blenderbot fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe "
    "pegasus plbart prophetnet switch_transformers t5 umt5"
)
IMAGE = words(
    "beit bit convnext convnextv2 cvt data2vec-vision deit dinov2 dinov2_with_registers "
    "dinov3_vit efficientnet focalnet hiera ijepa levit mobilenet_v1 mobilenet_v2 mobilevit "
    "mobilevitv2 poolformer pvt pvt_v2 regnet resnet segformer siglip_vision_model swiftformer "
    "swin swinv2 textnet vit vit_mae vit_msn clip_vision_model"
)
# What a small one of these needs besides.
OWN: dict[str, dict[str, Any]] = {
    **each_of(
        ("convnext", "convnextv2", "focalnet"),
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "patch_size": 4, "embed_dim": 8,
         "num_hidden_layers": None},
    ),
    **each_of(
        ("bit", "resnet", "regnet"),
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "embedding_size": 16,
         "num_groups": 4, "groups_width": 8, "layer_type": None},
    ),
    "hiera": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
              "patch_size": None, "image_size": [64, 64]},
    "big_bird": {"attention_type": "original_full"},
    "convbert": {"head_ratio": 2, "conv_kernel_size": 3},
    "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["a", "b"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "longformer": {"attention_window": 4},
    "led": {"attention_window": 4},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "layoutlm": {"max_2d_position_embeddings": 32},
    "luke": {"entity_vocab_size": 4, "entity_emb_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8},
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": TOKENS},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 1, "num_decoder_layers": 1},
    "rwkv": {"attention_hidden_size": 16, "context_length": 16},
    "xmod": {"languages": ["a"], "default_language": "a"},
    "xlnet": {"max_position_embeddings": None},
    "xlm": {"n_words": VOCABULARY, "causal": False},
    "cvt": {"embed_dim": [8, 16, 24], "depth": [1, 2, 3], "num_heads": [1, 1, 2]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "levit": {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
              "key_dim": [4, 4, 4], "patch_size": None, "image_size": 64,
              "down_ops": [["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 6, 4, 2, 2], [""]]},
    **each_of(("mobilenet_v1", "mobilenet_v2"), {"depth_multiplier": 0.25}),
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
                  "patch_size": 2, "image_size": 64},
    "mobilevitv2": {"base_attn_unit_dims": [16, 24, 32], "n_attn_blocks": [1, 1, 1],
                    "patch_size": 2, "image_size": 64, "width_multiplier": 0.25},
    "poolformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "patch_size": None},
    **each_of(
        ("pvt", "pvt_v2"),
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
         "num_attention_heads": [1, 1, 2, 2]},
    ),
    "swiftformer": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 24], "depths": [1, 1, 1, 1],
                "conv_layer_kernel_sizes": [[[3, 3]], [[1, 3]], [[3, 1]], [[3, 3]]],
                "conv_layer_strides": [[1], [2], [2], [2]]},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4,
             "window_size": 4},
    "swinv2": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4,
               "window_size": 4},
}  # fmt: skip


def can_be_set(config: Any, name: str) -> bool:
    """Whether a configuration has this as one number: of a list, one for each stage, it stays."""
    computed = getattr(type(config), name, None)
    if isinstance(computed, property) and computed.fset is None:
        return False
    return hasattr(config, name) and not isinstance(getattr(config, name), (list, tuple))


def small(kind: str, size: int = PIXELS) -> Any:
    """A small configuration of a kind."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    known = transformers.AutoConfig.for_model(kind)
    given = {n: value for n, value in SMALL.items() if can_be_set(known, n)}
    if "image_size" in given:
        given["image_size"] = size
    given = {n: v for n, v in (given | OWN.get(kind, {})).items() if v is not None}
    return transformers.AutoConfig.for_model(kind, **given)


def made(kind: str, **inputs: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model of a kind, and its first output."""
    config = small(kind)
    config._experts_implementation = "eager"  # grouped products are of float32 at most
    model = importlib.import_module("transformers").AutoModel.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    if count > 30_000_000:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    return model, lambda: tensor_of(model(**inputs))


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (N, TOKENS))


def from_text(kind: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    return made(kind, input_ids=tokens())


def from_both(kind: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    return made(kind, input_ids=tokens(), decoder_input_ids=tokens())


def from_image(kind: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    size = OWN.get(kind, {}).get("image_size", PIXELS)
    size = size[0] if isinstance(size, list) else size
    return made(kind, pixel_values=torch.randn(N, 3, size, size))


def cases() -> list[Case]:
    """All of them."""
    kinds = ((TEXT, from_text), (ENCODER_DECODER, from_both), (IMAGE, from_image))
    return [
        Case("transformers", kind, partial(make, kind)) for names, make in kinds for kind in names
    ]
