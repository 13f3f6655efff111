"""Checkpoints whose files, index or headers are not what they promise."""

import json

import torch
from safetensors.torch import save

from faults.case import NOTHING, Case, Right, refused
from faults.damage import Damage, all_of, copy, cut, directory, fifo, header, link, remove, shards, tensors, write

MODEL = "model.safetensors"
ROUTER = "model.layers.2.mlp.router.weight"
READERS = {  # each stage that reads a checkpoint, and the one that is damaged for it
    "evaluate": "child",
    "generate": "parent",
    "rl_recover": "child",
    "distill": "parent",
    "importance": "parent",
    "calibrate_kv": "child",
    "export": "child",
    "assemble": "parent",
    "score": "parent",
    "precompute_logits": "parent",
    "distill_blocks": "parent",
}
GARBAGE = torch.zeros(4)


def without(*names: str) -> Damage:
    """Return the damage of a checkpoint `child` that lacks tensors."""
    return tensors("child/" + MODEL, lambda content: [content.pop(name) for name in names])


def with_tensor(name: str, tensor: torch.Tensor) -> Damage:
    """Return the damage of a checkpoint `child` with one tensor replaced or added."""
    return tensors("child/" + MODEL, lambda content: content.update({name: tensor}))


def half(content: dict[str, torch.Tensor]) -> None:
    """Drop every second tensor."""
    for name in sorted(content)[::2]:
        del content[name]


def in_header(change: str, by: str) -> Damage:
    """Return the damage of a header in which a text is replaced."""
    return header("child/" + MODEL, lambda text: text.replace(change, by, 1))


def offsets_changed(change: dict[str, int]) -> Damage:
    """Return the damage of a header in which the data of tensors begins elsewhere."""

    def apply(text: str) -> str:
        content = json.loads(text)
        for name, by in change.items():
            content[name]["data_offsets"] = [place + by for place in content[name]["data_offsets"]]
        return json.dumps(content)

    return header("child/" + MODEL, apply)


def doubled_name(text: str) -> str:
    """Return the header with its first tensor twice."""
    content = {name: value for name, value in json.loads(text).items() if name != "__metadata__"}
    name, value = next(iter(content.items()))
    return text[:-1].rstrip().removesuffix("}") + "}" * 0 + "}" + f', "{name}": {json.dumps(value)}}}'


def case(name: str, damage: Damage, *words: str, stage: str = "evaluate") -> Case:
    """Return a case of a refused checkpoint."""
    return Case(f"checkpoint: {name}", "reader", stage, damage, refused(*words))


