"""Bytes, traffic and arithmetic of reinforcement learning: evaluations, rollouts and updates of one process.

    always       weights (P - T) b / N, master weights 4 T / N, and from the first update on optimizer states
    rollouts     the model gathered once (or two layers of it) + KV cache of completions_per_device x slices rows; or an
                 engine of vLLM (`lit_puzzle.generation.engine_footprint`) and gathered layers, to send it their weights
    update       activations of completions_per_device rows + inside of one layer, or while no layer is at work the
                 log-probabilities of a tile of 4096 x 32768 logits
    evaluation   the model gathered once + KV cache of evaluation.batch_size rows

No reference model: its KL term needs LoRA, where the reference is the model with the adapter off. Pure functions;
imports no torch; reads `config.json` of the child. `lit_puzzle.rl.module` and TRL 1.16 are what is counted.
"""

from __future__ import annotations

from dataclasses import replace

from lit_puzzle.generation.engine_footprint import engine_beside
from lit_puzzle.generation.footprint import apart_bytes, decoding_bytes, engine_name
from lit_puzzle.model.footprint import ModelSize, model_size, step_bytes
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import Assumed, Decoding, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values
from lit_puzzle.training.footprint import Trained, load_bytes, trained
from lit_puzzle.training.precision import cache_width, layer_precision, moe_chunk, optimizer_of

