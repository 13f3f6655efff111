"""Long documents of the tiny world: conversations about one table, the table in the first of them alone.

    python scripts/long_documents.py [--folder runs/long_documents] [--tokens 32768] [--documents 6] [--seed 1]
    python scripts/long_documents.py --prompt 1024 --tokens 1536 --documents 640    the first prompt is that long

The form of the last lessons of the tiny parent (`lit_puzzle.tiny.lessons.supervised`), which ended after 192 tokens, at
any length; families take turns, targets are the assistant's tokens. Whatever a question needs stands at the beginning
of the document, or in an earlier analysis. Writes a folder of documents for `recipes/text_distance.yaml`.
"""

import argparse
import random
from pathlib import Path

from lit_puzzle.data.document_files import Document, write_documents
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.tiny.lessons import IGNORED, supervised
from lit_puzzle.tiny.world import Chains, Counting, Sorting

PARENT = PACKAGE / "assets" / "tiny_parent"
FAMILIES = (Chains(), Sorting(), Counting())
EFFORTS = {"low": 1.0, "medium": 1.0, "high": 1.0}


def documents(count: int, tokens: int, seed: int, prompt: int | None) -> list[Document]:
    """Return documents of almost `tokens` tokens, the table alone or in a first prompt of `prompt` tokens."""
    tokenizer, found = load_tokenizer(PARENT), []
    for number in range(count):
        family = FAMILIES[number % len(FAMILIES)]
        rng = random.Random(f"long documents {seed} {number}")
        ids, labels = supervised(tokenizer, family, rng, tokens, EFFORTS, tokens // 20, prompt)
        if all(label == IGNORED for label in labels):
            raise SystemExit(f"--tokens {tokens} has no room for a prompt of {prompt} tokens and one answer")
        found.append(Document(ids, [int(label != IGNORED) for label in labels], family.name, "none"))
    return found


def positive(text: str) -> int:
    """Return a whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/long_documents"))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--prompt", type=positive, help="tokens of the first prompt; default: its table alone")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    made = documents(arguments.documents, arguments.tokens, arguments.seed, arguments.prompt)
    record = write_documents(arguments.folder, made, PARENT)
    print(f"{record['documents']} documents, {record['tokens']} tokens, {record['targets']} targets")


if __name__ == "__main__":
    main()
