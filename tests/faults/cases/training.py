"""Settings of trainings that do not fit, and what users plug in that misbehaves."""

import json

from faults.case import NOTHING, Case, Refused, Right, refused
from faults.damage import Damage, write

MODULE = "my_rewards.py"
REWARD = "def reward(completion_ids, **columns):\n    "
EXTRA = "--model.init_args.extra_rewards=[{function: my_rewards.reward, weight: 1.0}]"
BEST = "lit_puzzle.training.checkpoints.BestCheckpoint"
CHAINS = "{class_path: lit_puzzle.tiny.world.Chains}"
JSONL = "class_path: lit_puzzle.environments.jsonl.JsonlEnvironment"
ENVIRONMENT = "held_out.environments=[{" + JSONL + ", init_args: {name: mine, path: e.jsonl, verification: %s}}]"


def reward(name: str, body: str, *words: str) -> Case:
    """Return a case of a reward of the user's own."""
    damage = write(MODULE, REWARD + body + "\n")
    return Case(
        f"reward: {name}",
        "training",
        "rl_recover",
        damage,
        Refused(("reward", *words), keeps=True),
        (EXTRA,),
        seconds=60,
    )


def setting(name: str, stage: str, given: str, *words: str, keeps: bool = False) -> Case:
    """Return a case of a refused setting."""
    return Case(
        f"training: {name}: {stage}",
        "training",
        stage,
        NOTHING,
        Refused(words, keeps),
        (given,),
        seconds=60,
        words_are_wrong=True,
    )


def problems(name: str, rows: list[object], verification: str, *words: str) -> Case:
    """Return a case of a file of problems that is refused."""
    damage: Damage = write(
        "e.jsonl", "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return Case(
        f"problems: {name}",
        "prompts",
        "evaluate",
        damage,
        refused("e.jsonl", *words),
        ("--" + ENVIRONMENT % verification, "--held_out.prompts_per_effort=2"),
    )


