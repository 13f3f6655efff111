"""Bytes, traffic and arithmetic of on-policy distillation, of one process.

    always       child and parent as in global distillation (`lit_puzzle.distill.footprint`)
    rollouts     the child gathered once (or two layers of it) + KV cache of completions_per_device x slices rows; or an
                 engine of vLLM (`lit_puzzle.generation.engine_footprint`) and gathered layers, to send it their weights
    update       as in global distillation, of completions_per_device rows of a prompt and a completion
    evaluation   the child gathered once + KV cache of evaluation.batch_size rows

Every completion is taken to be as long as allowed, one to a row. Pure functions; imports no torch; reads `config.json`
of both. `lit_puzzle.distill.on_policy` is what is counted.
"""

from __future__ import annotations

from dataclasses import replace

from lit_puzzle.distill.footprint import KDRun
from lit_puzzle.generation.engine_footprint import engine_beside
from lit_puzzle.generation.footprint import decoding_bytes
from lit_puzzle.run.footprint import Assumed, Decoding, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values
from lit_puzzle.training.precision import cache_width

PARENTS_HEAD = "gathered embedding and head of the parent"


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of on-policy distillation."""
    run = _Run(values, device, assumed.prompt_tokens)
    base, beside = run.base, run.beside
    parent = base.parent_states()
    phases = (
        Phase("load", base.loading()),
        Phase("evaluation", run.held(optimizer=False) | parent | run.generating(run.evaluated_rows, run.evaluated)),
        Phase("rollouts", run.held() | parent | run.generating(run.rows * run.slices, run.new_tokens)),
        Phase("update", base.made.states(device.count) | parent | run.update()),
        Phase("the parent", base.made.states(device.count) | parent | base.parent_pass()),
    )
    return Footprint(
        "on-policy distillation",
        phases,
        disk=base.disk(),
        network=run.network(),
        works=run.works(),
        knobs=run.knobs(),
        host={} if beside is None else beside.host,
        refusals=() if beside is None else beside.refusals,
        notes=(base.assumed, f"prompts of {assumed.prompt_tokens:,} tokens", "every completion as long as allowed"),
    )


class _Run:
    """The numbers of a run, read from its recipe."""

    def __init__(self, values: Values, device: Device, prompt_tokens: int) -> None:
        model = values.inside("model.init_args")
        self.values, self.model, self.processes, self.prompt_tokens = values, model, device.count, prompt_tokens
        self.own = model.inside("on_policy")
        self.rows, self.new_tokens = (
            self.own.whole("completions_per_device", 1),
            self.own.whole("sampling.max_new_tokens"),
        )
        self.base = KDRun(values, device, self.rows, prompt_tokens + self.new_tokens)
        self.slices = int(self.own.get("steps_per_generation") or self.base.accumulated)
        self.evaluated = int(model.get("evaluation.max_new_tokens") or self.new_tokens)
        efforts = len(values.get("data.init_args.efforts") or {"all": 1})
        self.problems = -(-model.whole("evaluation.prompts_per_effort") * efforts // self.processes)
        self.evaluated_rows = min(model.whole("evaluation.batch_size", least=1), self.problems)
        self.beside = engine_beside(self.base.size, self.own, self.base.precision, device)
        self.whole = bool(self.own.get("unshard_rollouts", True))

    def held(self, optimizer: bool = True) -> dict[str, float]:
        left_out = {"gradients"} if optimizer else {"gradients", "optimizer"}
        return {name: count for name, count in self.base.made.states(self.processes).items() if name not in left_out}

    def generating(self, rows: int, new_tokens: int) -> dict[str, float]:
        """Return what generation holds beside what trains."""
        gathered = self.base.made.gathered(self.processes, backward=False)
        if self.beside is not None:
            return dict(self.beside.generating) | gathered
        width = cache_width(self.values.get("trainer.precision"), self.model.at("training.dtype"))
        parts = decoding_bytes(self.base.size, rows, self.prompt_tokens, new_tokens, width, eager=False)
        if self.processes == 1:
            return parts
        return parts | ({"child, gathered whole": self.base.made.all_bytes} if self.whole else gathered)

    def update(self) -> dict[str, float]:
        parts = self.base.update() | ({} if self.beside is None else dict(self.beside.training))
        if self.own.get("top_k") is not None:
            parts.pop(PARENTS_HEAD, None)
        return parts

    def network(self) -> dict[str, float]:
        found = self.base.network()
        if not found:
            return {}
        rollouts = self.base.updates * self.base.accumulated / self.slices
        share = (self.processes - 1) / self.processes * self.base.made.all_bytes
        return found | {"rollouts": rollouts * share * (1 if self.whole else self.new_tokens)}

    def works(self) -> tuple[Work, ...]:
        child, parent = (replace(work, head_tokens=self.new_tokens) for work in self.base.works())
        ranks = 1 if self.beside is None else self.beside.tensor_parallel
        by = ("transformers" if self.beside is None else "vllm", ranks)
        prompts = Work("rollouts", child.config, child.sequences, self.prompt_tokens, dtype=child.dtype)
        evaluated = Decoding(self.evaluated, self.evaluated_rows, *by)
        both = 2 * self.problems * self.processes
        return (
            replace(prompts, decoding=Decoding(self.new_tokens, self.rows * self.slices, *by)),
            child,
            parent,
            replace(prompts, name="evaluation, before and after", sequences=both, decoding=evaluated),
        )

    def knobs(self) -> tuple[Knob, ...]:
        own, evaluation = self.own.key, self.model.key("evaluation.batch_size")
        found = [] if self.beside is None else list(self.beside.knobs)
        found.append(
            Knob(evaluation, self.evaluated_rows, smaller(self.evaluated_rows), "evaluation of {} rows together")
        )
        if self.slices > 1:
            values = [slices for slices in smaller(self.slices) if self.base.accumulated % slices == 0]
            found.append(Knob(own("steps_per_generation"), self.slices, values, "rollouts of {} slices"))
        found.append(Knob(own("completions_per_device"), self.rows, smaller(self.rows), "slices of {} rows"))
        found += [knob for knob in self.base.knobs() if not knob.key.startswith("data.")]
        if self.processes > 1 and self.whole and self.beside is None:
            found.append(Knob(own("unshard_rollouts"), True, [False], "child gathered whole for rollouts: {}"))
        values = [self.new_tokens // 2**power for power in range(1, 6)]
        found.append(Knob(own("sampling.max_new_tokens"), self.new_tokens, values, "completions of {} tokens"))
        return tuple(found)
