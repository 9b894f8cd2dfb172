"""PEFT's methods on a small Llama with random weights, of which they train a few parameters.

Not among them: X-LoRA, which loads adapters from files, and Shadow, which puts an object of its own
in the place of hidden states and does not run on this Llama.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zoo_cases import Case, tensor_of
from zoo_transformers import small, tokens
from zoo_vision import draw_zeros

LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ALIKE = {"target_modules": ["q_proj", "o_proj"]}  # of one shape
CAUSAL = {"task_type": "CAUSAL_LM"}
TOKENS = CAUSAL | {"num_virtual_tokens": 3}
# name -> configuration, its arguments
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdaLoRA": ("AdaLoraConfig", LINEAR | {"init_r": 4, "target_r": 2, "total_step": 10}),
    "AdaMSS": ("AdamssConfig", LINEAR | {"r": 4, "num_subspaces": 2}),
    "adaption prompt": (
        "AdaptionPromptConfig",
        CAUSAL | {"adapter_len": 3, "adapter_layers": 2},
    ),
    "BEFT": ("BeftConfig", {"target_modules": ["v_proj"]}),
    "BOFT": ("BOFTConfig", LINEAR | {"boft_block_size": 4}),
    "BOFT, butterfly": ("BOFTConfig", ALIKE | {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "C3A": ("C3AConfig", LINEAR | {"block_size": 8}),
    "DeLoRA": ("DeloraConfig", LINEAR | {"r": 4}),
    "DEFT": ("DeftConfig", LINEAR | {"r": 4}),
    "DoRA": ("LoraConfig", LINEAR | {"r": 4, "use_dora": True, "lora_dropout": 0.1}),
    "FourierFT": ("FourierFTConfig", LINEAR | {"n_frequency": 20}),
    "FRoD": ("FrodConfig", LINEAR | {"progressbar": False}),
    "GLoRA": ("GloraConfig", LINEAR | {"r": 4}),
    "GraLoRA": ("GraloraConfig", LINEAR | {"r": 4}),
    "HiRA": ("HiraConfig", LINEAR | {"r": 4}),
    "HRA": ("HRAConfig", LINEAR | {"r": 4}),
    "HRA, Gram-Schmidt": ("HRAConfig", LINEAR | {"r": 4, "apply_GS": True, "init_weights": False}),
    "IA3": ("IA3Config", LINEAR | {"feedforward_modules": ["down_proj"]}),
    "Lily": ("LilyConfig", LINEAR | {"r": 4}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "LoHa": ("LoHaConfig", LINEAR | {"r": 4, "rank_dropout": 0.2}),
    "LoKr": ("LoKrConfig", LINEAR | {"r": 4}),
    "LoKr, both parts": ("LoKrConfig", LINEAR | {"r": 2, "decompose_both": True}),
    "LoRA": ("LoraConfig", LINEAR | {"r": 4, "lora_dropout": 0.1, "bias": "lora_only"}),
    "LoRA, all tokens": ("LoraConfig", {"target_modules": ["q_proj", "embed_tokens"], "r": 4}),
    "LoRA, head too": ("LoraConfig", LINEAR | {"r": 4, "modules_to_save": ["lm_head"]}),
    "LoRA, some tokens": ("LoraConfig", LINEAR | {"r": 4, "trainable_token_indices": [4, 7, 9]}),
    "MiSS": ("MissConfig", LINEAR | {"r": 4}),
    "OFT": ("OFTConfig", LINEAR | {"oft_block_size": 4}),
    "OFT, Cayley": ("OFTConfig", LINEAR | {"oft_block_size": 4, "use_cayley_neumann": False}),
    "OSF": ("OSFConfig", LINEAR | {"effective_rank": 4}),
    "P-tuning": ("PromptEncoderConfig", TOKENS | {"encoder_hidden_size": 16}),
    "P-tuning, LSTM": (
        "PromptEncoderConfig",
        TOKENS | {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
    ),
    "PEANuT": ("PeanutConfig", LINEAR | {"r": 4, "depth": 1}),
    "prefix tuning": ("PrefixTuningConfig", TOKENS),
    "prefix tuning, projected": (
        "PrefixTuningConfig",
        TOKENS | {"prefix_projection": True, "encoder_hidden_size": 16},
    ),
    "prompt tuning": ("PromptTuningConfig", TOKENS),
    "prompt tuning, multitask": ("MultitaskPromptTuningConfig", TOKENS | {"num_tasks": 3}),
    "Cartridge": ("CartridgeConfig", TOKENS),
    "CPT": (
        "CPTConfig",
        CAUSAL
        | {
            "cpt_token_ids": [4, 7, 9],
            "cpt_mask": [1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 3],
        },
    ),
    "Poly": ("PolyConfig", ALIKE | CAUSAL | {"r": 2, "n_tasks": 3, "n_splits": 2}),
    "PSOFT": ("PsoftConfig", LINEAR | {"r": 4}),
    "PVeRA": ("PveraConfig", LINEAR | {"r": 4}),
    "RandLoRA": ("RandLoraConfig", LINEAR | {"r": 4}),
    "RoAd": ("RoadConfig", ALIKE | {"group_size": 8}),
    "SHiRA": ("ShiraConfig", LINEAR | {"r": 2}),
    "Supertuning": ("SupertuningConfig", LINEAR | {"sparsity": 0.8}),
    "TinyLoRA": ("TinyLoraConfig", LINEAR | {"r": 2, "u": 4}),
    "trainable tokens": (
        "TrainableTokensConfig",
        {"target_modules": ["embed_tokens"], "token_indices": [4, 7, 9]},
    ),
    "Uni-LoRA": ("UniLoraConfig", LINEAR | {"r": 2, "theta_d_length": 16}),
    "VB-LoRA": ("VBLoRAConfig", LINEAR | {"r": 2, "num_vectors": 8, "vector_length": 8}),
    "VeRA": ("VeraConfig", LINEAR | {"r": 4}),
    "WaveFT": ("WaveFTConfig", LINEAR | {"n_frequency": 20}),
}
OF_TASKS = ("Poly", "prompt tuning, multitask")  # each sample is of one


def made(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A Llama with one of the methods, and its logits."""
    transformers, peft = map(importlib.import_module, ("transformers", "peft"))
    config = small("llama")
    kind, given = METHODS[name]
    before = torch.get_default_dtype()
    try:
        if name == "PSOFT":  # which refuses to begin with float64
            torch.set_default_dtype(torch.float32)
        base = transformers.AutoModelForCausalLM.from_config(config)
        model = peft.get_peft_model(base, getattr(peft, kind)(**given))
    finally:
        torch.set_default_dtype(before)
    draw_zeros(model)  # the half of an adapter that starts at zero hides the other
    x = {"input_ids": tokens()}
    if name in OF_TASKS:
        x["task_ids"] = torch.tensor([0, 2, 0, 1, 2, 1])
    return model, lambda: tensor_of(model(**x))


def cases() -> list[Case]:
    """One for each method, some in two ways."""
    return [Case("peft", name, partial(made, name)) for name in METHODS]