ACCUMULATE = "--trainer.accumulate_grad_batches=%d"
BATCHES = 7  # of an epoch of the small world
LORA = "--model.init_args.training.lora={rank: 2, alpha: 4, target_modules: [%s]}"
GOOD: list[object] = [{"prompt": f"What is {number} + 2?", "answer": str(number + 2)} for number in range(60)]
CASES = [
    *(
        setting(f"LoRA on {target}", stage, LORA % target, target)
        for target in ("q_porj", "no.such.module")
        for stage in ("rl_recover", "distill")
    ),
    setting("LoRA of rank 0", "rl_recover", "--model.init_args.training.lora={rank: 0}", "rank"),
    setting("LoRA with alpha NaN", "rl_recover", "--model.init_args.training.lora={rank: 2, alpha: .nan}", "alpha"),
    setting(
        "LoRA with dropout 2",
        "rl_recover",
        "--model.init_args.training.lora={rank: 2, alpha: 4, dropout: 2}",
        "dropout",
    ),
    setting("LoRA with an empty name", "rl_recover", LORA % "''", "target_modules"),
    setting("freeze that matches nothing", "distill", "--model.init_args.training={freeze: [no_such.*]}", "no_such"),
    setting("freeze that matches everything", "distill", "--model.init_args.training={freeze: ['*']}", "freeze"),
    setting("unknown attention", "rl_recover", "--model.init_args.training.attention=flash9", "attention", "flash9"),
    setting("unknown experts", "distill", "--model.init_args.training.experts=quantum", "experts", "quantum"),
    setting(
        "learning rate 1e30",
        "rl_recover",
        "--model.init_args.optimizer.init_args.lr=1e30",
        "lr|non-finite|finite|NaN|nan",
        keeps=True,
    ),
    setting(
        "learning rate 1e30",
        "distill",
        "--model.init_args.optimizer.init_args.lr=1e30",
        "lr|non-finite|finite|NaN|nan",
        keeps=True,
    ),
    setting("negative learning rate", "rl_recover", "--model.init_args.optimizer.init_args.lr=-1", "lr|learning rate"),
    *(
        Case(
            f"training: accumulation of 64 where an epoch has fewer batches: {stage}",
            "training",
            stage,
            NOTHING,
            (Right(words=(ACCUMULATE % BATCHES,)), refused("accumulate_grad_batches")),
            (ACCUMULATE % 64,),
            seconds=60,
            words_are_wrong=True,
        )
        for stage in ("distill", "distill_blocks")
    ),
    setting("accumulation of 0", "rl_recover", "--trainer.accumulate_grad_batches=0", "accumulate_grad_batches"),
    setting(
        "groups that do not divide a batch", "rl_recover", "--model.init_args.grpo.num_generations=3", "num_generations"
    ),
    setting("fewer prompts than a batch", "rl_recover", "--data.init_args.train_prompts=1", "prompts"),
    setting("a sequence longer than the context", "distill", "--data.init_args.sequence_tokens=999999", "999999"),
    setting(
        "a sequence of one token", "distill", "--data.init_args.sequence_tokens=1", "sequence_tokens|1 token|sequences"
    ),
    setting("no documents left for training", "distill", "--data.init_args.validation_one_in=1", "validation_one_in"),
    setting(
        "a metric that is not logged",
        "rl_recover",
        f"--trainer.callbacks=[{{class_path: {BEST}, init_args: {{monitor: val/acuracy}}}}]",
        "val/acuracy",
        keeps=True,
    ),
    setting("precision that does not exist", "rl_recover", "--trainer.precision=12-true", "12-true"),
    setting("float16 weights", "rl_recover", "--model.init_args.training.dtype=float16", "dtype"),
    setting("layers that do not exist", "distill_blocks", "--model.init_args.training.layers=[77]", "77"),
    setting(
        "tensors that match nothing", "distill_blocks", "--model.init_args.training.tensors=[no_such.*]", "no_such"
    ),
    setting("negative beta", "rl_recover", "--model.init_args.grpo.loss.beta=-0.1", "beta"),
    setting(
        "two environments of one name",
        "rl_recover",
        f"--data.init_args.environments=[{CHAINS},{CHAINS}]",
        "chains",
    ),
    setting("no weight on any loss", "distill", "--model.init_args.loss={logits: 0, hidden: 0, lm: 0}", "loss|logits"),
    setting("NaN weight of a loss", "distill", "--model.init_args.loss.hidden=.nan", "hidden"),
    reward("raises", "raise RuntimeError('no network')", "no network"),
    reward("raises KeyError", "return columns['no_such_column']", "no_such_column"),
    reward("one number too few", "return [0.0] * (len(completion_ids) - 1)"),
    reward("one number", "return 1.0"),
    reward("nothing", "return None"),
    reward("None for each", "return [None] * len(completion_ids)"),
    reward("NaN", "return [float('nan')] * len(completion_ids)"),
    reward("infinity", "return [float('inf')] * len(completion_ids)"),
    reward("texts", "return ['good'] * len(completion_ids)"),
    reward("no keywords", "return [0.0] * len(completion_ids)\n\ndef reward(completion_ids):\n    return [0.0]"),
    Case(
        "reward: does not exist",
        "training",
        "rl_recover",
        write(MODULE, "x = 1\n"),
        refused("my_rewards"),
        (EXTRA,),
    ),
    Case(
        "reward: module that raises",
        "training",
        "rl_recover",
        write(MODULE, "raise RuntimeError('half written')\n"),
        refused("my_rewards|extra_rewards"),
        (EXTRA,),
    ),
    Case(
        "reward: module with a syntax error",
        "training",
        "rl_recover",
        write(MODULE, "def reward(:\n"),
        refused("my_rewards"),
        (EXTRA,),
    ),
    problems("missing answer", [*GOOD, {"prompt": "x"}], "exact", ":61"),
    problems("not JSON", [*GOOD, "{"], "exact", ":61"),
    problems("answer null", [*GOOD, {"prompt": "x", "answer": None}], "exact", ":61"),
    problems("answer NaN", [*GOOD, '{"prompt": "x", "answer": NaN}'], "numeric", ":61"),
    problems("answer that is no number", [*GOOD, {"prompt": "x", "answer": "many"}], "numeric", ":61"),
    problems("answer that is no choice", [*GOOD, {"prompt": "x", "answer": "Z9"}], "choice", ":1"),
    problems("a key twice", [*GOOD, '{"prompt": "x", "answer": "1", "answer": "2"}'], "exact", ":61", "answer"),
    problems("unknown key", [*GOOD, {"prompt": "x", "answer": "1", "anwser": "2"}], "exact", ":61", "anwser"),
    problems(
        "unknown role",
        [*GOOD, {"messages": [{"role": "human", "content": "x"}], "answer": "1"}],
        "exact",
        ":61",
        "human",
    ),
    problems("empty", [], "exact"),
    Case(
        "problems: two problems where more are asked",
        "prompts",
        "evaluate",
        write("e.jsonl", "".join(json.dumps(row) + "\n" for row in GOOD[:2])),
        refused("e.jsonl|mine"),
        ("--" + ENVIRONMENT % "exact", "--held_out.prompts_per_effort=2"),
    ),
]
