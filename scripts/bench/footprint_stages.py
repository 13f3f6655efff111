"""What `footprint.py` measures: random parents, data and a library at three sizes, and each stage's recipe on them.

Stages that hold no model have parents of their own (`footprint_copies.py`). `make_inputs` writes a size's folder;
`stages` returns recipes and overrides. From the first size to the third a parent's weights grow sixfold, tokens, rows
and chunks fourfold: so does what a stage holds, if it grows at all. The fourth size is
smaller than the first, the fifth larger than the third.
"""

import json
import shutil
from pathlib import Path

LAYERS, EXPERTS = (2, 4, 6, 2, 9), (16, 24, 32, 10, 40)
TOKENS, ROWS = (512, 1024, 2048, 384, 2048), (16, 32, 64, 16, 64)
PROMPT_TOKENS, NEW_TOKENS = 58, 64  # the longest prompts that are drawn have 58
TINY_PARENT, LENGTHS = Path("lit_puzzle/assets/tiny_parent"), "generation_lengths.json"
KEPT_EXPERTS, WINDOW = 8, 64
SHAPE = {
    **{"hidden_size": 256, "intermediate_size": 384, "num_experts_per_tok": 4, "vocab_size": 4096},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32},
    **{"sliding_window": 128, "max_position_embeddings": 65536},
}
SHARDED = ("importance", "calibrate_kv", "score", "final_kl", "precompute_logits")
TRAINING = ("distill_blocks", "distill", "distill_checkpointed", "rl_recover", "on_policy")
IN_TWO = {  # further sizes of stages in two processes, which share what grows
    3: (*SHARDED, "distill_blocks", "distill_checkpointed"),
    4: ("importance", "calibrate_kv"),
}
ONE_PROCESS = ("text_distance", "generate", "evaluate", "tiny_parent")


def stages(folder: Path, size: int, processes: int) -> dict[str, tuple[str, list[str]]]:
    """Return the recipe and the overrides of every stage.

    Args:
        folder: that `make_inputs` has filled.
        size: index of the size.
        processes: that run the stage.
    """
    return _passes(folder, size, processes) | _training(folder, size, processes) | _one_process(folder, size)


def _paths(folder: Path, size: int) -> dict[str, str]:
    return {name: str(folder / f"size_{size}" / name) for name in ("parent", "library", "documents", "importance")}


def _sequences(folder: Path, size: int, rows: int, name: str = "sequences") -> list[str]:
    """Return overrides of a CalibrationData: whole sequences from a file."""
    return [
        "--data.init_args.prompts=null",
        f"--data.init_args.sequences={folder / f'size_{size}' / name}.jsonl",
        f"--data.init_args.parent={_paths(folder, size)['parent']}",
        f"--data.init_args.batch_size={rows}",
    ]


def _passes(folder: Path, size: int, processes: int) -> dict[str, tuple[str, list[str]]]:
    """Stages of forward passes, sharded over processes."""
    paths, tokens, model = _paths(folder, size), TOKENS[size], "--model.init_args"
    parent, documents = paths["parent"], paths["documents"]
    devices = [f"--trainer.devices={processes}", "--trainer.accelerator=cpu"]
    fabric = [f"--fabric.devices={processes}", "--fabric.accelerator=cpu"]
    data, chunk = _sequences(folder, size, 2), f"chunk_tokens={tokens}"
    short = _sequences(folder, size, 2, "halves")  # every candidate reads them
    library = [f"--library={paths['library']}", "--evaluations=[]"]
    logits = [f"--documents={documents}", f"--batch_tokens={2 * tokens}", f"--{chunk}"]
    pair = [f"--checkpoint={parent}", f"--parent={parent}", f"--documents={documents}", "--validation_one_in=4"]
    return {
        "importance": ("importance", [f"{model}.parent={parent}", f"{model}.{chunk}", *devices, *data]),
        "calibrate_kv": ("calibrate_kv", [f"{model}.checkpoint={parent}", *devices, *data]),
        "score": ("score", [f"--parent={parent}", *library, *fabric, *short]),
        "final_kl": ("final_kl", [f"--parent={parent}", *fabric, *short]),
        "precompute_logits": ("precompute_logits", [f"--parent={parent}", *logits, *fabric]),
        "text_distance": ("text_distance", [*pair, "--batch_size=2"]),
    }


