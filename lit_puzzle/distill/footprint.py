"""Bytes, traffic and arithmetic of global distillation, of one process.

    always     child: weights (P - T) b / N, master weights, gradients and Adam's states 16 T / N; parent Q b / N
    update     the child's activations + hidden states that the loss compares + embedding and head of both, gathered
               + the larger of: one layer at work, its gathered neighbor and their gradients; logits of a chunk of child
               and parent and the gradient of the head in float32, while the loss runs and no layer is gathered
    the parent its gathered layers + activations of one + the states that are kept

With the parent's top-k logits from disk, the parent's share and its gathered layers are not there. Pure functions;
imports no torch; reads `config.json` of both. `lit_puzzle.distill.global_kd` and `losses` are what is counted.
"""

from __future__ import annotations

from dataclasses import replace

from lit_puzzle.generation.footprint import apart_bytes, decoding_bytes
from lit_puzzle.model.footprint import (
    ModelSize,
    forward_bytes,
    model_size,
    step_bytes,
    stream_bytes,
)
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values
from lit_puzzle.training.footprint import Trained, frozen_gathered, frozen_states, load_bytes, trained
from lit_puzzle.training.precision import cache_width, layer_precision, moe_chunk, optimizer_of

RECORD_FILE = "top_logits.json"  # of lit_puzzle.distill.top_logits_files: a folder of logits, not of a model


