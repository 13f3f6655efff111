"""Tokenizers and chat templates."""

from faults.case import Case, Right, refused
from faults.cases.checkpoints import READERS
from faults.damage import Damage, cut, edit, remove, write

TEMPLATE = "child/chat_template.jinja"
ASKING = ("evaluate", "generate", "rl_recover")


def template(name: str, text: str, *words: str, stage: str = "evaluate") -> Case:
    """Return a case of a refused chat template."""
    damage = write(f"{READERS[stage]}/chat_template.jinja", text)
    return Case(
        f"template: {name}: {stage}", "prompts", stage, damage, refused(*(words or ("chat_template|chat template",)))
    )


def tokenizer(name: str, damage: Damage, *words: str, stage: str = "evaluate") -> Case:
    """Return a case of a refused tokenizer."""
    return Case(f"tokenizer: {name}: {stage}", "prompts", stage, damage, refused(*words))


ENDLESS = "".join("{% for " + letter + " in range(99999) %}" for letter in "abc") + "{% endfor %}" * 3
MESSAGES = "{{ reasoning_effort }}{%- for m in messages -%}{{ m.content }}{%- endfor -%}"
CLOCK = "{{- '<|start|>system<|message|>' ~ strftime_now('%d') -}}"
CASES = [
    *(template("does not compile", "{% if %}", stage=stage) for stage in ASKING),
    *(template("endless", ENDLESS, stage=stage) for stage in ASKING),
    *(template("unknown name", "{{ messages.nothing.at.all }}", stage=stage) for stage in ("evaluate", "generate")),
    *(template("unknown filter", "{{ messages | no_such_filter }}", stage=stage) for stage in ("evaluate", "generate")),
    template("empty", "", stage="generate"),
    template("never shows the prompt", "<|start|>assistant", stage="generate"),
    template("never shows the prompt", "<|start|>assistant", stage="rl_recover"),
    template("a text of gigabytes", "{{ 'x' * 9999999999 }}", stage="generate"),
    template("endless recursion", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", stage="generate"),
    template("divides by zero", "{{ 1 / 0 }}", stage="generate"),
    template("reaches for classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}", stage="generate"),
    template("reaches for classes by attr", "{{ ''|attr('__class__') }}", stage="evaluate"),
    template("imports", "{{ cycler.__init__.__globals__.os.system('touch escaped') }}", stage="generate"),
    template("includes a file", "{% include 'config.json' %}", stage="generate"),
    template("raises", "{{ raise_exception('no') }}", stage="generate"),
    Case(
        "template: Latin-1 bytes: generate",
        "prompts",
        "generate",
        write("parent/chat_template.jinja", b"{{ '\xe9' }}"),
        refused("chat_template"),
    ),
    Case(
        "template: missing: evaluate", "prompts", "evaluate", remove(TEMPLATE), refused("chat_template|chat template")
    ),
    Case(
        "template: missing: generate",
        "prompts",
        "generate",
        remove("parent/chat_template.jinja"),
        refused("chat_template|chat template"),
    ),
    Case(
        "template: missing: rl_recover",
        "prompts",
        "rl_recover",
        remove(TEMPLATE),
        refused("chat_template|chat template"),
    ),
    Case(
        "template: in tokenizer_config.json",
        "prompts",
        "evaluate",
        edit("child/tokenizer_config.json", {"chat_template": "never used, as the file stands"}),
        (Right(), refused("chat_template")),
    ),
    Case(
        "template: reads the clock, two runs agree",
        "prompts",
        "generate",
        write("parent/chat_template.jinja", CLOCK + MESSAGES),
        Right(
            damage=write("parent/chat_template.jinja", CLOCK + MESSAGES),
            only=("documents/*.parquet",),
        ),
    ),
    *(tokenizer("missing", remove(f"{READERS[stage]}/tokenizer.json"), "tokenizer", stage=stage) for stage in ASKING),
    *(
        tokenizer("cut", cut(f"{READERS[stage]}/tokenizer.json", 0.5), "tokenizer.json", stage=stage)
        for stage in (*ASKING, "export")
    ),
    *(
        tokenizer("empty", write(f"{READERS[stage]}/tokenizer.json", ""), "tokenizer.json", stage=stage)
        for stage in ("generate", "calibrate_kv")
    ),
    tokenizer("a list", write("child/tokenizer.json", "[]"), "tokenizer.json"),
    tokenizer("nested 100,000 deep", write("child/tokenizer.json", "[" * 100_000), "tokenizer.json"),
    tokenizer("config is cut", cut("child/tokenizer_config.json", 0.5), "tokenizer_config.json"),
    tokenizer("config is a list", write("child/tokenizer_config.json", "[]"), "tokenizer_config.json"),
    tokenizer(
        "class that does not exist",
        edit(
            "child/tokenizer_config.json",
            {"tokenizer_class": "NoSuchTokenizer", "auto_map": {"AutoTokenizer": ["x--y.Z", None]}},
        ),
        "tokenizer",
        stage="export",
    ),
    Case(
        "tokenizer: an end of text that the embedding does not have: evaluate",
        "prompts",
        "evaluate",
        edit("child/tokenizer.json", {"added_tokens.0.id": 100_000}),
        (Right(), refused("tokenizer.json|token")),
    ),
    tokenizer("unknown model type", edit("child/tokenizer.json", {"model.type": "NoSuchModel"}), "tokenizer.json"),
    tokenizer(
        "wrong type of the vocabulary",
        edit("parent/tokenizer.json", {"model.vocab": 7}),
        "tokenizer.json",
        stage="generate",
    ),
]