def _training(folder: Path, size: int, processes: int) -> dict[str, tuple[str, list[str]]]:
    """Stages of updates, sharded over processes."""
    paths, tokens, rows, model = _paths(folder, size), TOKENS[size], ROWS[size], "--model.init_args"
    parent = paths["parent"]
    devices = [f"--trainer.devices={processes}", "--trainer.accelerator=cpu"]
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.callbacks=[]"]
    short += ["--trainer.limit_val_batches=1"]
    packed = [
        f"--data.init_args.documents={paths['documents']}",
        f"--data.init_args.parent={parent}",
        f"--data.init_args.sequence_tokens={tokens}",
        "--data.init_args.validation_one_in=4",
        "--data.init_args.batch_size=1",
    ]
    blocks = [f"{model}.parent={parent}", f"{model}.library={paths['library']}", *devices, *packed, *short]
    chunk = f"{model}.loss.chunk_tokens={tokens // 4}"
    child = [f"{model}.child={parent}", f"{model}.parent={parent}", f"{model}.evaluation=null", chunk]
    checkpointed = [f"{model}.training.gradient_checkpointing=true", f"{model}.loss.hidden=0.0"]
    measured = [
        f"{model}.evaluation.prompts_per_effort=2",
        "--data.init_args.held_out_per_effort=2",
        "--data.init_args.train_prompts=128",
    ]
    rollouts = [
        f"{model}.child={parent}",
        f"{model}.training.lora=null",
        f"{model}.rewards.budget.weight=0",  # nobody has measured the parent's lengths
        f"{model}.grpo.completions_per_device={rows // 2}",
        f"{model}.grpo.sampling.max_new_tokens={NEW_TOKENS}",
        *measured,
    ]
    samples = [
        *(f"{model}.child={parent}", f"{model}.parent={parent}"),
        f"{model}.on_policy.completions_per_device={rows}",
        f"{model}.on_policy.sampling.max_new_tokens={NEW_TOKENS}",
        *measured,
    ]
    return {
        "distill_blocks": ("distill_blocks", blocks),
        "distill": ("distill", [*child, *devices, *packed, *short]),
        "distill_checkpointed": ("distill", [*child, *devices, *packed, *short, *checkpointed]),
        "rl_recover": ("rl_recover", [*rollouts, *devices, *short, "--trainer.max_steps=1"]),
        "on_policy": ("on_policy", [*samples, *devices, *short, "--trainer.max_steps=1"]),
    }


def _one_process(folder: Path, size: int) -> dict[str, tuple[str, list[str]]]:
    """Stages of one process: generation by transformers, training of a small model."""
    paths, rows, shape = _paths(folder, size), ROWS[size], "--model.init_args.shape"
    parent = paths["parent"]
    drawn = [f"--sampling.max_new_tokens={NEW_TOKENS}", "--engine.name=transformers", f"--engine.batch_size={rows}"]
    lessons = f"--data.init_args.curriculum.sequences={rows // 4}"
    small = [
        f"{shape}.num_hidden_layers={LAYERS[size]}",
        f"{shape}.num_local_experts={EXPERTS[size]}",
        f"{shape}.hidden_size=192",
        f"{shape}.intermediate_size=192",
        "--model.init_args.measured_per_effort=2",
        "--data.init_args.curriculum.retrieval_steps=0",  # of shorter lessons than those that follow
        "--data.init_args.curriculum.practice_steps=0",
    ]
    return {
        "generate": ("generate", [f"--parent={parent}", f"--prompts.num_prompts={rows}", *drawn]),
        "evaluate": ("evaluate", [f"--checkpoint={parent}", f"--held_out.prompts_per_effort={rows // 2}", *drawn]),
        "tiny_parent": ("tiny_parent", [*small, lessons, "--trainer.max_steps=2", "--trainer.callbacks=[]"]),
    }


def make_inputs(folder: Path, size: int) -> None:
    """Write a random parent, sequences, documents, importance and a library of one size."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from lit_puzzle.importance.importance_file import Importance
    from lit_puzzle.library.candidates import library
    from lit_puzzle.model.checkpoint import fingerprint
    from lit_puzzle.tiny.tokenizer import build_tokenizer

    home, tokenizer = folder / f"size_{size}", build_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = SHAPE | {"num_hidden_layers": LAYERS[size], "num_local_experts": EXPERTS[size]}
    torch.manual_seed(0)
    GptOssForCausalLM(GptOssConfig(**shape, **ends)).save_pretrained(home / "parent")
    tokenizer.save_pretrained(home / "parent")
    shutil.copy(TINY_PARENT / LENGTHS, home / "parent" / LENGTHS)  # RL compares its completions with the parent's
    rows = torch.randint(8, 110, (4, TOKENS[size])).tolist()
    for name, tokens in (("sequences", TOKENS[size]), ("halves", TOKENS[size] // 2)):
        lines = [json.dumps({"input_ids": row[:tokens]}) + "\n" for row in rows]
        (home / f"{name}.jsonl").write_text("".join(lines))
    _write_documents(home, rows)
    scores = tuple(torch.rand(EXPERTS[size], dtype=torch.float64) for _ in range(LAYERS[size]))
    (home / "importance").mkdir()
    Importance(fingerprint(home / "parent"), "random", 1, scores).save(home / "importance")
    (home / "library").mkdir()
    library(home / "library", home / "parent", home / "importance", [KEPT_EXPERTS], [WINDOW])


def _write_documents(home: Path, rows: list[list[int]]) -> None:
    """Write documents whose prompts differ: training and validation both get some."""
    from lit_puzzle.data.document_files import Document, write_documents

    prompt = 8
    written = [Document(row, [0] * prompt + [1] * (len(row) - prompt), "random", "high") for row in [*rows] * 4]
    for number, document in enumerate(written):
        document.input_ids[:prompt] = [8 + number + place for place in range(prompt)]
    write_documents(home / "documents", written, home / "parent")