def chunk_bytes(vocab: int, hidden: int, chunk_tokens: int, kind: str, full_parent: bool) -> float:
    """Return the logits of a chunk: child's and parent's in float32, and the tiles of the plain formula."""
    logits = chunk_tokens * vocab * 4 * (2 if full_parent else 1)
    tile = min(chunk_tokens * vocab, 2**26 if kind == "cuda" else 2**21) * 4
    return logits + 8 * tile + chunk_tokens * hidden * 4


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of global distillation."""
    data = values.inside("data.init_args")
    run = KDRun(values, device, data.whole("batch_size", least=1), data.whole("sequence_tokens", least=1))
    phases = [
        Phase("load", run.loading()),
        Phase("update", run.made.states(device.count) | run.parent_states() | run.update()),
    ]
    if run.parent is not None:
        phases.append(Phase("the parent", run.made.states(device.count) | run.parent_states() | run.parent_pass()))
    if run.model.get("evaluation") is not None:
        phases += run.evaluations(assumed.prompt_tokens)
    return Footprint(
        "global distillation",
        tuple(phases),
        disk=run.disk(),
        network=run.network(),
        works=run.works(),
        knobs=run.knobs(),
        notes=(run.assumed, "sequences filled to the last token"),
    )


class KDRun:
    """The numbers of a run in which a parent stands beside a child, read from its recipe.

    Args:
        values: of the recipe.
        device: of a process.
        rows: rows of a batch.
        row_tokens: tokens of a row.
    """

    def __init__(self, values: Values, device: Device, rows: int, row_tokens: int) -> None:
        self.values, self.device, self.processes = values, device, device.count
        self.model = values.inside("model.init_args")
        child, folder = planned_config(self.model.path("child")), self.model.path("parent")
        self.size = model_size(child.config)
        self.made: Trained = trained(self.size, self.model.inside("training"), optimizer_of(values))
        self.has_parent = not (folder / RECORD_FILE).is_file() and "top_logits" not in folder.parts
        parent = planned_config(folder) if self.has_parent else child
        self.parent: ModelSize | None = model_size(parent.config) if self.has_parent else None
        self.assumed = "; ".join(dict.fromkeys(part for part in (child.assumed, parent.assumed) if part))
        self.rows, self.row_tokens = rows, row_tokens
        self.tokens = self.rows * self.row_tokens
        self.precision = layer_precision(values.get("trainer.precision"), self.model.at("training.dtype"))
        self.accumulated = int(values.get("trainer.accumulate_grad_batches", 1))
        self.updates = max(int(values.get("trainer.max_steps", -1)), 1)
        self.checkpointed = bool(self.model.at("training.gradient_checkpointing"))
        self.compares_states = float(self.model.get("loss.hidden", 0.0)) > 0

    def loading(self) -> dict[str, float]:
        """Return what loading holds."""
        parts = {"child": sum(self.made.states(self.processes).values()) / 4}
        bigger = self.parent if self.parent is not None else self.size
        return parts | load_bytes(bigger, self.made.width, self.processes)

    def parent_states(self) -> dict[str, float]:
        """Return what the parent holds all through training."""
        if self.parent is None:
            return {}
        return {"parent": frozen_states(self.parent, self.made.width, self.processes)["weights"]}

    def update(self) -> dict[str, float]:
        """Return what an update holds beside the states."""
        size, tokens = self.size, self.tokens
        parts = step_bytes(size, tokens, self.precision, self.checkpointed, moe_chunk(self.model))
        if self.parent is not None:
            kept = len(self.parent.layers) if self.compares_states else 1
            parts["states of the parent"] = kept * stream_bytes(self.parent, tokens, self.precision)
        gathered = self.made.gathered(self.processes, backward=True)
        layers = {name: gathered.pop(name, 0.0) for name in ("gathered layers", "their gradients")}
        if self.parent is not None and self.processes > 1:  # FSDP2 keeps a root gathered that has no backward pass
            gathered["gathered embedding and head of the parent"] = float(self.parent.ends * self.made.width)
        # The loss runs between forward and backward, when no layer is at work or gathered.
        at_layer = {"inside of one layer": parts.pop("inside of one layer")} | layers
        at_loss = self._loss_bytes()
        return parts | gathered | max(at_layer, at_loss, key=lambda moment: sum(moment.values()))

    def parent_pass(self) -> dict[str, float]:
        """Return what the parent's forward pass holds, before the child's; its states are kept."""
        assert self.parent is not None
        kept = len(self.parent.layers) if self.compares_states else 1
        return frozen_gathered(self.parent, self.made.width, self.processes) | {
            "states of the parent": kept * stream_bytes(self.parent, self.tokens, self.precision),
            "activations of one layer of the parent": forward_bytes(self.parent, self.tokens, self.precision),
        }

    def _loss_bytes(self) -> dict[str, float]:
        chunk = min(self.model.whole("loss.chunk_tokens", least=1), self.tokens)
        logits = chunk_bytes(self.size.vocab, self.size.hidden, chunk, self.device.kind, self.parent is not None)
        head = 4.0 * self.size.table if self.made.ends else 0.0
        states = self.tokens * self.size.hidden * 4 * (3 if self.parent is not None else 2)
        return {"logits of a chunk": logits, "gradient of the head": head, "states and their gradient": float(states)}

    def evaluations(self, prompt_tokens: int) -> list[Phase]:
        """Return the evaluations by the child in memory, and those by engines from its folder."""
        states = self.made.states(self.processes)
        held = {k: v for k, v in states.items() if k not in ("gradients", "optimizer")} | self.parent_states()
        settings = self.model.inside("evaluation")
        by_engine = settings.get("engine") is not None
        in_memory = not by_engine or int(settings.get("validation.prompts") or 0) > 0
        phases = [Phase("evaluation", held | self.evaluation(prompt_tokens))] if in_memory else []
        if by_engine:
            engine, new = settings.inside("engine"), settings.whole("max_new_tokens")
            problems = settings.whole("prompts_per_effort") * len(settings.at("efforts"))
            had = sum(held.values())
            apart = apart_bytes(self.size, engine, self.device, had, prompt_tokens, new, problems)
            phases.append(Phase("evaluation by engines", held | apart))
        return phases

    def evaluation(self, prompt_tokens: int) -> dict[str, float]:
        """Return what the evaluation before and after holds beside the weights."""
        width = cache_width(self.values.get("trainer.precision"), self.model.at("training.dtype"))
        settings = self.model.inside("evaluation")
        problems = -(-settings.whole("prompts_per_effort") * len(settings.at("efforts")) // self.processes)
        rows = min(settings.whole("batch_size", least=1), problems)
        new = settings.whole("max_new_tokens")
        parts = decoding_bytes(self.size, rows, prompt_tokens, new, width, eager=False)
        return parts | ({"child, gathered whole": self.made.all_bytes} if self.processes > 1 else {})

    def disk(self) -> dict[str, float]:
        """Return what the run writes."""
        state = self.made.numbers * (4.0 + self.made.optimizer)
        return {"child": self.size.parameters * self.made.width, "2 checkpoints": 2 * state,
                "best weights": 4.0 * self.made.numbers}  # fmt: skip

    def network(self) -> dict[str, float]:
        """Return what a process receives."""
        if self.processes == 1:
            return {}
        batches = self.updates * self.accumulated
        share = (self.processes - 1) / self.processes
        parent = 0.0 if self.parent is None else share * self.parent.parameters * self.made.width
        return {"updates": batches * (self.made.step_traffic(self.processes, self._passes - 1) + parent)}

    @property
    def _passes(self) -> int:
        return 4 if self.checkpointed else 3

    def works(self) -> tuple[Work, ...]:
        """Return the passes of child and parent."""
        count = self.updates * self.accumulated * self.rows * self.processes
        dtype = "float32" if self.precision == "float32" else "bfloat16"
        tokens = self.row_tokens
        child = Work("updates of the child", self.size.config, count, tokens, self._passes, tokens, dtype=dtype)
        if self.parent is None:
            return (child,)
        name = "forward passes of the parent"
        return (child, replace(child, name=name, config=self.parent.config, passes=1))

    def knobs(self) -> tuple[Knob, ...]:
        """Return the settings that make it smaller."""
        found = []
        if self.rows > 1:
            found.append(Knob("data.init_args.batch_size", self.rows, smaller(self.rows), "batches of {} sequences"))
        if not self.checkpointed:
            found.append(Knob(self.model.key("training.gradient_checkpointing"), False, [True], "checkpointing {}"))
        if self.model.get("training.moe_chunk_tokens", 0) is None:
            sizes = [2**power for power in range(16, 9, -1)]
            found.append(
                Knob(self.model.key("training.moe_chunk_tokens"), None, sizes, "experts of {} tokens at a time")
            )
        chunk = self.model.whole("loss.chunk_tokens", least=1)
        halves = [chunk // 2**power for power in range(1, 5) if chunk >= 2**power]
        found.append(Knob(self.model.key("loss.chunk_tokens"), chunk, halves, "logits of {} targets at a time"))
        if self.compares_states:
            found.append(Knob(self.model.key("loss.hidden"), self.model.at("loss.hidden"), [0.0], "loss.hidden {}"))
        values = [self.row_tokens * share // 16 for share in range(15, 0, -1)]
        found.append(Knob("data.init_args.sequence_tokens", self.row_tokens, values, "sequences of {} tokens"))
        return tuple(found)
