"""Small files of a checkpoint (config.json, generation_config.json, ...) that are broken or contradict themselves."""

from faults.case import Case, Right, refused
from faults.cases.checkpoints import READERS
from faults.damage import Damage, all_of, cut, directory, edit, remove, replace, write

CONFIG = "child/config.json"
DEEP = "[" * 100_000 + "]" * 100_000
TEXTS = ("episodes.parquet", "documents/*.parquet")
OTHER_GENERATION: tuple[dict[str, object], ...] = (
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 12},
    {"suppress_tokens": [20, 21, 22, 23, 24]},
    {"num_beams": 3},
    {"repetition_penalty": 5.0},
    {"temperature": 9.0, "do_sample": True},
)
YARN_OF_MINE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def case(name: str, damage: Damage, *words: str, stage: str = "evaluate") -> Case:
    """Return a case of a refused configuration."""
    return Case(f"config: {name}", "reader", stage, damage, refused(*words))


def value(key: str, wrong: object, stage: str = "evaluate") -> Case:
    """Return a case of one wrong value, whose key must be named."""
    folder = READERS[stage]
    damage = edit(f"{folder}/config.json", {key: wrong})
    return case(
        f"{key} is {str(wrong)[:30]!r}: {stage}",
        damage,
        "config",
        f"{key.split('.')[0]}|the config implies",
        stage=stage,
    )