LOGPROB_TILE = (4096, 32768)  # tokens x vocabulary of the logits that TRL computes at a time, in float32
# Copies of a tile in its backward pass: Triton's kernel works in place, beside a copy in float32 for the products; in
# torch, on a CPU: logits, scaled, at temperature, log-probabilities, probabilities, gradient, three temporaries.
TILE_COPIES = {"cuda": 3.0, "cpu": 8.25}


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of RL recovery."""
    planned = planned_config(values.path("model.init_args.child"))
    size, model = model_size(planned.config), values.inside("model.init_args")
    made = trained(size, model.inside("training"), optimizer_of(values))
    run = _Run(values, size, made, device, assumed.prompt_tokens)
    phases = (
        Phase("load", load_bytes(size, made.width, device.count)),
        Phase("evaluation", run.held(optimizer=False) | run.generating(run.evaluated_rows, run.evaluated_tokens)),
        *run.evaluation_apart(),
        Phase("rollouts", run.held() | run.generating(run.rollout_rows, run.new_tokens)),
        Phase("update", run.held() | {"gradients": made.states(device.count)["gradients"]} | run.update()),
    )
    return Footprint(
        "RL recovery",
        phases,
        disk=run.disk(),
        network=run.network(),
        works=run.works(device.count),
        knobs=run.knobs(),
        host={} if run.rollouts is None else run.rollouts.host,
        refusals=() if run.rollouts is None else run.rollouts.refusals,
        notes=(planned.assumed, f"prompts of {assumed.prompt_tokens:,} tokens", "every completion as long as allowed"),
    )


class _Run:
    """The numbers of a run, read from its recipe."""

    def __init__(self, values: Values, size: ModelSize, made: Trained, device: Device, prompt_tokens: int) -> None:
        model = values.inside("model.init_args")
        self.values, self.model, self.size, self.made = values, model, size, made
        self.device, self.kind, self.processes = device, device.kind, device.count
        self.prompt_tokens = prompt_tokens
        self.new_tokens = model.whole("grpo.sampling.max_new_tokens")
        self.accumulated = int(values.get("trainer.accumulate_grad_batches", 1))
        self.slices = int(model.get("grpo.steps_per_generation") or self.accumulated)
        self.rows = model.whole("grpo.completions_per_device", least=1)
        self.rollout_rows = self.rows * self.slices
        self.evaluated_rows = min(model.whole("evaluation.batch_size", least=1), self.evaluated_problems)
        self.evaluated_tokens = int(model.get("evaluation.max_new_tokens") or self.new_tokens)
        self.updates = max(int(values.get("trainer.max_steps", -1)), 1)
        self.precision = layer_precision(values.get("trainer.precision"), model.at("training.dtype"))
        self.width = cache_width(values.get("trainer.precision"), model.at("training.dtype"))
        self.rollouts = engine_beside(size, model.inside("grpo"), self.precision, device)
        self.whole = bool(model.at("grpo.unshard_rollouts"))

    @property
    def evaluated_problems(self) -> int:
        efforts = sum(weight > 0 for weight in (self.values.get("data.init_args.efforts") or {"all": 1}).values())
        return -(-self.model.whole("evaluation.prompts_per_effort") * efforts // self.processes)

    def held(self, optimizer: bool = True) -> dict[str, float]:
        states = self.made.states(self.processes)
        left_out = {"gradients"} if optimizer else {"gradients", "optimizer"}
        return {name: count for name, count in states.items() if name not in left_out}

    def generating(self, rows: int, new_tokens: int) -> dict[str, float]:
        """Return what generation holds beside what trains."""
        if self.rollouts is None:
            return self.decoding(rows, new_tokens)
        return dict(self.rollouts.generating) | self.made.gathered(self.processes, backward=False)

    def decoding(self, rows: int, new_tokens: int) -> dict[str, float]:
        parts = decoding_bytes(self.size, rows, self.prompt_tokens, new_tokens, self.width, eager=False)
        if self.processes == 1:
            return parts
        if self.whole:
            return parts | {"weights, gathered whole": self.made.all_bytes}
        return parts | self.made.gathered(self.processes, backward=False)

    def evaluation_apart(self) -> tuple[Phase, ...]:
        """Return the evaluation by engines from the child's folder, beside what trains."""
        if self.model.get("evaluation.engine") is None:
            return ()
        held = self.held(optimizer=False) | ({} if self.rollouts is None else dict(self.rollouts.training))
        engine, problems = self.model.inside("evaluation.engine"), self.evaluated_problems * self.processes
        how = engine, self.device, sum(held.values()), self.prompt_tokens, self.evaluated_tokens, problems
        return (Phase("evaluation by engines", held | apart_bytes(self.size, *how)),)

    def update(self) -> dict[str, float]:
        tokens = self.rows * (self.prompt_tokens + self.new_tokens)
        tile = min(tokens, LOGPROB_TILE[0]) * min(self.size.vocab, LOGPROB_TILE[1]) * 4
        checkpointed, chunk = self.model.at("training.gradient_checkpointing"), moe_chunk(self.model)
        parts = step_bytes(self.size, tokens, self.precision, bool(checkpointed), chunk)
        beside = {} if self.rollouts is None else dict(self.rollouts.training)
        loss = {
            "log-probabilities of a tile": TILE_COPIES[self.kind] * tile,
            "last states and their gradient": 8.0 * tokens * self.size.hidden,
            "gradient of the head": 4.0 * self.size.table if self.made.ends else 0.0,
        }
        gathered = self.made.gathered(self.processes, backward=True)
        layers = {name: gathered.pop(name, 0.0) for name in ("gathered layers", "their gradients")}
        # The loss runs between forward and backward, when no layer is at work or gathered.
        at_layer = {"inside of one layer": parts.pop("inside of one layer")} | layers
        return parts | beside | gathered | max(at_layer, loss, key=lambda moment: sum(moment.values()))

    def disk(self) -> dict[str, float]:
        kept = 2
        return {
            "child": self.size.parameters * self.made.width,
            f"{kept} checkpoints": kept * self.made.numbers * (4.0 + self.made.optimizer),
            "best weights": 4.0 * self.made.numbers,
        }

    def network(self) -> dict[str, float]:
        if self.processes == 1:
            return {}
        rollouts = self.updates * self.accumulated / self.slices
        share = (self.processes - 1) / self.processes * self.made.all_bytes
        steps = 1 if self.whole else self.new_tokens
        return {
            "updates": self.updates * self.accumulated * self.made.step_traffic(self.processes, self._passes - 1),
            "rollouts": rollouts * share * steps,
        }

    @property
    def _passes(self) -> int:
        return 4 if self.model.at("training.gradient_checkpointing") else 3

    def works(self, processes: int) -> tuple[Work, ...]:
        completions = self.updates * self.accumulated * self.rows * processes
        dtype = "float32" if self.precision == "float32" else "bfloat16"
        tokens, prompt = self.prompt_tokens + self.new_tokens, self.prompt_tokens
        work = Work("rollouts", self.size.config, completions, prompt, dtype=dtype)
        ranks = 1 if self.rollouts is None else self.rollouts.tensor_parallel
        by = ("transformers" if self.rollouts is None else "vllm", ranks)
        evaluated = Decoding(self.evaluated_tokens, self.evaluated_rows, *self._evaluated_by(by))
        return (
            replace(work, decoding=Decoding(self.new_tokens, self.rollout_rows, *by)),
            replace(work, name="updates", read_tokens=tokens, passes=self._passes, head_tokens=tokens),
            replace(
                work,
                name="evaluation, before and after",
                sequences=2 * self.evaluated_problems * processes,
                decoding=evaluated,
            ),
        )

    def _evaluated_by(self, rollouts: tuple[str, int]) -> tuple[str, int]:
        """Return engine and GPUs of each of the evaluations before and after: their own, or those of the rollouts."""
        if self.model.get("evaluation.engine") is None:
            return rollouts
        engine = self.model.inside("evaluation.engine")
        return engine_name(engine, self.device), int(engine.get("tensor_parallel", 1))

    def knobs(self) -> tuple[Knob, ...]:
        beside = () if self.rollouts is None else self.rollouts.knobs
        return (*beside, *self._own_knobs())

    def _own_knobs(self) -> tuple[Knob, ...]:
        grpo, evaluation = self.model.key("grpo"), self.model.key("evaluation.batch_size")
        found = [Knob(evaluation, self.evaluated_rows, smaller(self.evaluated_rows), "evaluation of {} rows together")]
        if self.slices > 1:
            values = [slices for slices in smaller(self.slices) if self.accumulated % slices == 0]
            found.append(Knob(f"{grpo}.steps_per_generation", self.slices, values, "rollouts of {} slices"))
        found.append(Knob(f"{grpo}.completions_per_device", self.rows, smaller(self.rows), "slices of {} rows"))
        if not self.model.at("training.gradient_checkpointing"):
            found.append(Knob(self.model.key("training.gradient_checkpointing"), False, [True], "checkpointing {}"))
        if self.model.get("training.moe_chunk_tokens", 0) is None:
            values = [2**power for power in range(16, 9, -1)]
            found.append(
                Knob(self.model.key("training.moe_chunk_tokens"), None, values, "experts of {} tokens at a time")
            )
        if self.processes > 1 and self.whole and self.rollouts is None:
            found.append(Knob(f"{grpo}.unshard_rollouts", True, [False], "weights gathered whole for rollouts: {}"))
        values = [self.new_tokens // 2**power for power in range(1, 6)]
        found.append(Knob(f"{grpo}.sampling.max_new_tokens", self.new_tokens, values, "completions of {} tokens"))
        return tuple(found)
