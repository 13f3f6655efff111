"""Values by which transformers would read or compute something else than the files seem to say."""

import json

from faults.case import Case, refused
from faults.cases.checkpoints import MODEL, READERS
from faults.damage import Damage, all_of, edit, header, link, remove, write

ROPE = "rope_parameters"
SWITCHES: dict[str, object] = {
    "return_dict": False,
    "output_router_logits": True,
    "output_hidden_states": True,
    "attention_dropout": 0.5,
    "partial_rotary_factor": 0.5,
    "num_labels": 1_000_000_000,
    "pad_token_id": 99_999,
    "swiglu_limit": 1e308,
    f"{ROPE}.attention_factor": "a",
    f"{ROPE}.beta_fast": -1,
    f"{ROPE}.truncate": "no",
    f"{ROPE}.partial_rotary_factor": 0.5,
    f"{ROPE}.original_max_position_embeddings": 1e300,
    f"{ROPE}.rope_type": "llama3",
}
TOKENIZER_SETTINGS: list[tuple[str, object]] = [
    ("tokenizer_class", "GPT2Tokenizer"),
    ("tokenizer_class", 7),
    ("split_special_tokens", True),
    ("model_max_length", "x"),
    ("padding_side", "up"),
]
BACKTRACKS = {"type": "Split", "pattern": {"Regex": "([^Z]+)+\\b\\B"}, "behavior": "Isolated", "invert": False}
NO_TOKENS = edit("child/tokenizer.json", {"model.vocab": {}})
ENTRIES: dict[str, object] = {  # of the first tensor of a header
    "shape": ["128", "96"],
    "shape of many dimensions": [1] * 100 + [128, 96],
    "data_offsets": [0, 1, 2],
    "data_offsets as texts": ["a", "b"],
    "dtype": ["BF16"],
}


def entry(key: str, value: object) -> Damage:
    """Return the damage of an entry of the first tensor in a header."""

    def change(text: str) -> str:
        content = json.loads(text)
        first = next(name for name in content if name != "__metadata__")
        content[first][key] = value
        return json.dumps(content)

    return header(f"child/{MODEL}", change)


def switch(stage: str, key: str, value: object) -> Case:
    """Return the case of a key of config.json."""
    file = f"{READERS.get(stage, 'child')}/config.json"
    return Case(
        f"switch: {key}: {stage}",
        "reader",
        stage,
        edit(file, {key: value}),
        refused(file, key.split(".")[-1] if "rope_type" not in key else "low_freq_factor"),
    )


def tokenizer(key: str, value: object) -> Case:
    """Return the case of a setting of the tokenizer."""
    file = "child/tokenizer_config.json"
    said = refused(f"{file}|child/tokenizer.json", f"{key}|endswith|Padding side")
    return Case(f"switch: {key} {value}", "reader", "evaluate", edit(file, {key: value}), said)


def templates(value: object) -> Damage:
    """Return the damage of a chat template in the settings of the tokenizer."""
    return all_of(remove("child/chat_template.jinja"), edit("child/tokenizer_config.json", {"chat_template": value}))


def other_file(name: str, damage: Damage, *words: str) -> Case:
    """Return a case of another file of a checkpoint."""
    return Case(f"switch: {name}", "reader", "evaluate", damage, refused(*words))


CASES = [
    *(switch("evaluate", key, value) for key, value in SWITCHES.items()),
    *(switch("rl_recover", key, SWITCHES[key]) for key in ("return_dict", "attention_dropout", "output_router_logits")),
    switch("rl_recover", "router_aux_loss_coef", 5),
    *(switch("generate", key, SWITCHES[key]) for key in ("return_dict", "num_labels")),
    *(switch("importance", key, SWITCHES[key]) for key in ("return_dict", "output_router_logits")),
    *(switch("export", key, SWITCHES[key]) for key in ("return_dict", "pad_token_id", "num_labels")),
    *(tokenizer(key, value) for key, value in TOKENIZER_SETTINGS),
    *(
        Case(f"switch: header: {key}", "reader", "evaluate", entry(key.split(" ")[0], value), refused("safetensors"))
        for key, value in ENTRIES.items()
    ),
    other_file("a vocabulary without the unknown token", NO_TOKENS, "child/tokenizer.json", "UNK"),
    other_file(
        "a splitter that backtracks without end",
        edit("child/tokenizer.json", {"pre_tokenizer": BACKTRACKS}),
        "child/tokenizer.json",
        "retry-limit",
    ),
    other_file("a number as template", templates(7), "child/tokenizer_config.json", "chat_template"),
    other_file(
        "templates by name, none of them the default",
        templates([{"name": "a", "template": "a"}, {"name": "b", "template": "b"}]),
        "chat template of child",
        "default",
    ),
    other_file("checksums that were cut", write("child/SHA256SUMS", ""), "SHA256SUMS", "model.safetensors"),
    other_file("a folder that is a link to itself", all_of(remove("child"), link("child", "child")), "child"),
]