EMPTY_SHARD = save({"x": GARBAGE})
CASES = [
    *(
        Case(
            f"checkpoint without a tensor: {stage}",
            "reader",
            stage,
            tensors(f"{folder}/{MODEL}", lambda content: content.pop(ROUTER)),
            refused(ROUTER, f"{folder}:|{folder}/"),
        )
        for stage, folder in READERS.items()
    ),
    *(
        Case(
            f"checkpoint without half of its tensors: {stage}",
            "reader",
            stage,
            tensors(f"{READERS[stage]}/{MODEL}", half),
            refused("model.layers", f"{READERS[stage]}:|{READERS[stage]}/"),
        )
        for stage in ("evaluate", "generate", "rl_recover")
    ),
    *(
        Case(
            f"index that promises an absent tensor: {stage}",
            "reader",
            stage,
            shards(READERS[stage], lambda places: places.update({"model.layers.9.x": places[ROUTER]})),
            refused("model.layers.9.x"),
        )
        for stage in ("evaluate", "generate", "rl_recover", "export", "importance")
    ),
    *(
        Case(
            f"missing shard: {stage}",
            "reader",
            stage,
            all_of(
                shards(READERS[stage], lambda _: None), remove(f"{READERS[stage]}/model-00002-of-00002.safetensors")
            ),
            refused("model-00002-of-00002.safetensors"),
        )
        for stage in ("evaluate", "generate", "rl_recover", "export", "calibrate_kv")
    ),
    Case("checkpoint in two shards", "reader", "evaluate", shards("child", lambda _: None), Right()),
    case("a tensor in two shards", shards("child", lambda _: None, twice=ROUTER), ROUTER),
    case("index that omits a tensor", shards("child", lambda places: places.pop(ROUTER)), ROUTER),
    case(
        "index that names a shard outside the folder",
        all_of(
            shards("child", lambda places: places.update({ROUTER: "../outside.safetensors"})),
            copy("child/model-00002-of-00002.safetensors", "outside.safetensors"),
        ),
        "outside.safetensors|index",
    ),
    case(
        "index that is no JSON",
        all_of(shards("child", lambda _: None), cut("child/model.safetensors.index.json", 0.5)),
        "index.json",
    ),
    case(
        "index without weight_map",
        all_of(shards("child", lambda _: None), write("child/model.safetensors.index.json", "{}")),
        "index.json",
        "weight_map",
    ),
    case(
        "index whose map is a list",
        all_of(shards("child", lambda _: None), write("child/model.safetensors.index.json", '{"weight_map": []}')),
        "index.json",
    ),
    case(
        "index that places tensors wrongly",
        shards("child", lambda places: places.update({name: max(places.values()) for name in places})),
        "model-",
    ),
    case("extra tensor", with_tensor("model.layers.2.mlp.unknown", GARBAGE), "model.layers.2.mlp.unknown"),
    case("extra layer", with_tensor("model.layers.17.mlp.router.bias", GARBAGE), "model.layers.17.mlp.router.bias"),
    case(
        "router of another number of experts",
        with_tensor(ROUTER, torch.zeros(7, 96, dtype=torch.bfloat16)),
        ROUTER,
        "7",
    ),
    case(
        "embedding of another vocabulary",
        with_tensor("model.embed_tokens.weight", torch.zeros(120, 96, dtype=torch.bfloat16)),
        "model.embed_tokens.weight",
        "120",
    ),
    case("a scalar where a matrix is expected", with_tensor("lm_head.weight", torch.tensor(1.0)), "lm_head.weight"),
    case(
        "weights of whole numbers",
        with_tensor("lm_head.weight", torch.zeros(128, 96, dtype=torch.int64)),
        "lm_head.weight",
    ),
    case("no tensors at all", write("child/" + MODEL, save({})), "child"),
    case("weights that are another file's", write("child/" + MODEL, EMPTY_SHARD), "child"),
    case("cut at 70 %", cut("child/" + MODEL, 0.7), MODEL),
    case("cut in the header", cut("child/" + MODEL, 0.0005), MODEL),
    case("empty weights", write("child/" + MODEL, b""), MODEL),
    case("bytes after the data", all_of(lambda folder: (folder / "child" / MODEL).open("ab").write(b"x" * 64)), MODEL),
    case("header size of 2^60", write("child/" + MODEL, (1 << 60).to_bytes(8, "little") + b"{}"), MODEL),
    case("header that is no JSON", write("child/" + MODEL, (8).to_bytes(8, "little") + b"{{{{{{{{"), MODEL),
    case("header that is a list", write("child/" + MODEL, (8).to_bytes(8, "little") + b"[]      "), MODEL),
    case(
        "header nested 100,000 deep",
        write("child/" + MODEL, (200_000).to_bytes(8, "little") + b"[" * 100_000 + b"]" * 100_000),
        MODEL,
    ),
    case("unknown dtype in the header", in_header('"BF16"', '"BF17"'), MODEL, "BF17"),
    case("negative shape in the header", in_header('"shape":[', '"shape":[-'), MODEL),
    case("overlapping data", offsets_changed({"lm_head.weight": 2}), MODEL, "lm_head.weight|overlap|offsets"),
    case("a name twice in the header", header("child/" + MODEL, doubled_name), MODEL),
    case("a folder in the place of the weights", directory("child/" + MODEL), MODEL),
    case("a named pipe in the place of the weights", all_of(remove("child/" + MODEL), fifo("child/" + MODEL)), MODEL),
    case(
        "/dev/zero in the place of the weights",
        all_of(remove("child/" + MODEL), link("child/" + MODEL, "/dev/zero")),
        MODEL,
    ),
    case("a link to nowhere", all_of(remove("child/" + MODEL), link("child/" + MODEL, "gone.safetensors")), MODEL),
    case("no weights", remove("child/" + MODEL), "child"),
    case(
        "only a pickle",
        all_of(remove("child/" + MODEL), write("child/pytorch_model.bin", b"\x80\x04.")),
        "pytorch_model.bin|safetensors",
    ),
    *(
        Case(
            f"a pickle beside the weights: {stage}",
            "reader",
            stage,
            write(f"{READERS[stage]}/pytorch_model.bin", b"\x80\x04."),
            (Right(), refused("pytorch_model.bin")),
            seconds=60,
        )
        for stage in ("evaluate", "generate", "rl_recover", "export")
    ),
    Case(
        "a link to good weights",
        "reader",
        "evaluate",
        all_of(
            copy("child/" + MODEL, "w.safetensors"),
            remove("child/" + MODEL),
            link("child/" + MODEL, "../w.safetensors"),
        ),
        Right(),
    ),
    case("missing checkpoint", remove("child"), "child"),
    case("a file in the place of the checkpoint", all_of(remove("child"), write("child", "x")), "child"),
    case("an empty folder", all_of(remove("child"), directory("child")), "config.json"),
    case(
        "without one tensor of each expert kind",
        without("model.layers.1.mlp.experts.gate_up_proj_bias", "lm_head.weight"),
        "lm_head.weight",
    ),
    Case("undamaged", "reader", "evaluate", NOTHING, Right()),
]
