"""Recipes and words of the command line."""

from faults.case import NOTHING, Case, refused
from faults.damage import Damage, all_of, directory, fifo, link, write

MINE = "mine.yaml"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + number)}: &{chr(98 + number)} [{','.join(['*' + chr(97 + number)] * 9)}]\n" for number in range(12)
)
EVALUATE = "command: evaluate\nrun_dir: out\n"
FAMILIES = "held_out: {prompts_per_effort: 2, environments: [{class_path: lit_puzzle.tiny.world.Chains}]}\n"
SCENARIO = "gpu: %s, num_gpus: 1, prompt_tokens: 9, generated_tokens: 9, kv_dtype: bfloat16, expert_dtype: bfloat16"
SMALL = "checkpoint: child\nsampling: {max_new_tokens: 16}\nengine: {batch_size: 8}\n"


def file(name: str, text: str | bytes, *words: str, seconds: float = 30.0) -> Case:
    """Return a case of a refused recipe file."""
    return Case(f"recipe: {name}", "lead", MINE, write(MINE, text), refused(*(words or (MINE,))), seconds=seconds)


def word(name: str, stage: str, given: str, *words: str) -> Case:
    """Return a case of a refused word of the command line."""
    return Case(f"word: {name}: {stage}", "lead", stage, NOTHING, refused(*words), (given,), words_are_wrong=True)


def of_evaluate(text: str) -> Damage:
    """Return a recipe in the small world that evaluates, with more lines."""
    return write(MINE, EVALUATE + SMALL + text)