CASES = [
    case("missing", remove(CONFIG), "config.json"),
    case("missing: generate", remove("parent/config.json"), "config.json", stage="generate"),
    *(
        Case(
            f"config: cut: {stage}", "reader", stage, cut(f"{READERS[stage]}/config.json", 0.6), refused("config.json")
        )
        for stage in ("evaluate", "generate", "rl_recover", "importance", "export", "calibrate_kv")
    ),
    case("empty", write(CONFIG, ""), "config.json"),
    case("a list", write(CONFIG, "[]"), "config.json"),
    case("null", write(CONFIG, "null"), "config.json"),
    case("a folder", directory(CONFIG), "config.json"),
    case("nested 100,000 deep", write(CONFIG, DEEP), "config.json"),
    case("Latin-1 bytes", write(CONFIG, b'{"model_type": "gpt_\xf6ss"}'), "config.json"),
    case(
        "a key twice",
        replace(CONFIG, '"hidden_size": 96,', '"hidden_size": 96, "hidden_size": 64,'),
        "config.json",
        "hidden_size",
    ),
    case(
        "a number of 5,000 digits",
        replace(CONFIG, '"hidden_size": 96,', f'"hidden_size": {"9" * 5000},'),
        "config.json",
    ),
    case("NaN", replace(CONFIG, '"rms_norm_eps": 1e-05', '"rms_norm_eps": NaN'), "config.json", "rms_norm_eps|NaN"),
    case(
        "infinite swiglu limit",
        replace(CONFIG, '"swiglu_limit": 7.0', '"swiglu_limit": Infinity'),
        "config.json",
        "swiglu_limit|Infinity",
    ),
    value("model_type", "llama"),
    value("model_type", "llama", "generate"),
    value("model_type", 7),
    value("model_type", None, "generate"),
    value("hidden_size", "96"),
    value("hidden_size", -96),
    value("hidden_size", 96.5),
    value("hidden_size", 10**30),
    value("hidden_size", None, "rl_recover"),
    value("num_hidden_layers", 5),
    value("num_hidden_layers", 7, "generate"),
    value("num_hidden_layers", 10**9, "generate"),
    value("num_local_experts", 15, "importance"),
    value("num_experts_per_tok", 0),
    value("num_experts_per_tok", 17, "generate"),
    value("num_attention_heads", 3),
    value("num_key_value_heads", 0, "generate"),
    value("head_dim", 31),
    value("vocab_size", 64),
    value("rms_norm_eps", -1.0),
    Case(
        "config: hidden_act, which the model does not read: evaluate",
        "reader",
        "evaluate",
        edit(CONFIG, {"hidden_act": "no_such_act"}),
        (Right(), refused("config.json", "hidden_act")),
    ),
    value("layer_types", ["full_attention"], "generate"),
    value("layer_types", ["chunked_attention"] * 6, "generate"),
    value("sliding_window", -4, "generate"),
    value("dtype", "float7", "generate"),
    value("block_configs", [], "evaluate"),
    value("block_configs", None, "export"),
    value("block_configs.1.num_local_experts", 0),
    value("block_configs.1.num_local_experts", 17, "export"),
    value("block_configs.1.sliding_window", 0),
    value("quantization_config", {"quant_method": "fp5"}, "generate"),
    value("rope_parameters", None, "generate"),
    value("rope_parameters", {"rope_type": "no_such_rope"}, "generate"),
    value("rope_parameters.factor", -2.0, "generate"),
    value("max_position_embeddings", 0, "generate"),
    *(
        Case(
            f"config: two dialects of RoPE that contradict: {stage}",
            "reader",
            stage,
            edit(f"{READERS[stage]}/config.json", {"rope_scaling": YARN_OF_MINE}),
            refused("config.json", "rope_scaling|rope_parameters"),
        )
        for stage in ("evaluate", "generate", "export", "assemble")
    ),
    case(
        "rope_theta that contradicts rope_parameters",
        edit(CONFIG, {"rope_theta": 10000.0}),
        "config.json",
        "rope_theta",
    ),
    case(
        "experts_per_token that contradicts num_experts_per_tok",
        edit(CONFIG, {"experts_per_token": 4}),
        "config.json",
        "experts_per_token",
    ),
    Case(
        "config: both dialects of RoPE that agree",
        "reader",
        "generate",
        all_of(replace("parent/config.json", '"rope_parameters"', '"rope_theta": 150000.0, "rope_parameters"')),
        Right(only=("documents/*.parquet",)),
    ),
    Case("config: code of its own", "reader", "evaluate", write("child/gpt_oss.py", "raise SystemExit(77)\n"), Right()),
    Case(
        "config: auto_map to code elsewhere",
        "reader",
        "generate",
        edit("parent/config.json", {"auto_map": {"AutoConfig": "someone/repo--x.Y"}}),
        (Right(only=("documents/*.parquet",)), refused("auto_map")),
    ),
    *(
        Case(
            f"generation_config: {next(iter(changes))}: {stage}",
            "prompts",
            stage,
            edit(f"{READERS[stage]}/generation_config.json", changes),
            (Right(only=TEXTS), refused("generation_config.json", next(iter(changes)))),
        )
        for stage in ("evaluate", "generate")
        for changes in OTHER_GENERATION
    ),
    Case(
        "generation_config: cut",
        "reader",
        "evaluate",
        cut("child/generation_config.json", 0.5),
        refused("generation_config.json"),
    ),
    Case(
        "generation_config: end token as text",
        "reader",
        "evaluate",
        edit("child/generation_config.json", {"eos_token_id": "five"}),
        refused("generation_config.json", "eos_token_id"),
    ),
    Case(
        "generation_config: end token outside the vocabulary",
        "reader",
        "evaluate",
        edit("child/generation_config.json", {"eos_token_id": [5, 999999]}),
        refused("generation_config.json", "eos_token_id"),
    ),
    Case("plan.json of the child: cut", "reader", "export", cut("child/plan.json", 0.5), refused("plan.json")),
    Case(
        "plan.json of the child: other experts",
        "reader",
        "export",
        edit("child/plan.json", {"blocks.1.experts": [0, 1]}),
        refused("plan.json"),
    ),
    Case(
        "generation_lengths.json: cut, where it is needed",
        "training",
        "rl_recover",
        cut("child/generation_lengths.json", 0.5),
        refused("generation_lengths.json"),
        ("--model.init_args.rewards.length=0.5",),
    ),
    Case(
        "generation_lengths.json: a text, where it is needed",
        "training",
        "rl_recover",
        edit("child/generation_lengths.json", {"low.mean": "many"}),
        refused("generation_lengths.json"),
        ("--model.init_args.rewards.length=0.5",),
    ),
]
