"""What distillation refuses before it starts: parents and children that do not speak the same tokens."""

import json
import shutil

import pytest
from helpers.distillation_runs import Models, make_models

from lit_puzzle.data.batch_validation import check_pair, check_same_tokens
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.spec import BlockSpec, Plan


@pytest.fixture
def models(tmp_path, tiny_config) -> Models:
    return make_models(tmp_path, tiny_config)


def test_a_child_of_the_parent_passes(models):
    check_same_tokens(models.parent, models.child)


def test_another_size_of_vocabulary(models):
    config = json.loads((models.child / "config.json").read_text())
    (models.child / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    with pytest.raises(ValueError, match=r"128 tokens, the child .* has 256"):
        check_same_tokens(models.parent, models.child)


def test_another_tokenizer_of_the_same_size(models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models.child, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"The token .* has the id \d+ in the parent"):
        check_same_tokens(models.parent, other)


def test_a_child_of_another_parent(models):
    check_pair(models.parent, models.child)
    plan = Plan(fingerprint(models.parent), 8, (BlockSpec((0, 1), None),))
    (models.child / "plan.json").write_text(json.dumps(plan.to_json()))
    check_pair(models.parent, models.child)
    (models.child / "plan.json").write_text(json.dumps(plan.to_json() | {"parent_fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match=r"plan\.json is of the parent 0{64}, but .* is [0-9a-f]{64}\."):
        check_pair(models.parent, models.child)
