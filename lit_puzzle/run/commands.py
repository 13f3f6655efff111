"""What `command` of a recipe may be: a command of Lightning, a stage, or a function of the user; and what it runs.

Names functions by dotted paths, imports none of them. Reads and writes nothing.
"""

from collections.abc import Sequence

from lit_puzzle.run.recipe import Recipe

PIPELINE = "pipeline"
LIGHTNING_COMMANDS = {
    "fit": "train a LightningModule: distillation, RL recovery, the tiny parent",
    "validate": "one pass over data without training: expert importance, FP8 KV-cache calibration",
}
STAGES = {
    "library": ("lit_puzzle.library.candidates.library", "expert importance -> candidate blocks of each layer"),
    "final_kl": ("lit_puzzle.scoring.final_kl.final_kl", "expert importance by the KL at the end without the expert"),
    "combine_importance": (
        "lit_puzzle.importance.combine.combine_importance",
        "several importance scores of a parent -> one, by their geometric mean or another rule",
    ),
    "score": ("lit_puzzle.scoring.scoring.score", "replace-1-block scores of the library's blocks in the parent"),
    "search": ("lit_puzzle.search.search.search", "library + scores + costs -> plan of least quality loss in a budget"),
    "assemble": ("lit_puzzle.child.assemble.assemble", "plan + parent checkpoint -> child checkpoint"),
    "average": ("lit_puzzle.child.average.average", "two recovered children -> their weighted average"),
    "generate": ("lit_puzzle.data.generate.generate", "prompts + parent -> documents with its completions"),
    "precompute_logits": (
        "lit_puzzle.distill.top_logits.precompute_logits",
        "documents + parent -> its top-k logits on disk",
    ),
    "evaluate": ("lit_puzzle.evaluate.accuracy.evaluate", "accuracy and generated tokens per reasoning effort"),
    "text_distance": (
        "lit_puzzle.evaluate.text_distance.text_distance",
        "divergence from the parent and perplexity on held-out documents",
    ),
    "throughput": (
        "lit_puzzle.serve.throughput.throughput",
        "best token throughput of parent and child: measured, predicted or stated",
    ),
    "frontier": (
        "lit_puzzle.report.frontier.frontier",
        "two evaluations + throughputs -> requests, retention, frontier",
    ),
    "report": ("lit_puzzle.report.report.report", "run folders -> one HTML page with pictures"),
    "export": ("lit_puzzle.serve.export.export", "child -> a complete folder to serve, with a model card"),
    "serve_check": (
        "lit_puzzle.serve.vllm.check.serve_check",
        "compare an exported folder in vLLM with transformers",
    ),
    PIPELINE: ("lit_puzzle.pipeline.pipeline.pipeline", "stages in their order, each a process, into one folder"),
}
# Stages that divide their work among processes; the others would repeat it in every process.
PARALLEL_STAGES = frozenset({"score", "final_kl", "precompute_logits"})


def target_of(command: str) -> str | None:
    """Return the dotted name of the function that a command runs, or None for a command of Lightning."""
    return None if command in LIGHTNING_COMMANDS else STAGES[command][0] if command in STAGES else command


def is_own(command: str) -> bool:
    """Return whether a command is one of this package, and not code of the user."""
    return command in LIGHTNING_COMMANDS or command in STAGES


def command_of(recipe: Recipe, words: Sequence[str]) -> str:
    """Return the command of a recipe.

    Args:
        recipe: the loaded recipe.
        words: overrides, which may name another one.

    Raises:
        ValueError: it has none.
    """
    given = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    command = given[-1] if given else recipe.value("command")
    if not isinstance(command, str):
        raise ValueError(
            f"{recipe.path} has no `command`: it can be the `base:` of other recipes only. Stages:\n{stage_list()}"
        )
    return command


def stage_list() -> str:
    """Return all commands with a line about each."""
    rows = LIGHTNING_COMMANDS | {name: line for name, (_, line) in STAGES.items()}
    return "\n".join(f"  {name:<18} {line}" for name, line in rows.items())