CASES = [
    Case("recipe: does not exist", "lead", "gone.yaml", NOTHING, refused("gone.yaml")),
    Case("recipe: a folder", "lead", MINE, directory(MINE), refused(MINE)),
    Case("recipe: a named pipe", "lead", MINE, fifo(MINE), refused(MINE)),
    Case("recipe: /dev/zero", "lead", MINE, link(MINE, "/dev/zero"), refused(MINE)),
    file("empty", ""),
    file("a list", "- command: evaluate\n"),
    file("no command", "run_dir: out\n", MINE, "command"),
    file("not YAML", "command: [evaluate\n"),
    file("a tab", "command: evaluate\n\trun_dir: out\n"),
    file("two documents", "command: evaluate\n---\ncommand: search\n"),
    file("Latin-1 bytes", b"command: evaluate # caf\xe9\n"),
    file("NUL bytes", b"command: evaluate\0\n"),
    file("alias bomb", BOMB + "command: evaluate\n", MINE),
    file("alias of itself", "command: evaluate\nrun_dir: out\nheld_out: &a {x: *a}\n"),
    file("nested 10,000 deep", "command: " + "[" * 10_000 + "]" * 10_000),
    file("Python object", "command: !!python/object/apply:os.system ['touch escaped']\n"),
    file("a key twice", "command: evaluate\nrun_dir: out\nrun_dir: elsewhere\n", MINE, "run_dir"),
    file("a key twice, inside", "command: evaluate\nrun_dir: out\nsampling: {seed: 1, seed: 2}\n", MINE, "seed"),
    file("unknown command", "command: evaluat\nrun_dir: out\n", MINE, "evaluat"),
    file("command of a missing module", "command: no_such_module.run\nrun_dir: out\n", "no_such_module"),
    file("command is a number", "command: 7\nrun_dir: out\n", MINE, "command"),
    file("base of itself", "base: mine.yaml\n", MINE),
    file("base does not exist", "base: gone.yaml\n", MINE, "gone.yaml"),
    file("base is a mapping", "base: {a: 1}\ncommand: evaluate\n", MINE, "base"),
    file("define is a list", "define: [1]\ncommand: evaluate\n", MINE, "define"),
    file("whole numbers as keys", "command: evaluate\nrun_dir: out\n1: 2\n", MINE, "1"),
    file("a date as key", "command: evaluate\nrun_dir: out\n2020-01-01: 2\n", MINE),
    Case(
        "recipe: reference to nothing",
        "lead",
        MINE,
        of_evaluate(FAMILIES + "seed: ${nothing}\n"),
        refused(MINE, "nothing|seed"),
    ),
    Case(
        "recipe: reference to itself",
        "lead",
        MINE,
        write(
            MINE,
            EVALUATE + "checkpoint: ${checkpoint}\n" + FAMILIES,
        ),
        refused(MINE, "checkpoint"),
    ),
    Case(
        "recipe: variable that is not set",
        "lead",
        MINE,
        write(
            MINE,
            EVALUATE + "checkpoint: ${oc.env:NOT_SET}\n" + FAMILIES,
        ),
        refused(MINE, "NOT_SET"),
    ),
    Case(
        "recipe: unknown resolver",
        "lead",
        MINE,
        write(
            MINE,
            EVALUATE + "checkpoint: ${run:ls}\n" + FAMILIES,
        ),
        refused(MINE, "checkpoint|run:ls"),
    ),
    Case(
        "recipe: run_dir is missing",
        "lead",
        MINE,
        write(MINE, "command: search\nlibrary: a\nscores: b\n"),
        refused(MINE, "run_dir"),
    ),
    word("unknown key", "evaluate", "--samplng.seed=1", "samplng"),
    word("unknown key inside", "evaluate", "--sampling.sede=1", "sede", "seed"),
    word("unknown key of a class", "rl_recover", "--model.init_args.gropo=1", "gropo"),
    word("misspelled class path", "rl_recover", "--model=lit_puzzle.rl.module.RLRecover", "RLRecover"),
    word(
        "class path of a missing module",
        "importance",
        "--model.init_args.method=no_such_module.Method",
        "no_such_module",
    ),
    word("class path of the wrong kind", "importance", "--model.init_args.method=collections.OrderedDict", "method"),
    word("misspelled optimizer", "rl_recover", "--model.init_args.optimizer=torch.optim.AdmW", "AdmW"),
    word("NaN temperature", "evaluate", "--sampling.temperature=.nan", "temperature"),
    word("NaN temperature", "generate", "--sampling.temperature=.nan", "temperature"),
    word("NaN temperature", "rl_recover", "--model.init_args.grpo.sampling.temperature=.nan", "temperature"),
    word("infinite temperature", "generate", "--sampling.temperature=.inf", "temperature"),
    word("NaN top_p", "generate", "--sampling.top_p=.nan", "top_p"),
    word("NaN learning rate", "rl_recover", "--model.init_args.optimizer.init_args.lr=.nan", "lr"),
    word("NaN reward weight", "rl_recover", "--model.init_args.rewards.correctness=.nan", "correctness"),
    word("NaN weight of an effort", "generate", "--prompts.efforts={low: .nan}", "low"),
    word("negative weight of an effort", "generate", "--prompts.efforts={low: -1}", "low"),
    word("NaN balance", "search", "--objective.balance=.nan", "balance"),
    word("NaN budget", "search", "--constraints.limits.total_parameters=.nan", "total_parameters"),
    word("negative tokens", "evaluate", "--sampling.max_new_tokens=-3", "max_new_tokens"),
    word("no tokens", "generate", "--sampling.max_new_tokens=0", "max_new_tokens"),
    word("more tokens than the context", "generate", "--sampling.max_new_tokens=999999999", "--force"),
    word("tokens as a text", "generate", "--sampling.max_new_tokens=many", "max_new_tokens"),
    word("half a token", "generate", "--sampling.max_new_tokens=1.5", "max_new_tokens"),
    word("negative seed", "generate", "--sampling.seed=-1", "seed"),
    word("seed of 40 digits", "generate", f"--sampling.seed={'9' * 40}", "seed"),
    word("negative seed", "importance", "--seed_everything=-1", "seed_everything"),
    word("negative prompts", "generate", "--prompts.num_prompts=-1", "num_prompts"),
    word("no batch", "evaluate", "--engine.batch_size=0", "batch_size"),
    word("negative shard size", "generate", "--shard_size=-1", "shard_size"),
    word("unknown dtype", "evaluate", "--engine.dtype=float99", "dtype"),
    word("float64", "evaluate", "--engine.dtype=float64", "dtype"),
    word("unknown engine", "evaluate", "--engine.name=llamacpp", "engine"),
    word("unknown effort", "evaluate", "--held_out.efforts=[extreme]", "extreme"),
    word("no effort", "evaluate", "--held_out.efforts=[]", "fforts"),
    word("an effort twice", "evaluate", "--held_out.efforts=[low,low]", "low|efforts"),
    word("null for settings", "evaluate", "--sampling=null", "sampling"),
    word("null for settings", "rl_recover", "--model.init_args.grpo=null", "grpo"),
    word("null for settings", "search", "--objective=null", "objective"),
    word("null for a number", "generate", "--sampling.temperature=null", "temperature"),
    word("null for an input", "evaluate", "--checkpoint=null", "checkpoint"),
    word("a list for settings", "evaluate", "--sampling=[1]", "sampling"),
    word("unknown choice", "generate", "--keep=some", "keep"),
    word("unknown divergence", "distill", "--model.init_args.loss.divergence=chi2", "divergence"),
    word("unknown metric", "search", "--objective.metric=no_such", "no_such"),
    word("unknown solver", "search", "--solver.name=quantum", "solver"),
    word(
        "unknown GPU",
        "search",
        f"--constraints.targets=[{{scenario: {{{SCENARIO % 'z9000'}}}, budget: {{}}}}]",
        "z9000",
    ),
    word("unknown budget", "search", "--constraints.limits={parameters: 3}", "parameters"),
    word("impossible budget", "search", "--constraints.limits={total_parameters: 3}", "total_parameters"),
    word("more experts than there are", "library", "--experts=[17]", "17"),
    word("negative window", "library", "--windows=[-16]", "-16"),
    word("empty word", "evaluate", "--checkpoint=", "checkpoint|config.json"),
    word("a word without dashes", "evaluate", "checkpoint=child", "checkpoint=child"),
    word("a sequence number that is none", "assemble", "--rope_factor=.nan", "rope_factor"),
    word("negative top_k", "precompute_logits", "--top_k=-4", "top_k"),
    word("top_k above the vocabulary", "precompute_logits", "--top_k=500", "top_k"),
    word("unknown precision", "precompute_logits", "--precision=float1", "precision"),
    word("unknown accelerator", "importance", "--trainer.accelerator=abacus", "abacus"),
    word("negative steps", "rl_recover", "--trainer.max_steps=-7", "max_steps"),
    word("unknown storage", "export", "--storage.experts=gguf", "experts"),
    word("unknown dtype", "export", "--storage.dtype=float99", "dtype"),
    word(
        "percentile above 100", "calibrate_kv", "--model.init_args.scales={method: percentile, percent: 101}", "percent"
    ),
    Case(
        "recipe: of the folder's own class",
        "lead",
        MINE,
        all_of(
            write("my_family.py", "from lit_puzzle.tiny.world import Chains\n\n\nclass Mine(Chains):\n    pass\n"),
            write(
                MINE,
                EVALUATE + "checkpoint: child\nheld_out: {environments: [{class_path: my_family.Nine}]}\n",
            ),
        ),
        refused("Nine"),
    ),
]
