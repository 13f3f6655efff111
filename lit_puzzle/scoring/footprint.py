"""Bytes, traffic and arithmetic of replace-1-block scoring, of one process.

    device   weights P b / R, two gathered layers and whole embedding and head when sharded, one layer's activations of
             a batch, or the metrics of a chunk of n tokens, 7 x 4 n V
    host     T D b / R entering a layer (in a file above memory.hidden_gib), N D b / R final, and 4 N V / R of
             log-probabilities where they are kept (memory.log_probs_gib); on a CPU all this is the same memory

A candidate of layer l of L runs through L - l layers. Evaluations gather the model whole, or layer by layer. Pure
functions; imports no torch; reads `config.json` and `library.json`. `lit_puzzle.scoring.replace_block` is counted.
`final_kl` has a candidate for every expert, E (L + 1) / 2 passes and 2; each runs on the sequences routed to it.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from lit_puzzle.data.footprint import Sequences, sequences_of
from lit_puzzle.generation.footprint import decoding_bytes, engine_bytes, engine_name
from lit_puzzle.generation.sampling import EngineSettings
from lit_puzzle.library.footprint import Candidates, planned_candidates
from lit_puzzle.model.footprint import BYTES, ModelSize, forward_bytes, model_size, stored_bytes, stream_bytes
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.model.streaming_footprint import is_streamed
from lit_puzzle.model.streaming_need import Streamed, layer_bytes, refusals, streamed
from lit_puzzle.run.footprint import GIB, Assumed, Decoding, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values
from lit_puzzle.scoring.settings import FEWEST_TOKENS
from lit_puzzle.scoring.streamed_footprint import StreamedScoring, layer_scoring, scoring_to_the_end
from lit_puzzle.training.footprint import frozen_gathered, frozen_states, load_bytes

METRIC_COPIES = 7  # of lit_puzzle.scoring.block_quality
ERROR_COPIES = 4  # of lit_puzzle.scoring.layer_errors
FINISHED_BYTES = 80  # the file of an expert of lit_puzzle.scoring.final_kl
SHORT_ANSWER = 64  # tokens of a reference answer that is teacher-forced


def metric_bytes(chunk_tokens: int, vocab: int) -> int:
    """Return what the metrics of a chunk hold: copies of its logits in float32."""
    return METRIC_COPIES * 4 * chunk_tokens * vocab


def error_bytes(tokens: float, hidden: int) -> int:
    """Return what the error of a layer's states holds in float32, with its factors."""
    return int(ERROR_COPIES * 4 * tokens * hidden)


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `score`."""
    planned = planned_config(values.path("parent"))
    size = model_size(planned.config)
    run = _Run(values, device, assumed, size, planned_candidates(values.path("library"), size))
    read = run.read()
    phases = [Phase("load", load_bytes(run.size, run.width, device.count) if read is None else read.loaded)]
    if run.data.generating:
        phases.append(Phase("completions of the parent", run.data.generating))
    phases.append(Phase("candidates", run.held() | (run.scoring() if read is None else dict(read.parts))))
    for evaluation in values.get("evaluations") or ():
        phases.append(Phase("evaluations", run.evaluation(Values(evaluation, "evaluations"))))
    files = run.states()
    return Footprint(
        "replace-1-block scores",
        tuple(phases),
        host=run.kept(),
        disk={"scores": 8.0 * 6 * run.data.count * run.found.rows} | run.candidate_folder() | files.disk,
        network=run.network(),
        traffic=files.traffic,
        works=run.works(planned.config),
        knobs=run.knobs(),
        notes=(planned.assumed, run.data.assumed, run.found.assumed),
        refusals=(*refusals(read), *filter(None, (files.refusal,))),
    )


def final_kl_footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `final_kl`: a candidate for every expert, run on the sequences that are routed to it."""
    planned = planned_config(values.path("parent"))
    size, streams = model_size(planned.config), is_streamed(values.get("fabric.memory_gib"))
    experts = tuple(tuple(range(layer.experts)) if layer.experts > 1 else () for layer in size.layers)
    found = Candidates(experts, ((),) * len(experts), "")
    scoring = {"depth": "end", "memory": values.at("memory"), "evaluate": "windows"}
    own = Values({**values.content, "scoring": scoring, "evaluations": None})
    tokens = sequences_of(values.inside("data"), device, assumed).tokens
    run = _Run(own, device, assumed, size, found, 1.0 if streams else routed_share(size, tokens))
    read, files, rows = run.read(), run.states(), sum(map(len, experts))
    load = load_bytes(run.size, run.width, device.count) if read is None else read.loaded
    generating = (Phase("completions of the parent", run.data.generating),) if run.data.generating else ()
    held = run.held() | (run.scoring() if read is None else dict(read.parts))
    return Footprint(
        "KL at the end without each expert",
        (Phase("load", load), *generating, Phase("experts", held)),
        host=run.kept() | {"sequences that are run": 0.0 if streams else float(rows * run.data.count / device.count)},
        disk={"scores": float(rows * (8 + FINISHED_BYTES))} | files.disk,
        network=run.network(),
        traffic=files.traffic,
        works=run.works(planned.config),
        knobs=run.knobs(),
        notes=(planned.assumed, run.data.assumed),
        refusals=(*refusals(read), *filter(None, (files.refusal,))),
    )


