"""What works with what, and the test that says so; the table of the documentation is made of it.

python tests/compatibility.py    # writes the table; a test looks whether it is up to date
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guides" / "compatibility.md"

# A column of the table -> the wrappers in it, by their names in tests/optim/bases.py
COLUMNS = {
    "ERM": ["ERM"],
    "Fishr": ["Fishr"],
    "surgery, masks": [
        "AgrSum",
        "AgrRand",
        "PCGrad",
        "GramSurgery",
        "ANDMask",
        "SANDMask",
    ],
    "Gram rules": ["CAGrad"],  # the contract alone is tested with the others
    "Fish": ["Fish"],
    "IGA": ["IGA"],
    "IRM": ["IRM"],
    "VREx, GroupDRO, EQRM, RDM": ["VREx", "GroupDRO", "EQRM", "RDM"],
    "features": ["CORAL", "IBIRM"],
    "MIRO, RISE": ["MIRO", "RISE"],
    "SAM family": ["SAM", "GAM"],
    "SWAD": ["SWAD(Fishr)"],
    "SD, SMA": ["SD", "SMA(Fishr)"],
    "GGA-L, POGM, PGrad": ["GGAL", "POGM", "PGrad"],
}
# What columns stand for, where their names do not say it
CAPTIONS = {
    "surgery, masks": COLUMNS["surgery, masks"],
    "Gram rules": [
        *("CAGrad", "MGDA", "UPGrad", "DualProj", "IMTLG"),
        *("AlignedMTL", "ConFIG", "NashMTL", "FairGrad", "GradVac"),
    ],
    "features": ["CORAL", "MMD", "CausIRL", "IBERM", "IBIRM"],
    "SAM family": ["SAM", "GSAM", "SAGM", "GAM", "DISAM"],
}

# A test under tests/; with [*] it has a case for each wrapper of the column, by that name. NO: the
# combination is not tested.
NO = ""
LIGHTNING = "optim/test_lightning.py::test_"
CHECKPOINTS = "optim/test_checkpoints.py::test_"
KILLS = "optim/test_kills.py::test_"
RANKS = "distributed/test_ranks.py::test_"
STATE = "optim/test_state.py::test_"
ASCENT = "optim/test_ascent.py::test_"
FORMULA = f"{ASCENT}steps_are_those_of_the_formula[*]"
MICRO_BATCHES = "optim/test_loops.py::test_micro_batches_are_the_full_batch[*]"

# A row of the table -> the test of each column, or one for all
ROWS: dict[str, Any] = {
    "learning-rate schedulers": "optim/test_contract.py::test_schedulers[*]",
    "gradient clipping": (
        "optim/test_loops.py::test_the_step_is_that_of_the_optimizer_inside_on_clipped_gradients[*]"
    ),
    "gradient accumulation": MICRO_BATCHES,
    "a forward for each domain": MICRO_BATCHES,
    "`opt.step(closure)`": "optim/test_contract.py::test_closure[*]",
    "hooks of the optimizer": "optim/test_contract.py::test_hooks_fire_once[*]",
    "frozen and unused parameters": (
        "optim/test_contract.py::test_what_is_frozen_or_not_used_keeps_no_gradient_and_no_state[*]"
    ),
    "gradient checkpointing": "optim/test_loops.py::test_activations_that_are_computed_again[*]",
    "`copy.deepcopy`, pickle": f"{STATE}copies_continue_alike_and_leave_the_original[*]",
    "`state_dict`, resumed bit for bit": f"{STATE}a_run_goes_on_bit_for_bit[*]",
    "a state of the bare optimizer": f"{STATE}state_of_the_bare_optimizer_loads[*]",
    "`torch.distributed.checkpoint`": f"{CHECKPOINTS}from_disk_into_a_fresh_process[*]",
    "kill -9, resumed bit for bit": f"{KILLS}the_weights_are_those_of_a_run_that_was_not_killed",
    "safetensors": f"{CHECKPOINTS}safetensors[*]",
    "autocast to bfloat16": "optim/test_amp.py::test_autocast[*]",
    "float16 with `GradScaler`": "optim/test_amp.py::test_no_scale_leaves_a_trace[*]",
    "`DistributedDataParallel`": f"{RANKS}equals_one_process[*]",
    "FSDP2 (`fully_shard`)": f"{RANKS}fsdp_equals_one_process[*]",
    "`torch.compile`": "optim/test_compiled.py::test_one_graph[*]",
    "DomainBed": dict.fromkeys(
        set(COLUMNS) - {"ERM", "SWAD"}, "domainbed/test_plug.py::test_settings_are_the_hparams"
    ),
    "Lightning, automatic optimization": f"{LIGHTNING}automatic_optimization[*]",
    "Lightning, manual optimization": f"{LIGHTNING}manual_optimization[*]",
    "Accelerate": "optim/test_accelerate.py::test_training[*]",
    "Hugging Face `Trainer`": "optim/test_trainer.py::test_training[*]",
}


# The same of the SAM family, whose steps are made otherwise; other rows are not tested with it
OF_SAM = {
    "gradient accumulation": FORMULA,
    "a forward for each domain": FORMULA,
    "`opt.step(closure)`": FORMULA,
    "frozen and unused parameters": f"{ASCENT}parameters_that_one_forward_does_not_use",
    "`state_dict`, resumed bit for bit": f"{ASCENT}a_saved_run_goes_on_bit_for_bit[*]",
    "float16 with `GradScaler`": FORMULA,
    "`DistributedDataParallel`": ROWS["`DistributedDataParallel`"],
    "FSDP2 (`fully_shard`)": ROWS["FSDP2 (`fully_shard`)"],
    "DomainBed": "domainbed/test_plug.py::test_settings_are_the_hparams",
}


# Rows in which columns are tested by the same tests as the others; elsewhere they are not tested
CONTRACT = [
    "learning-rate schedulers",
    "`opt.step(closure)`",
    "hooks of the optimizer",
    "frozen and unused parameters",
    "`copy.deepcopy`, pickle",
    "`state_dict`, resumed bit for bit",
    "a state of the bare optimizer",
    "DomainBed",
]
ONLY = {
    "SD, SMA": [*CONTRACT, "`DistributedDataParallel`", "FSDP2 (`fully_shard`)"],
    "GGA-L, POGM, PGrad": CONTRACT,
}


def test_of(row: str, column: str) -> str:
    """Return the test that says yes in a cell; empty if there is none."""
    if column == "SAM family":
        return OF_SAM.get(row, NO)
    if row not in ONLY.get(column, ROWS):
        return NO
    tests = ROWS[row]
    return tests if isinstance(tests, str) else tests.get(column, NO)


def cells() -> list[tuple[str, str, str]]:
    """Row, column and test of each cell that says yes."""
    return [
        (row, column, test) for row in ROWS for column in COLUMNS if (test := test_of(row, column))
    ]


def table() -> str:
    """In Markdown; the tests of a row are linked in its last column."""
    told = {(row, column): test for row, column, test in cells()}
    lines = [f"| | {' | '.join(COLUMNS)} | tested by |", "|---|" + ":---:|" * len(COLUMNS) + "---|"]
    for row in ROWS:
        tests = [told.get((row, column), NO) for column in COLUMNS]
        line = ["yes" if test else "–" for test in tests]
        links = []
        for test in dict.fromkeys(filter(None, tests)):
            path, _, name = test.partition("::")
            links.append(f"[{name.removesuffix('[*]')}](../../tests/{path})")
        lines.append(f"| {row} | {' | '.join(line)} | {', '.join(links)} |")
    captions = [f"*{column}*: {', '.join(names)}" for column, names in CAPTIONS.items()]
    return "\n".join([f"{'; '.join(captions)}.", "", *lines])


def filled(text: str) -> str:
    """The page's text with the table between its markers."""
    pattern = re.compile(
        r"(<!-- compatibility: begin[^>]*-->\n).*?(<!-- compatibility: end -->)", re.DOTALL
    )
    changed, count = pattern.subn(lambda m: f"{m[1]}{table()}\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"{PAGE.name}: expected one section compatibility, found {count}")
    return changed


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
