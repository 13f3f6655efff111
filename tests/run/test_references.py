"""References to environment variables: resolved for the run, references on disk."""

import pytest

from lit_puzzle.run.references import References


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret-value")
    monkeypatch.setenv("COUNT", "8")
    monkeypatch.delenv("ABSENT", raising=False)


def test_values_become_references_again_wherever_they_were_copied() -> None:
    references = References([{"logger": {"api_key": "${oc.env:TOKEN}"}}, {"count": "${oc.env:COUNT}"}])
    resolved = {
        "logger": {"api_key": "s3cret-value", "copied": ["s3cret-value", "Bearer s3cret-value"]},
        "count": 8,
        "other": 8,
        "text": "8 tokens",
    }
    assert references.restore(resolved) == {
        "logger": {"api_key": "${oc.env:TOKEN}", "copied": ["${oc.env:TOKEN}", "Bearer ${oc.env:TOKEN}"]},
        "count": "${oc.env:COUNT}",
        "other": 8,  # a short value may be anything
        "text": "8 tokens",
    }


def test_a_reference_in_a_text_and_a_default() -> None:
    references = References([{"url": "https://host/${oc.env:TOKEN}/x", "name": "${oc.env:ABSENT, a default}"}])
    resolved = {"url": "https://host/s3cret-value/x", "name": "a default"}
    assert references.restore(resolved) == {
        "url": "https://host/${oc.env:TOKEN}/x",
        "name": "${oc.env:ABSENT, a default}",
    }


def test_recipes_without_references_have_none() -> None:
    references = References([{"a": "${trainer.max_steps}", "b": 3}])
    assert not references and references.restore({"a": 3}) == {"a": 3}