def routed_share(size: ModelSize, tokens: float) -> float:
    """Return the share of sequences with a token that is routed to one expert, were all experts equally likely.

    Args:
        size: the parent.
        tokens: tokens of a sequence.
    """
    experts = max(layer.experts for layer in size.layers)
    return float(1 - max(0.0, 1 - size.top_k / experts) ** tokens)


class _Run:
    """The numbers of a run, read from its recipe."""

    def __init__(
        self, values: Values, device: Device, assumed: Assumed, size: ModelSize, found: Candidates, share: float = 1.0
    ) -> None:
        self.values, self.device, self.assumed, self.size = values, device, assumed, size
        self.precision = {"32-true": "float32"}.get(str(values.at("fabric.precision")), "bfloat16")
        self.width = BYTES[self.precision]
        self.processes = 1 if values.at("fabric.strategy") == "replicated" else device.count
        self.data: Sequences = sequences_of(values.inside("data"), device, assumed)
        self.found, self.share = found, share  # candidates, and the share of the sequences that each is run on
        self.own_tokens = self.data.count * self.data.tokens / device.count
        self.streamed = is_streamed(values.get("fabric.memory_gib"))
        self.local = values.at("scoring.depth") == "layer"
        memory = values.inside("scoring.memory")
        self.hidden_limit, self.log_probs_limit = (memory.number(key) * GIB for key in ("hidden_gib", "log_probs_gib"))
        logits = int(memory.get("chunk_logits") or (2**19 if device.kind == "cpu" else 2**26))
        self.chunk = max(FEWEST_TOKENS, logits // size.vocab)

    def read(self) -> Streamed | None:
        """Return what a parent that is read layer by layer holds; None for one in memory."""
        if not self.streamed:
            return None
        tokens, chunk = self.data.batch_tokens, self.chunk
        extra = error_bytes(tokens, self.size.hidden) if self.local else metric_bytes(chunk, self.size.vocab)
        computing = layer_bytes(self.size.config, tokens, self.data.tokens, self.width) + extra
        budget = self.values.number("fabric.memory_gib")
        return streamed(self.size, self.width, self.device, budget, computing, head=not self.local)

    def held(self) -> dict[str, float]:
        parts = {} if self.streamed else frozen_states(self.size, self.width, self.processes)
        if self.processes > 1 and not self.streamed:
            parts["embedding and head, whole"] = float(self.size.ends * self.width)
            parts |= frozen_gathered(self.size, self.width, self.processes, root=False)
        return parts | (self.kept() if self.device.kind == "cpu" else {})

    def entering(self) -> float:
        return self.own_tokens * self.size.hidden * self.width

    def kept(self) -> dict[str, float]:
        if self.streamed or self.local:
            return {"calibration sequences": 17.0 * self.own_tokens}
        log_probs = self.own_tokens * self.size.vocab * 4
        parts = {"final states": self.entering(), "calibration sequences": 17.0 * self.own_tokens}
        if self.entering() <= self.hidden_limit:
            parts["states entering a layer"] = self.entering()
        if log_probs <= self.log_probs_limit:
            parts["log-probabilities of the parent"] = log_probs
        return parts

    def states(self) -> StreamedScoring:
        """Return the files of hidden states, and what is read from and written to disk."""
        how = self.size, self.width, self.own_tokens, self.device.count, self.found
        if self.streamed or self.local:
            limit = self.values.inside("scoring.memory").number("disk_gib")
            made = layer_scoring(*how) if self.local else scoring_to_the_end(*how, limit)
            return made if self.streamed else StreamedScoring(made.disk, {})
        too_large = self.entering() > self.hidden_limit
        disk = {"states entering a layer": self.entering() * self.device.count} if too_large else {}
        return StreamedScoring(disk, {})

    def scoring(self) -> dict[str, float]:
        layer = forward_bytes(self.size, self.data.batch_tokens, self.precision)
        scored = int(min(self.chunk, self.data.batch_tokens))
        metrics = 0.0 if self.local else float(metric_bytes(scored, self.size.vocab))
        states = 3 * stream_bytes(self.size, self.data.batch_tokens, self.precision)
        return {"activations of one layer": layer} if layer > metrics + states else {
            "metrics of a chunk": metrics, "states of a batch": states}  # fmt: skip

    def evaluation(self, evaluation: Values) -> dict[str, float]:
        settings, size = evaluation.inside("init_args"), self.size
        rows, new = settings.whole("batch_size", least=1), settings.whole("sampling.max_new_tokens")
        prompt = int(settings.get("problems.context_tokens") or self.assumed.prompt_tokens)
        if (engine := self.engine(settings)) is not None:  # the parent is in memory no more
            return engine_bytes(size, engine, self.device, prompt, new, self.problems(settings))
        gathered = self.held()
        if self.processes > 1 and self.values.at("fabric.unshard_evaluations"):
            gathered |= {"weights, gathered whole": float(size.parameters * self.width)}
        if settings.at("grading.mode") == "teacher_forced":
            tokens = rows * (prompt + SHORT_ANSWER)
            logits = rows * SHORT_ANSWER * size.vocab * (self.width + 4.0)
            return gathered | {"activations of one layer": forward_bytes(size, tokens, self.precision),
                               "logits of the answers": logits}  # fmt: skip
        return gathered | decoding_bytes(size, rows, prompt, new, self.width, eager=False)

    @staticmethod
    def engine(settings: Values) -> Values | None:
        """Return the engine of an evaluation; None: the parent in memory."""
        given = settings.get("engine")
        return None if given is None else Values(asdict(EngineSettings()) | given, settings.key("engine"))

    @staticmethod
    def problems(settings: Values) -> int:
        """Return how many problems an evaluation has."""
        return settings.whole("problems.problems_per_effort") * len(settings.at("problems.efforts"))

    def candidate_folder(self) -> dict[str, float]:
        """Return what the folder takes that the engine of an evaluation reads."""
        engines = [content["init_args"].get("engine") for content in self.values.get("evaluations") or ()]
        return {"a candidate's folder": stored_bytes(self.size)} if any(engines) else {}

    @property
    def layers_run(self) -> float:
        """Layers that all candidates run through, over those of one forward pass."""
        total = len(self.size.layers)
        halves = [len(e) + len(w) for e, w in zip(self.found.experts, self.found.windows, strict=True)]
        if self.local:
            return 1 + sum(halves) / total
        return self.share * sum(count * (total - layer) for layer, count in enumerate(halves)) / total + 2

    def network(self) -> dict[str, float]:
        if self.processes == 1 or self.streamed:
            return {}
        share = (self.processes - 1) / self.processes * self.size.parameters * self.width
        batches = self.data.count / self.data.batch_size / self.device.count
        return {"gathered layers": batches * self.layers_run * share}

    def works(self, config: object) -> tuple[Work, ...]:
        dtype = "float32" if self.precision == "float32" else "bfloat16"
        count, tokens = self.data.count, self.data.tokens
        work = Work(
            "candidates", self.size.config, count, tokens, self.layers_run, 0 if self.local else tokens, dtype=dtype
        )
        works = [work]
        windows = sum(map(len, self.found.windows)) + 1
        rows = windows if self.values.at("scoring.evaluate") == "windows" else self.found.rows + 1
        for number, content in enumerate(self.values.get("evaluations") or ()):
            settings = Values(content["init_args"])
            prompt = int(settings.get("problems.context_tokens") or self.assumed.prompt_tokens)
            forced = settings.at("grading.mode") == "teacher_forced"
            engine = self.engine(settings)
            by = (
                ("transformers", 1)
                if engine is None
                else (engine_name(engine, self.device), engine.whole("tensor_parallel"))
            )
            decoding = Decoding(settings.whole("sampling.max_new_tokens"), settings.whole("batch_size", least=1), *by)
            works.append(
                replace(
                    work,
                    name="evaluations" if number == 0 else f"evaluations {number + 1}",
                    sequences=rows * self.problems(settings),
                    read_tokens=prompt,
                    passes=1,
                    head_tokens=0,
                    decoding=None if forced else decoding,
                )
            )
        return tuple(works)

    def knobs(self) -> tuple[Knob, ...]:
        rows = self.data.batch_size
        found = [Knob("data.init_args.batch_size", rows, smaller(rows), "batches of {} sequences")]
        for number, content in enumerate(self.values.get("evaluations") or ()):
            now = int(content["init_args"]["batch_size"])
            key = f"evaluations.{number}.init_args.batch_size"
            found.append(Knob(key, now, smaller(now), "evaluations of {} rows together"))
        if self.processes > 1 and self.values.at("fabric.unshard_evaluations"):
            found.append(Knob("fabric.unshard_evaluations", True, [False], "weights gathered whole in evaluations: {}"))
        return tuple(found)
