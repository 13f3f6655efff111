"""Token ids: equal hashes exactly where ids mean the same, and what a checkpoint folder says of its own."""

from transformers import GptOssForCausalLM, PreTrainedTokenizerFast

from lit_puzzle.data.provenance import Provenance, tokenizer_hash
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.tiny.tokenizer import build_tokenizer


def test_the_hash_of_a_tokenizer_is_that_of_its_ids(tmp_path):
    first, again, other = build_tokenizer(), build_tokenizer(), build_tokenizer()
    again.save_pretrained(tmp_path)
    other.add_tokens(["one more"])
    read = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer_hash(first) == tokenizer_hash(read) != tokenizer_hash(other)


def test_provenance_is_read_from_the_checkpoints_folder(tiny_config, tmp_path):
    GptOssForCausalLM(tiny_config(vocab_size=136, max_position_embeddings=64)).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    assert Provenance.of(tmp_path) == Provenance(fingerprint(tmp_path), tokenizer_hash(build_tokenizer()), 136, 64)
